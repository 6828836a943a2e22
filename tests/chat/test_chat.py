"""chat.py: answers equal the evaluations', streaming changes nothing, conversations become training data."""

import io
import json
import os
import signal
import sys
import time
from functools import partial

import pytest
from conftest import assert_one_line, eval_args, train_args, write_jsonl
from processes import Script

from preflab.chat.screen import Stacked
from preflab.models.generation import generate
from preflab.models.loading import load_model, load_tokenizer

SHORT = ("--max_new_tokens", "6")


@pytest.fixture
def chat(call, monkeypatch, trained, tmp_path):
    """chat(stdin, *flags): (exit code, stdout, stderr) of a chat with base and tuned; files in tmp_path/out/r."""

    def chatting(text, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return call("chat", *eval_args(trained, tmp_path / "out", *SHORT, *flags))

    return chatting


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conversation_becomes_training_data(chat, train, tiny, trained, tmp_path):
    code, out, err = chat("Name a colour.\n/2\nAnother?\n/1\n\n/new\nAnd you?\n/tie\n", "--system", "Be brief.")
    assert code == 0, err
    assert out.count("[1 base]") == 3 and out.count("[2 tuned]") == 3
    first, second = rows(tmp_path / "out/r/chat_pairs.jsonl")
    assert [m["content"] for m in first["prompt"]] == ["Be brief.", "Name a colour."]
    assert first["chosen_model"] == "tuned" and second["chosen_model"] == "base"
    # The conversation continues with the preferred answer.
    assert second["prompt"] == [*first["prompt"], *first["chosen"], {"role": "user", "content": "Another?"}]
    third = rows(tmp_path / "out/r/chat_pairs_votes.jsonl")[2]
    assert third["winner"] is None and [m["content"] for m in third["prompt"]] == ["Be brief.", "And you?"]
    assert "2 preference pairs of 3 judged ones" in out and "1 ties" in out
    args = train_args(tiny, tmp_path / "out/r/chat_pairs.jsonl", tmp_path / "t", "--preflight_only")
    code, out, err = train(*args, "--dataset_test_split", "none")
    assert code == 0 and "2 rows, 2 train pairs; dropped: nothing" in out, err


def test_answers_are_those_of_the_generation_loop(chat, trained, tiny, tmp_path):
    flags = ("--temperature", "1", "--top_k", "5", "--top_p", "0.9", "--seed", "3")
    code, _, err = chat("Name a colour.\n/1\n", *flags)
    assert code == 0, err
    (vote,) = rows(tmp_path / "out/r/chat_pairs_votes.jsonl")
    model, tokenizer = load_model(str(tiny)).eval(), load_tokenizer(str(tiny))
    prompt = [{"role": "user", "content": "Name a colour."}]
    (given,) = generate(model, tokenizer, [prompt], 6, temperature=1.0, top_k=5, top_p=0.9, seed=3)
    assert vote["answers"]["base"] == given["text"] and vote["prompt"] == prompt


def test_one_shot_and_file(chat, tmp_path):
    code, out, err = chat("", "--prompt", "Why?")
    assert code == 0 and out.count("[2 tuned]") == 1, err
    (tmp_path / "p.txt").write_text("Why?\n\nHow?\n")
    code, out, err = chat("/1\n/bad\n", "--file", tmp_path / "p.txt", "--vote")
    assert code == 0 and "1/2> Why?" in out and "2/2> How?" in out, err
    assert [v["both_bad"] for v in rows(tmp_path / "out/r/chat_pairs_votes.jsonl")] == [False, True]
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Who?"}, {"prompt": "When?"}])
    code, out, _ = chat("", "--file", tmp_path / "p.jsonl", "--limit", "1")
    assert code == 0 and "[1 base]" in out and "When" not in out


def test_blind_hides_names_until_the_vote(chat, tmp_path):
    code, out, _ = chat("".join(f"Question {k}\n/1\n" for k in range(6)), "--blind", "--history", "none")
    winners = [vote["winner"] for vote in rows(tmp_path / "out/r/chat_pairs_votes.jsonl")]
    assert code == 0 and set(winners) == {"base", "tuned"}, "the order is random"
    assert "base" not in out.split("voted")[0] and out.count("voted") == 6


def test_history_of_its_own(chat, endpoint):
    spec, requests = endpoint(lambda question, number: f"fine {number}")
    code, _, err = chat("A\nB\n/1\n", "--history", "own", "--models", f"served={spec}")
    assert code == 2 and [m["content"] for m in requests[1]["messages"]] == ["A", "fine 1", "B"]
    assert_one_line(err, "--history own", "/new")


def test_served_model_and_more_models(chat, endpoint, tiny, tmp_path):
    spec, requests = endpoint(lambda question, number: f"You said: {question}")
    code, out, err = chat("Hello\n/3\n", "--models", f"served={spec}", "--temperature", "1", "--top_k", "7")
    assert code == 0 and "[3 served]" in out and "You said: Hello" in out, err
    assert requests[0]["top_k"] == 7 and requests[0]["temperature"] == 1
    assert len(rows(tmp_path / "out/r/chat_pairs.jsonl")) == 2


def test_server_that_refuses_top_k(chat, endpoint):
    refuse = (400, "Unrecognized request argument supplied: top_k")
    spec, requests = endpoint(lambda *_: lambda request: refuse if "top_k" in request else "fine")
    code, out, err = chat("Hello\n", "--models", f"served={spec}", "--temperature", "1", "--top_k", "7")
    assert code == 0 and "fine" in out and "refused top_k" in out, err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/1\n", ("/1", "no answer")),
        ("/frobnicate\n", ("/frobnicate", "/help")),
        ("Hi\n/1\n/2\n", ("/2", "already")),
        ("Hi\n/3\n", ("/3",)),
        ("word " * 3000 + "\n", ("tokens", "at most")),
    ],
)
def test_piped_errors_are_one_line(text, words, chat):
    code, _, err = chat(text)
    assert code == 2
    assert_one_line(err, *words)


def test_a_path_is_a_message(chat):
    code, out, err = chat("/etc/hosts is what?\n")
    assert code == 0 and "[1 base]" in out, err


def test_one_model_alone(call, monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    code, out, err = call("chat", "--base_model", tiny, "--eval_out", tmp_path, *SHORT)
    assert code == 0 and "[1 base]" in out and "tuned" not in out, err


def test_control_characters_are_shown_as_escapes(capsys):
    screen = Stacked()
    screen.start(["1 a"])
    for text in ("\x1b[2J", "\x1b[2Jhello"):
        screen.update(0, text)
    screen.finish(0, "\x1b[2Jhello \u202eabc", "3 tokens")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and r"\x1b[2Jhello \u202eabc" in out


def test_streamed_text_that_changes_is_printed_again(capsys):
    screen = Stacked()
    screen.start(["1 a"])
    screen.update(0, "it 's")
    screen.finish(0, "it's done", "4 tokens")
    assert capsys.readouterr().out.endswith("it's done\n(4 tokens)\n")


def test_columns_show_both_answers_side_by_side():
    from rich.console import Console

    from preflab.chat.screen import Columns

    stream = io.StringIO()
    screen = Columns(Console(file=stream, force_terminal=True, width=80, height=20, color_system=None))
    screen.start(["1 base", "2 tuned"])
    screen.update(0, "left [bold]answer")
    screen.finish(0, "left [bold]answer", "3 tokens")
    screen.finish(1, "right \x1b[2J answer", "3 tokens")
    stream.truncate(0)
    screen.close()
    lines = stream.getvalue().splitlines()
    assert any("left [bold]answer" in line and r"right \x1b[2J answer" in line for line in lines)


def interruptible():
    """As on a terminal; a shell starts background jobs with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_is_one_line(trained, tmp_path):
    """While an answer is generated."""
    flags = ("--max_new_tokens", "100000", "--prompt", "Hi")
    process = Script("chat.py", *eval_args(trained, tmp_path, *flags), before=interruptible)
    start, out = time.monotonic(), process.folder / "stdout"
    while not out.exists() or "[1 base]" not in out.read_text():
        assert process.poll() is None and time.monotonic() - start < 100, process.args
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    done = process.result()
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("interrupted")


def read_from(fifo: str) -> None:
    """Messages from a named pipe. Opened for writing too, so that the open does not wait for the writer."""
    sys.stdin = os.fdopen(os.open(fifo, os.O_RDWR))


def test_votes_survive_kill_9(chat, trained, tmp_path):
    """Killed while it waits for the next message; the next chat appends to the same files."""
    fifo = tmp_path / "messages"
    os.mkfifo(fifo)
    flags = eval_args(trained, tmp_path / "out", *SHORT)
    process = Script("chat.py", *flags, before=partial(read_from, str(fifo)))
    start, votes = time.monotonic(), tmp_path / "out/r/chat_pairs_votes.jsonl"
    with open(fifo, "r+b", buffering=0) as messages:
        messages.write(b"Name a colour.\n/2\n")
        while not votes.exists() or not votes.read_bytes().endswith(b"\n"):
            assert process.poll() is None and time.monotonic() - start < 100, process.args
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.result().returncode == -signal.SIGKILL
    code, out, err = chat("Why?\n/1\n")
    assert code == 0, err
    assert [vote["winner"] for vote in rows(votes)] == ["tuned", "base"]
    assert [pair["chosen_model"] for pair in rows(tmp_path / "out/r/chat_pairs.jsonl")] == ["tuned", "base"]
