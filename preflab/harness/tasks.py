"""Tasks of lm-evaluation-harness: their names, and what this machine lacks to run them, told before a long run."""

import difflib
import importlib.util
import io
import logging
import os
import random
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from preflab.harness.suites import Suite
from utils.errors import UserError


def task_manager(include_path: str | None):
    """The harness's own index of tasks, with those of `include_path`."""
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        return TaskManager(include_path=include_path)


def expand(suite: Suite, include_path: str | None) -> None:
    """Take the suite's task names as the harness does: globs become what they match.

    Raises UserError for a name that the harness does not know, with those that are close.
    """
    manager, found = task_manager(include_path), {}
    for entry in suite.tasks:
        name = entry["task"]
        known = [name] if name.endswith(".yaml") and Path(name).is_file() else manager.match_tasks([name])
        if not known:
            close = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f"close: {', '.join(close)}" if close else "`lm_eval ls tasks` lists all"
            raise UserError(f"--tasks {name}: lm-evaluation-harness knows no such task; {hint}")
        found |= {task: {**entry, "task": task} for task in known if task not in found}
    suite.tasks = list(found.values())


def missing(suite: Suite, include_path: str | None, seed: int) -> tuple[dict[str, str], int | None]:
    """Loads, and so downloads, the data of every task.

    Args:
        seed: some tasks shuffle while they load, and `datasets` keeps what came out: they must find the run's seed.

    Returns:
        (`{task: what it lacks and the mend}`, documents of the smallest task that can run). Raises UserError where two
        entries bring the same task, whose figures would overwrite each other.
    """
    import numpy as np

    lacking, owner, smallest, manager = {}, {}, None, task_manager(include_path)
    for entry in suite.tasks:
        task = entry["task"]
        reason, loaded = _missing_extra(suite.needs, task), {}
        if reason is None:
            random.seed(seed)
            np.random.seed(seed)
            reason, loaded = _load(manager, suite.needs, task)
        if reason:
            lacking[task] = reason
        for leaf, found in loaded.items():
            if leaf in owner:
                raise UserError(f"--tasks {task}: {leaf} is in {owner[leaf]} too; name it once")
            owner[leaf] = task
            documents = len(found.eval_docs)
            smallest = documents if smallest is None else min(smallest, documents)
    return lacking, smallest


def _missing_extra(needs: dict, task: str) -> str | None:
    packages = [p for p in needs.get("packages", {}).get(task, []) if importlib.util.find_spec(p) is None]
    if packages:
        extra = needs.get("extras", {}).get(task)
        mend = f'pip install "lm-eval[{extra}]"' if extra else f"pip install {' '.join(packages)}"
        return f"lacks the packages {', '.join(packages)}: {mend}"
    for name in needs.get("nltk", {}).get(task, []):
        import nltk

        try:
            nltk.data.find(f"tokenizers/{name}")
        except LookupError:
            return f"lacks nltk's {name}: python -m nltk.downloader {name}"
    return None


def _load(manager, needs: dict, task: str) -> tuple[str | None, dict]:
    """(why the task's data cannot be loaded or None, its leaf tasks by name): loaded as the run will load it."""
    try:
        with quiet_harness(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            if task.endswith(".yaml"):
                from lm_eval.tasks._yaml_loader import load_yaml

                return None, manager.load([load_yaml(task, resolve_func=True)])["tasks"]
            return None, manager.load([task])["tasks"]
    except Exception as error:
        # Whatever loading raises is what the run would die of, hours later.
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if "gated" in f"{type(error).__name__} {text}".lower():
            what = needs.get("gated", {}).get(task, text)
            return f"lacks access to gated data ({what}): accept its terms on the hub, then `hf auth login`", {}
        if "trust_remote_code" in text or "dataset script" in text.lower():
            return f"its data set is a script, which datasets no longer runs ({text})", {}
        if isinstance(error, ModuleNotFoundError):
            return f"lacks the package {error.name}: pip install {error.name}", {}
        return f"its data cannot be loaded ({type(error).__name__}: {text})", {}


@contextmanager
def quiet_harness():
    """The harness's warnings off: what matters of them stands in our table."""
    before = os.environ.get("LMEVAL_LOG_LEVEL")
    os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.pop("LMEVAL_LOG_LEVEL") if before is None else os.environ.update(LMEVAL_LOG_LEVEL=before)
