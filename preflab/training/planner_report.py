"""The printed plan of a run (`preflab.training.planner`): options, parts of the memory, time, disk, the command."""

import shlex
import sys
from pathlib import Path

from utils.stage import Report, fits_terminal
from utils.tables import duration, paragraphs
from utils.tables import render as table

GIB = 2**30
LAUNCH = {"ddp": "multi_gpu", "fsdp2": "fsdp2", "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3"}
# Field of Memory -> what it is.
PARTS = {
    "weights": "weights", "reference": "reference", "gradients": "gradients", "buckets": "gradient buckets",
    "optimizer": "optimizer state", "gathered": "gathered layers", "activations": "activations",
    "holes": "holes in the heap", "kernels": "compiled products",
}  # fmt: skip


ROUGH = (
    "This model's code cannot be run without data, so that its activations are an order of magnitude: begin with a"
    " trial run (--max_steps 2)."
)


@fits_terminal
def render(planner, tried: list, chosen, shown, facts: dict, run_name: str) -> Report:
    """Tables and sentences of the plan.

    Args:
        tried: the options in the order in which they were tried. chosen: the first that fits, or None.
        shown: the option whose memory is shown in parts.
    """
    hardware, each = planner.hardware, "the machine" if planner.hardware.cpu else "each GPU"
    lines = [("option", f"GiB of {hardware.gib:g}", "fits", "tokens/s", "time")]
    for option in shortened(tried):
        lines.append((
            option.name, f"{option.total / GIB:.1f}", "yes" if planner.fits(option) else "no",
            f"{option.tokens_per_second:,.0f}", duration(option.hours * 3600),
        ))  # fmt: skip
    title = f"{run_name} on {hardware.text}: {facts['parameters']['total'] / 1e9:.2f}B parameters"
    parts = [(name, f"{getattr(shown.memory, key) / GIB:.2f}") for key, name in PARTS.items()]
    parts = [("part", "GiB"), *(p for p in parts if float(p[1])), ("process", f"{shown.process / GIB:.2f}")]
    texts = [table(title, lines), table(f"memory of {each} at the peak: {shown.name}", parts)]
    notes = [
        f"Rows: {planner.rows.source}.",
        *([] if shown.memory.exact else [ROUGH]),
        f"Memory is computed from the model's config; an option fits if it leaves a tenth of {each} free. Not all parts"
        " are at their largest at once, so that the peak can be below their sum.",
        f"Time is computed: {_rate(planner)} It has no evaluations, saves or communication between GPUs, and"
        " fewer than about 4,600 tokens computed together are slower on a GPU.",
    ]
    if chosen is None:
        verdict = f"No option fits: the smallest needs {shown.total / GIB:.1f} GiB of {each}."
        notes.append("Further ways: a smaller --max_length, a smaller --lora_r, more or larger GPUs.")
        return Report("\n\n".join([*texts, paragraphs(*notes), verdict]), verdict)
    size, count = facts["disk"]["checkpoint_bytes"], facts["disk"]["checkpoints"]
    notes.append(
        f"Disk: {size * count / GIB:.1f} GiB for {count} checkpoints of {size / GIB:.2f} GiB (the limit and the one"
        " being written), and the final weights."
    )
    if chosen.memory.host:
        notes.append(
            f"Offload: {chosen.memory.host * hardware.gpus / GIB:.0f} GiB of each machine's memory; the time has no"
            " transfers and no optimizer on the CPU, so that it is too short."
        )
    changed = "fits as it is" if not chosen.flags and len(tried) == 1 else f"fits with: {chosen.name}"
    verdict = f"The run {changed}; {shown.total / GIB:.1f} GiB of {each}, about {duration(chosen.hours * 3600)}."
    # Not wrapped, so that it can be copied.
    return Report("\n\n".join([*texts, paragraphs(*notes), facts["command"], verdict]), verdict)


def shortened(tried: list) -> list:
    """The options to print: the last, and of those that differ in the batch only the first and the smallest."""
    groups: dict[str, list] = {}
    for option in tried[:-1]:
        groups.setdefault(option.name.partition(", batch")[0], []).append(option)
    shown = [option for group in groups.values() for option in (group[0], min(group[1:], key=_total, default=None))]
    return [*(option for option in shown if option is not None), tried[-1]]


def _total(option) -> float:
    return option.total


def _rate(planner) -> str:
    """How the speed was computed."""
    return (
        f"{planner.mfu:.1%} of the rate of matrix products, the share measured in docs/performance.md, at"
        f" {planner.hardware.rate / 1e12:,.3g} TFLOP/s ({planner.hardware.rate_source})."
    )


def command_with(option, hardware) -> str:
    """The command of this call without --plan, with an option's flags, in lines of at most 100 characters."""
    words = without_flags(sys.argv[1:], {"plan", "plan_tflops", *option.flags})
    launch = ["python"]
    if option.shards is not None:
        config = LAUNCH[option.shards.kind] + ("_offload" if option.shards.offload else "")
        launch = ["accelerate", "launch", "--config_file", f"configs/accelerate/{config}.yaml"]
        launch += ["--num_processes", str(hardware.processes)]
        launch += ["--num_machines", str(hardware.nodes)] if hardware.nodes > 1 else []
    flags = [word for flag, value in option.flags.items() for word in (f"--{flag}", str(value))]
    lines, line = [], ""
    for group in _groups([*launch, Path(sys.argv[0]).name, *words, *flags]):
        if line and len(line) + len(group) > 96:
            lines.append(line)
            line = "   "
        line = f"{line} {group}" if line else group
    return " \\\n".join([*lines, line])


def without_flags(words: list[str], names: set[str]) -> list[str]:
    """A command line without some flags and their values."""
    rest, skipping = [], False
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            skipping = name in names or name.removeprefix("no_") in names
        if not skipping:
            rest.append(word)
    return rest


def _groups(words: list[str]) -> list[str]:
    """Words with the flag that they follow, quoted for a shell: a line is not broken between them."""
    groups: list[str] = []
    for word in map(shlex.quote, words):
        if word.startswith("--") or not groups or not groups[-1].startswith("--"):
            groups.append(word)
        else:
            groups[-1] += f" {word}"
    return groups
