"""The answer to --list: all runs with their state, and the headline figures of what was evaluated."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from preflab.evaluation.runs import Run, folder_size, latest_run, read_run
from utils.artifacts import read_json
from utils.cache import user_cache
from utils.errors import UserError
from utils.tables import duration, estimate, paragraphs, render

# What a reader looks for first in each summary: (file, figure, metric, factor, digits).
HEADLINES = (
    ("train", "reward accuracy, %", "reward_accuracy", 100, 1),
    ("train", "reward margin", "reward_margin", 1, 3),
    ("train", "perplexity of held-out answers", "heldout_ppl_tuned", 1, 2),
    ("reward_model", "accuracy on labelled pairs, %", "reward_accuracy", 100, 1),
    ("win_rate", "win rate by reward, %", "win_rate_ties_half", 100, 1),
    ("perplexity", "perplexity of chosen answers", "response_chosen_ppl_tuned", 1, 2),
    ("perplexity", "perplexity of plain text", "text_ppl_tuned", 1, 2),
    ("perplexity", "KL(tuned || base), nats per token", "kl_chosen", 1, 4),
    ("battle", "battles won under the judge, %", "win_rate", 100, 1),
    ("alpacaeval/alpacaeval", "AlpacaEval win rate, %", "tuned_win_rate", 1, 1),
    ("human_eval", "votes won, %", "win_rate", 100, 1),
)
DAMAGED = "damaged"


def print_runs(argv: list[str], folder_flag: str = "--checkpoints") -> None:
    """Print all runs, newest first, with state, time, size and headline figures.

    Args:
        argv: the command line; --list, the folders of the runs and of the results.
        folder_flag: the script's flag for the folder of the runs.

    Raises:
        UserError: other flags beside --list.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--list", action="store_true")
    parser.add_argument(folder_flag, dest="checkpoints", default="checkpoints")
    parser.add_argument("--eval_out", default="eval_out")
    # Flags may be written with dashes, as in every script.
    argv = [arg.replace("-", "_").replace("__", "--", 1) if arg.startswith("--") else arg for arg in argv]
    args, other = parser.parse_known_args(argv)
    if other:
        raise UserError(f"--list takes only {folder_flag} and --eval_out: remove {' '.join(other)}")
    # Shell scripts run in the repository; the user's relative paths are from the folder of the call.
    caller = Path(os.environ.get("INVOKED_FROM", ""))
    places = [
        Path(value) if value == parser.get_default(key) else caller / value
        for key, value in (("checkpoints", args.checkpoints), ("eval_out", args.eval_out))
    ]
    print(list_of_runs(*places))


def list_of_runs(checkpoints: Path, eval_out: Path) -> str:
    """The printed list of the runs in `checkpoints` and of the results in `eval_out`."""
    runs = read_runs(checkpoints, eval_out)
    if not runs:
        return (
            f"{checkpoints}/ holds no run yet: `bash quickstart.sh` makes one in minutes, and"
            " `python dpo_train_human_preference.py --help` shows how to train on other data"
        )
    try:
        latest = f"without --run_name, evaluations use {latest_run(checkpoints)}, the latest finished run"
    except UserError:
        latest = "no run is finished"
    heading = ("run", "state", "trains", "base", "time", "size")
    lines = [
        (run.name, run.state, run.trains or "-", run.base or "-", duration(run.seconds), disk(run.size)) for run in runs
    ]
    parts = [render(f"{checkpoints}/ and {eval_out}/, newest first", [heading, *lines])]
    figures = [line for run in runs for line in figures_of(run)]
    if figures:
        # Grouped by figure, so that runs can be compared.
        order = {label: k for k, label in enumerate(dict.fromkeys(line[0] for line in sorted(figures, key=_rank)))}
        figures.sort(key=lambda line: order[line[0]])
        shown = [("" if k and line[0] == figures[k - 1][0] else line[0], *line[1:]) for k, line in enumerate(figures)]
        parts.append(
            render("figures, tuned model, with 95% intervals", [("figure", "run", "value", "n", "file"), *shown])
        )
    parts.append(paragraphs(f"{latest}\n{disk_use(checkpoints, eval_out)}\nrename, compare, delete: docs/runs.md"))
    return "\n\n".join(parts)


def read_runs(checkpoints: Path, eval_out: Path) -> list[Run]:
    """Every run with weights or results, newest first."""
    names = {p.name for folder in (checkpoints, eval_out) for p in folder.glob("*") if p.is_dir()}
    runs = [read_run(checkpoints / name, eval_out / name) for name in names if not name.startswith(".")]
    return sorted(runs, key=lambda run: (-run.time, run.name))


def figures_of(run: Run) -> Iterator[tuple[str, str, str, str, str]]:
    """(figure, run, value with interval, rows, file) for every summary of a run; damaged summaries are named."""
    summaries: dict[str, dict] = {}
    for stem in dict.fromkeys(stem for stem, *_ in HEADLINES):
        path = run.results / f"{stem}.json"
        if path.exists():
            summaries[stem] = _metrics(path)
    for stem, label, name, factor, digits in HEADLINES:
        metrics = summaries.get(stem, {})
        if name in metrics:
            yield label, run.name, _estimate(metrics[name], factor, digits), _rows(metrics[name]), f"{stem}.json"
    for stem, metrics in summaries.items():
        if DAMAGED in metrics:
            yield DAMAGED, run.name, metrics[DAMAGED], "", f"{stem}.json"
    for path in sorted(run.results.glob("lm_eval/*/lm_eval.json")):
        suite, metrics = path.parent.name, _metrics(path)
        file = f"lm_eval/{suite}/lm_eval.json"
        if DAMAGED in metrics:
            yield DAMAGED, run.name, metrics[DAMAGED], "", file
            continue
        # An average has no "/" before the side; a suite without averages is named all the same.
        averages = {key: m for key, m in metrics.items() if key.endswith("/tuned") and key.count("/") == 1}
        for key, m in averages.items():
            yield f"lm-eval {suite}, {key.removesuffix('/tuned')}", run.name, _estimate(m, 1, 2), _rows(m), file
        if not averages:
            yield f"lm-eval {suite}", run.name, "see lm_eval.md", "", file


def _metrics(path: Path) -> dict:
    """The metrics of a summary, or `{DAMAGED: why}`."""
    try:
        metrics = read_json(path)["metrics"]
        return metrics if isinstance(metrics, dict) else {DAMAGED: "no metrics"}
    except UserError:
        return {DAMAGED: "not valid JSON"}
    except (KeyError, TypeError):
        return {DAMAGED: "no metrics"}


def _estimate(m: dict, factor: float, digits: int) -> str:
    try:
        return estimate(m, factor, digits)
    except (KeyError, TypeError, ValueError):
        return DAMAGED


def _rows(m) -> str:
    return str(m["n"]) if isinstance(m, dict) and m.get("n") else ""


def _rank(line: tuple) -> int:
    """The place of a figure in HEADLINES; others come after them."""
    labels = [label for _, label, *_ in HEADLINES]
    return labels.index(line[0]) if line[0] in labels else len(labels)


def disk(size: int) -> str:
    """`3 KiB`, `25 MiB` or `1.2 GiB`."""
    for unit, bytes_in_unit in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= bytes_in_unit:
            return f"{size / bytes_in_unit:.{1 if unit == 'GiB' else 0}f} {unit}"
    return f"{-(-size // 1024)} KiB"


def disk_use(checkpoints: Path, eval_out: Path) -> str:
    """One line: bytes of runs, results and caches, and what can be deleted."""
    cache = eval_out / ".cache"
    parts = [f"{place}/ {disk(folder_size(place))}" for place in (checkpoints, eval_out) if place.exists()]
    parts += [f"of which {cache}/ {disk(folder_size(cache))} is safe to delete"] if cache.exists() else []
    parts += [f"{user_cache()}/ {disk(folder_size(user_cache()))}"] if user_cache().exists() else []
    return f"disk: {', '.join(parts)}"
