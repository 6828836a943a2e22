"""What run_alpacaeval_local.py prints: tables, verdict, leaderboard file and picture."""

import csv
import io

from preflab.alpacaeval import package
from preflab.evaluation.contamination import overlap_table
from preflab.judging.panel_report import audit_result, left_out_judges
from utils.artifacts import read_published
from utils.errors import UserError
from utils.plots import CHOSEN, NEUTRAL, figure, interval_lengths, rate_bars, save, shorten
from utils.power import power_sentence
from utils.stage import Report, fits_terminal
from utils.stats import direction
from utils.tables import cell, difference, estimate, interval, number, p_equals, p_value
from utils.tables import render as render_table

SIDES = ("base", "tuned")
# Prefixes of the metrics' names by model.
PREFIXES = {side: f"{side}_" for side in SIDES}
ALPACAEVAL_SIZE = 805
# The axes of the second panel; a length-controlled rate may be missing.
REQUIRED = ("win_rate", "avg_length")
# Columns of the package's leaderboard files.
COLUMNS = (
    "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "avg_length",
    "length_controlled_winrate", "lc_standard_error",
)  # fmt: skip


def published(path: str | None) -> dict:
    """Published rows: the package's leaderboard and further rows of a YAML file.

    Raises UserError for a row without win_rate and avg_length as numbers.
    """
    extra = {}
    if path:
        content = read_published(path)
        for name, row in content["rows"].items():
            if not isinstance(row, dict) or not all(isinstance(row.get(k), (int, float)) for k in REQUIRED):
                raise UserError(f"--published {path}: row {name} needs {' and '.join(REQUIRED)} as numbers")
            extra[name] = {**row, "source": content["source"]}
    return package.published_rows(extra)


@fits_terminal
def render(results: dict, rows: dict, audit: dict | None, title: str, trained_on: dict | None = None) -> Report:
    """The table, its warnings, the published rows, the audit and the verdict.

    Args:
        results: from `preflab.alpacaeval.metrics.summarise`.
        rows: from `published`.
        audit: the content of judge_audit.json.
        trained_on: from `preflab.alpacaeval.stages.trained_instructions`.
    """
    m = results["metrics"]
    n, common = (m[k]["n"] for k in ("base_unparsed", "difference_win_rate"))
    blocks = [results_table(results, title)]
    # Sample sizes differ between the table's columns, which the table alone does not show.
    if common < n:
        blocks.append(
            f"ONLY {common} OF {n} INSTRUCTIONS HAVE A VERDICT FOR BOTH MODELS: differences use these, each model's"
            " rates use its own; the same command requests the missing verdicts again."
        )
    if results["judge_notes"]:
        blocks.append(f"JUDGE: {'; '.join(results['judge_notes'])}.")
    if "contamination" in results:
        blocks.append(_overlap(results["contamination"]))
    blocks += _length_control_note(results)
    # A part of AlpacaEval is easier or harder than all of it.
    if results["alpacaeval"] and n != ALPACAEVAL_SIZE:
        blocks.append(f"ONLY {n} OF ALPACAEVAL'S {ALPACAEVAL_SIZE} INSTRUCTIONS: not comparable with the leaderboard.")
    if "panel" in results:
        blocks.append(panel_table(results["panel"], audit))
    blocks.append(published_table(rows, results["leaderboards_judge"]))
    if audit:
        blocks += [audit["table"], audit["verdict"]]
    verdict = verdict_of(results, audit) + left_out_judges(audit)
    if trained_on and trained_on["count"]:
        part = "" if trained_on["count"] == trained_on["of"] else "PARTLY "
        verdict = (
            f"{part}NOT HELD OUT: {trained_on['count']} of {trained_on['of']} instructions are prompts that the run was"
            f" trained on (first: {trained_on['first']}). ({verdict})"
        )
    return Report("\n\n".join(filter(None, [*blocks, verdict, power_note(m)])), verdict)


def _overlap(section: dict) -> str:
    """Rates with and without the instructions that overlap with training data."""

    def cells(figures: dict) -> list[str]:
        rates = [estimate(figures[f"{side}_win_rate"]) for side in SIDES]
        return [*rates, difference(figures["difference_win_rate"], figures["p"])]

    return overlap_table(section, ["base, %", "tuned, %", "tuned - base"], cells)


def _overlap_of_file(section: dict) -> str:
    """The rates of one file's model with and without the instructions that overlap with training data."""

    def cells(figures: dict) -> list[str]:
        return [estimate(figures[k], 1, 2) if k in figures else "-" for k in ("win_rate", "length_controlled")]

    return overlap_table(section, ["win rate, %", "length-controlled, %"], cells)


def results_table(results: dict, title: str) -> str:
    """Rates of base and tuned against the reference, with 95% intervals, and what qualifies them."""
    return render_table(f"{title}, against the reference", table_lines(results["metrics"], results["lc_name"]))


def table_lines(m: dict, name: str) -> list[tuple]:
    """The lines of the table of results, its head first.

    Args:
        m: all metrics. name: of the length-controlled rate.
    """
    n, common = (m[k]["n"] for k in ("base_unparsed", "difference_win_rate"))
    lines = [
        (f"{n} instructions, 95% intervals", *SIDES, "tuned - base", "p"),
        (
            "win rate, %",
            *_both_sides(m, "win_rate"),
            difference(m["difference_win_rate"]),
            p_value(m["p_difference_win_rate"]["value"]),
        ),
    ]
    if f"base_{name}" in m:
        label = "length-controlled, %" if name == "length_controlled_winrate" else "length-controlled, MINIMAL, %"
        lines.append((label, *_both_sides(m, name), difference(m[f"difference_{name}"]), ""))
    lines += [
        ("discrete win rate, %", *_both_sides(m, "discrete_win_rate"), "", ""),
        ("answer length, characters", *(f"{m[f'{s}_avg_length']['value']}" for s in SIDES), "", ""),
        # What a judge that looks at length alone, or at nothing, would report for the same answers.
        ("judged by `longer`, %", *(cell(m[f"{s}_longer_win_rate"]) for s in SIDES), "", ""),
        ("judged by `random`, %", *(cell(m[f"{s}_random_win_rate"]) for s in SIDES), "", ""),
        *_optional(m, "flip_rate", "verdict flips with order, %", 100),
        *_optional(m, "verdict_mass_median", "probability of m and M, median", 1, 3),
        *_optional(m, "verdict_mass_below_half", "... below 0.5, % of verdicts", 100),
        *_optional(m, "truncated_share", "truncated answers, %", 100),
        ("judged instructions", *(str(m[f"{s}_n_total"]["value"]) for s in SIDES), f"{common} by both", ""),
    ]
    return lines


def _length_control_note(results: dict) -> list[str]:
    section = results["length_control"]
    # From the strongest restriction to the weakest; at most one note is printed.
    if "why_none" in section:
        return [f"No length-controlled win rate: {section['why_none']}."]
    if "why_no_interval" in section:
        return [f"No interval of the length-controlled difference: {section['why_no_interval']}."]
    if section["why_not_whole"]:
        return [
            f"AlpacaEval's length-controlled win rate is not available: {section['why_not_whole']}. The package's"
            " minimal variant (no difficulty of instructions) is reported instead, under its own name."
        ]
    if not results["leaderboards_judge"]:
        return ["Length control is calibrated on GPT-4 Turbo's judgements, not on this judge's."]
    return []


def _optional(m: dict, key: str, label: str, scale: float, digits: int = 1) -> list[tuple]:
    """The table's line for a metric that not every judge gives."""
    if f"base_{key}" not in m:
        return []
    return [(label, *(f"{scale * m[f'{side}_{key}']['value']:.{digits}f}" for side in SIDES), "", "")]


def _both_sides(m: dict, key: str) -> tuple[str, str]:
    return tuple(estimate(m[f"{side}_{key}"]) for side in SIDES)


def panel_table(panel: dict, audit: dict | None) -> str:
    """A line per judge: its audit, its win rates, the panel's difference without it, and what its verdicts cost."""
    audited = (audit or {}).get("members", {})
    lines = [("", "agrees, %", "audit", "base, %", "tuned, %", "tuned - base", "panel without it", "verdicts", "s")]
    names = []
    for place, (name, m) in enumerate(panel["members"].items(), 1):
        checked, cost = audited.get(name), m["cost"]
        lines.append(
            (
                str(place),
                cell(checked["audit"]["agreement"], 100) if checked else "-",
                audit_result(checked["passed"] if checked else None, m["votes"]),
                cell(m["base"]),
                cell(m["tuned"]),
                difference(m["difference"]),
                difference(m["without"]["difference"]) if "without" in m else "-",
                f"{cost['computed']}/{cost['of']}",
                f"{cost['seconds']:.0f}",
            )
        )
        names.append(f"{place}: {name}")
    alpha = estimate(panel["agreement"]["alpha"], 1, 2)
    notes = [*names, f"Wins, ties and losses of each judge; Krippendorff's alpha of the judges: {alpha}."]
    return "\n".join([render_table("judges of the panel", lines), *notes])


def published_table(rows: dict, same_judge: bool) -> str:
    """The published rows, with a title that names their judge."""
    lines = [("judged by GPT-4 Turbo", "LC win rate, %", "win rate, %", "length", "source")]
    for name, row in rows.items():
        lc, rate, length = (row.get(k) for k in ("length_controlled_winrate", "win_rate", "avg_length"))
        lines.append((name, "-" if lc is None else f"{lc:.1f}", f"{rate:.1f}", f"{length:.0f}", row["source"]))
    judge = "the same judge as above" if same_judge else "another judge: not comparable with the table above"
    return render_table(f"AlpacaEval 2, published ({judge})", lines)


def verdict_of(results: dict, audit: dict | None) -> str:
    """One sentence: whether the judge prefers tuned to base, as far as its audit allows."""
    m = results["metrics"]
    d, p = m["difference_win_rate"], m["p_difference_win_rate"]
    shown = f"tuned - base is {difference(d)} points of win rate against the reference ({p_equals(p['value'])})"
    controlled = m.get(f"difference_{results['lc_name']}")
    if controlled:
        shown += f", {difference(controlled)} length-controlled"
    # The audit decides first: without a reliable judge, no difference supports a claim.
    if not audit:
        return f"No claim: the judge was not audited (--audit_limit); {shown}."
    if not audit["passed"]:
        return f"No claim: the judge failed its audit; {shown}."
    preferred = direction(d, p["value"])
    if not preferred:
        return f"Inconclusive: {shown}."
    result = f"the judge prefers {'tuned to base' if preferred > 0 else 'base to tuned'}"
    # Also true for NaN: a rate that could not be fitted supports no claim.
    if controlled and controlled["value"] is not None and not preferred * controlled["value"] > 0:
        return f"Inconclusive: {result}, but not at equal length: {shown}."
    return f"T{result[1:]}: {shown}."


def power_note(m: dict) -> str:
    """What these instructions could have shown, where the difference of win rates is inconclusive; else ""."""
    d = m["difference_win_rate"]
    if direction(d, m["p_difference_win_rate"]["value"]):
        return ""
    return power_sentence(d, lambda points: f"{number(points, 1)} points")


def leaderboard(results: dict, rows: dict, sides: dict[str, str] | None = None) -> str:
    """leaderboard.csv: the models and the published rows in the package's columns, each with its judge and source.

    Args:
        sides: prefix of the metrics by name of the model; default: those of base and tuned.
    """
    m, name, out = results["metrics"], results["lc_name"], io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    # The minimal variant's rate has its own column name, so that no tool reads it as AlpacaEval 2's.
    columns = [name if c == "length_controlled_winrate" else c for c in COLUMNS]
    writer.writerow(["", *columns, "judged_by", "source"])
    for side, prefix in (sides or PREFIXES).items():
        values = [m[prefix + c]["value"] if prefix + c in m else "" for c in columns]
        writer.writerow([side, *values, results["judge"], "this run"])
    for row_name, row in rows.items():
        cells = [row.get(c, "") for c in COLUMNS]
        if name != "length_controlled_winrate":
            # Published length-controlled rates do not belong in the minimal variant's column.
            cells[COLUMNS.index("length_controlled_winrate")] = ""
        writer.writerow([row_name, *cells, "GPT-4 Turbo", row["source"]])
    return out.getvalue()


@fits_terminal
def render_file(results: dict, name: str) -> Report:
    """The report of --annotations: one model's metrics as the package computes them.

    Args:
        results: from `preflab.alpacaeval.metrics.summarise_file`. name: of the file.
    """
    m, section, lc = results["metrics"], results["length_control"], results["lc_name"]
    lines = [("metric", "value", "95% bootstrap interval")]
    for key in ("win_rate", "discrete_win_rate"):
        lines.append((key, f"{m[key]['value']:.4f}", interval(m[key], digits=2).strip() or "-"))
    if lc in m:
        shown = interval(m[lc], digits=2).strip() or "-"
        lines.append((lc, f"{m[lc]['value']:.4f}", f"{shown} ({section['resamples']} refits)"))
        lines.append(("lc_standard_error", f"{m['lc_standard_error']['value']:.4f}", "the package's"))
    else:
        lines.append((lc, "-", ""))
    lines.append(("standard_error", f"{m['standard_error']['value']:.4f}", "the package's"))
    for key in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length", "unparsed"):
        lines.append((key, str(m[key]["value"]), ""))
    blocks = [render_table(f"{name}: {results['model']} judged by {results['judge']}", lines)]
    if "why_none" in section:
        blocks.append(f"No length-controlled win rate: {section['why_none']}.")
    elif section["why_not_whole"]:
        blocks.append(f"AlpacaEval's length-controlled win rate is not available: {section['why_not_whole']}.")
    if "why_no_interval" in section:
        blocks.append(f"No interval of the length-controlled rate: {section['why_no_interval']}.")
    if not section["why_not_whole"] and results["rows"] != ALPACAEVAL_SIZE:
        blocks.append(f"ONLY {results['rows']} OF ALPACAEVAL'S {ALPACAEVAL_SIZE} INSTRUCTIONS.")
    if "contamination" in results:
        blocks.append(_overlap_of_file(results["contamination"]))
    verdict = f"No claim: one model's judgements, without a second model to compare ({results['model']})."
    return Report("\n\n".join([*blocks, verdict]), verdict)


# ----------------------------------------------------------------------------------------------------------- picture

BARS = {
    "win_rate": "win rate",
    "length_controlled_winrate": "length-controlled",
    "length_controlled_minimal_winrate": "length-controlled\n(minimal)",
    "longer_win_rate": "`longer` as judge",
    "random_win_rate": "`random` as judge",
}


def draw(path, metrics: dict, published_rows: dict, title: str, sides: dict[str, str] | None = None) -> None:
    """Two panels: win rates of the models with intervals and controls, and win rate against answer length.

    Args:
        sides: as for `leaderboard`, at most two.
    """
    fig, axes = figure(1, 2, title)
    sides = sides or PREFIXES
    colours = (NEUTRAL, CHOSEN) if len(sides) == 2 else (CHOSEN,)
    bars = []
    for key, label in BARS.items():
        for (side, prefix), colour in zip(sides.items(), colours, strict=True):
            if f"{prefix}{key}" in metrics:
                bars.append((f"{shorten(side, 22)}, {label}", as_share(metrics[f"{prefix}{key}"]), colour))
    rate_bars(axes[0], bars, "win rate (%)")
    axes[0].set_title("Against the reference, 95% intervals")
    # Markers with names above the panel: beside its point, a name would cover other points.
    for marker, (name, row) in zip("x+1234^v<>sD*phXPd", published_rows.items(), strict=False):
        axes[1].plot(row["avg_length"], row["win_rate"], marker, color="grey", ms=5, label=shorten(name, 22))
    for (side, prefix), colour in zip(sides.items(), colours, strict=True):
        rate, length = metrics[f"{prefix}win_rate"], metrics[f"{prefix}avg_length"]["value"]
        error, label = interval_lengths([rate]), f"{shorten(side, 22)}, this judge"
        axes[1].errorbar(length, rate["value"], error, fmt="o", color=colour, capsize=2, label=label)
    axes[1].set_title("Against length (grey: published, GPT-4 Turbo judged)")
    axes[1].set(xlabel="mean answer length (characters)", ylabel="win rate (%)", ylim=(-2, 102))
    axes[1].legend()
    save(fig, path)


def as_share(m: dict) -> dict:
    """A metric in percent, as the package has them, as a share from 0 to 1."""
    if m["value"] is None:
        return m
    # The package rounds some of its rates, so the value may be just outside its interval.
    return {**m, "value": m["value"] / 100, "ci95": m["ci95"] and [end / 100 for end in m["ci95"]]}
