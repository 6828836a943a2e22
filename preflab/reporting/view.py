"""The content of the report, as its templates show it: texts, tables and pictures, no figures of its own."""

import base64
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

from preflab.evaluation.run_list import HEADLINES, disk, figures_of
from preflab.reporting.answers import Answers, answers_of
from preflab.reporting.artifacts import TRAINING, Artifact, RunArtifacts, part
from preflab.reporting.comparability import BASE, NOTHING, WEIGHTS, basis_of
from preflab.reporting.findings import Audit, Finding, audits_of, findings_of
from preflab.reporting.lineage import Node, path_to
from preflab.reporting.published import published_table
from preflab.reporting.stages import STAGES, Table, tables_of, title_of
from preflab.reporting.status import DISK, MISSING, STALE, StageState, command_of, states_of
from utils.tables import duration

# Colours of the embedded pictures: lines and areas stay as they are, only their edges have fewer shades.
PNG_COLOURS = 128


@dataclass
class StageView:
    """A section of a run's page.

    Attributes:
        anchor: its id in the page.
        problem: what is wrong with its file, in which case there are no tables.
        picture: data URI of its PNG, and its alternative text.
        facts: (name, text) of how to repeat it.
        text: the report that the stage printed.
        picture_file: its path.
    """

    anchor: str
    title: str
    question: str
    state: StageState
    claim: str = ""
    problem: str | None = None
    tables: list[Table] = field(default_factory=list)
    picture: tuple[str, str] | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    picture_file: Path | None = None


@dataclass
class RunView:
    """The page of one run."""

    anchor: str
    name: str
    facts: list[tuple[str, str]]
    stages: list[StageView]
    missing: list[StageState]
    findings: list[Finding]
    audits: list[Audit]
    path: list[Node]
    costs: Table
    answers: Answers


@dataclass
class ReportView:
    """Everything the templates show.

    Attributes:
        overview: a line per run.
        matrix: the state of every stage of every run.
        figures: one table per headline figure; runs that are not comparable are in groups.
        curves: data URI of the overlaid training curves.
        comparison: tables of --compare, with the reason of what was left out.
    """

    title: str
    made: str
    runs: list[RunView]
    overview: Table
    matrix: Table
    figures: list[Table]
    trees: list[Node]
    costs: Table
    disk: Table
    published: Table | None
    problems: list[str]
    curves: str | None = None
    comparison: "ComparisonView | None" = None


@dataclass
class ComparisonView:
    """The result of --compare: `tests` is the number of tests in Holm's correction."""

    baseline: str
    runs: list[str]
    tests: int
    tables: list[Table]
    left_out: Table | None


def anchor_of(prefix: str, text: str) -> str:
    """An id for use in links: letters, digits and hyphens only."""
    return f"{prefix}-{re.sub(r'[^A-Za-z0-9]+', '-', text).strip('-')}"


def run_view(run: RunArtifacts, trees: list[Node], most_answers: int, number: int) -> RunView:
    """The page of a run. `number` keeps ids of runs apart whose names differ only in other characters."""
    states = states_of(run)
    anchor = anchor_of(f"run{number}", run.name)
    stages = [
        _stage_view(artifact, state, f"{anchor}-{k}")
        for k, (artifact, state) in enumerate(zip(run.artifacts, states, strict=False))
    ]
    findings = findings_of(run)
    findings += [Finding("stale", s.title, reason) for s in states if s.state == STALE for reason in s.reasons]
    findings += [Finding("files", view.title, view.problem) for view in stages if view.problem]
    missing = [state for state in states if state.state == MISSING]
    if missing:
        findings.append(Finding("missing", "evaluations", f"not run yet: {', '.join(s.title for s in missing)}"))
    answers = answers_of(run, most_answers)
    findings += [Finding("files", "answers", problem) for problem in answers.problems]
    return RunView(
        anchor,
        run.name,
        _run_facts(run),
        stages,
        missing,
        findings,
        audits_of(run),
        path_to(run.name, trees),
        Table([COSTS, *cost_lines(run)]),
        answers,
    )


def _run_facts(run: RunArtifacts) -> list[tuple[str, str]]:
    facts = [("state", run.run.state)]
    facts += [("trains", run.run.trains)] if run.run.trains else []
    facts += [("base", run.run.base)] if run.run.base else []
    facts += [("training time", duration(run.run.seconds))] if run.run.seconds is not None else []
    if run.training:
        plan, training = run.training.part("plan"), run.training.part("training")
        if plan.get("steps") and training.get("steps"):
            facts.append(
                ("steps", f"{training['steps']} of {plan['steps']}, global batch {plan.get('global_batch_size')}")
            )
    return [*facts, ("disk", disk(run.run.size))]


def _stage_view(artifact: Artifact, state: StageState, anchor: str) -> StageView:
    tables, problem = tables_of(artifact)
    known = STAGES.get(artifact.stage)
    view = StageView(anchor, title_of(artifact), known.question if known else "", state, problem=problem)
    view.facts = repeat_facts(artifact) if not artifact.problem else []
    if problem:
        # Nothing of a damaged file is shown as a result, neither its claim nor its picture.
        return view
    view.claim, view.text = str(artifact.summary.get("claim") or ""), str(artifact.summary.get("text") or "")
    view.tables = tables
    picture = artifact.picture()
    if picture:
        shown = png_uri(picture)
        view.picture = (shown, f"Figure of {view.title}") if shown else None
        view.picture_file = picture
    return view


def repeat_facts(artifact: Artifact) -> list[tuple[str, str]]:
    """(name, text) of what is needed to repeat a result."""
    run = artifact.run
    facts = [("command", command_of(artifact)), ("commit", str(run.get("git_commit") or "not recorded"))]
    facts.append(("finished", str(run.get("finished_utc") or "not recorded")))
    facts.append(("on", basis_of(artifact).text()))
    versions = part(run, "versions")
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    hardware = part(run, "hardware")
    machine = [f"{hardware.get('cores')} cores of {hardware.get('cpu')}", f"{hardware.get('memory_gib')} GiB"]
    machine += [str(gpu) for gpu in hardware.get("gpus") or []]
    facts.append(("machine", ", ".join(machine) if hardware else "not recorded"))
    if (run.get("world_size") or 1) > 1:
        facts.append(("processes", str(run["world_size"])))
    if run.get("seed") is not None:
        facts.append(("seed", str(run["seed"])))
    facts.append(("file", str(artifact.path)))
    return [(name, text) for name, text in facts if text]


COSTS = ("stage", "wall time", "host memory, GiB", "GPU memory, GiB", "finished, UTC")


def cost_lines(run: RunArtifacts) -> list[tuple]:
    """Time and memory of every stage of a run; a dash where a summary does not record it."""
    lines = []
    for artifact in run.artifacts:
        if artifact.problem:
            continue
        record = artifact.run
        memory = part(record, "peak_memory_gib")
        seconds = record.get("wall_seconds")
        if artifact.stage in TRAINING and run.run.seconds is not None:
            # Over all calls of a run that was resumed.
            seconds = max(seconds or 0, run.run.seconds)
        lines.append(
            (
                title_of(artifact),
                duration(seconds),
                *(str(memory[key]) if key in memory else "-" for key in ("host", "gpu")),
                str(record.get("finished_utc") or "-").replace("T", " ").removesuffix("Z"),
            )
        )
    return lines


def png_uri(path: Path) -> str | None:
    """A PNG as a data URI, in a palette of colours, which makes it a third of its size; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            picture = image.convert("RGB").quantize(PNG_COLOURS, method=Image.Quantize.FASTOCTREE, dither=0)
    except (OSError, ValueError, SyntaxError):
        return None
    out = io.BytesIO()
    picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------------------ all runs


def overview_table(runs: list[RunArtifacts], views: list[RunView]) -> Table:
    """A line per run: what it is, its verdict, and what is to be known before believing it."""
    lines = [("run", "state", "trains", "base", "time", "warnings", "verdict")]
    for run, view in zip(runs, views, strict=True):
        warnings = sum(finding.about != "missing" for finding in view.findings)
        verdict = (
            run.training.summary.get("claim") if run.training else next((s.claim for s in view.stages if s.claim), "")
        )
        lines.append(
            (
                run.name,
                run.run.state,
                run.run.trains or "-",
                run.run.base or "-",
                duration(run.run.seconds),
                str(warnings) if warnings else "none",
                str(verdict),
            )
        )
    return Table(lines)


def matrix_table(views: list[RunView]) -> Table:
    """Which stage of which run is done, stale, a trial, damaged or not run."""
    stages = [stage for stage in STAGES if any(state.stage == stage for v in views for state in _states(v))]
    lines = [("run", *(STAGES[stage].title for stage in stages))]
    for view in views:
        by_stage: dict[str, list[str]] = {}
        for state in _states(view):
            by_stage.setdefault(state.stage, []).append(state.state)
        lines.append((view.name, *(", ".join(dict.fromkeys(by_stage.get(stage, ["-"]))) for stage in stages)))
    return Table(lines)


def _states(view: RunView) -> list[StageState]:
    return [*(stage.state for stage in view.stages), *view.missing]


def figure_tables(runs: list[RunArtifacts]) -> list[Table]:
    """Every headline figure of all runs; runs on other data, another base or other settings are groups of their own."""
    labels = [label for _, label, *_ in HEADLINES]
    by_label: dict[str, list[tuple]] = {}
    for run in runs:
        by_file = {str(a.path.relative_to(run.run.results)): a for a in run.artifacts}
        for label, name, value, rows, file in figures_of(run.run):
            artifact = by_file.get(file)
            # A suite without averages has its figures on the run's page.
            if artifact and not artifact.problem and value != "see lm_eval.md":
                by_label.setdefault(label, []).append((artifact, name, value, rows))
    tables = []
    for label in sorted(by_label, key=lambda label: (labels.index(label) if label in labels else len(labels), label)):
        rewards, against = "margin" in label, measured_against(label)
        groups: list[tuple] = []
        for artifact, *line in by_label[label]:
            basis = basis_of(artifact, rewards)
            group = next((lines for other, lines in groups if not basis.differs(other, against)), None)
            if group is None:
                group = []
                groups.append((basis, group))
            # Answers to a reference and tasks are comparable whatever the base; the line names it.
            named = f"{line[0]} (base {basis.base[0]})" if against == NOTHING else line[0]
            group.append((named, *line[1:]))
        # The group with most runs first: the others are compared with it.
        groups.sort(key=lambda pair: -len(pair[1]))
        lines: list[tuple] = [(label, "value [95% interval]", "rows")]
        for number, (basis, group) in enumerate(groups):
            if len(groups) > 1:
                mark = "" if number == 0 else "not comparable with the runs above: "
                lines.append((f"{mark}{basis.text()}",))
            lines += group
        tables.append(Table(lines, note=f"on {groups[0][0].text()}" if len(groups) == 1 else ""))
    return tables


def measured_against(label: str) -> str:
    """What a headline figure is measured against."""
    if label.startswith(("AlpacaEval", "lm-eval")):
        return NOTHING
    return WEIGHTS if label.startswith("perplexity") else BASE


def all_costs(runs: list[RunArtifacts]) -> Table:
    """Time, memory and disk of every stage of every run."""
    head = ("run", *COSTS[:-1])
    lines = [(run.name if k == 0 else "", *line[:-1]) for run in runs for k, line in enumerate(cost_lines(run))]
    return Table([head, *lines])


def report_view(
    runs: list[RunArtifacts], trees: list[Node], published: dict, most_answers: int, title: str, made: str
) -> ReportView:
    """The content of the report but for curves, disk and comparison, which the caller adds.

    Args:
        runs: those that are shown. trees: the lineage of all runs.
        published: from `read_comparison`.
        most_answers: prompts shown side by side per stage.
        made: when and by which commit.
    """
    views = [run_view(run, trees, most_answers, number) for number, run in enumerate(runs)]
    return ReportView(
        title,
        made,
        views,
        overview_table(runs, views),
        matrix_table(views),
        figure_tables(runs),
        trees,
        all_costs(runs),
        Table([DISK]),
        published_table(runs, published),
        [problem for run in runs for problem in run.problems],
    )


def comparison_view(baseline: str, runs: list[str], figures: list) -> ComparisonView:
    """The tables of --compare. `figures` are from `preflab.reporting.compare.compare`."""
    from preflab.reporting.compare import left_out, stage_tables

    tests = sum(line.p is not None for compared in figures for line in compared.lines)
    return ComparisonView(baseline, runs, tests, stage_tables(figures), left_out(figures))
