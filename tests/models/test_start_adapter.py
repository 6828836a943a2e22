"""Runs that start from an adapter: merged into the base, or trained further against its frozen copy."""

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


def one_line(text: str) -> str:
    """The printed text without line breaks, since titles wrap."""
    return " ".join(text.split())


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start_flags(trained, use: str) -> tuple:
    return ("--start_adapter", trained / "ck/r", "--start_adapter_use", use)


def start_model(trained, tiny):
    """The model that the runs of this file start from."""
    return load_model(str(tiny), adapter=str(trained / "ck/r"))


def start_logps(trained) -> list[list[float]]:
    """Held-out log-probabilities of that model, from the rows of the run that trained it."""
    return [[row["chosen"], row["rejected"]] for row in rows_of(trained / "out/r/heldout_rows.jsonl")]


def test_continued_adapter_is_its_own_reference(train, call, trained, tiny, prefs, tmp_path):
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *start_flags(trained, "continue"), "--sample_prompts", 1))
    assert code == 0, err
    preflight = read_json(tmp_path / "out/r/preflight.json")
    assert preflight["step0"]["largest_margin"] <= 1e-3
    rows = rows_of(tmp_path / "out/r/heldout_rows.jsonl")
    # The reference is the adapter before training, not the base without an adapter.
    for row, before in zip(rows, start_logps(trained), strict=True):
        assert [row["ref_chosen"], row["ref_rejected"]] == pytest.approx(before, abs=1e-3)
    assert max(abs(row["margin"]) for row in rows) > 1e-3, "training changed nothing"
    folder = tmp_path / "ck/r"
    frozen = load_model(str(tiny), adapter=str(folder / "ref"))
    assert torch.allclose(logits(frozen), logits(start_model(trained, tiny)), atol=1e-6)
    summary = read_json(tmp_path / "out/r/train.json")
    assert summary["start"]["use"] == "continue" and summary["start"]["adapter_sha256"]
    card = (folder / "README.md").read_text()
    assert "The adapter local folder r was trained further." in card and str(trained) not in card

    # An evaluation compares it with that reference, and reproduces the run's own scores.
    code, out, err = call("eval_win_rate", *eval_args(tmp_path, tmp_path / "eval"))
    assert code == 0, err
    again = rows_of(tmp_path / "eval/r/win_rate_rows.jsonl")
    for row, other in zip(rows, again, strict=True):
        for key in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
            assert row[key] == pytest.approx(other[key], abs=1e-3), key
    assert f"against {tiny} with {folder / 'ref'}" in one_line(out)
    # With --base_adapter none it compares with the base without an adapter.
    code, _, err = call("eval_win_rate", *eval_args(tmp_path, tmp_path / "plain", "--base_adapter", "none"))
    assert code == 0, err
    plain = rows_of(tmp_path / "plain/r/win_rate_rows.jsonl")
    base = [row["ref_chosen"] for row in rows_of(trained / "out/r/heldout_rows.jsonl")]
    assert [row["ref_chosen"] for row in plain] == pytest.approx(base, abs=1e-3)


def test_merged_start_is_the_base_and_reference(train, call, trained, tiny, prefs, tmp_path):
    flags = (*start_flags(trained, "merge"), "--lora_r", 2)
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *flags))
    assert code == 0, err
    summary = read_json(tmp_path / "out/r/train.json")
    merged = summary["start"]["merged"]
    assert str(merged) in out and summary["model"]["name"] == merged
    assert torch.allclose(logits(load_model(merged)), logits(start_model(trained, tiny)), atol=1e-4)
    for row, before in zip(rows_of(tmp_path / "out/r/heldout_rows.jsonl"), start_logps(trained), strict=True):
        assert [row["ref_chosen"], row["ref_rejected"]] == pytest.approx(before, abs=1e-3)
    adapter = read_json(tmp_path / "ck/r/adapter_config.json")
    assert adapter["r"] == 2 and adapter["base_model_name_or_path"] == merged
    assert not (tmp_path / "ck/r/ref").exists()
    card = (tmp_path / "ck/r/README.md").read_text()
    # A local base has no hub id, and the card names no paths of this machine.
    assert "base_model:" not in card and str(trained) not in card
    assert f"That base is local folder {tiny.name} with the adapter local folder r merged into it." in card

    # Another run with the same start reuses the merged folder.
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *flags, "--run_name", "again", "--beta", "0.2"))
    assert code == 0, err
    assert {p.name for p in (tmp_path / "ck").iterdir() if p.is_dir()} == {"r", "again", merged.rpartition("/")[2]}
    # Evaluations load the same base without a flag for the start.
    code, out, err = call("eval_win_rate", *eval_args(tmp_path, tmp_path / "eval"))
    assert code == 0 and f"against {merged}" in one_line(out), err


def test_wrongly_merged_start_stops_the_run(train, trained, tiny, prefs, tmp_path, monkeypatch):
    """The written model is loaded and compared with base and adapter before anything is trained on it."""
    from safetensors.torch import load_file, save_file

    from preflab.models import start_adapter

    usual = start_adapter.write_merged

    def write_half(folder, model, *args):
        usual(folder, model, *args)
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("q_proj.weight"))
        save_file({**weights, name: weights[name] / 2}, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(start_adapter, "write_merged", write_half)
    args = train_args(tiny, prefs, tmp_path, *start_flags(trained, "merge"))
    code, _, err = train(*args)
    assert code == 2
    assert_one_line(err, "merged", "nats")
    # Nothing that looks like a run or like a merged model; the next call merges again.
    assert not list(tmp_path.glob("ck/*")) and not list(tmp_path.glob("out/*"))
    monkeypatch.setattr(start_adapter, "write_merged", usual)
    code, _, err = train(*args, "--max_steps", 1)
    assert code == 0, err


def test_full_fine_tuning_starts_from_the_merged_model(train, trained, tiny, prefs, tmp_path):
    full = ("--use_peft", "false", "--learning_rate", "1e-3", "--max_steps", 1)
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *start_flags(trained, "merge"), *full))
    assert code == 0, err
    for row, before in zip(rows_of(tmp_path / "out/r/heldout_rows.jsonl"), start_logps(trained), strict=True):
        assert [row["ref_chosen"], row["ref_rejected"]] == pytest.approx(before, abs=1e-3)


def test_resumed_run_keeps_its_reference(train, trained, tiny, prefs, tmp_path):
    args = train_args(tiny, prefs, tmp_path, *start_flags(trained, "continue"), "--save_steps", 2)

    with interrupted_at(3):
        assert train(*args)[0] == 130
    code, out, err = train(*args)
    assert code == 0 and "checkpoint-" in out, err
    uninterrupted = train_args(tiny, prefs, tmp_path / "whole", *start_flags(trained, "continue"), "--save_steps", 2)
    assert train(*uninterrupted)[0] == 0
    places = (tmp_path / "out/r/heldout_rows.jsonl", tmp_path / "whole/out/r/heldout_rows.jsonl")
    for a, b in zip(*map(rows_of, places), strict=True):
        for key in ("chosen", "ref_chosen", "margin"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key


def test_continued_adapter_keeps_its_lora_settings(train, trained, tiny, prefs, tmp_path):
    flags = ("--lora_r", 2, "--lora_target_modules", "q_proj", "--max_steps", 1)
    code, out, err = train(*train_args(tiny, prefs, tmp_path, *start_flags(trained, "continue"), *flags))
    assert code == 0, err
    # The preflight's lines are wrapped.
    note = " ".join(out.split()).partition("own LoRA settings are kept: ")[2]
    assert note.startswith("lora_r 4 (requested 2); lora_target_modules ['q_proj', 'v_proj'] (requested ['q_proj'])")
    recorded = read_json(tmp_path / "out/r/train.json")["args"]
    assert (recorded["lora_r"], recorded["lora_target_modules"]) == (4, ["q_proj", "v_proj"])
    assert read_json(tmp_path / "ck/r/adapter_config.json")["r"] == 4


def test_resume_from_other_start_is_refused(train, trained, tiny, prefs, tmp_path):
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


def test_continued_sft_is_compared_with_its_start(call, trained, tiny, prefs, tmp_path):
    """By the trainer and by evaluations, for the final adapter and for checkpoints."""
    flags = ("--save_steps", 2, "--dataset_test_split", "test")
    args = train_args(tiny, prefs, tmp_path, *start_flags(trained, "continue"), *flags)
    code, out, err = call("sft_train_instruction", *args)
    assert code == 0, err
    folder = tmp_path / "ck/r"
    frozen = load_model(str(tiny), adapter=str(folder / "ref"))
    assert torch.equal(logits(frozen), logits(start_model(trained, tiny)))
    own = {row["where"]: row for row in rows_of(tmp_path / "out/r/heldout_rows.jsonl")}
    for tuned in (folder, folder / "checkpoint-2"):
        place = tmp_path / tuned.name
        flags = ("--adapter_path", tuned, "--dataset_name", prefs, "--split", "test", "--output_dir", place)
        code, out, err = call("eval_perplexity", *map(str, (*flags, "--eval_out", tmp_path / "out")))
        assert code == 0, err
        assert f"against {tiny} with {folder / 'ref'}" in one_line(out)
        for row in rows_of(place / "perplexity_rows.jsonl"):
            trainer_row = own[row["where"]]
            assert row["nll_response_chosen_base"] == pytest.approx(trainer_row["nll_base"], abs=1e-3)
            if tuned == folder:
                assert row["nll_response_chosen_tuned"] == pytest.approx(trainer_row["nll_tuned"], abs=1e-3)


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
def test_start_adapter_flags_are_checked(flags, words, train, trained, tiny, prefs, tmp_path):
    real = {"X": trained / "ck/r", "TINY": tiny}
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *(real.get(flag, flag) for flag in flags)))
    assert code == 2
    assert_one_line(err, *words)


def test_continuing_needs_lora(train, trained, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *start_flags(trained, "continue"), "--use_peft", "false"))
    assert code == 2
    assert_one_line(err, "continue", "--use_peft")


def test_adapter_of_other_base_is_refused(train, trained, smol_tokenizer, prefs, tmp_path):
    from conftest import save_tiny

    other = save_tiny(tmp_path / "other", smol_tokenizer, hidden_size=64)
    for use in ("merge", "continue"):
        code, _, err = train(*train_args(other, prefs, tmp_path / use, *start_flags(trained, use)))
        assert code == 2
        assert_one_line(err, str(trained / "ck/r"))
