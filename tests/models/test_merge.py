"""merge_adapter.py: the folder on disk is the same model as base and adapter."""

import json
import shutil

import pytest
import torch
from conftest import assert_one_line, eval_args

from preflab.models.loading import load_model, load_tokenizer
from preflab.models.merging import MARK, MergedFolder
from utils.artifacts import TEMPORARY, read_json, write_json
from utils.errors import UserError

IDS = torch.tensor([[5, 9, 11, 40, 7, 3, 21]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def merge_args(trained, tmp_path, *extra):
    return eval_args(trained, tmp_path / "out", "--merged_dir", tmp_path / "merged", *extra)


def test_merged_folder_equals_base_and_adapter(call, trained, tiny, tmp_path):
    code, out, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 0, err
    assert read_json(tmp_path / "out/r/merge.json")["claim"] in " ".join(out.split())
    adapted = logits(load_model(str(tiny), adapter=str(trained / "ck" / "r")))
    merged = logits(load_model(str(tmp_path / "merged")))
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, logits(load_model(str(tiny))), atol=1e-2)
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == load_tokenizer(str(tiny)).chat_template
    summary = json.loads((tmp_path / "out" / "r" / "merge.json").read_text())
    assert summary["metrics"]["largest_difference"]["value"] < 1e-3 and summary["run"]["git_commit"]
    assert summary["metrics"]["same_preference"]["value"] == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "r" / "merge_rows.jsonl").read_text().splitlines()]
    largest = max(abs(r["adapter"][s] - r["merged"][s]) for r in rows for s in ("chosen", "rejected"))
    assert len(rows) == 8 and largest == pytest.approx(summary["metrics"]["largest_difference"]["value"])
    card = (tmp_path / "merged" / "README.md").read_text()
    assert summary["claim"] in card and "library_name: transformers" in card
    assert {p.stat().st_mode & 0o444 for p in (tmp_path / "merged").iterdir()} == {0o444}, (
        "all users may read the files"
    )
    assert (
        not (tmp_path / "merged.part").exists()
        and not (tmp_path / "merged.old").exists()
        and not (tmp_path / "merged" / "adapter_config.json").exists()
    )


def test_adapter_log_probs_equal_the_trainers(call, trained, tmp_path):
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "r" / "merge_rows.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (trained / "out" / "r" / "heldout_rows.jsonl").read_text().splitlines()]
    for row, before in zip(rows, held_out, strict=True):
        assert [row["adapter"]["chosen"], row["adapter"]["rejected"]] == pytest.approx(
            [before["chosen"], before["rejected"]], abs=1e-3
        )


def test_merge_in_bfloat16(call, trained, tmp_path):
    code, out, err = call("merge_adapter", *merge_args(trained, tmp_path, "--dtype", "bfloat16"))
    assert code == 0, err
    merged = load_model(str(tmp_path / "merged"), dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and "bfloat16" in out


def test_different_model_is_deleted(call, trained, tmp_path, monkeypatch):
    import preflab.evaluation.two_models

    original = preflab.evaluation.two_models.load_model

    def disturbed(name, *args, **kwargs):
        model = original(name, *args, **kwargs)
        if str(name).endswith(".part"):
            with torch.no_grad():
                model.lm_head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(preflab.evaluation.two_models, "load_model", disturbed)
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 2
    assert_one_line(err, "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.part").exists()


def test_refusals_name_folder_and_flags(call, trained, tiny, tmp_path):
    (tmp_path / "merged").mkdir()
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 2
    assert_one_line(err, "--merged_dir", "--overwrite")
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path, "--overwrite"))
    assert code == 2
    assert_one_line(err, "merged")
    shutil.rmtree(tmp_path / "merged")
    code, _, err = call(
        "merge_adapter",
        "--tuned_model",
        tiny,
        "--base_model",
        tiny,
        "--dataset_name",
        "x.jsonl",
        "--eval_out",
        tmp_path,
    )
    assert code == 2
    assert_one_line(err, "adapter")


def test_overwrite_replaces_a_merged_folder(call, trained, tmp_path):
    for extra in ((), ("--overwrite",)):
        code, _, err = call("merge_adapter", *merge_args(trained, tmp_path, *extra))
        assert code == 0, err
    assert json.loads((tmp_path / "merged" / "merged_from.json").read_text())["base"]


def test_merge_works_after_a_failed_call(call, trained, tmp_path):
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path, "--dataset_name", "nosuch.jsonl"))
    assert code == 2 and "nosuch.jsonl" in err
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 0, err


def test_merge_that_was_killed_before_its_summary_is_repeated(tmp_path):
    """Its folder has its name already; only a folder of the same base and adapter is replaced."""
    write_json(tmp_path / "merged" / MARK, {"base": "b", "adapter": {"adapter_sha256": "1"}})
    MergedFolder(tmp_path / "merged", False, {"base": "b", "adapter": {"adapter_sha256": "1"}})
    for other in (None, {"base": "b", "adapter": {"adapter_sha256": "2"}}):
        with pytest.raises(UserError, match="--merged_dir"):
            MergedFolder(tmp_path / "merged", False, other)


def test_merge_that_was_killed_before_its_mark_is_repeated(tmp_path):
    """The folder exists, empty or with a half-written mark; a folder with other files is the user's."""
    part = tmp_path / "merged.part"
    part.mkdir()
    (part / f"{TEMPORARY}merged_from-x1.json").write_text("{")
    MergedFolder(tmp_path / "merged", False)
    (part / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="merged.part"):
        MergedFolder(tmp_path / "merged", False)
