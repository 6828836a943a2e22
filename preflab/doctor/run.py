"""The command of doctor.sh: checks of the machine, or --clean."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from preflab.doctor import checks
from preflab.doctor.checks import OK, PROBLEM, WARNING, Finding
from utils.errors import UserError, run
from utils.provenance import ROOT


class Parser(argparse.ArgumentParser):
    """argparse with this project's form of errors."""

    def error(self, message):
        """Raise UserError instead of printing the usage."""
        raise UserError(f"command line: {message}; see bash doctor.sh --help")


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. Relative paths are from the folder of the call."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--checkpoints", default="checkpoints")
    parser.add_argument("--eval_out", "--eval-out", default="eval_out")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--clean", action="store_true")
    parser.add_argument("--yes", action="store_true")
    args = parser.parse_args(argv)
    if args.yes and not args.clean:
        raise UserError("--yes: only together with --clean")
    caller = Path(os.environ.get("INVOKED_FROM", "."))
    for key in ("config", "checkpoints", "eval_out"):
        value = getattr(args, key)
        if value and not Path(value).exists() and (caller / value).exists():
            setattr(args, key, str(caller / value))
    return args


def findings(args: argparse.Namespace) -> Iterable[Finding]:
    """All findings, one check after the other, so that each line is printed as soon as it is known."""
    installed = True
    for finding in checks.check_python(ROOT / "requirements.txt"):
        installed &= finding.state != PROBLEM
        yield finding
    folders = {"checkpoints": Path(args.checkpoints), "results and caches": Path(args.eval_out)}
    if not installed:
        yield from checks.check_disk(folders, {})
        return
    # It imports transformers, like the checks below.
    from utils.distributed import quiet_libraries

    quiet_libraries()
    yield from checks.check_gpu()
    yield from checks.check_quantisation()
    yield from checks.check_memory()
    yield from checks.check_accelerate()
    yield from checks.check_vllm()

    # They import the hub's client and transformers.
    from huggingface_hub import constants

    from preflab.doctor import recipe as recipes

    recipe, needs = recipes.read_recipe(args.config) if args.config else None, {}
    if not args.offline:
        yield from recipes.check_hub(recipe)
    if recipe:
        needs = recipes.needed_bytes(recipe)
        yield recipes.describe_needs(needs)
    yield from checks.check_disk({**folders, "models and data sets": Path(constants.HF_HOME)}, needs)


def examine(args: argparse.Namespace) -> int:
    """Print every finding and a conclusion; 1 if there is a problem."""
    from utils.tables import paragraphs

    states = []
    for finding in findings(args):
        states.append(finding.state)
        lines = paragraphs(finding.text, width=78).splitlines()
        print(f"{finding.state:<8} {finding.topic:<10} " + f"\n{'':<20}".join(lines), flush=True)
    problems, warnings = states.count(PROBLEM), states.count(WARNING)
    print(f"\n{states.count(OK)} ok, {warnings} warnings, {problems} problems")
    return int(problems > 0)


def clean(args: argparse.Namespace) -> int:
    """List what can be deleted, and delete it with --yes."""
    # It imports packages, which examine() reports when they are missing.
    from preflab.doctor.cleaning import leftovers
    from preflab.evaluation.run_list import disk

    items, total = list(leftovers(Path(args.checkpoints), Path(args.eval_out))), 0
    for item in items:
        total += item.size
        print(f"{disk(item.size):>9}  {item.path}  ({item.costs})")
        if args.yes:
            item.remove()
    if not items:
        print("nothing to clean")
    elif args.yes:
        print(f"deleted {disk(total)}")
    else:
        print(f"{disk(total)} in total; bash doctor.sh --clean --yes deletes this")
    print("downloaded models and data sets are the hub client's: `hf cache ls` lists them, `hf cache rm` deletes")
    return 0


def main():
    """Check or clean, and exit."""
    args = arguments(sys.argv[1:])
    sys.exit(clean(args) if args.clean else examine(args))


if __name__ == "__main__":
    run(main)
