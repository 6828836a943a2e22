"""What an instruction run says at its end: held-out perplexity of what it was trained on, base beside tuned."""

import numpy as np

from preflab.evaluation.perplexity import section_metrics
from utils.tables import cell, difference, render


def heldout_rows(data, dataset, base: list[float] | None, tuned: list[float]) -> list[dict]:
    """A row a held-out conversation: negative log-likelihood (nats) under both, tokens and bytes that were scored."""
    rows = []
    for i, (conversation, row) in enumerate(zip(data.conversations, dataset, strict=True)):
        tokens = sum(label != -100 for label in row["labels"][1:])
        found = {"row": i, "where": conversation.source, "tokens": tokens, "bytes": row["bytes"]}
        rows.append({**found, "nll_base": base[i] if base else None, "nll_tuned": tuned[i]})
    return rows


def heldout_metrics(rows: list[dict], seed: int = 42) -> dict:
    """Perplexity, nats a token and bits per byte under base and tuned, with intervals and a paired test.

    Where the base was not scored, the tuned model's figures alone.
    """
    alone = rows[0]["nll_base"] is None
    keys = ("nll_tuned" if alone else "nll_base", "nll_tuned", "tokens", "bytes")
    found = section_metrics("heldout", np.array([[row[key] for key in keys] for row in rows], float), seed)
    return {name: m for name, m in found.items() if name.endswith("_tuned")} if alone else found


def conclude(metrics: dict, title: str) -> tuple[str, str, None]:
    """(text, verdict, no warning): the table with the verdict below it, and the verdict alone."""
    if not metrics:
        verdict = "No claim: there are no held-out conversations."
        return f"{title}\n\n{verdict}", verdict, None
    n = metrics["heldout_ppl_tuned"]["n"]
    lines = [(f"on {n} held-out conversations", "base", "tuned", "tuned - base [95% interval]")]
    if "heldout_ppl_base" not in metrics:
        lines.append(("perplexity a token", "-", cell(metrics["heldout_ppl_tuned"], 1, 3), ""))
        verdict = (
            "No claim: a sharded model cannot be scored before training; eval_perplexity.py compares it with its base."
        )
        return f"{render(title, lines)}\n\n{verdict}", verdict, None
    p = metrics["p_heldout_nll_difference"] if n > 1 else None
    for label, name, moved, digits in (
        ("perplexity a token", "ppl", "ppl_difference", 3),
        ("loss, nats a token", "nll", "nll_difference", 4),
    ):
        sides = [cell(metrics[f"heldout_{name}_{side}"], 1, digits) for side in ("base", "tuned")]
        lines.append((label, *sides, difference(metrics[f"heldout_{moved}"], p, 1, digits)))
    bits = [cell(metrics[f"heldout_bits_per_byte_{side}"], 1, 4) for side in ("base", "tuned")]
    lines.append(("bits per byte", *bits, ""))
    _, verdict = claim(metrics)
    return f"{render(title, lines)}\n\n{verdict}", verdict, None


def claim(metrics: dict) -> tuple[bool, str]:
    """Whether held-out perplexity is shown to have fallen, and the sentence that says so either way."""
    ratio, p = metrics["heldout_ppl_ratio"], metrics["p_heldout_nll_difference"]["value"]
    if ratio["ci95"] is None:
        return False, "No claim: one held-out conversation is too few for an interval."
    change, low, high = (100 * (x - 1) for x in (ratio["value"], *ratio["ci95"]))
    figure = (
        f"held-out perplexity changed by {change:+.1f}% (95% interval {low:+.1f} to {high:+.1f}, signed-rank p={p:.2g})"
    )
    if high < 0 and p < 0.05:
        return True, f"Training helped: {figure}."
    if low > 0 and p < 0.05:
        return False, f"Training hurt: {figure}."
    return False, f"No claim that training helped: {figure}, not told from no change."
