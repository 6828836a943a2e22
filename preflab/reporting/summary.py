"""The steps of report.py between reading and writing: selection, comparison, curves, and the printed text."""

import time
from dataclasses import dataclass
from pathlib import Path

from preflab.reporting import curves, page
from preflab.reporting.arguments import ReportArguments
from preflab.reporting.artifacts import RunArtifacts, select
from preflab.reporting.view import ComparisonView, ReportView, comparison_view, png_uri
from utils.artifacts import metric, write_text
from utils.errors import UserError
from utils.provenance import git_commit
from utils.stage import Report, fits_terminal
from utils.tables import render as render_table


@dataclass
class ComparedRuns:
    """A comparison as the page shows it, and as metrics of report.json."""

    view: ComparisonView
    metrics: dict


def made() -> str:
    """When the report was made, and by which commit."""
    commit = git_commit()
    return f"Made {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC" + (
        f" at commit {commit[:12]}" if commit else ""
    )


def compare_runs(runs: list[RunArtifacts], args: ReportArguments) -> ComparedRuns:
    """The comparison of --compare.

    Raises:
        UserError: a run does not exist, or no figure of the baseline has rows to pair.
    """
    from preflab.reporting.compare import compare

    baseline = select(runs, [args.baseline_name()], "--baseline" if args.baseline else "--compare")[0]
    others = select(runs, args.others(), "--compare")
    figures = compare(others, baseline, args.seed)
    if not figures:
        raise UserError(
            f"--compare: {baseline.name} has no figures with rows; evaluate it, e.g. python eval_win_rate.py --run_name"
            f" {baseline.name}, or choose another --baseline"
        )
    metrics = {}
    for compared in figures:
        for line in compared.lines[1:]:
            if line.comparable:
                name = f"{compared.stage}/{compared.kind.label}/{line.run}-{baseline.name}"
                metrics |= {name: line.change, f"p_{name}": metric(line.p), f"p_holm_{name}": metric(line.p_holm)}
    return ComparedRuns(comparison_view(baseline.name, [run.name for run in others], figures), metrics)


def curves_of(runs: list[RunArtifacts], problems: list[str]) -> dict | None:
    """`{run: (kind, log)}` of the training runs, None for fewer than two; a damaged log is added to `problems`."""
    logs = {}
    for run in runs:
        if run.training and len(logs) < curves.MOST_RUNS:
            try:
                rows = run.log()
            except UserError as error:
                problems.append(str(error))
                continue
            if any(row.get("split") == "train" for row in rows):
                logs[run.name] = (run.training.stage, rows)
    return logs if len(logs) > 1 else None


def write_html(content: ReportView, logs: dict | None, most_answers: int, path: Path) -> None:
    """Write the page, with the overlaid curves that were drawn before."""
    picture = path.with_name("report.png")
    content.curves = png_uri(picture) if logs else None
    write_text(path, page.html(content, most_answers))


@fits_terminal
def render(content: ReportView, path: Path) -> Report:
    """What report.py prints: a line per run, the comparison, what is missing or damaged, and the path of the page."""
    lines = [("run", "state", "results", "warnings")]
    for view, line in zip(content.runs, content.overview.body, strict=True):
        done = [stage.title for stage in view.stages if not stage.problem]
        lines.append((view.name, line[1], str(len(done)), line[5]))
    parts = [render_table(content.title, lines)]
    if content.comparison:
        parts += [render_table(f"{t.title} {t.note}", t.lines) for t in content.comparison.tables]
        if content.comparison.left_out:
            parts.append(render_table("not comparable", content.comparison.left_out.lines))
    if content.problems:
        parts.append("\n".join(["missing or damaged:", *(f"- {problem}" for problem in content.problems)]))
    parts.append(f"open {path} in a browser; python report.py --status says what to run next")
    runs = f"{len(content.runs)} runs" if len(content.runs) != 1 else "1 run"
    return Report("\n\n".join(parts), f"Report of {runs}, {len(content.problems)} files missing or damaged.")
