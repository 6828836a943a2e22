"""What stands behind a reward win rate: calibration, slices, length, and the trainer's own way of averaging."""

import json
from pathlib import Path

import numpy as np

from preflab.evaluation.rewards import reward_metrics
from utils.artifacts import RowFile, metric, read_json
from utils.errors import UserError
from utils.stats import bootstrap, mcnemar, pairwise_correct, rank_correlation, sign_test

# The names of the field's win-rate files, for the figures that training calls by the trainer's names.
WIN_RATE_NAMES = {
    "reward_accuracy_strict": "win_rate",
    "reward_accuracy": "win_rate_ties_half",
    "reward_margin": "avg_margin",
    "reward_chosen": "avg_reward_chosen",
    "reward_rejected": "avg_reward_rejected",
    "p_reward_accuracy_is_half": "p_win_rate_is_half",
    "reward_accuracy_minus_base_ranking": "win_rate_minus_base_ranking",
    "p_reward_accuracy_is_base_ranking": "p_win_rate_is_base_ranking",
    "p_reward_margin_is_0": "p_avg_margin_is_0",
}
LENGTH_MATCHED = 0.1
EXPECTED_TOLERANCE = 1e-3
TRAINER_KEYS = {
    "rewards/accuracies": lambda row: float(row["margin"] > 0),
    "rewards/margins": lambda row: row["margin"],
    "rewards/chosen": lambda row: row["reward_chosen"],
    "rewards/rejected": lambda row: row["reward_rejected"],
    "logps/chosen": lambda row: row["chosen"],
    "logps/rejected": lambda row: row["rejected"],
}


def win_rate_metrics(rows: list[dict], beta: float, skipped: dict, seed: int) -> dict:
    """All summary metrics of the rows: those of `rewards.reward_metrics` under the field's names, and more.

    Length-normalised: beta × the mean log-ratio of an answer's tokens, in the place of the sum.
    """
    found = {WIN_RATE_NAMES.get(k, k): m for k, m in reward_metrics(rows, seed=seed).items()}
    normalised = np.array(
        [
            [beta * (row[side] - row[f"ref_{side}"]) / row[f"tokens_{side}"] for side in ("chosen", "rejected")]
            for row in rows
        ]
    )
    right = pairwise_correct(*normalised.T)
    found |= {
        "win_rate_length_normalised": bootstrap(normalised[:, 0] > normalised[:, 1], seed),
        "win_rate_length_normalised_ties_half": bootstrap(right, seed),
        "avg_margin_length_normalised": bootstrap(normalised, seed),
        "p_win_rate_length_normalised_is_half": metric(sign_test(right), n=len(rows)),
        "evaluated_examples": metric(len(rows), n=len(rows)),
        "skipped_examples": metric(sum(skipped.values())),
        **length_correlations(rows, seed),
        **calibration_metrics(margins(rows), seed),
    }
    return found


def margins(rows: list[dict]) -> np.ndarray:
    """Reward margins, shape (n,), in beta × nats."""
    return np.array([row["margin"] for row in rows])


# ------------------------------------------------------------------------------------------------------ calibration


def _sigmoid(x):
    from scipy.special import expit

    return expit(x)


def calibration_metrics(margin: np.ndarray, seed: int) -> dict:
    """Does sigmoid(margin) say how often chosen is preferred, as the Bradley-Terry model behind DPO reads it?

    log_loss is mean -log sigmoid(margin), the DPO loss on the data (0.693 knows nothing); brier is the mean of
    (1 - sigmoid(margin))^2; ece weighs |accuracy - confidence| over the bins of `calibration_bins`.
    """
    from scipy.special import log_expit

    bins = calibration_bins(margin, seed)
    ece = sum(b["n"] * abs(b["accuracy"]["value"] - b["confidence"]) for b in bins) / max(1, len(margin))
    return {
        "calibration_log_loss": bootstrap(-log_expit(margin), seed),
        "calibration_brier": bootstrap((1 - _sigmoid(margin)) ** 2, seed),
        "calibration_ece": metric(ece, n=len(margin)),
        "calibration_scale": metric(best_scale(margin), n=len(margin)),
    }


def best_scale(margin: np.ndarray) -> float:
    """The factor on the margins that makes sigmoid(factor × margin) fit best: below 1 they are overconfident."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_expit

    fit = minimize_scalar(lambda s: -log_expit(s * margin).mean(), bounds=(0, 1e3), method="bounded")
    return float(fit.x)


def calibration_bins(margin: np.ndarray, seed: int, most: int = 10, least: int = 10) -> list[dict]:
    """Up to `most` bins of equal count over the confidence sigmoid(|margin|), each of at least `least` pairs."""
    confidence, right = _sigmoid(np.abs(margin)), pairwise_correct(margin, np.zeros(len(margin)))
    count = int(np.clip(len(margin) // least, 1, most))
    found = []
    for part in np.array_split(np.argsort(confidence, kind="stable"), count):
        if len(part):
            found.append(
                {
                    "confidence": float(confidence[part].mean()),
                    "accuracy": bootstrap(right[part], seed),
                    "n": len(part),
                }
            )
    return found


# ----------------------------------------------------------------------------------------------------------- slices


def length_correlations(rows: list[dict], seed: int) -> dict:
    """Spearman's correlation of margins with length differences and of rewards with lengths (in tokens).

    The rewards' correlation takes both answers of a pair and resamples pairs.
    """
    sides = np.array(
        [[r["reward_chosen"], r["tokens_chosen"], r["reward_rejected"], r["tokens_rejected"]] for r in rows]
    )

    def of_rewards(x):
        return rank_correlation(np.concatenate([x[:, :2], x[:, 2:]]))

    difference = np.stack([sides[:, 0] - sides[:, 2], sides[:, 1] - sides[:, 3]], 1)
    return {
        "margin_length_correlation": bootstrap(difference, seed, statistic=rank_correlation),
        "reward_length_correlation": bootstrap(sides, seed, statistic=of_rewards),
    }


def slices(rows: list[dict], seed: int) -> dict:
    """Win rates by length, on length-matched pairs, by the longer side, and by score gap where the data has scores.

    Returns:
        `{slicing: {slice: {n, win_rate, win_rate_ties_half, avg_margin, base_ranking, ...}}}`. Lengths are tokens.
    """
    chosen, rejected = (np.array([row[f"tokens_{side}"] for row in rows]) for side in ("chosen", "rejected"))
    longer, both = np.maximum(chosen, rejected), (chosen + rejected) / 2
    matched = np.abs(chosen - rejected) <= LENGTH_MATCHED * longer
    found = {
        "by_length": _quantiles(both, "tokens"),
        "by_length_match": {
            f"lengths within {LENGTH_MATCHED:.0%}": matched,
            f"lengths beyond {LENGTH_MATCHED:.0%}": ~matched,
        },
        "by_longer_side": {
            "chosen longer, tokens": chosen > rejected,
            "rejected longer, tokens": chosen < rejected,
            "equal, tokens": chosen == rejected,
        },
    }
    gaps = [
        None if None in (r["score_chosen"], r["score_rejected"]) else r["score_chosen"] - r["score_rejected"]
        for r in rows
    ]
    scored = np.array([g is not None for g in gaps])
    if scored.any():
        gap = np.array([np.nan if g is None else g for g in gaps])
        found["by_score_gap"] = _quantiles(gap, "score gap", scored, parts=3)
        if not scored.all():
            found["by_score_gap"]["without scores"] = ~scored
    return {
        name: {label: _slice(rows, mask, seed) for label, mask in groups.items() if mask.any()}
        for name, groups in found.items()
    }


def _quantiles(values, unit: str, among=None, parts: int = 4) -> dict:
    among = np.ones(len(values), bool) if among is None else among
    edges = np.unique(np.quantile(values[among], np.linspace(0, 1, parts + 1)))
    if len(edges) == 1:
        return {f"{unit} {edges[0]:.4g}": among}
    found = {}
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        last = i == len(edges) - 2
        inside = among & (values >= low) & ((values <= high) if last else (values < high))
        found[f"{unit} {low:.4g} to {'' if last else 'below '}{high:.4g}"] = inside
    return found


def _slice(rows: list[dict], mask, seed: int) -> dict:
    part = [row for row, inside in zip(rows, mask, strict=True) if inside]
    margin = margins(part)
    right = pairwise_correct(margin, np.zeros(len(part)))
    base = pairwise_correct([r["ref_chosen"] for r in part], [r["ref_rejected"] for r in part])
    return {
        "n": len(part),
        "win_rate": bootstrap(margin > 0, seed),
        "win_rate_ties_half": bootstrap(right, seed),
        "avg_margin": bootstrap(margin, seed),
        "base_ranking": bootstrap(base, seed),
        "win_rate_minus_base_ranking": bootstrap(np.stack([right, base], 1), seed),
        "p_win_rate_is_base_ranking": mcnemar(right, base),
    }


# --------------------------------------------------------------------------------------- the trainer's own averages


def trainer_batches(count: int, batch_size: int, processes: int) -> list[list[int]]:
    """The rows behind each averaged step of transformers' evaluation, repeated rows included.

    One process ends on a short batch. Several deal out batches and fill the last round with rows from the start
    (accelerate's even_batches), and TRL averages over all of them.
    """
    order, step = list(range(count)), batch_size * processes
    if processes > 1 and count % step:
        order += [i % count for i in range(step - count % step)]
    return [order[i : i + step] for i in range(0, len(order), step)]


def longest_first_batches(lengths: list[int], batch_size: int, processes: int) -> list[list[int]]:
    """The rows behind each averaged step of `ResumableDPOTrainer.score`: dealt out row by row, then longest first."""
    share = -(-len(lengths) // processes)
    dealt = [
        sorted(
            (min(k, len(lengths) - 1) for k in range(rank, share * processes, processes)),
            key=lambda i: (-lengths[i], i),
        )
        for rank in range(processes)
    ]
    return [[i for rows in dealt for i in rows[at : at + batch_size]] for at in range(0, share, batch_size)]


def trainer_figures(rows: list[dict], batches: list[list[int]]) -> dict:
    """TRL's eval metrics as its trainer computes them: the mean over steps of the mean over each step's rows."""
    return {
        key: float(np.mean([np.mean([value(rows[i]) for i in batch]) for batch in batches]))
        for key, value in TRAINER_KEYS.items()
    }


def read_expected(path: str, step: int | None = None) -> dict:
    """The trainer's last eval metrics: our train_log.jsonl, transformers' trainer_state.json or eval_results.json.

    Args:
        step: the optimiser step of the weights, where they are a checkpoint's: its evaluation is taken, not the last.

    Returns:
        `{metric: value}` without the `eval_` prefix. Raises UserError where the file has no such evaluation.
    """
    if Path(path).suffix == ".jsonl":
        if not Path(path).exists():
            raise UserError(f"--expected {path}: no such file")
        try:
            rows = RowFile(path).read()
        except json.JSONDecodeError:
            raise UserError(f"--expected {path}: not the JSON lines of a training log") from None
    else:
        data = read_json(path)
        rows = data.get("log_history", [data]) if isinstance(data, dict) else []
    rows = [r for r in rows if isinstance(r, dict)]
    logged = [r for r in rows if r.get("split") == "eval" or any(k.startswith("eval_") for k in r)]
    logged = [{k.removeprefix("eval_"): v for k, v in r.items()} for r in logged]
    logged = [r for r in logged if set(TRAINER_KEYS) & set(r)]
    if not logged:
        raise UserError(f"--expected {path}: no evaluation with {', '.join(TRAINER_KEYS)} in it")
    if step is not None and any("step" in r for r in logged):
        logged = [r for r in logged if r.get("step") == step]
        if not logged:
            raise UserError(f"--expected {path}: no evaluation at step {step}, where the checkpoint was saved")
    return logged[-1]


def compare_expected(rows: list[dict], expected: dict, batch_size: int, processes: int) -> dict:
    """The trainer's figures beside ours, recomputed with its batching and as plain means over rows.

    Returns:
        `{agrees, tolerance, batch_size, processes, figures: {metric: {trainer, recomputed, mean_over_rows, agrees}}}`.
        Log-probabilities are compared relative to their size, all else absolutely.
    """
    if expected.get("longest_first"):
        lengths = [row["tokens_prompt"] + max(row["tokens_chosen"], row["tokens_rejected"]) for row in rows]
        batches = longest_first_batches(lengths, batch_size, processes)
    else:
        batches = trainer_batches(len(rows), batch_size, processes)
    ours = trainer_figures(rows, batches)
    plain = trainer_figures(rows, [list(range(len(rows)))])
    figures = {}
    for key in TRAINER_KEYS:
        if key in expected:
            allowed = EXPECTED_TOLERANCE * (max(1.0, abs(expected[key])) if key.startswith("logps") else 1.0)
            figures[key] = {
                "trainer": expected[key],
                "recomputed": ours[key],
                "mean_over_rows": plain[key],
                "agrees": bool(abs(ours[key] - expected[key]) <= allowed),
            }
    return {
        "agrees": all(f["agrees"] for f in figures.values()),
        "tolerance": EXPECTED_TOLERANCE,
        "batch_size": batch_size,
        "processes": processes,
        "figures": figures,
    }


def training_batches(path: str) -> tuple[int | None, int | None]:
    """(per_device_eval_batch_size, processes) of the training run that wrote `path`, from the train.json beside it."""
    beside = Path(path).parent / "train.json"
    if not beside.exists():
        return None, None
    summary = read_json(beside)
    return summary["args"].get("per_device_eval_batch_size"), summary["run"].get("world_size")
