"""Two models with identical results: refused by default, named in the report with --allow_identical."""

import shutil

import pytest
from conftest import assert_one_line

from utils.artifacts import read_json

CALLS = {
    "win_rate": ("eval_win_rate",),
    "battle": ("eval_win_rate", "--battle", "--judge", "longer", "--max_new_tokens", "3"),
    "perplexity": ("eval_perplexity",),
}


@pytest.mark.parametrize("name", CALLS)
def test_identical_complete_models(call, tiny, prefs, tmp_path, name):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    script, *extra = CALLS[name]
    models = ("--base_model", tiny, "--tuned_model", copy, "--eval_out", tmp_path, "--run_name", "same")
    args = (*models, "--dataset_name", prefs, "--split", "test", "--max_length", "128", *extra)
    code, _, err = call(script, *args)
    assert code == 2
    assert_one_line(err, "base and tuned gave", "--allow_identical")
    assert "adapter" not in err
    code, out, err = call(script, *args, "--allow_identical")
    assert code == 0, err
    claim = read_json(tmp_path / f"same/{name}.json")["claim"]
    assert claim.startswith("IDENTICAL: base and tuned gave the same") and "IDENTICAL" in out
    # No verdict on top of it claims a difference.
    assert not any(word in claim for word in ("helped", "hurt", "prefers", "rose", "fell"))
