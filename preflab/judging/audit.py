"""Is a judge worth listening to? Its verdicts on pairs whose better answer is labelled, beside its controls."""

import numpy as np
from scipy.special import logit

from preflab.evaluation.reward_slices import calibration_bins
from preflab.judging.style import markdown_counts
from utils.artifacts import metric
from utils.stats import bootstrap, signed_rank
from utils.tables import cell, estimate, render

LENGTH_MATCHED = 0.1
LONGER_BY = 30


KNOWN_LABELS = {
    "hh-rlhf": "labels by people",
    "alpaca_farm": "labels by people",
    "ultrafeedback": "labels are model scores, not people's",
    "quickstart_prefs": "labels of this project's own pairs, given as they were written",
}


def whose_labels(sources: list[dict]) -> str:
    """Whose judgement an audit measures a judge against."""
    names = ", ".join(f"{s['name']} {s.get('split') or ''}".strip() for s in sources)
    known = [text for key, text in KNOWN_LABELS.items() if key in names.lower()]
    return f"{names}: {known[0] if known else 'labels as the dataset has them'}"


def sample(pairs: list, count: int, seed: int) -> list:
    """`count` of the pairs, drawn at random and kept in order: the first rows of a split may all be of one kind."""
    if len(pairs) <= count:
        return pairs
    return [pairs[i] for i in sorted(np.random.default_rng(seed).choice(len(pairs), count, replace=False))]


def audit_items(pairs: list) -> list:
    """Both orders of each labelled pair: item 2k shows the better answer first, item 2k + 1 the worse one."""
    from preflab.data.prompts import Prompt
    from preflab.judging.judge_prompt import Item

    items = []
    for pair in pairs:
        prompt = Prompt(pair.messages or [{"role": "user", "content": pair.text}], pair.source)
        items += [Item(prompt, pair.chosen, pair.rejected), Item(prompt, pair.rejected, pair.chosen)]
    return items


def _first(verdicts: list) -> np.ndarray:
    """Score of the first slot in both orders of each pair, shape (pairs, 2); NaN without a verdict."""
    return np.array([np.nan if v.first is None else v.first for v in verdicts]).reshape(-1, 2)


def _agreement(first: np.ndarray) -> np.ndarray:
    """Mean over both orders of whether the better answer won, shape (pairs,)."""
    return (first[:, 0] + 1 - first[:, 1]) / 2


def audit(pairs: list, verdicts: list, seed: int, ordered: bool = True) -> dict:
    """`{name: metric}` of one judge.

    Args:
        pairs: preflab.data.preferences.Pair, chosen labelled better. verdicts: of `audit_items`.
        ordered: false for a judge that puts the answers into an order of its own, so that slots mean nothing.

    Returns:
        agreement (mean of both orders, ties half) on all pairs, on length-matched ones (within 10% of the longer, in
        characters) and on those whose better answer is shorter; flip_rate and prefers_first; prefers_longer where the
        lengths differ by more than 30 characters; prefers_lists where one answer has more list items; parsed_share;
        calibration_error where the judge gives probabilities: how far they lie from its agreement, on average.
    """
    first = _first(verdicts)
    parsed, better = ~np.isnan(first).any(1), _agreement(first)
    lengths = np.array([[len(p.chosen), len(p.rejected)] for p in pairs], float)
    lists = np.array([[markdown_counts(p.chosen)[1], markdown_counts(p.rejected)[1]] for p in pairs], float)
    difference = lengths[:, 0] - lengths[:, 1]

    def mean(values, among):
        chosen = values[among & parsed]
        return bootstrap(chosen, seed) if len(chosen) else metric(float("nan"), n=0)

    every = np.ones(len(pairs), bool)
    listed = lists[:, 0] != lists[:, 1]
    sure = [
        None if None in (a.probability, b.probability) else (a.probability + 1 - b.probability) / 2
        for a, b in zip(verdicts[::2], verdicts[1::2], strict=True)
    ]
    margin = np.array([logit(np.clip(p, 1e-9, 1 - 1e-9)) for p in sure if p is not None])
    bins = calibration_bins(margin, seed) if len(margin) else []
    error = sum(b["n"] * abs(b["accuracy"]["value"] - b["confidence"]) for b in bins) / max(1, len(margin))
    return {
        "agreement": mean(better, every),
        "agreement_length_matched": mean(better, np.abs(difference) <= LENGTH_MATCHED * lengths.max(1)),
        "agreement_better_is_shorter": mean(better, difference < 0),
        "flip_rate": mean((first[:, 0] != 1 - first[:, 1]).astype(float), every),
        "prefers_first": mean(first.mean(1), every) if ordered else metric(float("nan"), n=0),
        "prefers_longer": mean(np.where(difference > 0, better, 1 - better), np.abs(difference) > LONGER_BY),
        "prefers_lists": mean(np.where(lists[:, 0] > lists[:, 1], better, 1 - better), listed),
        "parsed_share": bootstrap(~np.isnan(first).ravel(), seed),
        "calibration_error": metric(error if len(margin) else float("nan"), n=len(margin)),
    }


def against_longer(judge: list, longer: list, seed: int) -> dict:
    """Agreement of the judge minus that of `longer`, pair by pair, and its test, from the verdicts of both."""
    both = np.stack([_agreement(_first(verdicts)) for verdicts in (judge, longer)], 1)
    both = both[~np.isnan(both).any(1)]
    if not len(both):
        return {"difference": metric(float("nan"), n=0), "p": metric(float("nan"), n=0)}
    return {"difference": bootstrap(both, seed), "p": metric(signed_rank(both[:, 0] - both[:, 1]), n=len(both))}


def passes(comparison: dict) -> bool:
    """Whether the judge agrees with the labels beyond what length alone gives: the 95% interval lies above 0."""
    ci = comparison["difference"]["ci95"]
    return bool(ci and ci[0] > 0 and comparison["p"]["value"] < 0.05)


def verdict(name: str, found: dict, comparison: dict) -> str:
    """The audit in one sentence."""
    agreement, d = found["agreement"], comparison["difference"]
    shown = (
        f"{name} agrees with {estimate(agreement, 100)}% of the labels, {estimate(d, 100)} points more than `longer`"
    )
    if passes(comparison):
        return f"Judge audit passed: {shown}."
    return f"JUDGE AUDIT FAILED: {shown}; it does not beat `longer`, so its win rates carry no information."


TABLE_LABELS = {
    "agreement": "agreement with labels, %",
    "agreement_length_matched": "- at equal length, %",
    "agreement_better_is_shorter": "- better is shorter, %",
    "flip_rate": "verdict flips with order, %",
    "prefers_first": "prefers first answer, %",
    "prefers_longer": "prefers longer answer, %",
    "prefers_lists": "prefers more lists, %",
    "parsed_share": "parsed verdicts, %",
    "calibration_error": "calibration error, %",
}


def table(audits: dict, labels: str) -> str:
    """One column per judge, one line per metric: three judges fit 100 columns.

    Args:
        labels: whose labels the judges are compared with.
    """
    lines = [("judge", *audits), ("labelled pairs", *(str(metrics["agreement"]["n"]) for metrics in audits.values()))]
    for key, label in TABLE_LABELS.items():
        show = estimate if key == "agreement" else cell
        lines.append((label, *(show(metrics[key], 100) for metrics in audits.values())))
    return render(f"judge audit: {labels}", lines)
