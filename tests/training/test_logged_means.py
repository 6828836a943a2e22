"""What train_log.jsonl holds: means over pairs with any --logging_steps, ties half, all of a run's time."""

import json
import signal
import time

import pytest
from conftest import make_pairs, train_args, write_jsonl
from processes import Script, run_script

from preflab.evaluation.rewards import reward_rows
from utils.artifacts import RowFile, read_json

# Logged as means over the pairs since the last logged step.
MEANS = ("loss", "rewards/margins", "rewards/chosen", "logps/rejected", "rewards/accuracies_ties_half")


def log_of(folder, split: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "out/r/train_log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


@pytest.fixture
def odd(tmp_path):
    """11 pairs: in batches of 2 x 2 an epoch's last step has 3 pairs in micro-batches of 2 and 1. 5 test pairs."""
    write_jsonl(tmp_path / "d/train.jsonl", make_pairs(11))
    write_jsonl(tmp_path / "d/test.jsonl", make_pairs(5, 100))
    return tmp_path / "d"


def odd_args(tiny, data, folder, *extra):
    return train_args(tiny, data, folder, "--max_steps", -1, "--num_train_epochs", 2, "--warmup_steps", 0, *extra)


def test_means_over_several_steps_are_over_pairs(train, tiny, odd, tmp_path):
    """The figures of single steps, weighted with their pairs, give those of --logging_steps 3."""
    assert train(*odd_args(tiny, odd, tmp_path / "a"))[0] == 0
    assert train(*odd_args(tiny, odd, tmp_path / "b", "--logging_steps", 3))[0] == 0
    single, several = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert [row["step"] for row in single] == [1, 2, 3, 4, 5, 6] and [row["step"] for row in several] == [3, 6]
    pairs = [4, 4, 3, 4, 4, 3]
    for k, row in enumerate(several):
        part = slice(3 * k, 3 * k + 3)
        for key in MEANS:
            mean = sum(n * step[key] for n, step in zip(pairs[part], single[part], strict=True)) / 11
            assert row[key] == pytest.approx(mean, abs=1e-6), (key, row["step"])
    # All rewards are 0 in the first step: ties count half in this project's figure, not at all in TRL's.
    assert single[0]["rewards/accuracies_ties_half"] == 0.5 and single[0]["rewards/accuracies"] == 0.0


def test_means_are_complete_after_a_resume(tiny, odd, tmp_path):
    """A checkpoint between two logged steps: the first mean after the resume has the steps before it too."""
    flags = ("--logging_steps", 3, "--save_steps", 2)
    done = run_script("dpo_train_human_preference.py", *odd_args(tiny, odd, tmp_path / "a", *flags))
    assert done.returncode == 0, done.stderr[-2000:]
    script = Script("dpo_train_human_preference.py", *odd_args(tiny, odd, tmp_path / "b", *flags))
    kill_when(script, (tmp_path / "b/ck/r/checkpoint-2/checkpoint_manifest.json").exists)
    script.result()
    assert not (tmp_path / "b/out/r/train.json").exists()
    done = run_script("dpo_train_human_preference.py", *odd_args(tiny, odd, tmp_path / "b", *flags))
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    for a, b in zip(log_of(tmp_path / "a"), log_of(tmp_path / "b"), strict=True):
        for key in MEANS:
            assert b[key] == pytest.approx(a[key], abs=1e-6), (key, a["step"])


def kill_when(script, condition) -> None:
    """Kill the script as soon as `condition()` holds."""
    while not condition() and script.poll() is None:
        time.sleep(0.002)
    script.send_signal(signal.SIGKILL)


def test_evaluation_has_means_over_pairs_beside_batch_means(train, tiny, odd, tmp_path):
    """5 pairs in batches of 2, 2 and 1: TRL's mean over batches weighs the last pair twice."""
    flags = ("--eval_strategy", "steps", "--eval_steps", 3, "--per_device_eval_batch_size", 2)
    code, _, err = train(*odd_args(tiny, odd, tmp_path, *flags))
    assert code == 0, err
    row = log_of(tmp_path, "eval")[-1]
    scored = [json.loads(line) for line in (tmp_path / "out/r/heldout_rows.jsonl").read_text().splitlines()]
    margins = [r["margin"] for r in reward_rows(scored, 0.1)]
    assert row["rewards/margins_pair_mean"] == pytest.approx(sum(margins) / 5, abs=1e-5)
    batches = [sum(margins[:2]) / 2, sum(margins[2:4]) / 2, margins[4]]
    assert row["rewards/margins"] == pytest.approx(sum(batches) / 3, abs=1e-5)
    right = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
    assert row["rewards/accuracies_ties_half"] == pytest.approx(sum(right) / 5)
    metrics = read_json(tmp_path / "out/r/train.json")["metrics"]
    assert row["logps/chosen_pair_mean"] == pytest.approx(metrics["logps_chosen_tuned"]["value"], abs=1e-4)


def test_time_of_a_killed_call_is_counted(tiny, prefs, tmp_path):
    """kill -9 without any checkpoint: the second call starts over, and its time includes that of the first."""
    args = train_args(tiny, prefs, tmp_path, "--max_steps", 6)
    script = Script("dpo_train_human_preference.py", *args)
    log = tmp_path / "out/r/train_log.jsonl"
    # The file is there before its first row; RowFile.read leaves an incomplete last row out.
    kill_when(script, RowFile(log).read)
    script.result()
    rows = RowFile(log).read()
    assert rows[-1]["step"] < 6 and rows[-1]["seconds"] > 0
    # As if the killed call had trained for an hour.
    rows[-1]["seconds"] += 3600
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_script("dpo_train_human_preference.py", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 3600 < read_json(tmp_path / "out/r/train.json")["training"]["seconds"] < 3700
    assert "training took 36" in done.stdout
