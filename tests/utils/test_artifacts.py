"""Artifacts are written whatever text the results hold."""

import json

from utils.artifacts import RowFile, dumps, read_json, write_json, write_text

CUT = "half an emoji: \ud83d"


def test_lone_surrogates_do_not_stop_the_writing_of_results(tmp_path):
    content = {"text": CUT, "name": "Ren\u00e9", "rate": float("nan")}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == {**content, "rate": None}
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.append({"reply": CUT})
    assert rows.read() == [{"reply": CUT}]
    write_text(tmp_path / "a.md", CUT)
    assert (tmp_path / "a.md").read_text() == "half an emoji: ?"


def test_other_text_is_written_as_it_is():
    assert dumps({"name": "Ren\u00e9 \U0001f600"}, indent=None) == '{"name": "Ren\u00e9 \U0001f600"}'
    assert json.loads(dumps({"x": CUT})) == {"x": CUT}
