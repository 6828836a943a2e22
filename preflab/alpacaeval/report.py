"""The summary of an AlpacaEval run, and what run_alpacaeval_local.py prints."""

import csv
import io
from pathlib import Path

import numpy as np

from preflab.alpacaeval import package as alpacaeval
from utils.artifacts import metric, read_published
from utils.errors import UserError, is_main_process
from utils.plots import CHOSEN, NEUTRAL, figure, save
from utils.stats import bootstrap, signed_rank
from utils.tables import cell, difference, estimate, interval, render

FEWEST = 50
NEEDED = ("win_rate", "avg_length")
COLUMNS = (
    "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "avg_length",
    "length_controlled_winrate", "lc_standard_error",
)  # fmt: skip


def summarise(sides: dict, controls: dict, eval_out: str, seed: int, resamples: int) -> dict:
    """Every figure of both models.

    Args:
        sides: `{"base": annotations, "tuned": annotations}`. controls: the same under `<side>_<control>`.

    Returns:
        metrics (names open with base_, tuned_ or difference_) and length_control (its variant, and why that one).

    Raises:
        UserError: where base and tuned were judged on other instructions.
    """
    texts = {name: [row["instruction"] for row in rows] for name, rows in sides.items()}
    if sorted(texts["base"]) != sorted(texts["tuned"]):
        only = set(texts["base"]) ^ set(texts["tuned"])
        raise UserError(f"base and tuned were judged on other instructions ({len(only)} differ): judge both again")
    order = {text: i for i, text in enumerate(texts["base"])}
    sides = {name: sorted(rows, key=lambda row: order[row["instruction"]]) for name, rows in sides.items()}
    metrics = {}
    for name, rows in {**sides, **controls}.items():
        metrics |= {f"{name}_{k}": m for k, m in alpacaeval.rates(rows, seed).items()}
    pairs = np.array(
        [
            [t["preference"], b["preference"]]
            for t, b in zip(sides["tuned"], sides["base"], strict=True)
            if None not in (t["preference"], b["preference"])
        ],
        float,
    ).reshape(-1, 2)
    metrics["difference_win_rate"] = bootstrap(100 * pairs, seed)
    metrics["p_difference_win_rate"] = metric(signed_rank(pairs[:, 0] - pairs[:, 1]), n=len(pairs))
    both = [
        k for k in range(len(order)) if None not in (sides["base"][k]["preference"], sides["tuned"][k]["preference"])
    ]
    control, why = alpacaeval.length_control(sides["base"], Path(eval_out) / ".cache" / "minimal.csv")
    name = "length_controlled_winrate" if why is None else "length_controlled_minimal_winrate"
    found = {"variant": control.variant, "why_not_whole": why, "resamples": resamples, "rows": len(both)}
    parsed = {side: [rows[k] for k in both] for side, rows in sides.items()}
    if any(map(alpacaeval.one_sided, parsed.values())):
        found["why_none"] = "a model won or lost every judgement, where the package's regression says nothing"
    elif len(both) >= FEWEST:
        rates = control.bootstrap(parsed, seed, resamples)
        for side in sides:
            metrics[f"{side}_{name}"] = rates[side]
            metrics[f"{side}_lc_standard_error"] = metric(control.fit(parsed[side])[1], n=len(both))
        metrics[f"difference_{name}"] = rates["tuned - base"]
    else:
        found["why_none"] = (
            f"{len(both)} judged rows are too few for the package's cross-validated fit (at least {FEWEST})"
        )
    judge = sides["base"][0]["annotator"]
    return {
        "metrics": metrics,
        "length_control": found,
        "lc_name": name,
        "judge": judge,
        "leaderboards_judge": judge == "weighted_alpaca_eval_gpt4_turbo",
        "alpacaeval": any(row.get("dataset") in alpacaeval.DATASETS[:-1] for row in sides["base"]),
    }


def published(path: str | None) -> dict:
    """Published rows: the package's leaderboard, and those of the YAML file that it lacks.

    Raises UserError for a row without win_rate and avg_length as numbers.
    """
    extra = {}
    if path:
        read = read_published(path)
        for name, row in read["rows"].items():
            if not isinstance(row, dict) or not all(isinstance(row.get(k), (int, float)) for k in NEEDED):
                raise UserError(f"--published {path}: row {name} needs {' and '.join(NEEDED)} as numbers")
            extra[name] = {**row, "source": read["source"]}
    return alpacaeval.published_rows(extra)


def conclude(found: dict, rows: dict, audit: dict | None, title: str) -> tuple[str, str]:
    """(text, verdict): table, published rows, audit, and the one sentence that answers the question."""
    m, name = found["metrics"], found["lc_name"]
    n, common = (m[k]["n"] for k in ("base_unparsed", "difference_win_rate"))
    head = (f"on {n} instructions, against the reference", "base", "tuned", "tuned - base [95% interval]")
    lines = [
        head,
        ("win rate, %", *_sides(m, "win_rate"), difference(m["difference_win_rate"], m["p_difference_win_rate"])),
    ]
    if f"base_{name}" in m:
        label = (
            "length-controlled win rate, %" if name == "length_controlled_winrate" else "length-controlled, MINIMAL, %"
        )
        lines.append((label, *_sides(m, name), difference(m[f"difference_{name}"])))
    lines += [
        ("discrete win rate, %", *_sides(m, "discrete_win_rate"), ""),
        ("answer length, characters", *(f"{m[f'{s}_avg_length']['value']}" for s in ("base", "tuned")), ""),
        ("`longer` as the judge, %", *(cell(m[f"{s}_longer_win_rate"]) for s in ("base", "tuned")), ""),
        ("`random` as the judge, %", *(cell(m[f"{s}_random_win_rate"]) for s in ("base", "tuned")), ""),
        *_optional(m, "flip_rate", "verdicts that turn with the order, %", 100),
        *_optional(m, "verdict_mass_median", "probability on m and M, median", 1, 3),
        *_optional(m, "verdict_mass_below_half", "below a half, % of verdicts", 100),
        *_optional(m, "truncated_share", "answers cut off at the longest, %", 100),
        ("judged instructions", *(str(m[f"{s}_n_total"]["value"]) for s in ("base", "tuned")), f"{common} by both"),
    ]
    blocks = [render(title, lines)]
    if common < n:
        blocks.append(
            f"ONLY {common} OF {n} INSTRUCTIONS HAVE A VERDICT FOR BOTH MODELS: the differences stand on these, the"
            " rates on each model's own; the same command asks the rest again."
        )
    lc = found["length_control"]
    if "why_none" in lc:
        blocks.append(f"No length-controlled win rate: {lc['why_none']}.")
    elif lc["why_not_whole"]:
        blocks.append(
            f"AlpacaEval's length-controlled win rate is refused: {lc['why_not_whole']}. The package's minimal variant"
            " (no difficulty of instructions) stands in its place, under its own name."
        )
    elif not found["leaderboards_judge"]:
        blocks.append("Length control is calibrated on GPT-4 Turbo's judgements, not on this judge's.")
    if found["alpacaeval"] and n != 805:
        blocks.append(f"ONLY {n} OF ALPACAEVAL'S 805 INSTRUCTIONS: no figure of the leaderboard.")
    blocks.append(published_table(rows, found["leaderboards_judge"]))
    if audit:
        blocks += [audit["table"], audit["verdict"]]
    verdict = claim(found, audit)
    return "\n\n".join([*blocks, verdict]), verdict


def _optional(m: dict, key: str, label: str, scale: float, digits: int = 1) -> list[tuple]:
    """The line of a figure that some judges have."""
    if f"base_{key}" not in m:
        return []
    return [(label, *(f"{scale * m[f'{side}_{key}']['value']:.{digits}f}" for side in ("base", "tuned")), "")]


def _sides(m: dict, key: str) -> tuple[str, str]:
    return tuple(estimate(m[f"{side}_{key}"]) for side in ("base", "tuned"))


def published_table(rows: dict, same_judge: bool) -> str:
    """The published rows, named as what they are."""
    lines = [("published, judged by GPT-4 Turbo", "LC win rate, %", "win rate, %", "length", "source")]
    for name, row in rows.items():
        lc, rate, length = (row.get(k) for k in ("length_controlled_winrate", "win_rate", "avg_length"))
        shown = "-" if lc is None else f"{lc:.1f}"
        lines.append((name, shown, f"{rate:.1f}", f"{length:.0f}", row["source"]))
    why = "the judge of the table above" if same_judge else "another judge, so no row of the table above"
    return render(f"AlpacaEval 2: {why}", lines)


def claim(found: dict, audit: dict | None) -> str:
    """What the comparison says, as far as the judge can be trusted."""
    m = found["metrics"]
    d, p = m["difference_win_rate"], m["p_difference_win_rate"]["value"]
    shown = f"tuned - base is {difference(d, m['p_difference_win_rate'])} points of win rate against the reference"
    controlled = m.get(f"difference_{found['lc_name']}")
    if controlled:
        shown += f", {difference(controlled)} length-controlled"
    if not audit:
        return f"No claim: the judge was not audited (--audit_limit); {shown}."
    if not audit["passed"]:
        return f"No claim: the judge failed its audit; {shown}."
    if d["ci95"] and d["ci95"][0] > 0 and p < 0.05:
        if controlled and controlled["value"] is not None and not controlled["value"] > 0:
            return f"No claim: the judge prefers tuned to base, but not at equal length: {shown}."
        return f"The judge prefers tuned to base: {shown}."
    return f"No claim that tuned is better: {shown}."


def leaderboard(found: dict, rows: dict) -> str:
    """leaderboard.csv: the package's columns for base and tuned, the published rows below, each with its judge."""
    m, out = found["metrics"], io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    lc = found["lc_name"]
    writer.writerow(["", *[lc if c == "length_controlled_winrate" else c for c in COLUMNS], "judged_by", "source"])
    for side in ("base", "tuned"):
        keys = [f"{side}_{lc if c == 'length_controlled_winrate' else c}" for c in COLUMNS]
        writer.writerow([side, *[m[k]["value"] if k in m else "" for k in keys], found["judge"], "this run"])
    for name, row in rows.items():
        cells = [row.get(c, "") for c in COLUMNS]
        if lc != "length_controlled_winrate":
            cells[COLUMNS.index("length_controlled_winrate")] = ""
        writer.writerow([name, *cells, "GPT-4 Turbo", row["source"]])
    return out.getvalue()


def one_file(annotations: list[dict], name: str, eval_out: str, seed: int, resamples: int) -> str:
    """The table of --annotations: one model's figures as the package computes them.

    Raises UserError where there is no verdict, or where several models or judges are in one file.
    """
    for key in ("generator_2", "annotator"):
        several = sorted({str(row[key]) for row in annotations})
        if len(several) > 1:
            raise UserError(f"--annotations {name}: holds several of {key} ({', '.join(several[:3])}): split the file")
    if all(row["preference"] is None for row in annotations):
        raise UserError(f"--annotations {name}: no row has a verdict")
    m = alpacaeval.rates(annotations, seed)
    texts = [row["instruction"] for row in annotations]
    control, why = alpacaeval.length_control(annotations, Path(eval_out) / ".cache" / "minimal.csv")
    label = "length_controlled_winrate" if why is None else "length_controlled_minimal_winrate"
    parsed = [row for row in annotations if row["preference"] is not None]
    lines = [("figure", "value", "95% interval by bootstrap")]
    for key in ("win_rate", "discrete_win_rate"):
        lines.append((key, f"{m[key]['value']:.4f}", interval(m[key], digits=2).strip() or "-"))
    if len(parsed) >= FEWEST and not alpacaeval.one_sided(parsed):
        rate = control.bootstrap({"model": parsed}, seed, resamples)["model"]
        shown = interval(rate, digits=2).strip() or "-"
        lines.append((label, f"{rate['value']:.4f}", f"{shown} ({resamples} refits)"))
        lines.append(("lc_standard_error", f"{control.fit(parsed)[1]:.4f}", "the package's; no sampling error"))
    lines.append(("standard_error", f"{m['standard_error']['value']:.4f}", "the package's"))
    for key in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length", "unparsed"):
        lines.append((key, str(m[key]["value"]), ""))
    note = f"\n\nAlpacaEval's length-controlled win rate is refused: {why}." if why else ""
    loud = "" if why or len(texts) == 805 else f"\n\nONLY {len(texts)} OF ALPACAEVAL'S 805 INSTRUCTIONS."
    return (
        render(f"{name}: {annotations[0]['generator_2']} judged by {annotations[0]['annotator']}", lines) + note + loud
    )


def alpacaeval_figure(path, metrics: dict, published: dict, headline: str) -> None:
    """Two panels: win rates of base and tuned with intervals and controls, and win rate against answer length.

    Args:
        published: rows judged by GPT-4 Turbo, drawn in grey.
    """
    import numpy as np

    if not is_main_process():
        return
    fig, axes = figure(1, 2, headline)
    colours = {"base": NEUTRAL, "tuned": CHOSEN}
    kinds = {
        "win_rate": "win rate",
        "length_controlled_winrate": "length-\ncontrolled",
        "length_controlled_minimal_winrate": "length-contr.\n(minimal)",
        "longer_win_rate": "`longer`\nas judge",
        "random_win_rate": "`random`\nas judge",
    }
    kinds = {k: label for k, label in kinds.items() if f"base_{k}" in metrics}
    for side, shift in (("base", -0.18), ("tuned", 0.18)):
        found = [metrics[f"{side}_{k}"] for k in kinds]
        value = np.array([m["value"] for m in found])
        ends = np.array([m["ci95"] or (m["value"], m["value"]) for m in found])
        error = np.clip([value - ends[:, 0], ends[:, 1] - value], 0, None)
        axes[0].bar(np.arange(len(kinds)) + shift, value, 0.34, yerr=error, capsize=2, color=colours[side], label=side)
        axes[1].errorbar(
            metrics[f"{side}_avg_length"]["value"], value[0], error[:, :1], fmt="o", color=colours[side], label=side
        )
    axes[0].set_xticks(range(len(kinds)), kinds.values(), fontsize=7)
    axes[0].axhline(50, color="grey", ls=":", lw=1)
    axes[0].set(title="Against the reference, 95% intervals", ylabel="win rate (%)", ylim=(0, 100))
    for name, row in published.items():
        axes[1].plot(row["avg_length"], row["win_rate"], "x", color="grey", ms=5)
        axes[1].annotate(name, (row["avg_length"], row["win_rate"]), fontsize=6, color="grey", xytext=(3, 3),
                         textcoords="offset points")  # fmt: skip
    axes[1].set(title="Against length (grey: published, GPT-4 Turbo judged)", xlabel="mean answer length (characters)")
    axes[1].set(ylabel="win rate (%)", ylim=(0, 100))
    for ax in axes:
        ax.legend(fontsize=7)
    save(fig, path)
