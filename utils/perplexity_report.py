"""What eval_perplexity.py prints."""

from utils.length_bias import sentence
from utils.tables import cell, difference, render

NAMES = {
    "response_chosen": "chosen answers, given the prompt",
    "response_rejected": "rejected answers, given the prompt",
    "whole_chosen": "prompt and chosen answer",
    "whole_rejected": "prompt and rejected answer",
    "text": "plain text",
}


def table(metrics: dict, title: str) -> str:
    """Base beside tuned, a line a section."""
    lines = [("perplexity a token", "units", "tokens", "base", "tuned", "tuned - base [95% interval]", "bits per byte")]
    for name, label in NAMES.items():
        if f"{name}_ppl_base" in metrics:
            m = {k.removeprefix(f"{name}_"): v for k, v in metrics.items() if k.startswith(f"{name}_")}
            # One unit has no spread, so nothing to test.
            p = metrics[f"p_{name}_nll_difference"] if m["tokens"]["n"] > 1 else None
            bits = f"{m['bits_per_byte_base']['value']:.4f} -> {m['bits_per_byte_tuned']['value']:.4f}"
            sides = [cell(m[f"ppl_{side}"], 1, 3) for side in ("base", "tuned")]
            moved = difference(m["ppl_difference"], p, 1, 3)
            lines.append((label, str(m["tokens"]["n"]), str(m["tokens"]["value"]), *sides, moved, bits))
            sides = [cell(m[f"ppl_mean_{side}"], 1, 3) for side in ("base", "tuned")]
            lines.append(("  mean over units", "", "", *sides, "", ""))
    return render(title, lines)


def conclude(metrics: dict, bias: dict, title: str, left_out: str | None) -> tuple[str, str]:
    """(text, verdict): table, divergence, length bias, and one sentence on what moved."""
    blocks = [table(metrics, title)]
    kls = [
        f"{side} {metrics[f'kl_{side}']['value']:.4f} ± {metrics[f'kl_{side}']['stderr'] or 0:.4f}"
        for side in ("chosen", "rejected")
        if f"kl_{side}" in metrics
    ]
    if kls:
        blocks.append(f"KL(tuned || base) on the data's answers, nats a token: {', '.join(kls)}")
    if left_out:
        blocks.append(left_out)
    if bias:
        blocks.append("\n".join(sentence(s, b) for s, b in bias.items()))
    verdict = " ".join(_moved(metrics, name, label) for name, label in NAMES.items() if f"{name}_ppl_base" in metrics)
    return "\n\n".join([*blocks, verdict]), verdict


def _moved(metrics: dict, name: str, label: str) -> str:
    ratio, p = metrics[f"{name}_ppl_ratio"], metrics[f"p_{name}_nll_difference"]["value"]
    change = f"{100 * (ratio['value'] - 1):+.2f}%"
    if ratio["ci95"] is None:
        return f"{label.capitalize()}: perplexity {change}, one unit, so no interval."
    low, high = (100 * (x - 1) for x in ratio["ci95"])
    moved = low > 0 or high < 0
    word = ("rose" if low > 0 else "fell") if moved and p < 0.05 else "did not move beyond chance"
    # Below six units the signed-rank test cannot reach 0.05 whatever they say.
    if ratio["n"] < 6:
        return f"{label.capitalize()}: perplexity {change}, {ratio['n']} units, too few for a test."
    test = f"; signed-rank test p={p:.2g}" if moved and p >= 0.05 else ""
    return f"{label.capitalize()}: perplexity {word} ({change}, 95% interval {low:+.2f} to {high:+.2f}%{test})."
