"""vLLM's process against a stand-in (tests/fake_vllm.py), and its settings; end_to_end/test_vllm.py runs vLLM."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import pytest
from conftest import ROOT, make_pairs, write_jsonl
from helpers import pair_args

from preflab.data.chat_template import ChatRenderer
from preflab.data.prompts import Prompt
from preflab.doctor.checks import check_vllm
from preflab.judging.battles import both_orders
from preflab.judging.judge_prompt import Item, JudgePrompt
from preflab.judging.judges import make_judge
from preflab.judging.panel import close, judge_with_members
from preflab.models import vllm_engine, vllm_environment
from preflab.models.sampling import prompt_seed
from preflab.models.vllm_engine import Engine, cause_of, choose_engine, devices_of_process, lora_rank, memory_share
from preflab.models.vllm_environment import answer_settings, environment, find_python, parse_args, require_python
from utils.errors import UserError


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The stand-in in place of vLLM; the fixture is a function that returns its recorded calls."""
    monkeypatch.setenv("VLLM_PYTHON", str(fake_vllm.make(tmp_path / "fake")))
    return lambda: [json.loads(line) for line in (tmp_path / "fake" / "calls.jsonl").read_text().splitlines()]


def running(pids: list[int]) -> list[int]:
    """Those of the processes that run; a zombie does not."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            pass
    return [pid for pid, state in states.items() if state != "Z"]


def wait_until_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while running(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running(pids) == []


MESSAGES = [[{"role": "user", "content": text}] for text in ("A colour?", "A fruit?")]


def test_prompts_stops_seeds_and_answers(fake, smol_tokenizer, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 12, "rank_pattern": {"q_proj": 40}}')
    engine = Engine("some/model", "bfloat16", str(tmp_path), ["max_num_seqs=4"], revision="main")
    answers = list(vllm_engine.generate(engine, smol_tokenizer, MESSAGES, 8, 0.7, 0.9, 3, batch_tokens=1))
    engine.close()
    loading, adapter, check, call = fake()
    chat = ChatRenderer(smol_tokenizer)
    ids = chat.ids([chat.prompt_text(messages) for messages in MESSAGES])
    assert loading["arguments"] == {
        "model": "some/model", "dtype": "bfloat16", "max_model_len": -1, "skip_tokenizer_init": True,
        "enable_lora": True, "max_lora_rank": 64, "max_num_seqs": 4, "revision": "main",
    }  # fmt: skip
    assert adapter["adapter"] == [1, str(tmp_path)] and call["adapter"] == str(tmp_path)
    # One token of the first prompt, to see that the model's outputs are numbers.
    assert check["prompts"] == [{"prompt_token_ids": ids[0]}] and check["settings"][0]["max_tokens"] == 1
    assert call["prompts"] == [{"prompt_token_ids": row} for row in ids]
    for messages, settings in zip(MESSAGES, call["settings"], strict=True):
        assert settings == {
            "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.0,
            "seed": prompt_seed(3, messages) % 2**31, "stop_token_ids": [smol_tokenizer.eos_token_id],
            "detokenize": False,
        }  # fmt: skip
    # In the order in which they end, decoded, without the end token.
    assert [answer["index"] for answer in answers] == [1, 0]
    assert answers[1]["text"] == smol_tokenizer.decode(ids[0][-5:-2], skip_special_tokens=True).strip()
    assert (answers[1]["tokens"], answers[1]["finish_reason"]) == (3, "stop")


def test_answers_leave_room_in_the_context(fake, smol_tokenizer):
    engine = Engine("m", "float32")
    (answer,) = vllm_engine.generate(engine, smol_tokenizer, MESSAGES[:1], 2)
    assert (answer["tokens"], answer["finish_reason"]) == (2, "length")
    list(vllm_engine.generate(engine, smol_tokenizer, MESSAGES[:1], 60))
    (prompt,), (settings,) = fake()[-1]["prompts"], fake()[-1]["settings"]
    assert settings["max_tokens"] == 64 - len(prompt["prompt_token_ids"]) < 60
    long = [{"role": "user", "content": "word " * 50}]
    with pytest.raises(UserError, match="prompt 1 of 1 has .* m reads at most 64 .with vLLM"):
        list(vllm_engine.generate(engine, smol_tokenizer, [long], 2))


def test_labels_wherever_they_rank_and_nan(fake):
    engine = Engine("m", "float32")
    rows = dict(vllm_engine.label_logprobs(engine, [[1, 2], [3, 4]], {"A": 9, "B": 8}))
    assert rows == {0: {"A": -9.0, "B": -8.0}, 1: {"A": -9.0, "B": -8.0}}
    assert fake()[-1]["settings"][0]["logprob_token_ids"] == [8, 9]
    with pytest.raises(UserError, match="NaN"):
        list(vllm_engine.label_logprobs(engine, [[13, 2]], {"A": 9}))


def test_close_ends_every_process_and_frees_the_log(fake):
    engine = Engine("m", "float32")
    pids = fake()[0]["pids"]
    assert len(running(pids)) == 2 and engine.log.exists()
    engine.close()
    wait_until_ended(pids)
    assert not engine.log.exists()
    engine.close()
    with pytest.raises(UserError, match="closed"):
        list(engine.run([[1]], [{"max_tokens": 1}]))


def test_answers_left_unread_are_not_mixed_with_the_next(fake):
    engine = Engine("m", "float32")
    answers = engine.run([[1], [2]], [{"max_tokens": 1}] * 2)
    next(answers)
    answers.close()
    wait_until_ended(fake()[0]["pids"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_engine_ends_with_the_script(fake, number):
    def script(ready):
        engine = Engine("m", "float32")
        ready.send((engine.process.pid, engine.log))
        time.sleep(600)

    # Forked: a new interpreter would import torch for seconds.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=script, args=(sender,))
    process.start()
    assert receiver.poll(60)
    pids = fake()[0]["pids"]
    pid, log = receiver.recv()
    assert pid == pids[0] and len(running(pids)) == 2
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == -number
    wait_until_ended(pids)
    log.unlink()


def test_errors_are_one_line_with_the_log(fake):
    with pytest.raises(UserError, match=r"vLLM, m: TypeError: .*'unknown' \(its log: (.*)\)") as error:
        Engine("m", "float32", words=["unknown=1"])
    log = Path(str(error.value).rpartition("log: ")[2][:-1])
    assert "Traceback" in log.read_text()
    log.unlink()
    # A process that dies: the cause is in the log only.
    engine = Engine("m", "float32", words=["dies=true"])
    with pytest.raises(UserError, match="RuntimeError: cuda out of reach"):
        list(engine.run([[1, 2, 3, 4, 5]], [{"max_tokens": 1}]))
    engine.log.unlink()
    for call in fake():
        wait_until_ended(call.get("pids", []))


def test_cause_of_an_engine_that_failed(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "(EngineCore pid=2) ERROR 11-27 [core.py:9] ValueError: To serve at least one request, 4 GiB are needed\n"
        "(EngineCore pid=2) ERROR [x.py:1] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue\n"
    )
    reported = "RuntimeError: Engine core initialization failed. See root cause above."
    assert cause_of(log, reported) == "ValueError: To serve at least one request, 4 GiB are needed"
    assert cause_of(log, "ValueError: another") == "ValueError: another"
    log.write_text("")
    assert cause_of(log, "its process ended") == "its process ended"


def test_interpreter_is_chosen_or_found(fake, tmp_path, monkeypatch):
    assert find_python() == os.environ["VLLM_PYTHON"]
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    with pytest.raises(UserError, match="VLLM_PYTHON=.*no package vllm.*install_vllm.sh"):
        find_python()
    monkeypatch.setenv("VLLM_PYTHON", "no-python")
    with pytest.raises(UserError, match="VLLM_PYTHON=no-python: no such interpreter"):
        find_python()
    monkeypatch.delenv("VLLM_PYTHON")
    monkeypatch.setattr(vllm_environment, "FOLDER", tmp_path / "v")
    (tmp_path / "v").mkdir()
    # Without its stamp, an installation was interrupted.
    assert find_python() is None
    with pytest.raises(UserError, match="--engine vllm: vLLM is not installed; run bash install_vllm.sh"):
        choose_engine("vllm")
    stamp(tmp_path / "v", "cpu")
    assert find_python() == str(tmp_path / "v" / "bin" / "python") and choose_engine("vllm") == "vllm"
    # A link to a Python that was removed.
    (tmp_path / "v" / "bin" / "python").unlink()
    (tmp_path / "v" / "bin" / "python").symlink_to(tmp_path / "removed")
    with pytest.raises(UserError, match="--engine vllm: the Python .* is gone; delete that folder and run bash"):
        choose_engine("vllm")


def stamp(folder: Path, build: str, text: str = "") -> None:
    """Write what install_vllm.sh writes last (tests/end_to_end/test_shell.py compares both), or another text."""
    text = text or vllm_environment.REQUIREMENTS[build].read_text()
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "bin" / "python").touch()
    (folder / "requirements.stamp").write_text(f"{build} 3.11.7 (main)\n{text}")


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_outdated_environment_is_reported_once(build, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm_environment, "FOLDER", tmp_path / ".vllm")
    assert list(check_vllm()) == []
    stamp(tmp_path / ".vllm", build)
    vllm_environment.warn_if_outdated.cache_clear()
    assert require_python("x", "y") and capsys.readouterr().err == ""
    assert [finding.state for finding in check_vllm()] == ["ok"]
    stamp(tmp_path / ".vllm", build, "vllm==0.1\n")
    vllm_environment.warn_if_outdated.cache_clear()
    assert require_python("x", "y") and require_python("x", "y")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: .vllm is outdated") and line.endswith(f"bash install_vllm.sh --{build}")
    (finding,) = check_vllm()
    assert finding.state == "warning" and f"--{build}" in finding.text
    vllm_environment.warn_if_outdated.cache_clear()


def test_launcher_is_not_inherited(fake, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "PYTHONPATH"} & set(environment())
    assert environment()["VLLM_CPU_KVCACHE_SPACE"] == "3" and environment()["VLLM_NO_USAGE_STATS"] == "1"


def test_settings_of_the_command_line():
    words = ["tensor_parallel_size=2", "gpu-memory-utilization=0.5", "enforce_eager=true", "quantization=fp8"]
    assert parse_args(words) == {
        "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "enforce_eager": True, "quantization": "fp8"
    }  # fmt: skip
    # Speed and memory do not change an answer; other settings may.
    assert answer_settings([*words, "max_model_len=64"]) == {"max_model_len": 64, "quantization": "fp8"}
    assert parse_args(None) == answer_settings(None) == {}
    for word in ("x", "=1", "x=", "a b=1", "model=other", "tensor_parallel_size=0", "tensor_parallel_size=two", "x=[1"):
        with pytest.raises(UserError, match="--vllm_args"):
            parse_args([word])


def test_every_process_has_its_own_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices_of_process(2) == {} == memory_share(2)
    state = SimpleNamespace(local_process_index=1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(vllm_engine, "PartialState", lambda: state)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_of_process(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert devices_of_process(2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    state.local_process_index = 2
    with pytest.raises(UserError, match="tensor_parallel_size=2: .*GPUs 4 to 5, but 4 are visible"):
        devices_of_process(2)


def test_memory_share_is_what_is_free(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: ({0: 80, 1: 50}[device] * 10**9, 80 * 10**9))
    assert memory_share(1) == {"gpu_memory_utilization": 0.9}
    assert memory_share(2) == {"gpu_memory_utilization": 0.59}


def test_engine_of_each_kind_of_model(fake, monkeypatch):
    def models(**values):
        defaults = {"quantized": None, "autocast": None, "dtype": "float32", "comparison": SimpleNamespace(adapter="a")}
        return SimpleNamespace(**{**defaults, **values})

    # On a CPU, auto is transformers; vLLM takes adapters in float32.
    assert choose_engine("auto") == choose_engine("hf") == "hf" and choose_engine("vllm", models()) == "vllm"
    with pytest.raises(UserError, match="GGUF file runs with llama.cpp"):
        choose_engine("vllm", bases=[f"gguf:{ROOT / 'README.md'}"])
    with pytest.raises(UserError, match="--load_in_4bit false"):
        choose_engine("vllm", models(quantized={"load_in_4bit": True}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_engine("auto") == "vllm" and choose_engine("auto", models()) == "hf"
    assert choose_engine("auto", models(dtype="bfloat16")) == "vllm"
    with pytest.raises(UserError, match="--dtype bfloat16"):
        choose_engine("vllm", models())


@pytest.mark.parametrize(("r", "rank"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_smallest_rank_of_vllm(r, rank, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": r}))
    assert lora_rank(str(tmp_path)) == rank


def test_judge_reads_labels_by_question(fake, tiny, monkeypatch):
    """The stand-in ends the last question first; each verdict must reach its own question."""
    prompt = JudgePrompt.read(str(ROOT / "configs/judges/pairwise.yaml"))
    options = {"dtype": "float32", "batch_tokens": 64, "batch_size": None, "vllm_args": ["quantization=fp8"]}
    judge = make_judge(f"vllm:{tiny}", prompt, options)
    assert judge.identity()["vllm_args"] == {"quantization": "fp8"}
    assert "vllm_args" not in make_judge(f"vllm:{tiny}", prompt, {**options, "vllm_args": None}).identity()
    judge.model = SimpleNamespace(max_model_len=10**6)
    received = {}

    def logprobs(engine, prompts, labels):
        received["prompts"] = prompts
        first, second = labels
        for k in reversed(range(len(prompts))):
            yield k, {first: -0.1 if k else -9.0, second: -9.0 if k else -0.1}

    items = [Item(Prompt(MESSAGES[k], "row"), f"answer {k}", "other") for k in range(2)]
    monkeypatch.setattr(vllm_engine, "label_logprobs", logprobs)
    verdicts = dict(judge.judge(items))
    assert [verdicts[k].first for k in range(2)] == [0.0, 1.0] and len(received["prompts"]) == 2


def test_judges_of_a_panel_have_one_engine_at_a_time(fake, tiny, monkeypatch, tmp_path):
    """Each takes the GPU's memory. A single judge reads several batches with one engine."""
    opened, closed = [], []

    class OneEngine:
        max_model_len = 10**6

        def __init__(self, model, dtype, words):
            assert len(opened) == len(closed)
            opened.append(dtype)

        def close(self):
            closed.append(True)

    def logprobs(engine, prompts, labels):
        return ((k, dict.fromkeys(labels, -1.0)) for k in range(len(prompts)))

    monkeypatch.setattr(vllm_engine, "Engine", OneEngine)
    monkeypatch.setattr(vllm_engine, "label_logprobs", logprobs)
    prompt = JudgePrompt.read(str(ROOT / "configs/judges/pairwise.yaml"))
    judges = [make_judge(f"vllm:{tiny}", prompt, {"dtype": dtype}) for dtype in ("float32", "bfloat16")]
    answers = {name: [{"text": name}] * len(MESSAGES) for name in ("tuned", "base")}
    parts = [both_orders([Prompt(MESSAGES[k], "row")], answers, [("tuned", "base")]) for k in range(2)]
    settings = SimpleNamespace(eval_out=str(tmp_path), overwrite=False)
    members = judge_with_members(judges, *parts[0], settings)
    assert opened == ["float32", "bfloat16"] and len(closed) == 2 and all(member.cost["of"] == 2 for member in members)
    judge = make_judge(f"vllm:{tiny}", prompt, {"dtype": "float16"})
    for part in parts:
        judge_with_members([judge], *part, settings)
    assert opened[2:] == ["float16"] and len(closed) == 2
    close([judge])
    assert len(closed) == 3


def test_judge_without_vllm_fails_before_answers(tiny, monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm_environment, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"judge vllm:.*install_vllm.sh, or use hf:"):
        make_judge(f"vllm:{tiny}", str(ROOT / "configs/judges/pairwise.yaml"), {})


def test_pairs_from_the_other_environment(fake, call, tiny, tmp_path):
    """Sampled by vLLM's process, scored and paired here; the second call reads the cache and starts no engine."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"instruction": row["prompt"]} for row in make_pairs(5)])
    arguments = pair_args(tiny, prompts, tmp_path / "out", "--engine", "vllm", "--stage", "sample")
    for _ in range(2):
        code, _, err = call("generate_preference_pairs", *arguments)
        assert code == 0, err
    loading = [entry for entry in fake() if "arguments" in entry]
    assert len(loading) == 1 and loading[0]["arguments"]["model"] == str(tiny)
    wait_until_ended(loading[0]["pids"])
    rows = [json.loads(line) for line in (tmp_path / "out/p/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(len(row["answers"]) == 3 for row in rows)
    manifest = json.loads((tmp_path / "out/p/manifest.json").read_text())
    assert manifest["stages"]["sample"]["model"]["engine"] == "vllm"
