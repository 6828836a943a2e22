"""What eval_perplexity.py prints."""

from preflab.data.length_bias import sentence
from utils.errors import is_main_process
from utils.plots import CHOSEN, NEUTRAL, REJECTED, figure, save
from utils.tables import cell, difference, render

NAMES = {
    "response_chosen": "chosen answers, given the prompt",
    "response_rejected": "rejected answers, given the prompt",
    "whole_chosen": "prompt and chosen answer",
    "whole_rejected": "prompt and rejected answer",
    "text": "plain text",
}

SECTIONS = {
    "response_chosen": "chosen\nanswer",
    "response_rejected": "rejected\nanswer",
    "whole_chosen": "prompt +\nchosen",
    "whole_rejected": "prompt +\nrejected",
    "text": "plain\ntext",
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


def perplexity_figure(path, metrics: dict, rows: list[dict], text_rows: list[dict], headline: str) -> None:
    """Three panels: perplexity of base and tuned, the histogram of what moved, and where chosen and rejected went.

    Args:
        metrics: of perplexity.json; rows and text_rows: of perplexity_rows.jsonl.
    """
    import numpy as np

    if not is_main_process():
        return
    fig, axes = figure(1, 3, headline)
    names = [n for n in SECTIONS if f"{n}_ppl_base" in metrics]
    for side, colour, shift in (("base", NEUTRAL, -0.17), ("tuned", CHOSEN, 0.17)):
        found = [metrics[f"{name}_ppl_{side}"] for name in names]
        value = np.array([m["value"] for m in found])
        ends = np.array([m["ci95"] or (m["value"], m["value"]) for m in found])
        error = np.clip([value - ends[:, 0], ends[:, 1] - value], 0, None)
        axes[0].bar(np.arange(len(names)) + shift, value, 0.32, yerr=error, color=colour, capsize=2, label=side)
    axes[0].set_xticks(range(len(names)), [SECTIONS[name] for name in names], fontsize=7)
    axes[0].set(title="Perplexity, 95% intervals", ylabel="exp(nats a token)")
    axes[0].legend(fontsize=7)

    moved = {
        side: np.array([r[f"nll_response_{side}_difference"] / r[f"tokens_response_{side}"] for r in rows])
        for side in ("chosen", "rejected")
        if rows
    }
    if text_rows:
        moved["text"] = np.array([r["nll_difference"] / r["tokens"] for r in text_rows])
    colours = {"chosen": CHOSEN, "rejected": REJECTED, "text": NEUTRAL}
    every = np.concatenate(list(moved.values()))
    edges = np.linspace(every.min(), every.max() + 1e-9, min(40, max(8, len(every) // 8)))
    for name, values in moved.items():
        axes[1].hist(
            values, bins=edges, histtype="step", lw=1.5, color=colours[name], label=f"{name}, {values.mean():+.4f}"
        )
    axes[1].axvline(0, color="grey", ls=":", lw=1)
    axes[1].set(title="What moved, by row", xlabel="tuned - base (nats a token)", ylabel="rows")
    axes[1].legend(fontsize=7, title="mean over rows", title_fontsize=7)

    for side, values in moved.items():
        key = "tokens" if side == "text" else f"tokens_response_{side}"
        lengths = [row[key] for row in (text_rows if side == "text" else rows)]
        axes[2].scatter(lengths, values, s=6, alpha=0.5, color=colours[side], label=side)
    axes[2].axhline(0, color="grey", ls=":", lw=1)
    axes[2].set(title="What moved, by length", xlabel="scored tokens of the row", ylabel="tuned - base (nats a token)")
    axes[2].legend(fontsize=7)
    save(fig, path)
