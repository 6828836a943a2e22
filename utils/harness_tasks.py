"""Tasks of lm-evaluation-harness: their names, and what this machine lacks to run them, told before a long run."""

import difflib
import importlib.util
import io
import logging
import os
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from utils.errors import UserError
from utils.harness_suites import Suite


def task_manager(include_path: str | None):
    """The harness's own index of tasks, with those of `include_path`."""
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        return TaskManager(include_path=include_path)


def check_names(suite: Suite, include_path: str | None) -> None:
    """Raise UserError for a task that the harness does not know, with the names that are close."""
    manager = task_manager(include_path)
    for entry in suite.tasks:
        name = entry["task"]
        if name.endswith(".yaml") and Path(name).is_file():
            continue
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f"close: {', '.join(close)}" if close else "`lm_eval ls tasks` lists all"
            raise UserError(f"--tasks {name}: lm-evaluation-harness knows no such task; {hint}")


def missing(suite: Suite, include_path: str | None) -> dict[str, str]:
    """`{task: what it lacks and the mend}` of the tasks that cannot run here. Loads, and so downloads, their data."""
    found, manager = {}, None
    for entry in suite.tasks:
        task = entry["task"]
        reason = _missing_extra(suite.needs, task)
        if reason is None:
            manager = manager or task_manager(include_path)
            reason = _missing_data(manager, suite.needs, task)
        if reason:
            found[task] = reason
    return found


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


def _missing_data(manager, needs: dict, task: str) -> str | None:
    """Why the task's data cannot be loaded, None where they can: it is loaded as the run will load it."""
    try:
        with quiet_harness(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            manager.load([task])
    except Exception as error:
        # Whatever loading raises is what the run would die of, hours later.
        text = " ".join(str(error).split())[:200] or type(error).__name__
        gated = needs.get("gated", {}).get(task)
        if gated or "gated" in text.lower():
            return f"lacks access to gated data ({gated or text}): accept its terms on the hub, then `hf auth login`"
        if "trust_remote_code" in text or "dataset script" in text.lower():
            return f"its data set is a script, which datasets no longer runs ({text})"
        if isinstance(error, ModuleNotFoundError):
            return f"lacks the package {error.name}: pip install {error.name}"
        return f"its data cannot be loaded ({type(error).__name__}: {text})"
    return None


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
