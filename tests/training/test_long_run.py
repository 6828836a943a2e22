"""A thousand steps: memory and open files stay as they were after the first hundred."""

import os
import time
from pathlib import Path

import pytest
from conftest import train_args, write_jsonl
from helpers import instructions, sft_args
from processes import Script

from utils.artifacts import RowFile

PAGE = os.sysconf("SC_PAGE_SIZE")


def usage(pid: int) -> tuple[float, int]:
    """(resident memory in MiB, open files) of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * PAGE / 2**20, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which Linux has")
@pytest.mark.parametrize("script", ["dpo_train_human_preference.py", "sft_train_instruction.py"])
def test_thousand_steps_without_growth(script, tiny, prefs, tmp_path):
    extra = ("--max_steps", 1000, "--save_steps", 100, "--gradient_accumulation_steps", 1, "--learning_rate", "1e-5")
    if script.startswith("dpo"):
        args = train_args(tiny, prefs, tmp_path, *extra)
    else:
        args = sft_args(tiny, write_jsonl(tmp_path / "rows/train.jsonl", instructions(64)), tmp_path, *extra)
    process, log, measured = Script(script, *args), tmp_path / "out/r/train_log.jsonl", {}
    for step in (150, 350, 550, 750, 950):
        while lines(log) < step and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, process.result().stderr
        measured[step] = usage(process.process.pid)
    done = process.result(timeout=600)
    assert done.returncode == 0, done.stderr
    print(script, {step: f"{memory:.0f} MiB, {files} files" for step, (memory, files) in measured.items()})
    trained = [row["step"] for row in RowFile(log).read() if row["split"] == "train"]
    assert trained == list(range(1, 1001))
    memory, files = zip(*measured.values(), strict=True)
    # A batch of a tiny model's activations is below 1 MiB: 20 MiB in 800 steps would be 25 KiB leaked per step.
    assert max(memory) - memory[0] < 20, measured
    assert max(files) - files[0] <= 2, measured
