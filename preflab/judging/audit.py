"""Judge audit: a judge's verdicts on pairs with a labelled better answer, compared with the labels and its controls."""

import numpy as np
from scipy.special import logit

from preflab.data.pair_rows import Pair
from preflab.data.prompts import Prompt
from preflab.evaluation.reward_slices import calibration_error, calibration_error_if_calibrated
from preflab.judging.judge_prompt import Item, Verdict
from preflab.judging.panel_report import heading_of
from preflab.judging.style import markdown_counts
from utils.artifacts import metric
from utils.stats import direction, mean_test, share
from utils.tables import cell, estimate
from utils.tables import render as render_table

# Answers count as length-matched if they differ by at most this share of the longer one.
LENGTH_MATCHED = 0.1
# Characters by which one answer must be longer for prefers_longer.
LONGER_BY = 30

# Where the labels of well-known datasets come from, by a part of the dataset's name.
KNOWN_LABELS = {
    "hh-rlhf": "human labels",
    "alpaca_farm": "human labels",
    "ultrafeedback": "labels from model scores, not human",
    "quickstart_prefs": "labels of this project's own pairs, set when they were written",
}


def whose_labels(sources: list[dict]) -> str:
    """The datasets of an audit, and who labelled them."""
    names = ", ".join(f"{s['name']} {s.get('split') or ''}".strip() for s in sources)
    known = [text for key, text in KNOWN_LABELS.items() if key in names.lower()]
    return f"{names}: {known[0] if known else 'labels of the dataset'}"


def sample_pairs(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """Up to `count` pairs, drawn at random, in their order. The first rows of a split may all be of one kind."""
    if len(pairs) <= count:
        return pairs
    # Without replacement, and sorted to keep the dataset's order.
    return [pairs[i] for i in sorted(np.random.default_rng(seed).choice(len(pairs), count, replace=False))]


def audit_items(pairs: list[Pair]) -> list[Item]:
    """Both orders of each labelled pair: item 2k shows the better answer first, item 2k + 1 the worse one."""
    items = []
    for pair in pairs:
        prompt = Prompt(pair.messages or [{"role": "user", "content": pair.text}], pair.source)
        items += [Item(prompt, pair.chosen, pair.rejected), Item(prompt, pair.rejected, pair.chosen)]
    return items


def _first_slot(verdicts: list[Verdict]) -> np.ndarray:
    """Score of the first slot in both orders of each pair, shape (pairs, 2); NaN without a verdict."""
    # Items 2k and 2k + 1 are pair k in both orders, so two columns.
    return np.array([np.nan if v.first is None else v.first for v in verdicts]).reshape(-1, 2)


def _agreement(first: np.ndarray) -> np.ndarray:
    """Score of the better answer, mean of both orders, shape (pairs,). `first`: from `_first_slot`."""
    # The better answer is in the first slot of the first order and in the second slot of the second.
    return (first[:, 0] + 1 - first[:, 1]) / 2


def audit(pairs: list[Pair], verdicts: list[Verdict], seed: int, ordered: bool = True) -> dict:
    """Metrics of one judge against the labels, `{name: metric}`.

    Args:
        pairs: pairs whose chosen answer is labelled better.
        verdicts: on the items of `audit_items`.
        ordered: False for a judge that chooses the order of the answers itself, so that slots mean nothing.

    Returns:
        agreement: mean score of the better answer over both orders (ties half).
        agreement_length_matched: the same on pairs that differ by at most 10% of the longer answer's characters.
        agreement_better_is_shorter: the same on pairs whose better answer is shorter.
        flip_rate: share of pairs whose verdict changes with the order.
        prefers_first: mean score of the first slot.
        prefers_longer: mean score of the longer answer if lengths differ by more than 30 characters.
        prefers_lists: mean score of the answer with more list items.
        parsed_share: share of items with a verdict.
        calibration_error: mean distance between the judge's probability and its agreement (expected calibration
            error); NaN if the judge gives no probabilities.
        calibration_error_if_calibrated: what sampling alone gives to calibrated probabilities on as many pairs.
    """
    first = _first_slot(verdicts)
    # A pair counts only with a verdict in both orders; otherwise position bias would not cancel.
    parsed, better = ~np.isnan(first).any(1), _agreement(first)
    # Shape (pairs, 2): chosen, rejected.
    lengths = np.array([[len(p.chosen), len(p.rejected)] for p in pairs], float)
    lists = np.array([[markdown_counts(p.chosen)[1], markdown_counts(p.rejected)[1]] for p in pairs], float)
    difference = lengths[:, 0] - lengths[:, 1]

    # Several labelled pairs may share a prompt, so prompts are resampled.
    prompts = np.array([pair.prompt_key for pair in pairs])

    def mean(values, selected):
        rows = selected & parsed
        if not rows.any():
            return metric(float("nan"), n=0)
        return share(values[rows], seed, groups=prompts[rows].tolist())

    every = np.ones(len(pairs), bool)
    # P(chosen is better), mean of both orders.
    probabilities = [
        (a.probability + 1 - b.probability) / 2
        for a, b in zip(verdicts[::2], verdicts[1::2], strict=True)
        if a.probability is not None and b.probability is not None
    ]
    # calibration_error takes margins: sigmoid(logit(p)) = p. Clipped, because the logit of 0 and 1 is infinite.
    margins = np.array([logit(np.clip(p, 1e-9, 1 - 1e-9)) for p in probabilities])
    return {
        "agreement": mean(better, every),
        "agreement_length_matched": mean(better, np.abs(difference) <= LENGTH_MATCHED * lengths.max(1)),
        "agreement_better_is_shorter": mean(better, difference < 0),
        "flip_rate": mean((first[:, 0] != 1 - first[:, 1]).astype(float), every),
        "prefers_first": mean(first.mean(1), every) if ordered else metric(float("nan"), n=0),
        # Where the better answer is the longer one its score is the longer answer's; elsewhere the complement is.
        "prefers_longer": mean(np.where(difference > 0, better, 1 - better), np.abs(difference) > LONGER_BY),
        "prefers_lists": mean(np.where(lists[:, 0] > lists[:, 1], better, 1 - better), lists[:, 0] != lists[:, 1]),
        # Per item, not per pair: each order is one question to the judge.
        "parsed_share": share(~np.isnan(first).ravel(), seed, groups=np.repeat(prompts, 2).tolist()),
        "calibration_error": calibration_error(margins),
        "calibration_error_if_calibrated": calibration_error_if_calibrated(margins, seed),
    }


def against_longer(judge: list[Verdict], longer: list[Verdict], seed: int, prompts: list[str] | None = None) -> dict:
    """Agreement of the judge minus that of `longer`, paired by labelled pair, and its test.

    Args:
        judge: the judge's verdicts on the items of `audit_items`.
        longer: those of the length-only baseline.
        prompts: of each labelled pair; pairs of a prompt are resampled together.

    Returns:
        {difference, p}; NaN without a pair that both judged.
    """
    both = np.stack([_agreement(_first_slot(verdicts)) for verdicts in (judge, longer)], 1)
    # Paired: only pairs that both judges decided in both orders.
    judged = ~np.isnan(both).any(1)
    both, groups = both[judged], None if prompts is None else np.array(prompts)[judged].tolist()
    if not len(both):
        return {"difference": metric(float("nan"), n=0), "p": metric(float("nan"), n=0)}
    p = mean_test(both[:, 0] - both[:, 1], groups, seed)
    return {"difference": share(both, seed, groups=groups), "p": metric(p, n=len(both))}


def passes(comparison: dict) -> bool:
    """Whether the judge agrees with the labels more than length alone does: 95% interval above 0 and p < 0.05.

    Args:
        comparison: from `against_longer`.
    """
    return direction(comparison["difference"], comparison["p"]["value"]) > 0


def verdict_of(name: str, metrics: dict, comparison: dict) -> str:
    """The audit in one sentence.

    Args:
        name: the judge.
        metrics: from `audit`.
        comparison: from `against_longer`.
    """
    agreement, difference = estimate(metrics["agreement"], 100), estimate(comparison["difference"], 100)
    result = f"{name} agrees with {agreement}% of the labels, {difference} points more than `longer`"
    if passes(comparison):
        return f"Judge audit passed: {result}."
    return f"JUDGE AUDIT FAILED: {result}; it does not beat the length-only baseline `longer`, so ignore its win rates."


def audit_table(audits: dict[str, dict], labels: str) -> str:
    """One row per metric, one column per judge.

    Args:
        audits: {judge: metrics} from `audit`, the judge before its controls.
        labels: from `whose_labels`, for the title.
    """
    rows = {
        "agreement": "agreement with labels, %",
        "agreement_length_matched": "agreement, length-matched, %",
        "agreement_better_is_shorter": "agreement, better is shorter, %",
        "flip_rate": "verdict changes with order, %",
        "prefers_first": "first answer wins, %",
        "prefers_longer": "longer answer wins, %",
        "prefers_lists": "more list items wins, %",
        "parsed_share": "parsed verdicts, %",
        "calibration_error": "calibration error, %",
        "calibration_error_if_calibrated": "... of a calibrated judge, %",
    }
    judge, *controls = audits
    lines = [("", heading_of(judge), *controls)]
    lines.append(("labelled pairs", *(str(metrics["agreement"]["n"]) for metrics in audits.values())))
    for key, label in rows.items():
        text_of = estimate if key == "agreement" else cell
        # Audits of earlier versions lack the last row.
        if all(key in metrics for metrics in audits.values()):
            lines.append((label, *(text_of(metrics[key], 100) for metrics in audits.values())))
    return render_table(f"judge audit of {judge}: {labels}", lines)
