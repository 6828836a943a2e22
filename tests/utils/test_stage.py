"""The end of a stage: which files are written, in which order, and what is printed."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT, assert_one_line

from utils import stage as stage_module
from utils import tables
from utils.artifacts import metric
from utils.stage import Report, Stage, fits_terminal, start, wrote


@dataclass
class Arguments:
    limit: int | None = None
    api_token: str = "secret"


REPORT = Report("the table", "the verdict")


def publish(folder, **extra):
    stage = Stage("toy", [Arguments(3)])
    path = folder / "toy.json"
    metrics = {"x": metric(1.5, 0.1, (1.3, 1.7), 4)}
    return stage.publish(path, {"base": "m"}, metrics, REPORT, run={"run_name": "r"}, seed=7, **extra)


def test_the_envelope_of_a_summary(tmp_path, capsys):
    summary = publish(tmp_path, data={"rows": 4})
    assert json.loads((tmp_path / "toy.json").read_text()) == json.loads(json.dumps(summary, default=str))
    assert [*summary][:5] == ["stage", "model", "metrics", "args", "run"]
    assert summary["claim"] == "the verdict" and summary["text"] == "the table" and summary["data"] == {"rows": 4}
    assert "warning" not in summary and summary["args"] == {"limit": 3}, "tokens stay out of artifacts"
    assert summary["run"]["seed"] == 7 and summary["run"]["run_name"] == "r"
    assert capsys.readouterr().out.startswith("the table\n\nwrote ")


def test_the_summary_is_written_last(tmp_path):
    present = []

    def draw(path):
        present.append((tmp_path / "toy.json").exists())
        path.write_text("png")

    publish(tmp_path, rows=[{"a": 1}], figure=draw, files={tmp_path / "toy.md": "text", tmp_path / "b.json": {"k": 1}})
    assert present == [False]
    assert {p.name for p in tmp_path.iterdir()} == {"toy.json", "toy_rows.jsonl", "toy.png", "toy.md", "b.json"}
    assert json.loads((tmp_path / "toy_rows.jsonl").read_text()) == {"a": 1}


def test_a_failing_figure_leaves_no_summary(tmp_path):
    def draw(path):
        raise OSError("disk full")

    with pytest.raises(OSError):
        publish(tmp_path, rows=[], figure=draw)
    assert not (tmp_path / "toy.json").exists()


def test_other_ranks_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    publish(tmp_path, rows=[{"a": 1}], figure=lambda path: path.write_text("png"))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_written_files_are_listed_by_folder(tmp_path):
    paths = [tmp_path / f"a_rather_long_artifact_name_{k}.json" for k in range(8)]
    text = wrote([*paths, tmp_path / "other" / "x.png"])
    assert text.count("wrote ") == 2 and all(path.name in text for path in paths)
    longest_word = max(map(len, text.split()))
    assert max(map(len, text.splitlines())) <= max(100, longest_word)


def test_help_is_printed_before_parsing(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["toy.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        start("toy", "the page", Arguments)
    assert stop.value.code == 0 and capsys.readouterr().out == "the page\n"


@fits_terminal
def render(cell: str) -> Report:
    sentence = (
        "A sentence of a report that is longer than one hundred characters, so that it breaks into two lines or more."
    )
    return Report("\n\n".join([tables.render("title", [("metric", "value"), (cell, "1.0 ± 0.1")]), sentence]), sentence)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_artifacts_ignore_the_terminal(columns, monkeypatch):
    wide = render("a metric whose name is rather long").text
    monkeypatch.setattr(stage_module, "terminal_width", lambda: min(100, columns))
    report = render("a metric whose name is rather long")
    assert report.text == wide and max(map(len, wide.splitlines())) <= 100
    assert report.verdict in wide.replace("\n", " ")
    if columns < 100:
        assert max(map(len, report.printed.splitlines())) <= columns
        words = [word for word in wide.split() if not word.startswith("--")]
        assert set(words) <= set(report.printed.split())
    else:
        assert report.printed is None


def test_table_rows_are_not_broken_as_sentences():
    row = "a" * 60 + "  " + "b" * 60
    assert tables.wrap_sentences(row) == row


def test_a_closed_pipe_ends_quietly(tmp_path):
    code = "from utils.errors import run\ndef main():\n    for _ in range(100000): print('line')\nrun(main)"
    piped = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "line\n" and done.stderr == "" and done.returncode == 141


def test_missing_package_is_one_line(tmp_path):
    code = "from utils.errors import run\ndef main():\n    import a_package_that_is_missing\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert_one_line(done.stderr, "a_package_that_is_missing", ".venv/bin/activate")
