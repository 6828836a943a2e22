"""The reference is computed for the pairs that a run reaches, and the figures are those of the complete pass."""

import json
from types import SimpleNamespace

import pytest
from conftest import assert_one_line, train_args
from datasets import Dataset

from preflab.training.dpo_trainer import ResumableDPOTrainer
from preflab.training.reference_cache import ReferenceCache
from utils.artifacts import RowFile, read_json


def reference(folder, name="r"):
    return read_json(folder / f"out/{name}/train.json")["training"]["reference"]


def losses(folder, name="r"):
    rows = RowFile(folder / f"out/{name}/train_log.jsonl").read()
    return [row["loss"] for row in rows if row["split"] == "train"]


def counts(folder, name="r"):
    return tuple(reference(folder, name)[key] for key in ("computed", "read"))


@pytest.fixture
def nothing_in_the_step(monkeypatch):
    """Training needs no reference that was not computed before it."""

    def refuse(self, batch):
        raise AssertionError("a reference was computed in the step")

    usual = ResumableDPOTrainer.get_batch_samples

    def without(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ResumableDPOTrainer, "reference_of_batch", refuse)
            return usual(self, *args)

    monkeypatch.setattr(ResumableDPOTrainer, "get_batch_samples", without)


def test_only_what_the_steps_reach(train, tiny, prefs, tmp_path, nothing_in_the_step):
    """24 train and 8 test pairs, steps of 4: two steps need 8, four need 8 more, two epochs the rest."""
    shared = ("--eval_out", tmp_path / "out")

    def run(name, steps, *extra):
        args = train_args(tiny, prefs, tmp_path, *shared, "--run_name", name, "--max_steps", steps, *extra)
        code, out, err = train(*args)
        assert code == 0, err
        return out

    assert "8 of 24 train pairs are reached" in run("two", 2)
    assert counts(tmp_path, "two") == (16, 0)
    run("four", 4, "--beta", 0.3)
    assert counts(tmp_path, "four") == (8, 16)
    run("epochs", 12)
    assert counts(tmp_path, "epochs") == (8, 24)
    run("seed", 2, "--seed", 7)
    assert counts(tmp_path, "seed") == (0, 16)
    # Equal to the reference computed in every step, which knows nothing of the order.
    run("plain", 12, "--no_reference_cache")
    assert losses(tmp_path, "epochs") == pytest.approx(losses(tmp_path, "plain"), abs=2e-5)
    assert len(set(losses(tmp_path, "epochs"))) > 6


def test_evaluation_during_training(train, tiny, prefs, tmp_path, nothing_in_the_step):
    """The test pairs' reference is computed at the first evaluation, once."""
    evals = ("--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 2)
    for name, extra in (("cached", ()), ("plain", ("--no_reference_cache",))):
        code, _, err = train(*train_args(tiny, prefs, tmp_path, "--run_name", name, *evals, *extra))
        assert code == 0, err
    assert counts(tmp_path, "cached") == (16, 0)
    margins = [
        [row["rewards/margins"] for row in RowFile(tmp_path / f"out/{name}/train_log.jsonl").read()]
        for name in ("cached", "plain")
    ]
    assert margins[0] == pytest.approx(margins[1], abs=2e-5)


def test_resume_needs_only_the_rest(train, tiny, prefs, tmp_path, nothing_in_the_step):
    """After the cache is lost, a resumed run computes the pairs of the steps that are left."""
    import shutil

    from conftest import interrupted_at

    args = train_args(tiny, prefs, tmp_path, "--save_steps", 1)
    with interrupted_at(3):
        train(*args)
    shutil.rmtree(tmp_path / "out/.cache")
    code, out, err = train(*args)
    assert code == 0 and "checkpoint-2" in out and "8 of 24 train pairs are reached" in out, err
    assert counts(tmp_path) == (16, 0)
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--run_name", "at_once"))
    assert code == 0, err
    assert losses(tmp_path) == pytest.approx(losses(tmp_path, "at_once"), abs=1e-6)


def test_equal_pairs_are_computed_where_they_are_reached_first(tmp_path, monkeypatch):
    """Rows 2 and 0 are equal: of the order 2, 1, 0, 3 the first is computed first, and the equal one not again."""
    ids = {"prompt_ids": [[1], [2], [1], [3]], "chosen_ids": [[4]] * 4, "rejected_ids": [[5]] * 4}
    names = {name: getattr(ResumableDPOTrainer, name) for name in ("KEYED", "REFERENCE_COLUMNS", "UNKNOWN")}
    trainer = SimpleNamespace(train_dataset=Dataset.from_dict(ids), **names)
    computed = []

    def compute(self, dataset, keys, missing):
        computed.extend(missing)
        for i in missing:
            self.cache.add(keys[i], {"chosen": -float(i), "rejected": -1.0})

    monkeypatch.setattr(ReferenceCache, "_compute", compute)
    ReferenceCache(trainer, str(tmp_path), {}).add("train_dataset", [2, 1, 0, 3])
    assert computed == [2, 1, 3]
    assert trainer.train_dataset["ref_chosen_logps"][:] == [-2.0, -1.0, -2.0, -3.0]


def test_rows_in_their_own_order(train, tiny, prefs, tmp_path, nothing_in_the_step):
    args = train_args(tiny, prefs, tmp_path, "--max_steps", 1, "--train_sampling_strategy", "sequential")
    code, out, err = train(*args)
    assert code == 0 and "4 of 24 train pairs are reached" in out, err
    assert counts(tmp_path) == (12, 0)


def test_an_unforeseen_pair_is_computed_in_the_step(train, tiny, prefs, tmp_path, monkeypatch):
    monkeypatch.setattr("preflab.training.reference_cache.reached_rows", lambda *args: [])
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--run_name", "unforeseen"))
    assert code == 0, err
    monkeypatch.undo()
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--run_name", "foreseen"))
    assert code == 0, err
    assert losses(tmp_path, "unforeseen") == pytest.approx(losses(tmp_path, "foreseen"), abs=2e-5)


def test_wrong_cached_figures_are_refused(train, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--max_steps", 1))
    assert code == 0, err
    for path in (tmp_path / "out" / ".cache").glob("reference-*/rows-0.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "chosen": row["chosen"] - 3}) + "\n" for row in rows))
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--run_name", "again", "--max_steps", 1))
    assert code == 2
    assert_one_line(err, "reference-", "--no_reference_cache")
