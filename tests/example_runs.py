"""Runs whose results are those of docs/example_run, for the tests of the report."""

import json
import shutil
from pathlib import Path

from conftest import ROOT

EXAMPLE = ROOT / "docs" / "example_run"
ATTACK = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def rewrite(path: Path, change) -> None:
    """Read a JSON file, change it in place with `change(content)`, and write it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_run(root: Path, name: str) -> Path:
    """A finished run whose results are those of docs/example_run; returns the folder of the results."""
    results, weights = root / "out" / name, root / "ck" / name
    (results / "lm_eval" / "quick").mkdir(parents=True)
    weights.mkdir(parents=True)
    for file in EXAMPLE.iterdir():
        if file.suffix in (".json", ".jsonl") and not file.name.startswith(("sppo", "human", "lm_eval")):
            shutil.copy(file, results)
    shutil.copy(EXAMPLE / "lm_eval_quick.json", results / "lm_eval" / "quick" / "lm_eval.json")
    summary = json.loads((EXAMPLE / "train.json").read_text())
    (weights / "run.json").write_text(
        json.dumps({"args": summary["args"], "finished": True, "finished_utc": "2026-11-21T13:49:53Z"})
    )
    (weights / "config.json").write_text("{}")
    return results
