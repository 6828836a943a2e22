"""The report as one HTML file that opens from disk, and as Markdown. Every text is escaped."""

import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from preflab.data.messages import well_formed
from preflab.human import page as human_page
from preflab.reporting.answers import Answer, SideBySide
from preflab.reporting.findings import Finding
from preflab.reporting.stages import Table
from preflab.reporting.view import ReportView
from utils.markdown import code_span, escaped
from utils.tables import markdown_table
from utils.web_page import content_policy

STATIC = Path(__file__).parent / "static"
STATE_CLASSES = {"done": "ok", "stale": "warn", "trial": "warn", "damaged": "bad", "not run": "plain"}
# What a warning is about, as shown.
TOPICS = {
    "files": "missing or damaged",
    "stale": "stale",
    "trial": "trial",
    "displacement": "likelihood displacement",
    "length": "length bias",
    "truncation": "truncation",
    "contamination": "contamination",
    "judge": "judge",
    "preflight": "preflight",
    "code": "code",
    "missing": "not run",
}
# A figure with its interval and p-value.
FIGURE = re.compile(r"[-+≠ \d.,%±e\[\]]*( p[=<]?[-\d.e]+)?")
TOPIC_CLASSES = {"files": "bad", "contamination": "bad", "missing": "plain", "code": "plain"}


def html(view: ReportView, most_answers: int) -> str:
    """The self-contained page: no links to other files, no network, one inline script and style."""
    style, script = ((STATIC / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    page = _environment(autoescape=True).get_template("report.html.jinja")
    return well_formed(
        page.render(
            view=view,
            most_answers=most_answers,
            anchors={run.name: run.anchor for run in view.runs},
            # The project's own files; everything else is escaped.
            style=Markup(style),
            script=Markup(script),
            policy=content_policy(script, style, pictures=True),
            state_classes=STATE_CLASSES,
            topics=TOPICS,
            topic_classes=TOPIC_CLASSES,
        )
    )


def markdown(view: ReportView, folder: Path, curves: Path | None) -> str:
    """The report as Markdown, with links to the pictures.

    Args:
        folder: where it is written, for relative links.
        curves: the picture of the overlaid curves, or None.
    """
    environment = _environment(autoescape=False)
    environment.filters["link"] = partial(link, folder=folder)
    page = environment.get_template("report.md.jinja")
    text = page.render(view=view, topics=TOPICS, curves_file=link(curves, folder))
    lines = "\n".join(line.rstrip() for line in text.split("\n")).split("\n")
    # Blocks that are empty leave several empty lines.
    kept = [line for k, line in enumerate(lines) if line or (k and lines[k - 1])]
    return well_formed("\n".join(kept).strip() + "\n")


def link(path: Path | None, folder: Path) -> str | None:
    """A relative link from `folder` to a file."""
    return None if path is None else quote(os.path.relpath(path, folder))


def _environment(autoescape: bool) -> Environment:
    # StrictUndefined: a misspelt name in a template is an error and not an empty place.
    environment = Environment(loader=FileSystemLoader(STATIC), autoescape=autoescape, undefined=StrictUndefined)
    environment.filters |= {
        "answer": _answer,
        "typed": lambda text: Markup(human_page.typed(text)),
        "topic_counts": _topic_counts,
        "choices": _choices,
        "md": escaped,
        "md_code": code_span,
        "md_table": _markdown_table,
    }
    return environment


def _answer(answer: Answer) -> Markup:
    """An answer's Markdown as safe HTML, in which no script, style or picture is left."""
    return Markup(human_page.answer(answer.text, answer.cut))


def _topic_counts(findings: list[Finding]) -> list[tuple[str, str]]:
    """(class, `2 × length bias`) of the topics of a run's warnings."""
    counts = Counter(finding.about for finding in findings)
    return [
        (TOPIC_CLASSES.get(about, "warn"), TOPICS.get(about, about) + (f" × {n}" if n > 1 else ""))
        for about, n in counts.items()
        if about != "missing"
    ]


def _choices(entries: list[SideBySide]) -> list[str]:
    """The sources, outcomes and categories that answers can be filtered by."""
    kinds = ([e.source for e in entries], [e.outcome for e in entries], sorted({e.category for e in entries}))
    values = [value for kind in kinds for value in dict.fromkeys(kind) if value]
    return list(dict.fromkeys(values))


def _markdown_table(table: Table) -> str:
    """Markdown tables: a line that spans all columns is a sentence between two of them."""
    parts, lines = [], []
    for line in table.body:
        if len(line) == len(table.head):
            lines.append(line)
            continue
        parts += [_aligned([table.head, *lines])] if lines else []
        parts.append(f"{escaped(line[0])}:")
        lines = []
    return "\n\n".join([*parts, *([_aligned([table.head, *lines])] if lines else [])])


def _aligned(lines: list[tuple]) -> str:
    # `markdown_table` escapes the bars itself.
    return markdown_table([[_cell(text).replace("\\|", "|") for text in line] for line in lines])


def _cell(text: str) -> str:
    """A cell as Markdown; a figure as it is, since brackets without a link behind them are no markup."""
    return text if FIGURE.fullmatch(text) else escaped(text)
