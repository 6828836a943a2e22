"""Fixtures: tiny random models under real tokenizers, the scripts in-process and as commands, and small data."""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import processes
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
MIRROR = ROOT.parent / "shared" / "hub"
# The suite must pass offline: a test that needs a hub starts its own.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")
# One thread per process, here and in every command: two workers share the cores, and tiny models gain nothing.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

# A test that runs a script, here or as a command, is end to end; `-m "not e2e"` leaves the fast ones. It is recognised
# by its fixtures, or by the names of functions that it calls.
E2E_FIXTURES = {"call", "trained", "inputs", "unbroken", "done", "recipe"}
E2E_FUNCTIONS = {"command", "subprocess", "run_script", "kill_when", "two_processes", "shell", "iteration"}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what is too long for every commit")
    parser.addoption("--cpu-times", metavar="FILE", help="write each test's CPU seconds, commands included, as JSON")


def pytest_collection_modifyitems(config, items):
    for item in items:
        calls = item.function.__code__.co_names
        if E2E_FIXTURES & set(item.fixturenames) or E2E_FUNCTIONS & set(calls) or "end_to_end" in item.path.parts:
            item.add_marker(pytest.mark.e2e)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def pytest_collection_finish():
    """Keep the imported libraries out of the garbage collections that every trainer starts: each would take 0.5 s."""
    gc.collect()
    gc.freeze()


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children: unlike wall time, equal on a busy machine."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return processes.forked_cpu_seconds + sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.fixture(autouse=True, scope="session")
def checked_pictures():
    """Check the layout of every picture that the project draws in a test's process (tests/pictures.py)."""
    import pictures

    from utils import plots

    plots.before_close.append(pictures.check)
    yield
    plots.before_close.remove(pictures.check)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    item.stash[STARTED] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.user_properties.append(("cpu_seconds", round(cpu_seconds() - item.stash[STARTED], 2)))
    return report


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        CPU_TIMES[report.nodeid] = dict(report.user_properties)["cpu_seconds"]


def pytest_sessionfinish(session):
    path = session.config.getoption("--cpu-times")
    if path and not hasattr(session.config, "workerinput"):  # the controller has the reports of all workers
        times = dict(sorted(CPU_TIMES.items(), key=lambda item: -item[1]))
        Path(path).write_text(json.dumps({"total": round(sum(times.values()), 1), "tests": times}, indent=1) + "\n")


STARTED, CPU_TIMES = pytest.StashKey[float](), {}


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """Folder `name`, made by the first pytest-xdist worker that needs it and read by all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # getbasetemp() is the worker's own folder below the session's
    folder = root / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.made").exists():
            folder.mkdir()
            make(folder)
            Path(f"{folder}.made").touch()
    return folder


VOCABULARY = 4096


def small_tokenizer():
    """SmolLM2's tokenizer with its first 4096 tokens, so that logits of tiny models cost a twelfth.

    Template, special tokens and byte-level BPE are the real ones: ids follow the order of the merges, so the first
    4096 form a separate tokenizer.
    """
    from tokenizers import Tokenizer

    from preflab.models.loading import BUILTIN, load_tokenizer

    tokenizer = load_tokenizer(BUILTIN)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


@pytest.fixture(scope="session")
def smol_tokenizer():
    """SmolLM2's tokenizer, shortened: its pad is its end-of-turn, its BOS opens every turn."""
    return small_tokenizer()


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def gemma_like_tokenizer():
    """The same vocabulary with Gemma's special tokens and template: a BOS, its own pad, no system role."""
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens(
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        }
    )
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def save_tiny(folder: Path, tokenizer, kind: str = "Llama", **extra) -> Path:
    """A tiny random model of the given architecture, saved with its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **{**size, **extra})
    for key in ("bos", "eos", "pad"):
        setattr(config, f"{key}_token_id", getattr(tokenizer, f"{key}_token_id"))
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, smol_tokenizer):
    """Folder of a tiny Llama under SmolLM2's tokenizer."""
    return made_once(tmp_path_factory, "tiny-llama", lambda folder: save_tiny(folder, smol_tokenizer))


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory, gemma_like_tokenizer):
    """Folder of a tiny Gemma 2: sliding window, attention and final-logit softcaps, no system role."""
    return made_once(
        tmp_path_factory,
        "tiny-gemma2",
        lambda folder: save_tiny(folder, gemma_like_tokenizer, "Gemma2", sliding_window=16),
    )


def make_pairs(count: int, offset: int = 0) -> list[dict]:
    """Short UltraFeedback-style rows with distinct prompts and responses of different lengths."""
    words = "river stone cloud paper lamp garden winter music".split()
    rows = []
    for i in range(offset, offset + count):
        prompt = f"Tell me about {words[i % 8]} number {i}."
        turns = [{"role": "user", "content": prompt}]
        chosen = f"The {words[i % 8]} is number {i}. " + "It is quite plain. " * (i % 4)
        rejected = f"I like {words[(i + 3) % 8]}. " * (1 + (i + 1) % 3)
        rows.append(
            {
                "prompt": prompt,
                "prompt_id": str(i),
                "chosen": [*turns, {"role": "assistant", "content": chosen.strip()}],
                "rejected": [*turns, {"role": "assistant", "content": rejected.strip()}],
                "score_chosen": 8.0,
                "score_rejected": 3.0 + i % 3,
            }
        )
    return rows


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prefs(tmp_path_factory):
    """A folder with train.jsonl (24 pairs) and test.jsonl (8 pairs)."""

    def make(folder):
        write_jsonl(folder / "train.jsonl", make_pairs(24))
        write_jsonl(folder / "test.jsonl", make_pairs(8, 100))

    return made_once(tmp_path_factory, "prefs", make)


def lora_args(extra: tuple) -> list[str]:
    """A small LoRA; nothing where `extra` has `--use_peft false`, since the keys of LoRA are then refused."""
    full = ("--use_peft", "false") in zip(extra, extra[1:], strict=False)
    return [] if full else ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]


def train_args(model, data, folder: Path, *extra) -> list[str]:
    """Arguments of a small, fast run on CPU in float32: LoRA, or all weights with `--use_peft false` in `extra`."""
    return [
        *lora_args(extra),
        *("--model_name_or_path", str(model), "--dataset_name", str(data)),
        *("--learning_rate", "1e-2", "--max_length", "128"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "4"),
        *("--gradient_checkpointing", "false", "--sample_prompts", "0", "--disable_tqdm", "true"),
        # Tiny models train at rates, and on rows, that the preflight refuses for real ones.
        "--allow_fatal",
        *("--output_dir", str(folder / "ck"), "--eval_out", str(folder / "out"), "--run_name", "r", *map(str, extra)),
    ]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script in this process: call("eval_win_rate", *arguments) gives (exit code, stdout, stderr)."""
    import importlib

    from utils.errors import run

    def calling(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        code = 0
        try:
            run(importlib.import_module(script).main)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return calling


@pytest.fixture
def train(call):
    """Run dpo_train_human_preference.py in this process; returns (exit code, stdout, stderr)."""
    return lambda *args: call("dpo_train_human_preference", *args)


@pytest.fixture(scope="session")
def trained(tiny, prefs, tmp_path_factory):
    """Folder of a finished tiny LoRA run, `ck/r` and `out/r`, evaluated every 2 steps in batches of 3 on 8 pairs."""
    extra = ("--eval_strategy", "steps", "--eval_steps", "2", "--per_device_eval_batch_size", "3", "--save_steps", "2")

    def make(folder):
        done = processes.run_script("dpo_train_human_preference.py", *train_args(tiny, prefs, folder, *extra))
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="session")
def trained_reward(tiny, prefs, tmp_path_factory):
    """Folder of a finished tiny LoRA reward model, `ck/r` and `out/r`, evaluated after each epoch on 8 pairs."""

    def make(folder):
        arguments = train_args(tiny, prefs, folder, "--eval_strategy", "epoch")
        done = processes.run_script("train_reward_model.py", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once(tmp_path_factory, "trained-reward", make)


@pytest.fixture
def root(tmp_path):
    """A folder with one run of docs/example_run, `ck/quickstart` and `out/quickstart`."""
    from example_runs import write_run

    write_run(tmp_path, "quickstart")
    return tmp_path


@pytest.fixture
def report(call, root):
    """report(*flags) runs report.py on `root` and returns (stdout, HTML, Markdown)."""

    def reporting(*flags) -> tuple[str, str, str]:
        code, out, err = call("report", "--checkpoints", root / "ck", "--eval_out", root / "out", *flags)
        assert code == 0, err
        files = (root / "out" / f"report.{kind}" for kind in ("html", "md"))
        return out, *(file.read_text(encoding="utf-8") if file.exists() else "" for file in files)

    return reporting


@pytest.fixture
def endpoint(monkeypatch):
    """Start a stand-in for a server with OpenAI's chat completions (tests/chat_servers.py)."""
    from chat_servers import chat_servers

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with chat_servers() as start:
        yield start


@pytest.fixture(scope="session")
def inputs(tiny, trained, prefs, tmp_path_factory):
    """What the small calls of all stages read (tests/stages.py)."""
    from helpers import instructions
    from stages import Inputs

    def make(folder):
        write_jsonl(folder / "conversations/train.jsonl", instructions(32))
        write_jsonl(folder / "prompts.jsonl", [{"instruction": row["prompt"]} for row in make_pairs(9)])
        words = "one two three four five six seven eight".split()
        reference = [{"instruction": f"Say the word {w}.", "output": f"{w}! " * 3, "generator": "ref"} for w in words]
        write_jsonl(folder / "reference.jsonl", [{**row, "dataset": "mine"} for row in reference])

    folder = made_once(tmp_path_factory, "inputs", make)
    files = (folder / "conversations", folder / "prompts.jsonl", folder / "reference.jsonl")
    return Inputs(tiny, trained, prefs, *files)


@pytest.fixture
def shipped_config(tmp_path):
    """A config of configs/accelerate, changed only to run on two CPU processes."""

    import yaml

    def make(name: str) -> Path:
        config = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**config, "num_processes": 2, "use_cpu": True}))
        return path

    return make


NO_BROWSER = "no browser: pip install -r requirements/browser-tests.txt; Debian: apt-get install chromium"


@pytest.fixture(scope="session")
def browser():
    """Chromium: $CHROMIUM, else one on the path, else playwright's own."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.skip(NO_BROWSER)
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error:
            if path:
                raise
            pytest.skip(NO_BROWSER)
        yield chromium
        chromium.close()


@contextmanager
def interrupted_at(step: int):
    """Ctrl-C comes at this step of whatever is trained meanwhile."""
    from preflab.training.resumable import RowLog

    usual = RowLog.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt
        return usual(self, args, state, control, logs, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowLog, "on_log", on_log)
        yield


def eval_args(folder: Path, out: Path, *extra) -> list[str]:
    """Arguments that evaluate the run of `trained` into `out`."""
    run = ("--run_name", "r", "--checkpoints", folder / "ck", "--eval_out", out)
    return [*map(str, run), *map(str, extra)]


def command(*args, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Run a command of the repository from its root in a fresh interpreter, as a user would."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=600,
        **kwargs,
    )


def assert_one_line(err: str, *words: str) -> None:
    """The error is one `error: ...` line that holds all `words`, and no traceback came with it."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]
