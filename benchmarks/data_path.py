"""How long do the rows take, and how much memory, from the command to the first training step?

    python benchmarks/data_path.py                                    # 1,000, 10,000 and 61,135 rows, cold and warm
    python benchmarks/data_path.py --rows 100000 --tokenise_only      # reading, filtering, tokenising

Writes synthetic preference rows with the lengths of UltraFeedback's (61,135 pairs has its train_prefs split) and runs
`dpo_train_human_preference.py --max_steps 10` on them twice: with empty caches, and again under another name. Every
run is stopped after its first step. The time of each phase is the training script's own (printed before training);
"before" is their sum without the reference of the ten steps' pairs, and both peaks are the script's resident memory.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start

ROOT = Path(__file__).resolve().parent.parent
# Log-normal lengths in words (median, sigma), after median and mean of 1,000 rows of ultrafeedback_binarized.
WORDS = {"prompt": (57, 1.3), "chosen": (152, 0.9), "rejected": (135, 0.9)}
LONGEST = 1000
# Seconds between two looks at the running script.
POLL = 0.1
PHASES = re.compile(r"before training: (.*(?:\n\S.* s\b.*)*)")
SECONDS = re.compile(r"([a-z ]+?) ([0-9.]+) s\b")


@dataclass
class DataPathArguments:
    """Keys of this benchmark."""

    rows: list[int] = field(default_factory=lambda: [1000, 10000, 61135], metadata={"help": "Numbers of rows."})
    model: str = option("The trained model.", "builtin:smollm2-135m-instruct")
    max_length: int = option("Longest sequence in tokens.", 1024)
    tokenise_only: bool = option("Stop after the rows are tokenised; load no model.", False)
    json: str | None = option("Write the figures here.")


def write_rows(path: Path, count: int) -> None:
    """Write `count` preference rows whose texts are random words of this project's documents."""
    documents = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    words = [word for word in documents.split() if word.strip(".,").isalpha()]
    rng = random.Random(0)

    def text(part: str) -> str:
        median, sigma = WORDS[part]
        return " ".join(rng.choices(words, k=max(1, min(LONGEST, round(rng.lognormvariate(0, sigma) * median)))))

    with path.open("w") as file:
        for i in range(count):
            prompt = f"Question {i}: {text('prompt')}"
            turns = [{"role": "user", "content": prompt}]
            answers = {side: [*turns, {"role": "assistant", "content": text(side)}] for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": prompt, **answers}) + "\n")


def command(args, data: Path, folder: Path, name: str) -> list[str]:
    """The training command, or the one that only tokenises."""
    if args.tokenise_only:
        code = (
            "import sys, time; t = time.monotonic();"
            "from preflab.data.preferences import load_pairs, tokenize;"
            "from preflab.models.loading import load_tokenizer;"
            "tokenizer = load_tokenizer(sys.argv[1]); a = time.monotonic();"
            "data = load_pairs([{'name': sys.argv[2], 'split': 'train'}]); b = time.monotonic();"
            "tokenize(data, tokenizer, int(sys.argv[3]), int(sys.argv[3]) // 2); c = time.monotonic();"
            "print(f'before training: start {a - t:.1f} s, read {b - a:.1f} s, tokenise {c - b:.1f} s')"
        )
        return [sys.executable, "-c", code, args.model, str(data), str(args.max_length)]
    flags = {
        "model_name_or_path": args.model, "dataset_name": data, "dataset_test_split": "none", "run_name": name,
        "max_length": args.max_length, "max_steps": 10, "per_device_train_batch_size": 2, "sample_prompts": 0,
        "gradient_accumulation_steps": 2, "output_dir": folder / "checkpoints", "eval_out": folder / "eval_out",
    }  # fmt: skip
    script = ROOT / "dpo_train_human_preference.py"
    return [sys.executable, str(script), "--use_peft", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]


def measure(args, data: Path, folder: Path, name: str) -> dict:
    """Run the command up to its first step.

    Returns:
        `{seconds, before, peak_gib_before, peak_gib, phases}`: until the first step has ended, and before it begins
        without the reference.
    """
    log, output = folder / "eval_out" / name / "train_log.jsonl", folder / f"{name}.log"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PREFERENCELAB_CACHE": str(folder / "cache")}
    started, peak, peak_before = time.monotonic(), 0, 0
    with output.open("w") as file:
        process = subprocess.Popen(command(args, data, folder, name), stdout=file, stderr=file, env=env, cwd=ROOT)
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            peak = max(peak, peak_of(process.pid))
            peak_before = peak_before if "before training" in output.read_text() else peak
            time.sleep(POLL)
        seconds = time.monotonic() - started
        stopped = process.poll() is None
        process.kill()
        process.wait()
    phases = PHASES.search(output.read_text())
    if phases is None or not (stopped or args.tokenise_only):
        raise UserError(f"{name}: the command failed: {output.read_text().strip().splitlines()[-1:]}")
    before = {name.strip(): float(seconds) for name, seconds in SECONDS.findall(phases[1])}
    return {
        "seconds": round(seconds, 1),
        "before": round(sum(before.values()) - before.get("reference", 0), 1),
        "peak_gib_before": round((peak_before or peak) / 2**20, 2),
        "peak_gib": round(peak / 2**20, 2),
        "phases": " ".join(phases[1].split()),
    }


def peak_of(pid: int) -> int:
    """The largest resident memory of a process so far, in KiB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"VmHWM:\s+(\d+)", status)
    return int(match[1]) if match else 0


def main():
    _, args = start("data_path", __doc__, DataPathArguments)
    figures = []
    print("| rows | caches | seconds | before | peak GiB before | peak GiB | phases |\n|" + " --- |" * 7)
    for count in args.rows:
        folder = Path(tempfile.mkdtemp(prefix="data_path_"))
        try:
            write_rows(folder / "train.jsonl", count)
            for state in ("cold", "warm"):
                figure = {"rows": count, "caches": state, **measure(args, folder / "train.jsonl", folder, state)}
                figures.append(figure)
                print("| " + " | ".join(str(value) for value in figure.values()) + " |", flush=True)
        finally:
            shutil.rmtree(folder)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
