"""The trainer's own eval metrics, recomputed from scored rows with the trainer's batching (`--expected`).

The trainer averages over batches first, so its metrics differ from plain means over rows: a short last batch weighs as
much as a full one.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preflab.evaluation.comparison import Comparison
from utils.artifacts import RowFile, read_json
from utils.errors import UserError

TOLERANCE = 1e-3
# TRL's names of its DPO metrics, and their value on one row of `rewards.reward_rows`.
VALUE_OF_ROW = {
    # Strict, as in TRL: a tie counts as wrong.
    "rewards/accuracies": lambda row: float(row["margin"] > 0),
    "rewards/margins": lambda row: row["margin"],
    "rewards/chosen": lambda row: row["reward_chosen"],
    "rewards/rejected": lambda row: row["reward_rejected"],
    "logps/chosen": lambda row: row["chosen"],
    "logps/rejected": lambda row: row["rejected"],
}


@dataclass
class TrainerEvaluation:
    """An evaluation that a trainer logged: its metrics, and the batch size and processes that it averaged over."""

    metrics: dict
    batch_size: int
    processes: int


def read_trainer_evaluation(args, comparison: Comparison) -> TrainerEvaluation | None:
    """Read `--expected`; None if it is not given.

    Args:
        args: expected, expected_batch_size and expected_processes.

    Raises:
        UserError: the file has no evaluation, or the run's metrics cannot be compared with this evaluation's.
    """
    if args.expected is None:
        return None
    trained = comparison.trained
    if trained.get("ld_alpha") is not None:
        raise UserError(
            "--expected: the run used ld_alpha, which discounts log-probabilities, so its metrics are not comparable"
        )
    if trained.get("limit") != comparison.args.limit:
        raise UserError(
            f"--expected: the run used --limit {trained.get('limit')}, this call --limit {comparison.args.limit}; use"
            " the same value"
        )
    batch_size, processes = training_batches(args.expected)
    return TrainerEvaluation(
        read_logged_metrics(args.expected, comparison.step),
        args.expected_batch_size or batch_size or 8,
        args.expected_processes or processes or 1,
    )


def read_logged_metrics(path: str, step: int | None = None) -> dict:
    """The last eval metrics in a train_log.jsonl, or in transformers' trainer_state.json or eval_results.json.

    Args:
        step: the optimizer step of a checkpoint; its evaluation is read instead of the last one.

    Returns:
        `{metric: value}` without the `eval_` prefix.

    Raises:
        UserError: the file has no such evaluation.
    """
    if Path(path).suffix == ".jsonl":
        if not Path(path).exists():
            raise UserError(f"--expected {path}: no such file")
        try:
            entries = RowFile(path).read()
        except UserError as error:
            raise UserError(f"--expected {path}: not a training log in JSON lines ({error})") from None
    else:
        content = read_json(path)
        # trainer_state.json has a history; eval_results.json is a single entry.
        entries = content.get("log_history", [content]) if isinstance(content, dict) else []
    entries = [entry for entry in entries if isinstance(entry, dict)]
    # This project's log marks evaluations by `split`, transformers' by the prefix of the keys.
    logged = [e for e in entries if e.get("split") == "eval" or any(key.startswith("eval_") for key in e)]
    logged = [{key.removeprefix("eval_"): value for key, value in entry.items()} for entry in logged]
    logged = [entry for entry in logged if set(VALUE_OF_ROW) & set(entry)]
    if not logged:
        raise UserError(f"--expected {path}: contains no evaluation with {', '.join(VALUE_OF_ROW)}")
    if step is not None and any("step" in entry for entry in logged):
        logged = [entry for entry in logged if entry.get("step") == step]
        if not logged:
            raise UserError(f"--expected {path}: no evaluation at step {step}, the step of the checkpoint")
    # The last evaluation is the one nearest to the final weights, which are those in the run's folder.
    return logged[-1]


def training_batches(path: str) -> tuple[int | None, int | None]:
    """(per_device_eval_batch_size, processes) of the run that wrote `path`, from the train.json in the same folder."""
    train_json = Path(path).parent / "train.json"
    if not train_json.exists():
        return None, None
    summary = read_json(train_json)
    return summary["args"].get("per_device_eval_batch_size"), summary["run"].get("world_size")


def in_order_batches(count: int, batch_size: int, processes: int) -> list[list[int]]:
    """The rows behind each averaged step of transformers' evaluation, repeated rows included.

    A single process ends with a short batch. With several, accelerate (even_batches) fills the last round with rows
    from the start, and TRL averages over all of them.
    """
    order, step = list(range(count)), batch_size * processes
    if processes > 1 and count % step:
        # % count: a dataset smaller than the gap is repeated more than once.
        order += [i % count for i in range(step - count % step)]
    return [order[i : i + step] for i in range(0, len(order), step)]


def longest_first_batches(lengths: list[int], batch_size: int, processes: int) -> list[list[int]]:
    """The rows behind each averaged step of `ResumableDPOTrainer.score`.

    Rows are dealt out to the processes one by one, the last row repeated to fill up, then sorted by length.
    """
    # Rounded up: every process gets the same number of rows, as collective operations require.
    share = -(-len(lengths) // processes)
    rows_of_process = [
        sorted(
            (min(k, len(lengths) - 1) for k in range(rank, share * processes, processes)),
            key=lambda i: (-lengths[i], i),
        )
        for rank in range(processes)
    ]
    return [[i for rows in rows_of_process for i in rows[at : at + batch_size]] for at in range(0, share, batch_size)]


def mean_over_batches(rows: list[dict], batches: list[list[int]]) -> dict:
    """TRL's eval metrics as its trainer computes them: the mean over batches of the mean over each batch's rows."""
    return {
        # Not the mean over rows: a short last batch has the weight of a full one.
        key: float(np.mean([np.mean([value(rows[i]) for i in batch]) for batch in batches]))
        for key, value in VALUE_OF_ROW.items()
    }


def compare(rows: list[dict], logged: TrainerEvaluation) -> dict:
    """The trainer's metrics beside those of the rows, with the trainer's batching and as plain means over rows.

    Returns:
        `{agrees, tolerance, batch_size, processes, figures: {metric: {trainer, recomputed, mean_over_rows, agrees}}}`.
        The tolerance is relative for log-probabilities above 1 nat and absolute otherwise.
    """
    expected, size, processes = logged.metrics, logged.batch_size, logged.processes
    # `eval_longest_first` in the log marks an evaluation by ResumableDPOTrainer.score, whose batches are sorted by
    # length. The length is that of preflab.models.logprobs.pair_batches.
    if expected.get("longest_first"):
        lengths = [row["tokens_prompt"] + max(row["tokens_chosen"], row["tokens_rejected"]) for row in rows]
        batches = longest_first_batches(lengths, size, processes)
    else:
        batches = in_order_batches(len(rows), size, processes)
    recomputed = mean_over_batches(rows, batches)
    # One batch of all rows: the plain mean, which explains where the summary's figures differ from the trainer's.
    plain = mean_over_batches(rows, [list(range(len(rows)))])
    figures = {}
    for key in VALUE_OF_ROW:
        if key in expected:
            # Summed log-probabilities are in the hundreds of nats, rewards and accuracies around 1.
            allowed = TOLERANCE * (max(1.0, abs(expected[key])) if key.startswith("logps") else 1.0)
            figures[key] = {
                "trainer": expected[key],
                "recomputed": recomputed[key],
                "mean_over_rows": plain[key],
                "agrees": bool(abs(recomputed[key] - expected[key]) <= allowed),
            }
    return {
        "agrees": all(f["agrees"] for f in figures.values()),
        "tolerance": TOLERANCE,
        "batch_size": size,
        "processes": processes,
        "figures": figures,
    }
