"""How do training's speed and memory grow with the longest sequence, and with the number of processes?

    python benchmarks/cost_growth.py --data HuggingFaceH4/ultrafeedback_binarized --split train_prefs

Runs this project's side of benchmarks/train_throughput.py for every combination of --lengths and --processes, always
with 8 pairs per step. Prints a table, writes it to --json and draws a figure to --png. The other flags are those of
train_throughput.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.child import figures_of_child
from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start

PAIRS_PER_STEP = 8
SCRIPT = Path(__file__).with_name("train_throughput.py")


@dataclass
class GrowthArguments:
    """Keys of this benchmark."""

    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048], metadata={"help": "max_length."})
    processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of processes."})
    data: str = option("Preference data in any format of the training script.", "data/quickstart_prefs")
    split: str = option("Split of --data.", "train")
    steps: int = option("Timed optimizer steps per run, after one untimed step.", 2)
    dtype: str = option("float32 or bfloat16.", "float32", choices=["float32", "bfloat16"])
    device: str = option("cpu or cuda.", "cpu", choices=["cpu", "cuda"])
    model: str = option("As in train_throughput.py.", "builtin:smollm2-135m-instruct")
    micro_batch_tokens: int = option("Tokens computed together, at every length.", 2048)
    json: str | None = option("Write the figures here.")
    png: str | None = option("Draw the figures here.")


def measure(args, length: int, processes: int) -> dict:
    """One run of this project's trainer: the figures that train_throughput.py prints."""
    launch = []
    if processes > 1:
        kind = "cpu_2proc" if args.device == "cpu" else "multi_gpu"
        config = SCRIPT.parent.parent / "configs" / "accelerate" / f"{kind}.yaml"
        launch += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
    settings = {"max_length": length, "batch": 1, "accumulation": PAIRS_PER_STEP // processes}
    settings |= {"way": "ours", "draws": 1}
    settings |= {key: getattr(args, key) for key in ("data", "split", "steps", "dtype", "device", "model")}
    settings["micro_batch_tokens"] = args.micro_batch_tokens
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return figures_of_child([*launch, str(SCRIPT), *flags], f"max_length {length} on {processes} processes")


def draw(path, rows: list[dict], title: str) -> None:
    """Draw speed and peak memory over the longest sequence, one line per number of processes."""
    from utils.plots import CHOSEN, REJECTED, figure, save

    fig, axes = figure(1, 2, title)
    for processes, colour in zip(sorted({r["processes"] for r in rows}), (CHOSEN, REJECTED, "#3d405b"), strict=False):
        own_rows = [r for r in rows if r["processes"] == processes]
        for ax, key in zip(axes, ("pairs_per_second", "peak_memory_gib"), strict=True):
            label = f"{processes} process{'es' if processes > 1 else ''}"
            ax.plot([r["max_length"] for r in own_rows], [r[key] for r in own_rows], "o-", color=colour, label=label)
    for ax, name, unit in zip(axes, ("speed", "peak memory"), ("pairs per second", "GiB, of rank 0"), strict=True):
        ax.set(title=name, xlabel="max_length, tokens", ylabel=unit, ylim=(0, None), xscale="log")
        ax.set_xticks(
            sorted({r["max_length"] for r in rows}), [str(n) for n in sorted({r["max_length"] for r in rows})]
        )
        ax.minorticks_off()
        ax.legend(frameon=False)
    save(fig, path)


def main():
    stage, args = start("cost_growth", __doc__, GrowthArguments)

    from utils.artifacts import write_json
    from utils.provenance import run_record
    from utils.tables import markdown_table

    for n in args.processes:
        if n < 1 or PAIRS_PER_STEP % n:
            raise UserError(f"--processes {n}: must divide the {PAIRS_PER_STEP} pairs per step")
    rows = []
    for processes in args.processes:
        for length in args.lengths:
            figures = measure(args, length, processes)
            rows.append(
                {
                    "processes": processes,
                    "max_length": length,
                    "pairs_per_second": figures["pairs"] / figures["seconds"],
                    "tokens_per_second": figures["tokens"] / figures["seconds"],
                    "tokens_a_pair": figures["tokens"] / figures["pairs"],
                    "peak_memory_gib": max(figures["peak_memory_gib"].values()),
                }
            )
            speed = rows[-1]["pairs_per_second"]
            print(f"{processes} processes, max_length {length}: {speed:.3f} pairs/s", file=sys.stderr)
    cells = [("processes", "max_length", "tokens per pair", "pairs/s", "tokens/s", "peak GiB of rank 0")]
    for r in rows:
        speed = (f"{r['tokens_a_pair']:.0f}", f"{r['pairs_per_second']:.3f}", f"{r['tokens_per_second']:.0f}")
        cells.append((str(r["processes"]), str(r["max_length"]), *speed, f"{r['peak_memory_gib']:.2f}"))
    print(markdown_table(cells))
    title = f"DPO training of {args.model}, {args.dtype}, {PAIRS_PER_STEP} pairs per step"
    if args.png:
        draw(args.png, rows, title)
    if args.json:
        write_json(args.json, {"rows": rows, "args": args.__dict__, "run": run_record(42, stage.seconds)})


if __name__ == "__main__":
    run(main)
