"""Does everything run on this machine's GPU? Every stage on the builtin model, within a time limit.

    bash benchmarks/gpu_acceptance.sh                       # writes eval_out/gpu_acceptance/
    bash benchmarks/gpu_acceptance.sh --minutes 20          # more time for the largest models
    bash benchmarks/gpu_acceptance.sh --only dpo_lora kill_and_resume
    bash benchmarks/gpu_acceptance.sh --device cpu          # the same steps, as far as they go

Each step is a separate process, so that one failure does not stop the others. A step that cannot run on this machine
is skipped with the reason, and so is one for which no time is left; steps are ordered by importance. Writes
gpu_acceptance.json and gpu_acceptance.md after every step. Exit code 1 if a step failed.
"""

import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.acceptance_steps import STEPS_OF_PAGE, Machine, Step, StepFailed, execute
from utils.artifacts import write_json, write_text
from utils.cli import option
from utils.errors import UserError, run
from utils.progress import progress
from utils.stage import start

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass
class AcceptanceArguments:
    """Keys of this benchmark."""

    device: str = option("cuda or cpu.", "cuda", choices=["cuda", "cpu"])
    minutes: float = option("Time limit of all steps together.", 9.0)
    only: list[str] | None = field(default=None, metadata={"help": "Names of the steps to run (default: all)."})
    output_dir: str = option("Folder of the JSON and the Markdown page.", "eval_out/gpu_acceptance")


@dataclass
class Result:
    """What became of a step: `state` is passed, failed or skipped, `detail` the reason of the last two."""

    name: str
    says: str
    state: str
    seconds: float = 0.0
    figures: dict = field(default_factory=dict)
    detail: str = ""


def perform(step: Step, machine: Machine, results: dict[str, Result], left: float) -> Result:
    """Run one step, or say why not."""
    reason = step.skip(machine)
    if reason is None and step.needs and results.get(step.needs, Result("", "", SKIPPED)).state != PASSED:
        reason = f"needs the step {step.needs}"
    if reason is None and left <= 0:
        reason = "no time left (--minutes)"
    if reason:
        return Result(step.name, step.says, SKIPPED, detail=reason)
    begin = time.monotonic()
    try:
        output = step.do(machine, left) if step.do else execute(step.command(machine), left)
        figures, state, detail = step.read(machine, output), PASSED, ""
    except StepFailed as error:
        figures, state, detail = {}, FAILED, str(error)
    except (OSError, ValueError, KeyError, IndexError) as error:
        figures, state, detail = {}, FAILED, f"the step ended, but its figures cannot be read: {error!r}"
    return Result(step.name, step.says, state, round(time.monotonic() - begin, 1), figures, detail)


def page(results: list[Result], run_info: dict, device: str) -> str:
    """The Markdown page."""
    hardware, versions = run_info["hardware"], run_info["versions"]
    where = ", ".join(hardware["gpus"]) if device == "cuda" else hardware["cpu"]
    counts = {state: sum(r.state == state for r in results) for state in (PASSED, FAILED, SKIPPED)}
    lines = [
        "# Acceptance on " + where,
        "",
        f"{', '.join(f'{count} {state}' for state, count in counts.items())}; {run_info['wall_seconds']:.0f} s;"
        f" commit `{run_info['git_commit']}`; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        "",
        "| step | | seconds | figures |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        figures = "; ".join(f"{name}: {value}" for name, value in result.figures.items())
        lines.append(f"| {result.says} | {result.state} | {result.seconds:.0f} | {figures or result.detail} |")
    return "\n".join(lines) + "\n"


def machine_of(args, folder: Path) -> Machine:
    """The machine to test.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; --device cpu runs the steps that need none")
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if args.device == "cuda" else 0.0
    return Machine(args.device, gib, folder)


def main():
    stage, args = start("gpu_acceptance", __doc__, AcceptanceArguments, runs_bare=True)
    names = [step.name for step in STEPS_OF_PAGE]
    unknown = [name for name in args.only or [] if name not in names]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such step; the steps are {', '.join(names)}")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes}: must be above 0")

    from utils.provenance import run_record

    folder = Path(tempfile.mkdtemp(prefix="acceptance_"))
    try:
        machine, results, output = machine_of(args, folder), {}, Path(args.output_dir)
        steps = [step for step in STEPS_OF_PAGE if not args.only or step.name in args.only]
        with progress(len(steps), "acceptance", "step") as bar:
            for step in steps:
                left = 60 * args.minutes - stage.seconds
                results[step.name] = perform(step, machine, results, left)
                result, run_info = results[step.name], run_record(0, stage.seconds)
                print(f"{result.state:<8} {result.seconds:6.1f} s  {step.says}  {result.figures or result.detail}")
                done = list(results.values())
                write_json(
                    output / "gpu_acceptance.json",
                    {"device": args.device, "steps": [asdict(r) for r in done], "args": vars(args), "run": run_info},
                )
                write_text(output / "gpu_acceptance.md", page(done, run_info, args.device))
                bar.update(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = [result.name for result in results.values() if result.state == FAILED]
    print(f"wrote {output}/gpu_acceptance.json and .md; failed: {', '.join(failed) or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
