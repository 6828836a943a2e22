"""The commands that a run prints at its end: they name this run and its folders, and they work."""

import shlex
import shutil
from pathlib import Path

import pytest

from preflab.training.next_steps import next_commands

ALL = {"stage": "train", "held_out": True, "lora": True}


def commands(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines()[1:] if not line.strip().startswith("#")]
    return [shlex.split(line, comments=True) for line in lines]


def test_default_folders_are_not_repeated():
    text = next_commands(Path("checkpoints/quickstart"), Path("eval_out/quickstart"), **ALL)
    assert ["python", "eval_win_rate.py", "--run_name", "quickstart"] in commands(text)
    assert "--checkpoints" not in text and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("kind", "present", "absent"),
    [
        ({"held_out": False}, "human_eval.py", "eval_perplexity.py"),
        ({"lora": False}, "eval_perplexity.py", "merge_adapter.py"),
        ({"stage": "sft"}, "--start_adapter checkpoints/r", "eval_perplexity.py"),
        # Without held-out pairs, the merge is checked on the shipped ones.
        ({"held_out": False}, "merge_adapter.py", "eval_perplexity.py"),
        ({"stage": "sft"}, "merge_adapter.py", "eval_perplexity.py"),
        ({"stage": "sft", "lora": False}, "export_gguf.py", "merge_adapter.py"),
    ],
)
def test_commands_fit_the_run(kind, present, absent):
    text = next_commands(Path("checkpoints/r"), Path("eval_out/r"), **{**ALL, **kind})
    assert present in text and absent not in text and "--list" in text


def test_printed_commands_run(call, trained, tmp_path):
    """The run of `trained` in a folder whose name needs quoting."""
    shutil.copytree(trained, tmp_path / "my runs")
    weights, results = (tmp_path / "my runs" / folder / "r" for folder in ("ck", "out"))
    text = next_commands(weights, results, **ALL)
    listed = [words for words in commands(text) if words[1] == "eval_win_rate.py" and "--battle" not in words]
    assert len(listed) == 2
    for words in listed:
        code, printed, err = call("eval_win_rate", *words[2:])
        assert code == 0 and ("--list" in words) == ("evaluations use r" in printed), err
