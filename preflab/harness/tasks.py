"""Tasks of lm-evaluation-harness: resolve their names, and check their data and packages before a long run."""

import difflib
import functools
import importlib.util
import io
import logging
import math
import os
import random
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from preflab.harness.suites import Suite, load_suite, suite_of
from utils.errors import UserError
from utils.provenance import ROOT, sha256_of_files


@functools.cache
def task_manager(include_path: str | None) -> TaskManager:
    """The harness's index of tasks, including those in `include_path`."""
    # Once per process: reading some 10,000 task files takes 6 s, and both names and data are looked up in them.
    with quiet_harness():
        return TaskManager(include_path=include_path)


def choose_suite(args) -> Suite:
    """The suite of --suite or --tasks with the command line's settings applied and all task names checked."""
    suite = suite_of(args.tasks.split(",")) if args.tasks else load_suite(args.suite)
    if args.include_path:
        suite.include_path = args.include_path
    if args.apply_chat_template not in (None, suite.apply_chat_template):
        # The suite's fewshot_as_multiturn belongs to its own choice of template: leave it to the harness.
        suite.apply_chat_template, suite.fewshot_as_multiturn = args.apply_chat_template, None
    # Last, since names are looked up in the folder of --include-path too.
    expand(suite, suite.include_path)
    return suite


def expand(suite: Suite, include_path: str | None) -> None:
    """Replace glob patterns in the suite's task names by the tasks that they match, as the harness does.

    Raises:
        UserError: a name that the harness does not know; the message suggests similar ones.
    """
    manager, expanded = task_manager(include_path), {}
    for entry in suite.tasks:
        name = entry["task"]
        # A task file is passed to lm_eval by its path and is not in its index.
        matches = [name] if name.endswith(".yaml") and Path(name).is_file() else manager.match_tasks([name])
        if not matches:
            close = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f"similar: {', '.join(close)}" if close else "`lm_eval ls tasks` lists all"
            raise UserError(f"--tasks {name}: lm-evaluation-harness has no such task; {hint}")
        # The first entry of a task keeps its number of shots where two patterns match it.
        expanded |= {task: {**entry, "task": task} for task in matches if task not in expanded}
    suite.tasks = list(expanded.values())


def drop_missing(suite: Suite, args) -> tuple[dict[str, str], int]:
    """Check that every task of the suite can run; under --skip-missing, remove those that cannot.

    Returns:
        (`{removed task: reason}`, documents of the smallest remaining task).

    Raises:
        UserError: some task cannot run and --skip-missing is off, or no task can run.
    """
    print(f"checking the data of {len(suite.tasks)} tasks", file=sys.stderr)
    reasons, smallest = missing(suite, suite.include_path, args.seed)
    if reasons and not args.skip_missing:
        for task, reason in reasons.items():
            print(f"{task}: {reason}", file=sys.stderr)
        names = ", ".join([*list(reasons)[:5], *(["..."] if len(reasons) > 5 else [])])
        raise UserError(
            f"{len(reasons)} of {len(suite.tasks)} tasks cannot run ({names}; reasons above): fix them, or give"
            " --skip-missing to run the rest"
        )
    if len(reasons) == len(suite.tasks):
        raise UserError("no task can run: " + "; ".join(f"{task} {reason}" for task, reason in reasons.items()))
    suite.tasks = [entry for entry in suite.tasks if entry["task"] not in reasons]
    # --limit reduces every task to that many documents, or to that share of its documents, rounded up by lm_eval.
    limit = args.limit if args.limit is None or args.limit >= 1 else math.ceil(smallest * args.limit)
    return reasons, min(smallest, limit or smallest)


def missing(suite: Suite, include_path: str | None, seed: int) -> tuple[dict[str, str], int | None]:
    """Load, and so download, the data of every task.

    Args:
        seed: the run's seed. Some tasks shuffle their data while loading and `datasets` caches the result, so they
            must load under the same seed here and in the run.

    Returns:
        (`{task: what is missing and the fix}`, documents of the smallest task that can run).

    Raises:
        UserError: two entries contain the same task, so one result would overwrite the other.
    """
    reasons, owner, smallest, manager = {}, {}, None, task_manager(include_path)
    for entry in suite.tasks:
        task = entry["task"]
        # Packages first: loading a task without them fails with a less helpful error.
        reason, loaded = _missing_extra(suite.needs, task), {}
        if reason is None:
            # The global generators, which lm_eval seeds in the run with the same --seed before it loads tasks.
            random.seed(seed)
            np.random.seed(seed)
            reason, loaded = _load(manager, suite.needs, task)
        if reason:
            reasons[task] = reason
        # A group loads as its leaf tasks; a leaf that two entries share would run under two numbers of shots.
        for leaf, leaf_task in loaded.items():
            if leaf in owner:
                raise UserError(f"--tasks {task}: {leaf} is also in {owner[leaf]}; name it once")
            owner[leaf] = task
            # The evaluation documents only, without those of the few-shot examples.
            documents = len(leaf_task.eval_docs)
            smallest = documents if smallest is None else min(smallest, documents)
    return reasons, smallest


def _missing_extra(needs: dict, task: str) -> str | None:
    """Which package or nltk data the task needs and this environment does not have, with the fix; else None."""
    packages = [p for p in needs.get("packages", {}).get(task, []) if importlib.util.find_spec(p) is None]
    if packages:
        extra = needs.get("extras", {}).get(task)
        fix = f'pip install "lm-eval[{extra}]"' if extra else f"pip install {' '.join(packages)}"
        return f"missing packages {', '.join(packages)}: {fix}"
    for name in needs.get("nltk", {}).get(task, []):
        # nltk comes with lm-eval's extras, so it may be absent where no task needs it.
        import nltk

        try:
            nltk.data.find(f"tokenizers/{name}")
        except LookupError:
            return f"missing nltk data {name}: python -m nltk.downloader {name}"
    return None


def _load(manager: TaskManager, needs: dict, task: str) -> tuple[str | None, dict]:
    """Load a task's data as the run will. Returns (the reason if that fails, else None; its leaf tasks by name)."""
    try:
        with quiet_harness(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            if task.endswith(".yaml"):
                return None, manager.load([load_yaml(task, resolve_func=True)])["tasks"]
            return None, manager.load([task])["tasks"]
    except Exception as error:
        # Any exception here would end the run hours later, so all of them become a reason.
        text = " ".join(str(error).split())[:200] or type(error).__name__
        # The order matters where a message matches several of these causes.
        if "gated" in f"{type(error).__name__} {text}".lower():
            dataset = needs.get("gated", {}).get(task, text)
            return f"no access to gated data ({dataset}): accept its terms on the hub, then `hf auth login`", {}
        if "trust_remote_code" in text or "dataset script" in text.lower():
            return f"its dataset is a script, which datasets no longer runs ({text})", {}
        if isinstance(error, ModuleNotFoundError):
            return f"missing package {error.name}: pip install {error.name}", {}
        return f"its data cannot be loaded ({type(error).__name__}: {text})", {}


def hash_of_local_tasks(suite: Suite) -> str:
    """SHA-256 of the task files that are not part of the harness; a changed file is a different task."""
    folders = [Path(suite.include_path)] if suite.include_path else []
    if str(ROOT) in str(suite.include_path):
        folders.append(ROOT / "data" / "lm_eval_quick")
    # Data of the shipped tasks is part of the tasks: another file would give other figures under the same name.
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".yaml", ".py", ".jsonl", ".json")
    ]
    return sha256_of_files([*files, *(e["task"] for e in suite.tasks if e["task"].endswith(".yaml"))])


@contextmanager
def quiet_harness():
    """Silence the harness's warnings; those that matter are notes of the report."""
    before = os.environ.get("LMEVAL_LOG_LEVEL")
    # Both: lm_eval reads the variable when it configures its logger, which may happen inside the block.
    os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.pop("LMEVAL_LOG_LEVEL") if before is None else os.environ.update(LMEVAL_LOG_LEVEL=before)
