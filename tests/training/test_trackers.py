"""--report_to: a tracker gets the figures of train_log.jsonl, offline. Skipped where its package is not installed."""

import importlib.util
import struct

import pytest
from conftest import assert_one_line, train_args
from processes import run_script

from utils.artifacts import RowFile

SCRIPT = "dpo_train_human_preference.py"


def tensorboard_losses(folder) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logs,) = (folder / "ck/r/runs").iterdir()
    events = EventAccumulator(str(logs)).Reload()
    assert "eval/loss" in events.Tags()["scalars"]
    return {event.step: event.value for event in events.Scalars("train/loss")}


def trackio_losses(folder) -> dict[int, float]:
    # Imported here: it reads TRACKIO_DIR at import.
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("huggingface", "r")
    assert any("eval/loss" in row for row in rows)
    return {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}


def wandb_losses(folder) -> dict[int, float]:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    losses = {}
    for content in leveldb_records(path.read_bytes()[7:]):
        record = Record.FromString(content)
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in items:
            losses[int(items["train/global_step"])] = float(items["train/loss"])
    return losses


def leveldb_records(data: bytes):
    """The records of a LevelDB log whose first 7 bytes are a header: blocks of 32 KiB, records split over blocks."""
    position, part = 7, b""
    data = b"\0" * 7 + data
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        # 1: complete, 4: the last part.
        if kind in (1, 4):
            yield part
            part = b""


LOSSES = {"tensorboard": tensorboard_losses, "trackio": trackio_losses, "wandb": wandb_losses}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", LOSSES)
def test_gets_every_step(tracker, tiny, prefs, tmp_path, monkeypatch):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"no {tracker}: pip install -r requirements/tracking.txt")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    extra = ("--report_to", tracker, "--eval_strategy", "steps", "--eval_steps", 2)
    done = run_script(SCRIPT, *train_args(tiny, prefs, tmp_path, *extra), env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = RowFile(tmp_path / "out/r/train_log.jsonl").read()
    logged = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    assert len(logged) == 4 and LOSSES[tracker](tmp_path) == pytest.approx(logged)


@pytest.mark.parametrize(
    ("tracker", "words"),
    [("wandb", ("requirements/tracking.txt",)), ("tensorbord", ("tensorboard", "trackio", "wandb"))],
)
def test_missing_or_unknown_tracker(train, tiny, prefs, tmp_path, monkeypatch, tracker, words):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "wandb" else find(name, *args))
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--report_to", tracker))
    assert code == 2 and not (tmp_path / "ck").exists()
    assert_one_line(err, f"--report_to {tracker}", *words)
