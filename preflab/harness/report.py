"""Report of run_lm_eval.sh: the printed table, the full table as Markdown, the verdict and the figure."""

from importlib.metadata import version

import numpy as np

from preflab.harness import contamination
from preflab.harness.metrics import SuiteResults
from preflab.harness.results import leaves
from preflab.harness.suites import on_harness_scale, published_averages, published_row
from utils import tables
from utils.plots import CHOSEN, EVAL, NEUTRAL, empty_panel, figure, interval_lengths, save, shorten
from utils.power import LEVEL, pilot_of_metric, points, power_record, power_sentence
from utils.stage import Report, fits_terminal
from utils.stats import direction, holm, score_interval
from utils.tables import markdown_table, number, p_equals, p_value, paragraphs

PURPOSE = (
    "These tasks measure objective quality (knowledge, reasoning, truthfulness on fixed questions), not human"
    " preference."
)
MIXED = "MIXED TABLE: some figures use a chat template and some do not, so they are not comparable."
ARROWS = {True: " ↑", False: " ↓", None: ""}


@fits_terminal
def render(results: SuiteResults) -> Report:
    """The printed report: tables of at most 100 columns, notes and the verdict.

    Marks rows as `significant` and attaches published figures to them, see `verdict_of` and `attach_published`.
    """
    # First, because both set keys of the rows that the tables below read.
    verdict, reasons = verdict_of(results.rows, results.alone), attach_published(results)
    parts = [tables.render(results.title, shown_lines(results, table_lines(results)))]
    if results.averages:
        lines = shown_lines(results, average_lines(results))
        parts.append(tables.render("averages, as the leaderboard defines them", lines))
        published = published_average_lines(results)
        parts += [tables.render("published averages", published)] if published else []
    notes = [*notes_of(results, reasons), *(about(r, results.settings) for r in results.references), PURPOSE]
    if results.contamination:
        parts.append(contamination.table(results.contamination))
    warning = MIXED if is_mixed(results) else None
    parts += [paragraphs(*([warning] if warning else []), *notes), paragraphs(verdict, *power_notes(results.rows))]
    return Report("\n\n".join(parts), verdict, warning)


def markdown(results: SuiteResults) -> str:
    """The full report for lm_eval.md: all of the harness's columns, published figures beside ours."""
    verdict, reasons = verdict_of(results.rows, results.alone), attach_published(results)
    headers = [f"- {name}: `{line}`" for name, side in results.sides.items() for line in side.headers]
    parts = [f"# {results.title}", "\n".join(headers), *([MIXED] if is_mixed(results) else [])]
    parts.append(full_table(results))
    if results.averages:
        parts.append(full_averages(results))
    if results.contamination:
        parts.append(f"```\n{contamination.table(results.contamination)}\n```")
    parts += notes_of(results, reasons)
    parts += [about(reference, results.settings) for reference in results.references]
    return "\n\n".join([*parts, PURPOSE, verdict, *power_notes(results.rows)]) + "\n"


def is_mixed(results: SuiteResults) -> bool:
    """Whether calls differ in the use of a chat template."""
    # `templates` has one value if all calls of a side agree.
    return len(set().union(*(side.templates for side in results.sides.values()))) > 1


def verdict_of(rows: list[dict], alone: bool = False) -> str:
    """Which tasks changed significantly: the `top` rows, with Holm's correction for their number.

    The 95% interval must exclude 0 too (`utils.stats.direction`).

    Sets `p_holm` and `significant` of those rows.
    """
    # Subtasks repeat their group's documents and would inflate Holm's number of tests.
    tested = [row for row in rows if row["top"] and row["p"] is not None]
    if alone:
        return "No claim: one model's figures, without a second model to compare."
    if not tested:
        return "No claim: no figure of these tasks could be tested."
    better, worse = [], []
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        moved = direction(row["difference"], p)
        row["p_holm"], row["significant"] = p, moved != 0
        if moved and row["higher"] is not None:
            # For perplexities (higher is False), a negative difference is an improvement.
            up = (moved > 0) == row["higher"]
            (better if up else worse).append(f"{row['task']} {row['metric']} ({row['difference']['value']:+.4f})")
    tests = (
        f"{len(tested)} paired tests with Holm's correction (* in the table; without it, about"
        f" {0.05 * len(tested):.1f} of them fall below p=0.05 by chance)"
    )
    if not better and not worse:
        return f"Inconclusive: no task changed significantly in {tests}."
    parts = [
        f"tuned is {word} on {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names
    ]
    return f"{parts[0][0].upper()}{'; '.join(parts)[1:]}, by {tests}."


def power_notes(rows: list[dict]) -> list[str]:
    """What the documents could have shown, for the tested rows of an inconclusive verdict: the first five.

    Sets `power` of the difference of every tested row, at the level of Holm's smallest p-value.
    """
    tested = [row for row in rows if row["top"] and row["p"] is not None]
    for row in tested:
        pilot = pilot_of_metric(row["difference"], row["n"], of_shares=row["test"] == "McNemar")
        row["difference"]["power"] = power_record(pilot, "documents", LEVEL / len(tested))
    if any(row["significant"] for row in tested):
        return []
    notes = []
    for row in tested:
        shown = points if is_share(row["metric"]) else number_of
        notes.append(power_sentence(row["difference"], shown, of=f"{row['task']} {row['metric']}"))
    notes = [note for note in notes if note]
    more = [f"Power of {len(notes) - 5} further figures is in lm_eval.json."] if len(notes) > 5 else []
    return [*notes[:5], *more]


def number_of(difference: float) -> str:
    """A difference on the harness's own scale."""
    return number(difference, 4)


# ------------------------------------------------------------------------------------------------------------- printed


def table_lines(results: SuiteResults) -> list[tuple]:
    """Lines of the printed table: a task's name, then a line per metric, each followed by its published figures."""
    template = "on" if results.settings["apply_chat_template"] else "off"
    lines: list[tuple] = [(f"chat template {template}", "base", "tuned", "tuned - base", "p")]
    task, named = None, set()
    for row in results.rows:
        indent = "  " * row["depth"]
        lines += [("  " * depth + f"{alias} (group without a figure)",) for depth, alias in new_groups(row, named)]
        if row["task"] != task:
            task = row["task"]
            lines.append((f"{indent}{row['alias']}" + ("" if row["shots"] is None else f", {row['shots']}-shot"),))
        measure = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
        p = p_value(row["p"]) + ("*" if row.get("significant") else "")
        cells = (_cell(row["base"]), _cell(row["tuned"]), _cell(row["difference"], "+"))
        lines.append((f"{indent}  {measure}{ARROWS.get(row['higher'], '')}", *cells, p))
        for name, published in row.get("references", {}).items():
            shown, difference = _published_cells(row, published)
            lines.append((f"{indent}    published: {name}", "", shown, difference, ""))
    return lines


def shown_lines(results: SuiteResults, lines: list[tuple]) -> list[tuple]:
    """Lines of (label, base, tuned, difference, p); of a model alone, its figure and, in published lines, theirs."""
    return [line if len(line) < 5 else (line[0], line[1] or line[2]) for line in lines] if results.alone else lines


def rows_for_summary(results: SuiteResults) -> list[dict]:
    """The rows of lm_eval.json; of a model alone without what is of two models."""
    of_two = ("tuned", "difference", "p", "test", "note") if results.alone else ()
    return [{key: value for key, value in row.items() if key not in of_two} for row in results.rows]


def new_groups(row: dict, named: set) -> list[tuple[int, str]]:
    """(depth, alias) of the groups without a figure that a row is under and `named` has not; adds them to it."""
    groups = [tuple(group) for group in row.get("under", []) if tuple(group) not in named]
    named.update(groups)
    return groups


def average_lines(results: SuiteResults) -> list[tuple]:
    """Lines of the printed table of averages."""
    digits = digits_of_averages(results)
    lines: list[tuple] = [("average", "base", "tuned", "tuned - base", "p")]
    for name, m in results.averages.items():
        cells = (_cell(m["base"], "", digits[name]), _cell(m["tuned"], "", digits[name]))
        p = p_value(m["p"])
        lines.append((name, *cells, _cell(m["difference"], "+", digits[name]), p))
    return lines


def published_average_lines(results: SuiteResults) -> list[tuple]:
    """A line per reference and a column per average; empty if no reference has any. Parentheses: another setting."""
    digits, lines = digits_of_averages(results), []
    for reference in results.references:
        published = published_averages(results.suite, reference)
        if any(value is not None for value in published.values()):
            # An average has no number of shots, so --num-fewshot makes every published one another setting.
            other = differs(reference, None, None, results.settings) or results.settings["num_fewshot"] is not None
            cells = ["" if value is None else f"{value:.{digits[name]}f}" for name, value in published.items()]
            lines.append((reference["name"], *(f"({c})" if other and c else c for c in cells)))
    # Without a line, no header, so that no empty table is printed.
    return [("model", *results.averages), *lines] if lines else []


def digits_of_averages(results: SuiteResults) -> dict[str, int]:
    """Decimal places by average: two on a scale to 100, four on one to 1; an average of averages has theirs."""
    digits: dict[str, int] = {}
    for average in results.suite.averages:
        inner = [digits[entry] for entry in average["of"] if isinstance(entry, str)]
        # As leaderboards print them: percentages as 62.34, shares as 0.6234.
        digits[average["name"]] = max(inner) if inner else 2 if average.get("scale", 1) > 1 else 4
    return digits


def _cell(m: dict, sign: str = "", digits: int = 4) -> str:
    """`0.6667 ± 0.0688`, or a dash."""
    return " ".join(filter(None, _value(m, sign, digits)))


def _published_cells(row: dict, published: dict) -> tuple[str, str]:
    """(the published figure, tuned minus it if comparable); parentheses mark another setting."""
    stderr = "" if published["stderr"] is None else f" ± {published['stderr']:.4f}"
    shown = f"{published['value']:.4f}{stderr}"
    if published["other_setting"]:
        # No difference for another setting: it would mix the models' quality with the settings' effect.
        return f"({shown})", ""
    return shown, f"{row['tuned']['value'] - published['value']:+.4f}"


# ------------------------------------------------------------------------------------------------------------ Markdown


def full_table(results: SuiteResults) -> str:
    """The harness's columns for base and tuned, the paired difference, and published figures, as Markdown."""
    on = f"template {'on' if results.settings['apply_chat_template'] else 'off'}"
    # One column per reference, in order of first appearance.
    names = list(dict.fromkeys(name for row in results.rows for name in row.get("references", {})))
    head = ["Tasks", "Version", "Filter", "n-shot", "Metric", "", f"base ({on})", "Stderr", f"tuned ({on})", "Stderr"]
    lines, named = [[*head, "tuned - base", "Stderr", "p", *names]], set()
    for row in results.rows:
        for depth, alias in new_groups(row, named):
            lines.append([f"{' ' * depth + '- ' if depth else ''}{alias}", *[""] * (len(lines[0]) - 1)])
        name = f"{' ' * row['depth'] + '- ' if row['depth'] else ''}{row['alias']}"
        task_version = "" if row["version"] is None else str(row["version"])
        shots = "" if row["shots"] is None else str(row["shots"])
        p = p_value(row["p"]) + ("*" if row.get("significant") else "")
        references = row.get("references", {})
        published = [_published_cells(row, references[name]) if name in references else ("", "") for name in names]
        lines.append(
            [
                *(name, task_version, row["filter"], shots, row["metric"], ARROWS.get(row["higher"], "").strip()),
                *_value(row["base"]),
                *_value(row["tuned"]),
                *_value(row["difference"], "+"),
                p,
                *(f"{shown}, tuned {moved}" if moved else shown for shown, moved in published),
            ]
        )
    # Without the columns of tuned, the difference and p.
    return markdown_table([[*line[:8], *line[13:]] for line in lines] if results.alone else lines)


def full_averages(results: SuiteResults) -> str:
    """A line per model and a column per average, as Markdown; parentheses mark another setting."""
    digits = digits_of_averages(results)
    lines = [["Model", *results.averages]]
    for side in results.sides:
        lines.append([side, *(_cell(m[side], "", digits[name]) for name, m in results.averages.items())])
    differences = [
        _cell(m["difference"], "+", digits[name]) + ("" if m["p"] is None else f" {p_equals(m['p'])}")
        for name, m in results.averages.items()
    ]
    if not results.alone:
        lines.append(["tuned - base", *differences])
    return markdown_table([*lines, *(list(line) for line in published_average_lines(results)[1:])])


def _value(m: dict, sign: str = "", digits: int = 4) -> tuple[str, str]:
    """(value, `± stderr`) with a dash for a missing value."""
    if m["value"] is None:
        return "-", ""
    digits = tables.decimals(m, digits=digits)
    return number(m["value"], digits, sign), "" if m["stderr"] is None else f"± {number(m['stderr'], digits)}"


# --------------------------------------------------------------------------------------------------- published figures


def differs(reference: dict, row: dict | None, shots: int | None, settings: dict) -> str | None:
    """How the setting of a published figure differs from ours; None if everything known is equal.

    Args:
        row: the published row, or None for the reference's averages. shots: of our figure.
    """
    # Checked in this order: method, documents, shots, template, harness version, precision. The first difference is
    # reported.
    if row is not None and row.get("how") == "generated":
        return "its answers were generated and parsed, not scored by likelihood"
    if settings["limit"] is not None:
        return "ours use only --limit documents"
    if row is not None and row.get("shots") != shots:
        return (
            f"{'unknown' if row.get('shots') is None else row['shots']} shots" if shots is not None else "other shots"
        )
    # A setting that is not published counts as different: the figures may not be compared.
    if reference.get("apply_chat_template") is None:
        return "its use of a chat template is not published"
    if reference["apply_chat_template"] != settings["apply_chat_template"]:
        return f"chat template {'on' if reference['apply_chat_template'] else 'off'}"
    if reference.get("harness") != f"lm-eval {version('lm_eval')}":
        return "another harness"
    if reference.get("dtype") != settings["dtype"]:
        return f"dtype {reference.get('dtype') or 'not published'}"
    return None


def attach_published(results: SuiteResults) -> dict[str, dict[str, list[str]]]:
    """Set `references` of every row that a reference covers: `{name: {value, stderr, published_as, other_setting}}`.

    Returns:
        `{reference: {reason: [task]}}`: why figures are not comparable, see `differs`.
    """
    reasons: dict[str, dict] = {}
    for reference in results.references:
        by_reason = reasons.setdefault(reference["name"], {})
        for row in results.rows:
            published = published_row(reference, row, row["shots"])
            if published is None:
                continue
            reason = differs(reference, published, row["shots"], results.settings)
            # Leaderboards rename tasks and metrics; the artifact keeps their names for a check against the source.
            name, measure = published.get("published", row["task"]), published.get("published_metric", row["metric"])
            row.setdefault("references", {})[reference["name"]] = {
                "value": on_harness_scale(reference, published, "value"),
                "stderr": on_harness_scale(reference, published, "stderr"),
                "published_as": f"{name} {measure}",
                "other_setting": reason,
            }
            if reason:
                by_reason.setdefault(reason, []).append(row["task"])
    return reasons


def about(reference: dict, settings: dict) -> str:
    """The source of a reference's figures and the setting in which they were measured."""
    template = {None: "chat template not published", True: "chat template on", False: "chat template off"}
    parts = [reference["source"], f"harness: {reference.get('harness')}", f"dtype: {reference.get('dtype')}"]
    parts += [template[reference.get("apply_chat_template")], f"published on a scale to {reference.get('scale', 1)}"]
    note = f". {reference['note']}" if reference.get("note") else ""
    other = differs(reference, None, None, settings)
    averages = f"; its averages have another setting: {other}" if reference["averages"] and other else ""
    return f"{reference['name']}: {'; '.join(parts)}{averages}{note}."


# --------------------------------------------------------------------------------------------------------------- notes


def notes_of(results: SuiteResults, reasons: dict[str, dict[str, list[str]]]) -> list[str]:
    """Times, lengths, figures that are not comparable, and deviations from the published suite.

    Args:
        reasons: from `attach_published`.
    """
    sides, settings = results.sides, results.settings
    # From the calls that computed the results, also if this call only read them.
    seconds = {name: side.seconds for name, side in sides.items()}
    each = ", ".join(f"{name} {clock(spent)}" for name, spent in seconds.items())
    notes = [f"Elapsed time of the calls: {clock(sum(seconds.values()))} ({each})."]
    if settings["limit"] is not None:
        share = settings["limit"] < 1
        amount = f"{settings['limit']:.4g} OF THE DOCUMENTS OF EACH" if share else f"{settings['limit']} DOCUMENTS PER"
        notes.append(f"ONLY {amount} TASK: not comparable with any leaderboard.")
    if settings["num_fewshot"] is not None:
        notes.append(f"--num-fewshot {settings['num_fewshot']} replaces the suite's numbers of shots.")
    if settings["unquantised"]:
        notes.append(settings["unquantised"])
    if settings["missing"]:
        missing = "; ".join(f"{task}: {reason}" for task, reason in settings["missing"].items())
        notes.append(f"LEFT OUT (--skip-missing): {missing}.")
    lengths = [
        f"{name} {' and '.join(f'{mean:.0f}' for mean in of_side.values())}"
        for name, of_side in mean_lengths(sides).items()
    ]
    if lengths:
        notes.append(f"Mean length of generated answers in characters, {' and '.join(sides)}: {', '.join(lengths)}.")
    notes += eq_bench(results.rows, tuple(sides))
    unpaired = [f"{row['task']} {row['metric']}: {row['note']}" for row in results.rows if row["note"]]
    if unpaired:
        notes.append("Differences with unpaired errors: " + "; ".join(dict.fromkeys(unpaired)) + ".")
    for name, by_reason in reasons.items():
        parts = [f"{reason} ({tasks[0] if len(set(tasks)) == 1 else f'{len(set(tasks))} tasks'})"
                 for reason, tasks in by_reason.items()]  # fmt: skip
        if parts:
            notes.append(f"{name}, in parentheses: measured in another setting, so not compared: {'; '.join(parts)}.")
    return [*notes, *results.suite.notes]


def mean_lengths(sides: dict) -> dict[str, dict[str, float]]:
    """`{task or group: {side: mean characters of its generated answers}}`, over the documents of all its tasks."""
    base, lengths = sides["base"], {}
    members = {child for children in base.subtasks.values() for child in children}
    for name in (name for name in [*base.subtasks, *base.lengths] if name not in members):
        tasks = [task for task in leaves(base, name) if task in base.lengths]
        counts = [len({document for _, document in base.samples.get(task, ())}) or 1 for task in tasks]
        if tasks:
            lengths[name if len(tasks) == 1 else f"{name} ({len(tasks)} tasks)"] = {
                side: float(np.average([results.lengths[task] for task in tasks], weights=counts))
                for side, results in sides.items()
            }
    return lengths


def eq_bench(rows: list[dict], sides=("base", "tuned")) -> list[str]:
    """EQ-Bench's own average of the parsed answers; the harness counts answers that cannot be parsed as 0."""
    figures = {row["metric"]: row for row in rows if row["task"] == "eq_bench"}
    if not {"eqbench", "percent_parseable"} <= set(figures):
        return []
    # EQ-Bench fails a model with fewer than 83.33% parsed answers (configs/lm_eval/eq_bench.yaml).
    parts = []
    for side in sides:
        score, parsed = (figures[key][side]["value"] for key in ("eqbench", "percent_parseable"))
        # The harness's score averages over all answers with 0 for those that were not parsed; dividing by the parsed
        # share (a percentage) leaves the mean of the parsed ones.
        own = f"{score / (parsed / 100):.2f}" if parsed >= 83.33 else "none, fewer than 83.33% were parsed"
        parts.append(f"{side} {own} ({parsed:.1f}% parsed)")
    return [f"EQ-Bench's own average, of the parsed answers: {'; '.join(parts)}."]


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, `00:12:31`."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def is_share(metric: str) -> bool:
    """Whether a metric of the harness is a share of correct documents, from 0 to 1."""
    # By name, since results do not state a metric's range.
    return metric.startswith(("acc", "exact_match")) or metric.endswith(("_acc", "_match")) or metric == "em"


def with_interval(m: dict, n: int) -> dict:
    """A share as the harness reports it, with Wilson's interval for its `n` documents, or 1.96 errors within 0 to 1."""
    if n > 1:
        low, high = score_interval(n * m["value"], n * (1 - m["value"]), n)
        return {**m, "ci95": [(1 + low) / 2, (1 + high) / 2]}
    error = 1.96 * (m["stderr"] or 0)
    return {**m, "ci95": [max(0.0, m["value"] - error), min(1.0, m["value"] + error)]}


def draw(path, results: SuiteResults) -> None:
    """Two panels with a line per task and metric: base and tuned with published figures, and their differences.

    Without subtasks of groups and without metrics that are not shares (perplexities, scores).
    """
    shown = [r for r in results.rows if r["top"] and is_share(r["metric"])]
    fig, axes = figure(1, 2, results.title)
    if not shown:
        for ax, name in zip(axes, ("Base and tuned", "Tuned - base"), strict=True):
            ax.set_title(name)
            empty_panel(ax, "none of these figures is a share: see lm_eval.md")
        return save(fig, path)
    fig.set_size_inches(9.5, max(2.6, 1.6 + 0.32 * len(shown)))
    y = np.arange(len(shown))
    places = (("base", NEUTRAL, -0.14), ("tuned", CHOSEN, 0.14))
    for side, colour, shift in places[:1] if results.alone else places:
        rates = [with_interval(r[side], r["n"]) for r in shown]
        value = 100 * np.array([m["value"] for m in rates])
        error = interval_lengths(rates, 100)
        axes[0].errorbar(value, y + shift, xerr=error, fmt="o", ms=4, lw=1.2, color=colour, label=side)
    published = [
        (y[k], f"{name}{', other setting' if m['other_setting'] else ''}", 100 * m["value"])
        for k, r in enumerate(shown)
        for name, m in r.get("references", {}).items()
    ]
    # At most six references get a marker; the table lists all.
    for marker, name in zip("x+1234", dict.fromkeys(name for _, name, _ in published), strict=False):
        points = [(value, place) for place, other, value in published if other == name]
        label = f"published: {shorten(name)}"
        axes[0].plot(*zip(*points, strict=True), marker, color="grey", ms=6, alpha=0.6, label=label)
    filters = [f" ({r['filter']})" if r["filter"] != "none" else "" for r in shown]
    names = [
        f"{shorten(r['task'])}\n{shorten(r['metric'] + f)}, {r['shots']}-shot"
        for r, f in zip(shown, filters, strict=True)
    ]
    axes[0].set_yticks(y, names, fontsize=7)
    axes[0].set(title="Base and tuned, 95% intervals", xlabel="score (%)")
    axes[0].legend()
    if results.alone:
        axes[1].set_title("Tuned - base")
        empty_panel(axes[1], "one model alone")
        axes[0].set_ylim(len(shown) - 0.4, -0.6)
        return save(fig, path)
    difference = 100 * np.array([r["difference"]["value"] for r in shown])
    # Shape (2, rows): distances below and above the point, since the intervals are not symmetric.
    error = interval_lengths([r["difference"] for r in shown], 100)
    colours = [EVAL if r.get("significant") else NEUTRAL for r in shown]
    for k, colour in enumerate(colours):
        axes[1].errorbar(difference[k], y[k], xerr=error[:, k : k + 1], fmt="o", ms=4, lw=1.2, color=colour)
    axes[1].axvline(0, color="grey", ls=":", lw=1)
    axes[1].set_yticks(y, [])
    axes[1].set(title="Tuned - base (orange: significant after Holm)", xlabel="percentage points")
    for ax in axes:
        # Reversed, so that the first task is at the top, as in the table.
        ax.set_ylim(len(shown) - 0.4, -0.6)
    save(fig, path)
