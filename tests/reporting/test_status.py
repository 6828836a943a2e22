"""The state of every stage: stale after a change of data or weights, and what --status prints."""

import hashlib
import re
import shutil

from conftest import ROOT
from example_runs import rewrite
from helpers import texts

from preflab.reporting import status
from preflab.reporting.artifacts import read_all
from preflab.reporting.status import STALE, states_of


def states(root) -> dict[str, tuple[str, list[str]]]:
    run = read_all(root / "ck", root / "out")[0]
    return {state.title: (state.state, state.reasons) for state in states_of(run)}


def test_stale_after_a_change_of_the_data(root, report):
    data = root / "prefs"
    shutil.copytree(ROOT / "data/quickstart_prefs", data)

    def move(summary):
        for source in (summary["data"].get("test") or summary["data"])["sources"]:
            source["name"] = str(data)

    for name in ("train", "win_rate"):
        rewrite(root / "out" / "quickstart" / f"{name}.json", move)
    assert states(root)["Win rate by rewards"][0] == "done"
    with (data / "test.jsonl").open("a") as file:
        file.write((data / "train.jsonl").read_text().splitlines()[0] + "\n")
    assert states(root)["Win rate by rewards"] == (STALE, [f"{data} changed since"])
    assert states(root)["Preference training"][0] == STALE and states(root)["Perplexity"][0] == "done"
    out, _, _ = report("--status")
    assert re.search(r"# quickstart, Win rate by rewards is stale.*\n  python eval_win_rate.py .*--overwrite", out)
    assert f"{data} changed since" in texts(report()[1])


def test_stale_after_another_training(root, monkeypatch):
    weights = root / "ck" / "quickstart"
    (weights / "adapter_config.json").write_text("{}")
    (weights / "adapter_model.safetensors").write_bytes(b"one")

    def digest() -> str:
        """As preflab.models.adapter_files: names and contents' hashes, in the order of the names."""
        total = hashlib.sha256()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            total.update(name.encode() + hashlib.sha256((weights / name).read_bytes()).digest())
        return total.hexdigest()

    before = digest()
    for name in ("win_rate", "perplexity", "battle"):
        path = root / "out" / "quickstart" / f"{name}.json"
        rewrite(path, lambda s: s["model"]["tuned"].update(adapter_sha256=before))
    assert {states(root)[title][0] for title in ("Win rate by rewards", "Perplexity", "Battles")} == {"done"}
    (weights / "adapter_model.safetensors").write_bytes(b"two")
    state, reasons = states(root)["Win rate by rewards"]
    assert state == STALE and "trained again" in reasons[0]


def test_files_are_hashed_once_per_run(root, monkeypatch):
    """The adapter and the data that all results of a run name."""
    weights, hashed = root / "ck" / "quickstart", []
    (weights / "adapter_config.json").write_text("{}")
    for name in ("win_rate", "perplexity", "battle"):
        path = root / "out" / "quickstart" / f"{name}.json"
        rewrite(path, lambda s: s["model"]["tuned"].update(adapter_sha256="0" * 64))

    def counted(function):
        return lambda what: hashed.append(str(what)) or function(what)

    for name in ("sha256_of_files", "adapter_sha256"):
        monkeypatch.setattr(status, name, counted(getattr(status, name)))
    made = states(root)
    assert {made[title][0] for title in ("Win rate by rewards", "Perplexity", "Battles")} == {STALE}
    assert len(hashed) == len(set(hashed)) > 1


def test_status_writes_nothing(root, report):
    before = sorted(root.rglob("*"))
    out, *_ = report("--status")
    assert sorted(root.rglob("*")) == before
    for words in ("what ran", "next:", "what uses the disk", "python report.py", "Preference training"):
        assert words in out, words
    assert max(map(len, re.split("next:", out)[0].splitlines())) <= 100
