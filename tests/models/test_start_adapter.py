"""Runs that start from an adapter: merged into the base, or trained further against a frozen copy of itself."""

import json

import pytest
import torch
from conftest import assert_one_line, eval_args, interrupted_at, train_args

from preflab.models.loading import load_model
from utils.artifacts import read_json

IDS = torch.tensor([[5, 9, 11, 40, 7, 3, 21]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def started(trained, use: str) -> tuple:
    return ("--start_adapter", trained / "ck/r", "--start_adapter_use", use)


def came(trained, tiny):
    """The model that a run of this file starts from."""
    return load_model(str(tiny), adapter=str(trained / "ck/r"))


def by_adapter(trained) -> list[list[float]]:
    """Held-out log-probabilities under the adapter that the run ended with, from that run's own rows."""
    return [[row["chosen"], row["rejected"]] for row in rows_of(trained / "out/r/heldout_rows.jsonl")]


def test_trained_further_the_adapter_is_its_own_reference(train, call, trained, tiny, prefs, tmp_path):
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *started(trained, "continue"), "--sample_prompts", 1))
    assert code == 0, err
    flight = read_json(tmp_path / "out/r/preflight.json")
    assert flight["step0"]["largest_margin"] <= 1e-3
    rows = rows_of(tmp_path / "out/r/heldout_rows.jsonl")
    # The reference is the adapter as it came, not the base without one.
    for row, before in zip(rows, by_adapter(trained), strict=True):
        assert [row["ref_chosen"], row["ref_rejected"]] == pytest.approx(before, abs=1e-3)
    assert max(abs(row["margin"]) for row in rows) > 1e-3, "and it moved"
    folder = tmp_path / "ck/r"
    frozen = load_model(str(tiny), adapter=str(folder / "ref"))
    assert torch.allclose(logits(frozen), logits(came(trained, tiny)), atol=1e-6)
    summary = read_json(tmp_path / "out/r/train.json")
    assert summary["start"]["use"] == "continue" and summary["start"]["adapter_sha256"]
    assert str(trained / "ck/r") in (folder / "README.md").read_text()

    # An evaluation compares it with that reference, and finds the run's own figures again.
    code, out, err = call("eval_win_rate", *eval_args(tmp_path, tmp_path / "eval"))
    assert code == 0, err
    again = rows_of(tmp_path / "eval/r/win_rate_rows.jsonl")
    for row, other in zip(rows, again, strict=True):
        for key in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
            assert row[key] == pytest.approx(other[key], abs=1e-3), key
    assert f"against {tiny} with {folder / 'ref'}" in out
    # Asked for the plain base, it compares with that one.
    code, _, err = call("eval_win_rate", *eval_args(tmp_path, tmp_path / "plain", "--base_adapter", "none"))
    assert code == 0, err
    plain = rows_of(tmp_path / "plain/r/win_rate_rows.jsonl")
    base = [row["ref_chosen"] for row in rows_of(trained / "out/r/heldout_rows.jsonl")]
    assert [row["ref_chosen"] for row in plain] == pytest.approx(base, abs=1e-3)


def test_merged_the_base_is_the_adapters_model(train, call, trained, tiny, prefs, tmp_path):
    flags = (*started(trained, "merge"), "--lora_r", 2)
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *flags))
    assert code == 0, err
    summary = read_json(tmp_path / "out/r/train.json")
    merged = summary["start"]["merged"]
    assert str(merged) in out and summary["model"]["name"] == merged
    assert torch.allclose(logits(load_model(merged)), logits(came(trained, tiny)), atol=1e-4)
    for row, before in zip(rows_of(tmp_path / "out/r/heldout_rows.jsonl"), by_adapter(trained), strict=True):
        assert [row["ref_chosen"], row["ref_rejected"]] == pytest.approx(before, abs=1e-3)
    adapter = read_json(tmp_path / "ck/r/adapter_config.json")
    assert adapter["r"] == 2 and adapter["base_model_name_or_path"] == merged
    assert not (tmp_path / "ck/r/ref").exists()
    card = (tmp_path / "ck/r/README.md").read_text()
    assert f"base_model: {tiny}" in card and str(trained / "ck/r") in card

    # Another run of the same start finds the merged folder there.
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *flags, "--run_name", "again", "--beta", "0.2"))
    assert code == 0, err
    assert {p.name for p in (tmp_path / "ck").iterdir() if p.is_dir()} == {"r", "again", merged.rpartition("/")[2]}
    # And evaluations load the same base without being told of the start.
    code, out, err = call("eval_win_rate", *eval_args(tmp_path, tmp_path / "eval"))
    assert code == 0 and f"against {merged}" in out, err


def test_full_fine_tuning_starts_from_the_merged_model(train, trained, tiny, prefs, tmp_path):
    full = ("--use_peft", "false", "--learning_rate", "1e-3", "--max_steps", 1)
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *started(trained, "merge"), *full))
    assert code == 0, err
    for row, before in zip(rows_of(tmp_path / "out/r/heldout_rows.jsonl"), by_adapter(trained), strict=True):
        assert [row["ref_chosen"], row["ref_rejected"]] == pytest.approx(before, abs=1e-3)


def test_a_resumed_run_keeps_its_reference(train, trained, tiny, prefs, tmp_path):
    args = train_args(tiny, prefs, tmp_path, *started(trained, "continue"), "--save_steps", 2)

    with interrupted_at(3):
        assert train(*args)[0] == 130
    code, out, err = train(*args)
    assert code == 0 and "checkpoint-" in out, err
    whole = train_args(tiny, prefs, tmp_path / "whole", *started(trained, "continue"), "--save_steps", 2)
    assert train(*whole)[0] == 0
    places = (tmp_path / "out/r/heldout_rows.jsonl", tmp_path / "whole/out/r/heldout_rows.jsonl")
    for a, b in zip(*map(rows_of, places), strict=True):
        for key in ("chosen", "ref_chosen", "margin"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key


def test_an_adapter_that_goes_on_keeps_its_shape_and_says_so(train, trained, tiny, prefs, tmp_path):
    flags = ("--lora_r", 2, "--lora_target_modules", "q_proj", "--max_steps", 1)
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *started(trained, "continue"), *flags))
    assert code == 0, err
    note = next(line for line in out.splitlines() if "lora_r 4" in line)
    assert "2" in note and "lora_target_modules ['q_proj', 'v_proj']" in note and "['q_proj']" in note
    asked = read_json(tmp_path / "out/r/train.json")["args"]
    assert (asked["lora_r"], asked["lora_target_modules"]) == (4, ["q_proj", "v_proj"])
    assert read_json(tmp_path / "ck/r/adapter_config.json")["r"] == 4


def test_a_run_does_not_go_on_from_another_start(train, trained, tiny, prefs, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    start = tmp_path / "start"
    shutil.copytree(trained / "ck/r", start)
    args = train_args(tiny, prefs, tmp_path, "--start_adapter", start, "--start_adapter_use", "continue")
    with interrupted_at(3):
        assert train(*args)[0] == 130
    weights = load_file(start / "adapter_model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, start / "adapter_model.safetensors", {"format": "pt"})
    code, _, err = train(*args)
    assert code == 2
    assert_one_line(err, "adapter_sha256")


def test_sft_that_goes_on_is_compared_with_its_start(call, trained, tiny, prefs, tmp_path):
    """In its own figures and in every evaluation, of the run and of its checkpoints."""
    flags = ("--save_steps", 2, "--dataset_test_split", "test")
    args = train_args(tiny, prefs, tmp_path, *started(trained, "continue"), *flags)
    code, out, err = call("sft_train_instruction", *args)
    assert code == 0, err
    folder = tmp_path / "ck/r"
    frozen = load_model(str(tiny), adapter=str(folder / "ref"))
    assert torch.equal(logits(frozen), logits(came(trained, tiny)))
    own = {row["where"]: row for row in rows_of(tmp_path / "out/r/heldout_rows.jsonl")}
    for tuned in (folder, folder / "checkpoint-2"):
        place = tmp_path / tuned.name
        asked = ("--adapter_path", tuned, "--dataset_name", prefs, "--split", "test", "--output_dir", place)
        code, out, err = call("eval_perplexity", *map(str, (*asked, "--eval_out", tmp_path / "out")))
        assert code == 0, err
        assert f"against {tiny} with {folder / 'ref'}" in out
        for row in rows_of(place / "perplexity_rows.jsonl"):
            mine = own[row["where"]]
            assert row["nll_response_chosen_base"] == pytest.approx(mine["nll_base"], abs=1e-3)
            if tuned == folder:
                assert row["nll_response_chosen_tuned"] == pytest.approx(mine["nll_tuned"], abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start_adapter", "X"), ("--start_adapter_use", "merge", "continue")),
        (("--start_adapter_use", "merge"), ("--start_adapter",)),
        (("--start_adapter", "X", "--start_adapter_use", "mix"), ("--start_adapter_use", "mix")),
        (("--start_adapter", "./nowhere", "--start_adapter_use", "merge"), ("./nowhere",)),
        (
            ("--start_adapter", "checkpoints/x", "--start_adapter_use", "merge"),
            ("checkpoints/x",),
        ),
        (("--start_adapter", "TINY", "--start_adapter_use", "merge"), ("adapter_config.json",)),
    ],
)
def test_what_is_meant_must_be_said(flags, words, train, trained, tiny, prefs, tmp_path):
    real = {"X": trained / "ck/r", "TINY": tiny}
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *(real.get(flag, flag) for flag in flags)))
    assert code == 2
    assert_one_line(err, *words)


def test_continuing_needs_lora(train, trained, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *started(trained, "continue"), "--use_peft", "false"))
    assert code == 2
    assert_one_line(err, "continue", "--use_peft")


def test_an_adapter_of_another_base_is_refused(train, trained, smol_tokenizer, prefs, tmp_path):
    from conftest import save_tiny

    other = save_tiny(tmp_path / "other", smol_tokenizer, hidden_size=64)
    for use in ("merge", "continue"):
        code, _, err = train(*train_args(other, prefs, tmp_path / use, *started(trained, use)))
        assert code == 2
        assert_one_line(err, str(trained / "ck/r"))
