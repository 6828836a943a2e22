"""What run_lm_eval.sh prints and writes: the harness's table for base and tuned, averages, published rows."""

from importlib.metadata import version

from preflab.harness.metrics import ModelResults
from preflab.harness.suites import Suite, on_harness_scale, published_averages, published_row
from utils.errors import is_main_process
from utils.plots import CHOSEN, EVAL, NEUTRAL, empty_panel, figure, save
from utils.stats import holm
from utils.tables import markdown_table

PURPOSE = (
    "These tasks measure objective quality (knowledge, reasoning, truthfulness as fixed questions see them), not human"
    " preference."
)


def report(title: str, suite: Suite, sides: dict, rows: list[dict], averages: dict, references: list[dict],
           settings: dict) -> tuple[str, str]:  # fmt: skip
    """(text, verdict): everything that is printed, as Markdown.

    Args:
        sides: `{"base": ModelResults, "tuned": ModelResults}`. rows: from `preflab.harness.metrics.rows`.
        averages: from `suite_averages`. references: from `load_reference`.
        settings: apply_chat_template, limit, num_fewshot, tokenizer_bos (BOS tokens before the first request), missing.
    """
    verdict = claim(rows)
    published, why = published_columns(rows, references, settings)
    parts = [f"# {title}", "\n".join(f"- {name}: `{line}`" for name, side in sides.items() for line in side.headers)]
    if any(len(side.templates) > 1 for side in sides.values()) or sides["base"].templates != sides["tuned"].templates:
        parts.append("MIXED TABLE: some figures are with a chat template and some without; they do not compare.")
    parts.append(table(rows, settings, published))
    if averages:
        parts.append(averages_table(suite, averages, references, settings))
    parts += _below(suite, sides, rows, why, settings)
    parts += [about(reference, settings) for reference in references]
    parts += [PURPOSE, verdict]
    return "\n\n".join(parts), verdict


def table(rows: list[dict], settings: dict, published: dict[str, list[str]]) -> str:
    """The harness's columns for base and tuned, the paired difference, and published figures."""
    on = f"template {'on' if settings['apply_chat_template'] else 'off'}"
    head = ["Tasks", "Version", "Filter", "n-shot", "Metric", "", f"base ({on})", "Stderr", f"tuned ({on})", "Stderr"]
    lines = [[*head, "tuned - base", "Stderr", "p", *published]]
    arrows = {True: "↑", False: "↓"}
    for k, row in enumerate(rows):
        name = f"{' ' * row['depth'] + '- ' if row['depth'] else ''}{row['alias']}"
        version = "" if row["version"] is None else str(row["version"])
        shots = "" if row["shots"] is None else str(row["shots"])
        p = "-" if row["p"] is None else f"{row['p']:.2g}{'*' if row.get('significant') else ''}"
        lines.append(
            [
                *(name, version, row["filter"], shots, row["metric"], arrows.get(row["higher"], "")),
                *_value(row["base"]),
                *_value(row["tuned"]),
                *(_value(row["difference"], "+")),
                p,
                *(column[k] for column in published.values()),
            ]
        )
    return markdown_table(lines)


def _value(m: dict, sign: str = "") -> tuple[str, str]:
    if m["value"] is None:
        return "-", ""
    return f"{m['value']:{sign}.4f}", "" if m["stderr"] is None else f"± {m['stderr']:.4f}"


def claim(rows: list[dict]) -> str:
    """What changed for certain: the tasks' own rows, corrected for their number. Marks those rows `significant`."""
    tested = [row for row in rows if row["top"] and row["p"] is not None]
    if not tested:
        return "No claim: no figure of these tasks could be tested."
    better, worse = [], []
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"], row["significant"] = p, p < 0.05
        if row["significant"] and row["higher"] is not None:
            up = (row["difference"]["value"] > 0) == row["higher"]
            (better if up else worse).append(f"{row['task']} {row['metric']} ({row['difference']['value']:+.4f})")
    tail = f"by {len(tested)} paired tests with Holm's correction (* above; about {0.05 * len(tested):.1f} of them fall"
    tail += " below p=0.05 by chance alone)"
    if not better and not worse:
        return f"No claim: no task changed for certain, {tail}."
    said = [f"tuned is {word} on {', '.join(found)}" for word, found in (("better", better), ("worse", worse)) if found]
    return f"{'; '.join(said).capitalize()}: {tail}."


# ---------------------------------------------------------------------------------------------------- published figures


def differs(reference: dict, row: dict | None, shots: int | None, settings: dict) -> str | None:
    """Why a published figure was measured in another setting than ours, None where everything known is equal."""
    if row is not None and row.get("how") == "generated":
        return "its answers were generated and parsed, not scored by likelihood"
    if settings["limit"] is not None:
        return "ours are on --limit alone"
    if row is not None and row.get("shots") != shots:
        return (
            f"{'unknown' if row.get('shots') is None else row['shots']} shots" if shots is not None else "other shots"
        )
    if reference.get("apply_chat_template") is None:
        return "whether with a chat template is not published"
    if reference["apply_chat_template"] != settings["apply_chat_template"]:
        return f"chat template {'on' if reference['apply_chat_template'] else 'off'}"
    if reference.get("harness") != f"lm-eval {version('lm_eval')}":
        return "another harness"
    if reference.get("dtype") != settings["dtype"]:
        return f"dtype {reference.get('dtype') or 'not published'}"
    return None


def published_columns(rows: list[dict], references: list[dict], settings: dict) -> tuple[dict[str, list], dict]:
    """({reference: a cell a row}, {reference: reasons}); parentheses mark another setting: nothing is compared."""
    columns, reasons = {}, {}
    for reference in references:
        cells, why = [], {}
        for row in rows:
            found = published_row(reference, row, row["shots"])
            if found is None:
                cells.append("")
                continue
            value, stderr = (on_harness_scale(reference, found, key) for key in ("value", "stderr"))
            shown = f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
            reason = differs(reference, found, row["shots"], settings)
            row.setdefault("references", {})[reference["name"]] = {
                "value": value,
                "stderr": stderr,
                "published_as": f"{found.get('published', row['task'])} {found.get('published_metric', row['metric'])}",
                "other_setting": reason,
            }
            if reason:
                cells.append(f"({shown})")
                why.setdefault(reason, []).append(row["task"])
            else:
                cells.append(f"{shown}, tuned {row['tuned']['value'] - value:+.4f}")
        if any(cells):
            columns[reference["name"]] = cells
        reasons[reference["name"]] = why
    return columns, reasons


def averages_table(suite: Suite, averages: dict, references: list[dict], settings: dict) -> str:
    """A line a model, a column an average: the summary of a suite; parentheses mark another setting."""
    lines, digits = [["Model", *averages]], {}
    for average in suite.averages:
        inner = [digits[entry] for entry in average["of"] if isinstance(entry, str)]
        digits[average["name"]] = max(inner) if inner else 2 if average.get("scale", 1) > 1 else 4
    for side in ("base", "tuned"):
        lines.append([side, *(_average(m[side], digits[name]) for name, m in averages.items())])
    moved = (_average(m["difference"], digits[name], "+", m["p"]) for name, m in averages.items())
    lines.append(["tuned - base", *moved])
    for reference in references:
        published = published_averages(suite, reference)
        if any(value is not None for value in published.values()):
            other = differs(reference, None, None, settings) or settings["num_fewshot"] is not None
            cells = ["" if value is None else f"{value:.{digits[name]}f}" for name, value in published.items()]
            lines.append([reference["name"], *(f"({c})" if other and c else c for c in cells)])
    return markdown_table(lines)


def _average(m: dict, digits: int, sign: str = "", p: float | None = None) -> str:
    if m["value"] is None:
        return "-"
    error = "" if m["stderr"] is None else f" ± {m['stderr']:.{digits}f}"
    return f"{m['value']:{sign}.{digits}f}{error}" + ("" if p is None else f" p={p:.2g}")


# ---------------------------------------------------------------------------------------------------- below the table


def about(reference: dict, settings: dict) -> str:
    """Where a reference's figures come from, and in which setting they were measured."""
    template = {None: "chat template not published", True: "chat template on", False: "chat template off"}
    said = [reference["source"], f"harness: {reference.get('harness')}", f"dtype: {reference.get('dtype')}"]
    said += [template[reference.get("apply_chat_template")], f"published on a scale to {reference.get('scale', 1)}"]
    note = f". {reference['note']}" if reference.get("note") else ""
    other = differs(reference, None, None, settings)
    averages = f"; its averages are of another setting: {other}" if reference["averages"] and other else ""
    return f"{reference['name']}: {'; '.join(said)}{averages}{note}."


def _below(suite: Suite, sides: dict[str, ModelResults], rows: list[dict], why: dict, settings: dict) -> list[str]:
    """Times, lengths, what cannot be compared and what departs from the published suite."""
    seconds = {name: side.seconds for name, side in sides.items()}
    each = ", ".join(f"{name} {clock(spent)}" for name, spent in seconds.items())
    found = [f"Elapsed time: {clock(sum(seconds.values()))} ({each}), of the calls that ran these tasks."]
    if settings["limit"] is not None:
        found.append(f"ONLY {settings['limit']} DOCUMENTS A TASK: no figure of any leaderboard.")
    if settings["num_fewshot"] is not None:
        found.append(f"--num-fewshot {settings['num_fewshot']} was asked for: the suite's own shots are others.")
    if settings["unquantised"]:
        found.append(settings["unquantised"])
    if settings["missing"]:
        lacking = "; ".join(f"{task} {reason}" for task, reason in settings["missing"].items())
        found.append(f"LEFT OUT (--skip-missing): {lacking}.")
    lengths = [f"{task} {sides['base'].lengths[task]:.0f} and {sides['tuned'].lengths[task]:.0f}"
               for task in sides["base"].lengths]  # fmt: skip
    if lengths:
        found.append(f"Mean generated length, base and tuned, characters: {', '.join(lengths)}.")
    found += eq_bench(rows)
    notes = [f"{row['task']} {row['metric']}: {row['note']}" for row in rows if row["note"]]
    if notes:
        found.append("Errors of the difference without pairing: " + "; ".join(dict.fromkeys(notes)) + ".")
    for name, reasons in why.items():
        told = [f"{reason} ({tasks[0] if len(set(tasks)) == 1 else f'{len(set(tasks))} tasks'})"
                for reason, tasks in reasons.items()]  # fmt: skip
        if told:
            found.append(f"{name}, in parentheses: another setting than ours, so no difference: {'; '.join(told)}.")
    return [*found, *suite.notes]


def eq_bench(rows: list[dict]) -> list[str]:
    """EQ-Bench's own figure beside the harness's, which counts unparsed answers as 0: EQ-Bench leaves them out."""
    figures = {row["metric"]: row for row in rows if row["task"] == "eq_bench"}
    if not {"eqbench", "percent_parseable"} <= set(figures):
        return []
    said = []
    for side in ("base", "tuned"):
        score, parsed = (figures[key][side]["value"] for key in ("eqbench", "percent_parseable"))
        own = f"{score / (parsed / 100):.2f}" if parsed >= 83.33 else "none, fewer than 83.33% were parsed"
        said.append(f"{side} {own} ({parsed:.1f}% parsed)")
    return [f"EQ-Bench's own average, of the parsed answers: {'; '.join(said)}."]


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, `00:12:31`."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def is_share(metric: str) -> bool:
    """Whether a metric of the harness is a share of documents right, from 0 to 1."""
    return metric.startswith(("acc", "exact_match")) or metric.endswith(("_acc", "_match")) or metric == "em"


def harness_figure(path, rows: list[dict], headline: str) -> None:
    """Two panels, a line a task and metric: base and tuned with 95% intervals and published figures, and differences.

    Subtasks of groups are left out, and so are metrics that are no shares (perplexities, scores).

    Args:
        rows: from `preflab.harness.metrics.rows`.
    """
    import numpy as np

    if not is_main_process():
        return
    shown = [r for r in rows if r["top"] and is_share(r["metric"])]
    fig, axes = figure(1, 2, headline)
    if not shown:
        for ax in axes:
            empty_panel(ax, "no figure of these tasks is a share: see lm_eval.md")
        return save(fig, path)
    fig.set_size_inches(9.5, max(2.6, 1.2 + 0.32 * len(shown)))
    y = np.arange(len(shown))
    for side, colour, shift in (("base", NEUTRAL, -0.14), ("tuned", CHOSEN, 0.14)):
        value = 100 * np.array([r[side]["value"] for r in shown])
        error = 196 * np.array([r[side]["stderr"] or 0 for r in shown])
        axes[0].errorbar(value, y + shift, xerr=error, fmt="o", ms=4, lw=1.2, color=colour, label=side)
    published = [
        (y[k], f"{name}{', other setting' if m['other_setting'] else ''}", 100 * m["value"])
        for k, r in enumerate(shown)
        for name, m in r.get("references", {}).items()
    ]
    for marker, name in zip("x+1234", dict.fromkeys(name for _, name, _ in published), strict=False):
        points = [(value, place) for place, other, value in published if other == name]
        axes[0].plot(*zip(*points, strict=True), marker, color="grey", ms=6, alpha=0.6, label=f"published: {name}")
    filters = [f" ({r['filter']})" if r["filter"] != "none" else "" for r in shown]
    names = [f"{r['task']}\n{r['metric']}{f}, {r['shots']}-shot" for r, f in zip(shown, filters, strict=True)]
    axes[0].set_yticks(y, names, fontsize=7)
    axes[0].set(title="Base and tuned, 95% intervals", xlabel="score (%)")
    axes[0].legend(fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.06), frameon=False)
    difference = 100 * np.array([r["difference"]["value"] for r in shown])
    ends = [r["difference"]["ci95"] or (r["difference"]["value"],) * 2 for r in shown]
    error = np.clip(
        [difference - 100 * np.array([e[0] for e in ends]), 100 * np.array([e[1] for e in ends]) - difference], 0, None
    )
    colours = [EVAL if r.get("significant") else NEUTRAL for r in shown]
    for k, colour in enumerate(colours):
        axes[1].errorbar(difference[k], y[k], xerr=error[:, k : k + 1], fmt="o", ms=4, lw=1.2, color=colour)
    axes[1].axvline(0, color="grey", ls=":", lw=1)
    axes[1].set_yticks(y, [])
    axes[1].set(title="Tuned - base (orange: certain after Holm)", xlabel="percentage points")
    for ax in axes:
        ax.set_ylim(len(shown) - 0.4, -0.6)
    save(fig, path)
