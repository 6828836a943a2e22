"""Models behind an OpenAI-compatible server answer in every stage that reads answers only."""

import base64
import json
import time
from types import SimpleNamespace

import httpx2
import pytest
from chat_servers import raw
from conftest import assert_one_line, eval_args
from helpers import alpaca_args, pair_args
from test_judges import OPTIONS, PAIRWISE, item_of

from preflab.data.prompts import Prompt
from preflab.evaluation.servers import model_and_url
from preflab.judging.answers import AnsweringModel, answer_all
from preflab.judging.chat_server import BoundedTransport
from preflab.judging.endpoint_answers import EndpointModel
from preflab.judging.judges import make_judge
from utils.artifacts import RowFile, read_json
from utils.errors import UserError
from utils.secrets_in_text import without_secrets

ARGS = SimpleNamespace(server_timeout=20.0, server_concurrency=4)


def conversation(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_server_answers_prompts(endpoint, tmp_path, smol_tokenizer):
    spec, requests = endpoint(lambda question, _: f"<think>hm</think>\n\nRe: {question}")
    server = EndpointModel(spec, "--models", ARGS)
    model = AnsweringModel("gpt", server.identity, smol_tokenizer, None, endpoint=server)
    args = SimpleNamespace(eval_out=str(tmp_path), overwrite=False, batch_tokens=1, batch_size=None)
    settings = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    prompts = [Prompt(conversation(f"q{i} " * (i + 1)), "here") for i in range(5)]
    answers = answer_all(model, prompts, settings, args)
    assert [a["text"] for a in answers] == [f"Re: {p.text}".strip() for p in prompts]
    assert [a["tokens"] for a in answers] == [len(smol_tokenizer(a["text"])["input_ids"]) for a in answers]
    assert {a["finish_reason"] for a in answers} == {"stop"}
    assert [requests[0][k] for k in ("max_tokens", "temperature", "top_p", "seed")] == [7, 0.5, 0.9, 3]
    # Neither the engine of the other models nor a second call asks again.
    assert answer_all(model, prompts, settings, args, "vllm") == answers and len(requests) == 5


def test_interrupted_answers_continue(endpoint, tmp_path, smol_tokenizer):
    """Answers that came before a failure are not requested again."""
    down = [True]
    spec, requests = endpoint(lambda question, _: 401 if down[0] and "q3" in question else "fine")
    args = SimpleNamespace(eval_out=str(tmp_path), overwrite=False, batch_tokens=1, batch_size=None)
    settings = {"max_new_tokens": 7, "temperature": 0.0, "top_p": 1.0, "seed": 3}
    # Of equal length, so that they are asked in this order.
    prompts = [Prompt(conversation(f"q{i}"), "here") for i in range(5)]

    def answers():
        server = EndpointModel(spec, "--models", SimpleNamespace(server_timeout=20.0, server_concurrency=1))
        return answer_all(AnsweringModel("m", server.identity, smol_tokenizer, None, endpoint=server),
                          prompts, settings, args)  # fmt: skip

    with pytest.raises(UserError, match="401.*cached"):
        answers()
    before, down[0] = len(requests), False
    assert [a["text"] for a in answers()] == ["fine"] * 5
    assert 1 <= len(requests) - before < 5


def test_server_that_fails_is_one_line(endpoint, smol_tokenizer):
    server = EndpointModel(endpoint(lambda *_: 401)[0], "--models", ARGS)
    with pytest.raises(UserError, match="openai:m@.*401"):
        list(server.generate([conversation("q")], smol_tokenizer, max_new_tokens=3, temperature=0, top_p=1, seed=1))


@pytest.mark.parametrize("spec", ["openai:x", "openai:x@host/v1", "openai:@http://h/v1", "openai:x@http://h/v1?key=1"])
def test_server_without_an_address_is_refused(spec):
    with pytest.raises(UserError, match="--base_model openai:"):
        model_and_url(spec, f"--base_model {spec}")


def test_names_with_versions_and_logins():
    assert model_and_url("openai:gpt@2024@https://h/v1", "") == ("gpt@2024", "https://h/v1")
    assert model_and_url("openai:qwen2.5:7b@http://a:b@h:1/v1", "") == ("qwen2.5:7b", "http://a:b@h:1/v1")


def test_refused_parameters_are_noted_in_answers(endpoint, smol_tokenizer, tmp_path, capsys):
    def serve(request):
        return (400, "'temperature' does not support 0.0") if "temperature" in request else "fine"

    server = EndpointModel(endpoint(lambda *_: serve)[0], "--models", ARGS)
    model = AnsweringModel("gpt", server.identity, smol_tokenizer, None, endpoint=server)
    args = SimpleNamespace(eval_out=str(tmp_path), overwrite=False, batch_tokens=1, batch_size=None)
    settings = {"max_new_tokens": 7, "temperature": 0.0, "top_p": 1.0, "seed": 3}
    for _ in range(2):  # the second call reads the cache
        (answer,) = answer_all(model, [Prompt(conversation("q"), "here")], settings, args)
        assert answer["text"] == "fine" and "temperature" in answer["note"]
        assert "note: gpt: the server refused temperature" in capsys.readouterr().err


def test_answer_that_the_server_cut_off(endpoint, smol_tokenizer):
    reply = raw({"finish_reason": "length", "message": {"role": "assistant", "content": "<think>I wonder"}})
    server = EndpointModel(endpoint(lambda *_: reply)[0], "--models", ARGS)
    (answer,) = server.generate([conversation("q")], smol_tokenizer, max_new_tokens=3, temperature=0, top_p=1, seed=1)
    assert (answer["text"], answer["finish_reason"], answer["tokens"]) == ("", "length", 0)


def question_to(server: EndpointModel, tokenizer) -> list[dict]:
    return list(server.generate([conversation("q")], tokenizer, max_new_tokens=3, temperature=0, top_p=1, seed=1))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"finish_reason": "content_filter", "message": {"role": "assistant", "content": None}}, "content_filter"),
        ({"message": {"role": "assistant", "content": None, "refusal": "I cannot\nhelp"}}, "refusal: I cannot)"),
        ({"finish_reason": "tool_calls", "message": {"role": "assistant"}}, "tool_calls"),
    ],
)
def test_reply_without_text_is_noted_in_the_server_s_words(endpoint, smol_tokenizer, choice, words):
    (answer,) = question_to(EndpointModel(endpoint(lambda *_: raw(choice))[0], "--models", ARGS), smol_tokenizer)
    assert answer["text"] == "" and words in answer["note"]


ERRORS = [
    json.dumps({"error": {"message": "model is loading\nstep 2", "code": 503}}).encode(),
    json.dumps({"error": "model is loading"}).encode(),
    json.dumps({"object": "chat.completion", "choices": [], "error": {"message": "model is loading"}}).encode(),
    raw({"finish_reason": "error", "error": {"code": 502, "message": "model is loading"}}),
]


@pytest.mark.parametrize("reply", ERRORS)
def test_error_with_status_200_is_named(endpoint, smol_tokenizer, reply):
    spec, requests = endpoint(lambda *_: reply)
    with pytest.raises(UserError, match="openai:m@.*: the server replied with an error: model is loading$"):
        question_to(EndpointModel(spec, "--models", ARGS), smol_tokenizer)
    judge = make_judge(spec, PAIRWISE, {**OPTIONS, "attempts": 1})
    before = len(requests)
    ((_, verdict),) = judge.judge([item_of("q")])
    assert verdict.first is None and verdict.error == "the server replied with an error: model is loading"
    assert len(requests) == before + 2, "asked again"


def test_empty_answers_of_a_battle_are_counted(endpoint, call, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(5)))
    base, _ = endpoint(lambda *_: "Something.")
    tuned, _ = endpoint(lambda question, _: "<think>hm</think>" if question[9] in "13" else f"Answer to {question}")
    args = ("--battle", "--base_model", base, "--tuned_model", tuned, "--prompts", prompts, "--judge", "longer")
    code, stdout, err = call("eval_win_rate", *args, "--eval_out", tmp_path / "out")
    assert code == 0 and "note: tuned: no text (2 of 5 answers)" in err
    summary = read_json(tmp_path / "out/m/battle.json")
    assert summary["data"]["answer_notes"][-1] == "tuned: no text (2 of 5 answers)"
    assert "tuned: no text (2 of 5 answers)" in " ".join(stdout.split())


# ------------------------------------------------------------------------------------------------------------- bounds


def slow_stream(chunk: bytes, count: int, pause: float):
    class Stream(httpx2.SyncByteStream):
        def __iter__(self):
            for _ in range(count):
                time.sleep(pause)
                yield chunk

    return SimpleNamespace(
        handle_request=lambda request: httpx2.Response(200, stream=Stream()), close=lambda: None
    )  # fmt: skip


@pytest.mark.parametrize(
    ("chunk", "count", "pause", "error"),
    [(b"x", 1000, 0.02, httpx2.ReadTimeout), (b"x" * 1000, 1000, 0, httpx2.ReadError), (b"{}", 1, 0, None)],
    ids=["a byte at a time", "too large", "fine"],
)
def test_replies_are_bounded_in_time_and_size(chunk, count, pause, error):
    transport = BoundedTransport(0.2, largest=10_000)
    transport.inner = slow_stream(chunk, count, pause)
    started = time.monotonic()
    with httpx2.Client(transport=transport) as client:
        if error:
            with pytest.raises(error):
                client.get("http://h/")
        else:
            assert client.get("http://h/").json() == {}
    assert time.monotonic() - started < 2


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("openai:m@http://me:hunter2@host:1/v1", "openai:m@http://host:1/v1"),
        ("no file at /home/x/https:/me:hunter2@host/v1", "no file at /home/x/https:/host/v1"),
        ("https://me:p@ss@host/v1 and me@host", "https://host/v1 and me@host"),
        ("https://host/v1?api_key=hunter2&n=3", "https://host/v1?api_key=***&n=3"),
        ("hf://datasets/a/b@main/c.json, a@b", "hf://datasets/a/b@main/c.json, a@b"),
    ],
)
def test_logins_are_removed_from_text(text, shown):
    assert without_secrets(text) == shown


def with_login(spec: str) -> str:
    return spec.replace("http://", "http://me:hunt%40er2@")


def assert_no_secret(folder, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for text in (*texts, *(path.read_bytes().decode(errors="replace") for path in files)):
        assert "er2" not in text and base64.b64encode(b"me:hunt@er2").decode() not in text


# -------------------------------------------------------------------------------------------------------------- stages


def test_battle_of_two_servers(endpoint, call, tmp_path):
    """Base, tuned and judge behind servers with a login: no weights are read, and the login is stored nowhere."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(4)))
    base, base_requests = endpoint(lambda *_: "Short.")
    tuned, tuned_requests = endpoint(lambda question, _: f"A longer answer to {question}")
    judge, _ = endpoint(lambda question, _: "A" if question.index("longer") < question.index("Short") else "B")
    out = tmp_path / "out"
    args = ["--battle", "--base_model", with_login(base), "--tuned_model", with_login(tuned).replace(":m@", ":x/new@")]
    args += ["--judge", with_login(judge), "--prompts", prompts, "--eval_out", out, "--max_new_tokens", 9]
    code, stdout, err = call("eval_win_rate", *args)
    assert code == 0, err
    summary = read_json(out / "new/battle.json")
    assert summary["metrics"]["win_rate"]["value"] == 1 and "100.0" in stdout
    assert summary["model"]["base"]["endpoint"] == base and summary["model"]["judge"]["judge"] == judge
    assert summary["args"]["base_model"] == base
    assert len(base_requests) == len(tuned_requests) == 4
    expected = "Basic " + base64.b64encode(b"me:hunt@er2").decode()
    assert {r["authorization"] for r in base_requests} == {expected}
    assert_no_secret(out, stdout, err)
    # The second call reads the caches.
    assert call("eval_win_rate", *args)[0] == 0 and len(base_requests) == 4


def test_wrong_server_does_not_show_its_login(endpoint, call, tmp_path):
    spec = with_login(endpoint(lambda *_: 401)[0])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Question?"}\n')
    args = ["--battle", "--base_model", spec, "--tuned_model", spec, "--prompts", prompts, "--judge", "longer"]
    code, stdout, err = call("eval_win_rate", *args, "--eval_out", tmp_path / "out")
    assert code == 2 and "401" in err and "openai:m@http://127" in err
    assert_no_secret(tmp_path / "out", stdout, err)
    code, _, err = call("eval_win_rate", "--battle", "--base_model", "openai:m@http://me:er2@h/v1?x=1",
                        "--tuned_model", spec, "--eval_out", tmp_path / "out")  # fmt: skip
    assert code == 2 and "er2" not in err
    assert_one_line(err, "--base_model openai:m@http://h/v1")


def test_server_in_the_base_s_place(endpoint, call, trained, tmp_path):
    """The tuned model is an adapter on its own base; the server answers for base. Another one is added by --models."""
    spec, requests = endpoint(lambda *_: "An answer of the server, longer than any of the tiny models' own. " * 9)
    args = eval_args(trained, tmp_path, "--battle", "--judge", "longer", "--max_new_tokens", 4, "--limit", 3)
    code, out, err = call("eval_win_rate", *args, "--base_model", spec, "--models", f"gpt={spec}")
    assert code == 0, err
    summary = read_json(tmp_path / "r/battle_LIMIT3.json")
    assert summary["model"]["base"] == {"endpoint": spec, "name": spec} and summary["model"]["tuned"]["adapter_sha256"]
    assert summary["matches"][0]["judges"]["longer"]["win_rate"]["value"] == 0
    assert len(requests) == 6 and "gpt vs tuned" in out


@pytest.mark.parametrize("script", ["eval_win_rate", "eval_perplexity", "preflab.harness.run", "merge_adapter"])
def test_figures_of_log_probabilities_need_weights(call, trained, tmp_path, script):
    flags = ("--base_model", "openai:m@http://127.0.0.1:1/v1", *eval_args(trained, tmp_path))
    code, _, err = call(script, *flags)
    assert code == 2
    assert_one_line(err, "--base_model openai:m@http://127.0.0.1:1/v1", "weights", "log-probabilities")


def test_alpacaeval_of_two_servers(endpoint, call, trained, inputs, tmp_path):
    base, _ = endpoint(lambda question, _: f"{question} Short.")
    tuned, requests = endpoint(lambda question, number: f"{question} A longer answer {'!' * number}")
    args = alpaca_args(trained, tmp_path, inputs.reference, inputs.tiny, "--base_model", base, "--tuned_model", tuned)
    args = [*args, "--judge", "longer", "--audit_dataset", inputs.prefs / "test.jsonl"]
    # A judge is given by alpaca_args, a run by eval_args: both are replaced here.
    for flag in ("--judge", "--run_name"):
        at = list(map(str, args)).index(flag)
        args = [*args[:at], *args[at + 2 :]]
    code, _, err = call("run_alpacaeval_local", *args)
    assert code == 0, err
    folder = tmp_path / "out/m/alpacaeval"
    about = read_json(folder / "model_outputs_tuned.about.json")
    assert about["endpoint"] == tuned and about["engine"] == "server" and len(requests) == 8
    outputs = read_json(folder / "model_outputs_tuned.json")
    assert {row["generator"] for row in outputs} == {tuned} and all("longer answer" in row["output"] for row in outputs)
    assert read_json(folder / "alpacaeval.json")["model"]["tuned"]["endpoint"] == tuned


def test_human_evaluation_of_two_servers(endpoint, call, inputs, tmp_path):
    base, tuned = (endpoint(lambda question, _, side=side: f"{side} {question}")[0] for side in ("B", "T"))
    code, _, err = call("human_eval", "--base_model", base, "--tuned_model", tuned, "--eval_out", tmp_path,
                        "--prompts", inputs.prompts)  # fmt: skip
    assert code == 0, err
    rows = read_json(tmp_path / "m/manual_eval_candidates.json")
    assert all(row["base"].startswith("B ") and row["dpo"].startswith("T ") for row in rows) and len(rows) == 9


def test_pairs_of_a_server_s_answers(endpoint, call, inputs, tmp_path):
    spec, requests = endpoint(lambda *_: lambda request: f"answer {'x' * (request['seed'] // 10)}")
    args = pair_args(with_login(spec), inputs.prompts, tmp_path)
    code, stdout, err = call("generate_preference_pairs", *args)
    assert code == 0, err
    pairs = [row for name in ("train", "test") for row in RowFile(tmp_path / f"p/{name}.jsonl").read()]
    # `longer` prefers seed 100's answer to seed 0's.
    texts = {(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in pairs}
    assert len(pairs) == 9 and texts == {("answer xxxxxxxxxx", "answer")}
    assert read_json(tmp_path / "p/manifest.json")["stages"]["sample"]["model"] == {
        "endpoint": spec, "engine": "server",
    }  # fmt: skip
    assert len(requests) == 27
    assert_no_secret(tmp_path, stdout, err)
    code, _, err = call("generate_preference_pairs", *args, "--adapter_path", "x", "--run_name", "q")
    assert code == 2 and "--adapter_path" in err
