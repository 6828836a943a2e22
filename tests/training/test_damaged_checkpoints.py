"""Damaged and tampered checkpoints: nothing in them runs, and training resumes from the newest undamaged one."""

import json
import pickle
import shutil
import subprocess

import pytest
import torch
from conftest import assert_one_line, train_args
from payloads import Mark

from preflab.evaluation.runs import MANIFEST, is_complete
from preflab.training.checkpoint_check import damage
from preflab.training.run_folder import write_manifest
from utils.artifacts import RowFile, read_json, write_json

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of the newest checkpoint of a run, at step 4."""
    return shutil.copytree(trained / "ck/r/checkpoint-4", tmp_path / "checkpoint-4")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sign(checkpoint):
    """A manifest for the files as they are, as whoever tampers with a folder can write it."""
    state = {k: v for k, v in read_json(checkpoint / MANIFEST).items() if k not in ("files", "sha256")}
    write_manifest(checkpoint, **state)


def test_undamaged_checkpoint(checkpoint):
    assert is_complete(checkpoint) and damage(checkpoint) is None
    manifest = read_json(checkpoint / MANIFEST)
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {MANIFEST}
    assert files == set(manifest["sha256"]) == set(manifest["files"])
    printed = subprocess.run(["sha256sum", checkpoint / "optimizer.pt"], capture_output=True, text=True).stdout
    assert manifest["sha256"]["optimizer.pt"] == printed.split()[0]
    # Manifests of earlier versions have no hashes.
    write_json(checkpoint / MANIFEST, {k: v for k, v in manifest.items() if k != "sha256"})
    assert damage(checkpoint) is None


def test_any_flipped_bit_is_found(checkpoint):
    names = list(read_json(checkpoint / MANIFEST)["files"])
    assert len(names) >= 8
    for name in names:
        before = (checkpoint / name).read_bytes()
        if before:
            flip_a_bit(checkpoint / name)
            assert is_complete(checkpoint) and name in damage(checkpoint)
            (checkpoint / name).write_bytes(before)


@pytest.mark.parametrize("name", STATES)
def test_payload_in_a_signed_state(checkpoint, name, tmp_path):
    mark = Mark(tmp_path / "mark")
    mark.pickled(checkpoint / name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpoint / name, weights_only=True)
    mark.assert_unmarked()
    sign(checkpoint)
    assert is_complete(checkpoint) and name in damage(checkpoint)
    mark.assert_unmarked()
    # The payload does run where it is loaded carelessly, so this test could fail.
    torch.load(checkpoint / name, weights_only=False)
    assert mark.path.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b"[]"),
        ("trainer_state.json", b"{"),
        ("trainer_state.json", b'{"global_step": 3}'),
        ("trainer_state.json", b'{"global_step": 4, "no_such_key": 1}'),
        ("trainer_state.json", b"[" * 100_000),
        ("trainer_state.json", b"\xff\xfe"),
        ("rng_state.pth", b""),
        ("rng_state.pth", b"PK\x03\x04 not an archive"),
        ("rng_state.pth", b"junk"),
        ("optimizer.pt", b"junk"),
        ("adapter_model.safetensors", b"\xff" * 100),
        ("adapter_model.safetensors", b""),
    ],
)
def test_unreadable_signed_files(checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    sign(checkpoint)
    assert name in damage(checkpoint)


def test_missing_random_state(checkpoint):
    torch.save({"python": 1}, checkpoint / "rng_state.pth")
    sign(checkpoint)
    assert "rng_state.pth" in damage(checkpoint)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": []}', '{"files": 3}', "null"])
def test_damaged_manifest_is_incomplete(checkpoint, content):
    (checkpoint / MANIFEST).write_text(content)
    assert not is_complete(checkpoint) or json.loads(content) == {"files": []}


def test_resume_passes_over_the_damaged_newest_checkpoint(train, tiny, prefs, trained, tmp_path):
    for name in ("ck", "out"):
        shutil.copytree(trained / name, tmp_path / name)
    run, log = tmp_path / "ck/r", tmp_path / "out/r/train_log.jsonl"
    extra = ("--eval_strategy", "steps", "--eval_steps", "2", "--per_device_eval_batch_size", "3", "--save_steps", "2")
    args = train_args(tiny, prefs, tmp_path, *extra)
    write_json(run / "run.json", {**read_json(run / "run.json"), "finished": False})
    before = RowFile(log).read()
    flip_a_bit(run / "checkpoint-4/adapter_model.safetensors")
    code, _, err = train(*args, "--resume", run / "checkpoint-4")
    assert code == 2
    assert_one_line(err, "--resume", "adapter_model.safetensors")
    code, out, err = train(*args)
    assert code == 0, err
    assert "checkpoint-4: adapter_model.safetensors" in err and f"resuming from {run}/checkpoint-2" in out
    after = RowFile(log).read()
    assert [row["loss"] for row in after] == pytest.approx([row["loss"] for row in before], abs=1e-6)
    assert damage(run / "checkpoint-4") is None
