"""merge_adapter.py: the folder on disk is the model that the adapter made."""

import json
import shutil

import pytest
import torch
from conftest import assert_one_line, eval_args

from preflab.models.loading import load_model, load_tokenizer
from utils.artifacts import read_json

IDS = torch.tensor([[5, 9, 11, 40, 7, 3, 21]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def merge_args(trained, tmp_path, *extra):
    return eval_args(trained, tmp_path / "out", "--merged_dir", tmp_path / "merged", *extra)


def test_the_folder_is_base_and_adapter_and_says_how_well(call, trained, tiny, tmp_path):
    code, out, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 0, err
    assert read_json(tmp_path / "out/r/merge.json")["claim"] in out
    wanted = logits(load_model(str(tiny), adapter=str(trained / "ck" / "r")))
    found = logits(load_model(str(tmp_path / "merged")))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found, logits(load_model(str(tiny))), atol=1e-2)
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == load_tokenizer(str(tiny)).chat_template
    summary = json.loads((tmp_path / "out" / "r" / "merge.json").read_text())
    assert summary["metrics"]["largest_difference"]["value"] < 1e-3 and summary["run"]["git_commit"]
    assert summary["metrics"]["same_preference"]["value"] == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "r" / "merge_rows.jsonl").read_text().splitlines()]
    largest = max(abs(r["adapter"][s] - r["merged"][s]) for r in rows for s in ("chosen", "rejected"))
    assert len(rows) == 8 and largest == pytest.approx(summary["metrics"]["largest_difference"]["value"])
    card = (tmp_path / "merged" / "README.md").read_text()
    assert summary["claim"] in card and "library_name: transformers" in card
    assert {p.stat().st_mode & 0o444 for p in (tmp_path / "merged").iterdir()} == {0o444}, "everybody may read it"
    assert (
        not (tmp_path / "merged.part").exists()
        and not (tmp_path / "merged.old").exists()
        and not (tmp_path / "merged" / "adapter_config.json").exists()
    )


def test_the_adapters_figures_are_the_trainers(call, trained, tmp_path):
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "r" / "merge_rows.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (trained / "out" / "r" / "heldout_rows.jsonl").read_text().splitlines()]
    for row, before in zip(rows, held_out, strict=True):
        assert [row["adapter"]["chosen"], row["adapter"]["rejected"]] == pytest.approx(
            [before["chosen"], before["rejected"]], abs=1e-3
        )


def test_16_bits_are_merged_in_16_bits(call, trained, tmp_path):
    code, out, err = call("merge_adapter", *merge_args(trained, tmp_path, "--dtype", "bfloat16"))
    assert code == 0, err
    merged = load_model(str(tmp_path / "merged"), dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and "bfloat16" in out


def test_another_model_gets_no_name(call, trained, tmp_path, monkeypatch):
    import preflab.evaluation.comparison

    usual = preflab.evaluation.comparison.load_model

    def disturbed(name, *args, **kwargs):
        model = usual(name, *args, **kwargs)
        if str(name).endswith(".part"):
            with torch.no_grad():
                model.lm_head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(preflab.evaluation.comparison, "load_model", disturbed)
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 2
    assert_one_line(err, "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.part").exists()


def test_what_cannot_be_merged_is_named(call, trained, tiny, tmp_path):
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


def test_a_mistyped_dataset_does_not_lock_the_place(call, trained, tmp_path):
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path, "--dataset_name", "nosuch.jsonl"))
    assert code == 2 and "nosuch.jsonl" in err
    code, _, err = call("merge_adapter", *merge_args(trained, tmp_path))
    assert code == 0, err
