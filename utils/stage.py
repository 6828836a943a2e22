"""The start and the end of every stage: arguments and clock; report, artifacts and their envelope."""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from utils.artifacts import all_arguments, envelope, write_json, write_rows, write_text
from utils.cli import parse, quick_help
from utils.distributed import quiet_libraries
from utils.errors import discard_output, is_main_process
from utils.markdown import plain
from utils.provenance import run_record
from utils.tables import WIDTH, at_width, paragraphs, terminal_width, wrap_sentences


@dataclass
class Report:
    """A stage's conclusions from its metrics.

    Attributes:
        text: the printed tables and sentences.
        verdict: one sentence, the artifact's `claim`.
        warning: a defect that a reader must know before using the figures, or None.
        printed: the text at the width of a narrow terminal; None where `text` fits.
    """

    text: str
    verdict: str
    warning: str | None = None
    printed: str | None = None

    def noted(self, note: str) -> "Report":
        """The report with `note` before its verdict; unchanged for ""."""
        if not note:
            return self
        text, printed = (t and f"{t}\n\n{paragraphs(note)}" for t in (self.text, self.printed))
        return Report(text, f"{note} {self.verdict}", self.warning, printed)


def fits_terminal(render: Callable[..., Report]) -> Callable[..., Report]:
    """Decorate a function that makes a Report: lines of at most 100 characters, fewer on a narrower terminal.

    Only `printed` follows the terminal: artifacts must not depend on where a command was typed.
    """

    @functools.wraps(render)
    def rendered(*args, **kwargs) -> Report:
        report = render(*args, **kwargs)
        report.text = wrap_sentences(report.text)
        if terminal_width() < WIDTH:
            with at_width(terminal_width()):
                report.printed = wrap_sentences(render(*args, **kwargs).text)
        return report

    return rendered


@dataclass
class Stage:
    """One call of a script: its name in artifacts, its argument dataclasses, and when it started."""

    name: str
    arguments: list = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall time since the script started, in seconds."""
        return time.monotonic() - self.started

    def summary(self, model: dict, metrics: dict, report: Report, *, run: dict, seed: int, **sections) -> dict:
        """The stage's summary as it is written to <stem>.json. Arguments as `publish`."""
        return envelope(
            self.name,
            model,
            metrics,
            all_arguments(self.arguments),
            run_record(seed, self.seconds, **run),
            claim=report.verdict,
            **({"warning": report.warning} if report.warning is not None else {}),
            text=report.text,
            **sections,
        )

    def write(
        self,
        path: Path,
        summary: dict,
        files: dict[Path, object],
        printed: str | None = None,
        earlier: list[Path] | None = None,
    ) -> None:
        """Write the files, then the summary, and print the report. Rank 0 only.

        The summary's presence marks the stage as complete, so all other files are written before it.

        Args:
            files: as `publish`.
            printed: what is printed instead of the summary's text.
            earlier: files that this stage wrote before, to be listed too.
        """
        # A stage that is interrupted here has no summary, so it is not mistaken for a complete one.
        for place, content in files.items():
            write_file(place, content)
        write_json(path, summary)
        print_main(printed or summary["text"])
        print_main(f"\n{wrote([path, *files, *(earlier or [])])}")

    def publish(
        self,
        path: Path,
        model: dict,
        metrics: dict,
        report: Report,
        *,
        run: dict,
        seed: int,
        rows: list[dict] | None = None,
        summary_rows: list[dict] | None = None,
        figure: Callable[[Path], None] | None = None,
        files: dict[Path, object] | None = None,
        **sections,
    ) -> dict:
        """Write every artifact of the stage, the summary last, and print the report. Rank 0 only.

        Args:
            path: the summary, `<stem>.json`. Rows go to `<stem>_rows.jsonl`, the figure to `<stem>.png` beside it.
            metrics: {name: metric} (utils.artifacts.metric).
            run: what `run_record` adds to the run section: run_name, limit.
            seed: the seed of sampling and resampling.
            summary_rows: rows for the summary's own section `rows` instead of a file.
            figure: draws the figure and saves it at the path it is called with.
            files: further files by path: text, rows (a list), JSON (a dict), or a function that writes the path.
            sections: further sections of the summary, in order.

        Returns:
            The summary as written.
        """
        # Rows in the summary come before the caller's sections.
        if summary_rows is not None:
            sections = {"rows": summary_rows, **sections}
        summary = self.summary(model, metrics, report, run=run, seed=seed, **sections)
        # Rows first: a function in `files` may put a finished folder in its place, which declares the work complete.
        contents: dict[Path, object] = {}
        if rows is not None:
            contents[path.with_name(f"{path.stem}_rows.jsonl")] = rows
        if figure is not None:
            contents[path.with_suffix(".png")] = figure
        self.write(path, summary, contents | (files or {}), report.printed)
        return summary


def start(
    name: str,
    page: str,
    *argument_types: type,
    runs_bare: bool = True,
    argv: list[str] | None = None,
    listing: Callable[[list[str]], None] | None = None,
) -> tuple:
    """Start a stage: print --help if requested, silence the libraries, parse the command line.

    Args:
        name: the stage's name in its artifacts.
        page: the script's docstring, printed by --help before any heavy import.
        argument_types: dataclasses whose fields are the flags.
        runs_bare: whether a call without arguments runs; otherwise it prints the help.
        argv: arguments to parse instead of the command line's.
        listing: answers --list, from the command line's arguments.

    Returns:
        (Stage, one filled dataclass per type).

    Raises:
        UserError: an unknown or duplicate key, a value of the wrong type, a missing config file.
    """
    # Before the heavy imports: they take seconds that the stage's wall time includes.
    began = time.monotonic()
    prepare(page, runs_bare, listing)
    arguments = parse(argument_types, argv)
    return Stage(name, list(arguments), began), *arguments


def prepare(page: str, runs_bare: bool = False, listing: Callable[[list[str]], None] | None = None) -> None:
    """Answer --help with `page` or --list with `listing` and exit, else silence the libraries. Part of `start`.

    Scripts whose argument dataclasses need a heavy import call it before that import.
    """
    # --help comes first: silencing the libraries imports them.
    quick_help(page, runs_bare)
    if listing and "--list" in sys.argv[1:]:
        listing(sys.argv[1:])
        sys.exit(0)
    quiet_libraries()


def write_file(path: Path, content) -> None:
    """Write text, rows (a list) or JSON (a dict) atomically, or call a function with `path`. Rank 0 only."""
    if callable(content):
        # The writers of utils.artifacts check the rank themselves; a caller's function may not.
        if is_main_process():
            content(path)
    elif isinstance(content, str):
        write_text(path, content)
    elif isinstance(content, dict):
        write_json(path, content)
    else:
        write_rows(path, content)


def wrote(paths: list[Path]) -> str:
    """The closing line of a stage: every written file, by folder, in lines of at most 100 characters."""
    # Grouped by folder in the order of writing, so that a long folder name is printed once.
    folders: dict[Path, list[str]] = {}
    for path in map(Path, paths):
        folders.setdefault(path.parent, []).append(path.name)
    return "\n".join(paragraphs(f"wrote {folder}/: {', '.join(names)}") for folder, names in folders.items())


def print_main(text: str) -> None:
    """Print from rank 0 only. Without a reader (`| head`) the script continues: its files are the results."""
    if is_main_process():
        try:
            print(plain(text), flush=True)
        except BrokenPipeError:
            discard_output()
