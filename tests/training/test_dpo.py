"""dpo_train_human_preference.py end to end on tiny models: artifacts, precision, rerun, resume, and what it refuses."""

import json
import re
import shutil

import pytest
from conftest import assert_one_line, make_pairs, save_tiny, train_args, write_jsonl

from utils.artifacts import read_json


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder) -> list[float]:
    return [row["loss"] for row in rows_of(folder / "out" / "r" / "train_log.jsonl") if row["split"] == "train"]


def test_run_writes_all_artifacts(train, tiny, prefs, tmp_path):
    code, out, err = train(
        *train_args(tiny, prefs, tmp_path, "--eval_strategy", "steps", "--eval_steps", 2, "--sample_prompts", 1)
    )
    assert code == 0, err
    assert read_json(tmp_path / "out/r/train.json")["claim"] in " ".join(out.split())
    # 24 pairs in batches of 4.
    assert "--max_steps ended training after 4 of the 6 steps of one epoch" in out
    assert "> A trial run of 4 of the 6 steps of one epoch (--max_steps)." in (tmp_path / "ck/r/README.md").read_text()
    folder, weights = tmp_path / "out" / "r", tmp_path / "ck" / "r"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "preflight.json",
        "train.json",
        "train_log.jsonl",
        "heldout_rows.jsonl",
        "samples.md",
        "dpo_training_curves.png",
    }
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md", "checkpoint-4"} <= {
        p.name for p in weights.iterdir()
    }

    summary = read_json(folder / "train.json")
    assert {"stage", "model", "metrics", "args", "run"} <= set(summary)
    for figure in summary["metrics"].values():
        assert set(figure) - {"power"} == {"value", "stderr", "ci95", "n"} and figure["n"] == 8
    run = summary["run"]
    assert run["seed"] == 42 and run["versions"]["trl"] and run["hardware"]["cores"] and run["wall_seconds"] > 0
    assert summary["data"]["train"]["sources"][0]["sha256"] and summary["model"]["weights_sha256"]
    assert summary["args"]["beta"] == 0.1 and summary["args"]["lora_r"] == 4

    # The held-out rows give the summary's figures again.
    rows = rows_of(folder / "heldout_rows.jsonl")
    margin = sum(0.1 * (r["chosen"] - r["ref_chosen"] - r["rejected"] + r["ref_rejected"]) for r in rows) / 8
    assert summary["metrics"]["reward_margin"]["value"] == pytest.approx(margin, abs=1e-6)

    log = rows_of(folder / "train_log.jsonl")
    assert [r["step"] for r in log if r["split"] == "train"] == [1, 2, 3, 4]
    evals = [r for r in log if r["split"] == "eval"]
    assert [r["step"] for r in evals] == [2, 4]
    for key in ("rewards/chosen", "rewards/accuracies", "logps/rejected", "logits/chosen", "entropy", "num_tokens"):
        assert all(key in r for r in log), key
    # The trainer's own evaluation is the same definition: its mean of batch means, on equal batches of 8.
    assert evals[-1]["rewards/margins"] == pytest.approx(margin, abs=1e-4)

    flight = read_json(folder / "preflight.json")
    assert flight["step0"]["largest_margin"] <= 1e-3 and flight["step0"]["checked"] == "before training"
    assert flight["special_tokens"]["leading_bos_min"] == flight["special_tokens"]["leading_bos_max"] == 1
    assert flight["first_pair"]["chosen_scored"].strip().endswith("<|im_end|>")
    assert "lora_dropout 0.05" in flight["dropout"]
    assert (folder / "dpo_training_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_card_parses(train, tiny, prefs, tmp_path):
    from huggingface_hub import ModelCard

    code, _, err = train(
        *train_args(tiny, prefs, tmp_path, "--eval_strategy", "epoch", "--num_train_epochs", 1, "--max_steps", -1)
    )
    assert code == 0, err
    card = ModelCard.load(tmp_path / "ck" / "r" / "README.md")
    assert card.data.library_name == "peft" and "dpo" in card.data.tags
    table = re.search(r"\| Training Loss \|.*?\n\n", card.text, re.S).group()
    assert re.search(r"\| 0\.\d+ \| 1\.00 \| 6 \|", table), table


def test_finished_run_is_not_trained_again(train, tiny, prefs, tmp_path):
    args = train_args(tiny, prefs, tmp_path)
    assert train(*args)[0] == 0
    before = (tmp_path / "ck/r/adapter_model.safetensors").stat().st_mtime_ns
    code, out, _ = train(*args)
    assert code == 0 and "nothing to train" in out and "reward accuracy" in out
    for flags, words in (
        (("--beta", "0.5"), ("beta 0.1 -> 0.5", "--overwrite")),
        (("--resume", "never"), ("--overwrite",)),
    ):
        code, _, err = train(*args, *flags)
        assert code == 2
        assert_one_line(err, *words)
    assert (tmp_path / "ck/r/adapter_model.safetensors").stat().st_mtime_ns == before
    code, out, _ = train(*args, "--beta", "0.5", "--overwrite")
    assert code == 0 and read_json(tmp_path / "out/r/train.json")["args"]["beta"] == 0.5


def test_foreign_folder_is_not_deleted(train, tiny, prefs, tmp_path):
    (tmp_path / "ck" / "r").mkdir(parents=True)
    (tmp_path / "ck" / "r" / "thesis.txt").write_text("mine")
    code, _, err = train(*train_args(tiny, prefs, tmp_path), "--overwrite")
    assert code == 2 and (tmp_path / "ck/r/thesis.txt").exists()
    assert_one_line(err, "run.json", "--run_name")


def test_limit_marks_names(train, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--limit", 6, "--max_steps", 1))
    assert code == 0, err
    summary = read_json(tmp_path / "out" / "r_LIMIT6" / "train.json")
    assert summary["run"]["limit"] == 6 and "r_LIMIT6" in summary["text"] and summary["data"]["train"]["pairs"] == 6


def test_preflight_only_takes_no_step(train, tiny, prefs, tmp_path):
    code, out, _ = train(*train_args(tiny, prefs, tmp_path), "--preflight_only")
    assert code == 0 and "step 0" in out
    assert (tmp_path / "out/r/preflight.json").exists() and not (tmp_path / "out/r/train_log.jsonl").exists()
    assert train(*train_args(tiny, prefs, tmp_path))[0] == 0


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ((), "fp32"),
        (("--bf16", "true"), "bf16"),
        (("--dtype", "bfloat16", "--bf16", "true"), "bf16"),
        (("--fp16", "true"), "fp16"),
        (("--use_peft", "false", "--learning_rate", "1e-3"), "fp32"),
        (("--gradient_checkpointing", "true"), "fp32"),
        (("--precompute_ref_log_probs", "true"), "fp32"),
        (("--attn_implementation", "eager"), "fp32"),
        (("--dataset_test_split", "none"), "fp32"),
        (("--disable_dropout", "false"), "fp32"),
    ],
)
def test_precisions_and_training_modes(train, tiny, prefs, tmp_path, flags, precision):
    code, out, err = train(*train_args(tiny, prefs, tmp_path, "--max_steps", 2, *flags))
    assert code == 0, err
    summary = read_json(tmp_path / "out/r/train.json")
    assert summary["precision"] == precision and len(losses(tmp_path)) == 2
    assert losses(tmp_path)[0] == pytest.approx(0.6931, abs=0.02)
    if "none" in flags:
        assert summary["metrics"] == {} and "test split" in summary["claim"]


def test_qlora_small_updates_change_adapters(train, tiny, prefs, tmp_path):
    """At lr 2e-6 (the seed recipe's) a bf16 adapter would round most of its updates away."""
    from safetensors.torch import load_file

    args = train_args(
        tiny, prefs, tmp_path, "--load_in_4bit", "--learning_rate", "2e-6", "--max_steps", 3, "--save_steps", 1
    )
    code, out, err = train(*args, "--save_total_limit", 5)
    assert code == 0, err
    assert read_json(tmp_path / "out/r/train.json")["model"]["quantized"] == "4bit"
    first, last = (load_file(tmp_path / f"ck/r/checkpoint-{n}/adapter_model.safetensors") for n in (1, 3))
    assert all(t.dtype.itemsize == 4 for t in last.values())
    moved = {name: float((first[name] != last[name]).float().mean()) for name in last}
    assert min(moved.values()) > 0.9, moved


@pytest.mark.parametrize("kind", ["Gemma", "Gemma2", "Qwen3", "Mistral"])
def test_other_architectures(train, gemma_like_tokenizer, prefs, tmp_path, kind):
    folder = save_tiny(tmp_path / kind, gemma_like_tokenizer, kind)
    code, _, err = train(*train_args(folder, prefs, tmp_path), "--max_steps", 2)
    assert code == 0, err
    flight = read_json(tmp_path / "out/r/preflight.json")
    assert flight["special_tokens"]["leading_bos_max"] == 1 and flight["special_tokens"]["chosen_with_end_token"] == 1
    assert "<end_of_turn>" in flight["first_pair"]["chosen_scored"]


def test_dataset_mix_from_yaml(train, tiny, prefs, tmp_path):
    other = write_jsonl(tmp_path / "more" / "train.jsonl", make_pairs(6, 200)).parent
    config = tmp_path / "mix.yaml"
    config.write_text(
        f"datasets:\n  - {{path: {prefs}, test_split: test, fraction: 0.5}}\n  - {{path: {other}, fraction: 0.5}}\n"
    )
    args = train_args(tiny, prefs, tmp_path, "--max_steps", 1, "--config", config)
    code, _, err = train(*[a for a in args if a not in ("--dataset_name", str(prefs))])
    assert code == 0, err
    data = read_json(tmp_path / "out/r/train.json")["data"]
    assert data["train"]["pairs"] == 12 and data["test"]["pairs"] == 8 and len(data["train"]["sources"]) == 2


def test_nonzero_step0_margin_stops_run(train, tiny, prefs, tmp_path, monkeypatch):
    from peft import LoraConfig

    monkeypatch.setattr(
        "preflab.training.run.get_peft_config",
        lambda model: LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )  # fmt: skip
    code, _, err = train(*train_args(tiny, prefs, tmp_path), "--beta", "10")
    assert code == 2
    assert_one_line(err, "step 0")


def test_likelihood_displacement_warning(train, tiny, tmp_path):
    """The rejected answer repeats the chosen one's word: making it less likely drags the chosen one along."""
    rows = make_pairs(16)
    for i, row in enumerate(rows):
        word = ["river", "stone", "cloud", "paper"][i % 4]
        row["chosen"][1]["content"], row["rejected"][1]["content"] = f"{word} {word}", " ".join([word] * 8)
    write_jsonl(tmp_path / "d/train.jsonl", rows[:8])
    write_jsonl(tmp_path / "d/test.jsonl", rows[8:])
    often = ("--eval_strategy", "steps", "--eval_steps", 4, "--max_steps", 12)
    full = ("--use_peft", "false", "--loss_type", "apo_down")
    code, out, err = train(*train_args(tiny, tmp_path / "d", tmp_path, *full, *often))
    assert code == 0, err
    summary = read_json(tmp_path / "out/r/train.json")
    assert max(summary["metrics"][f"reward_{side}"]["value"] for side in ("chosen", "rejected")) < 0
    assert "warning: likelihood displacement" in out and "likelihood displacement" in summary["warning"]
    assert "step 12: likelihood displacement" in err
    assert "> Warning: likelihood displacement" in (tmp_path / "ck/r/README.md").read_text()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: write_jsonl(d / "train.jsonl", [{"prompt": "a", "chosen": "b"}]), ("line 1", "'rejected'")),
        (
            lambda d: write_jsonl(d / "train.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}]),
            ("0 train pairs", "identical_responses"),
        ),
        (lambda d: write_jsonl(d / "train.jsonl", make_pairs(3)), ("3 train prompts", "--train_test_overlap")),
        (lambda d: None, ("'train'", "test")),
    ],
)
def test_unusable_data(train, tiny, tmp_path, make, words):
    write_jsonl(tmp_path / "d/test.jsonl", make_pairs(3))
    make(tmp_path / "d")
    code, _, err = train(*train_args(tiny, tmp_path / "d", tmp_path))
    assert code == 2
    assert_one_line(err, *words)


def without(model, folder, name):
    shutil.copytree(model, folder)
    (folder / name).unlink()
    return folder


def damaged(model, folder, name):
    shutil.copytree(model, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    return folder


def test_unusable_models(train, tiny, prefs, tmp_path):
    assert train(*train_args(tiny, prefs, tmp_path), "--max_steps", 1)[0] == 0
    (tmp_path / "empty").mkdir()
    for model, words in (
        (tmp_path / "ck" / "r", ("LoRA adapter",)),
        (tmp_path / "empty", ("config.json",)),
        (tmp_path / "nope", ("nope",)),
        (without(tiny, tmp_path / "a", "tokenizer.json"), ("tokenizer", str(tmp_path / "a"))),
        (without(tiny, tmp_path / "b", "model.safetensors"), ("model", str(tmp_path / "b"))),
        (damaged(tiny, tmp_path / "c", "model.safetensors"), ("model", str(tmp_path / "c"))),
        (damaged(tiny, tmp_path / "d", "config.json"), (str(tmp_path / "d"),)),
        ("builtin:gpt5", ("builtin:smollm2-135m-instruct",)),
    ):
        code, _, err = train(*train_args(model, prefs, tmp_path), "--run_name", "other")
        assert code == 2
        assert_one_line(err, *words)


def test_adapter_of_another_base_is_refused(train, tiny, prefs, tmp_path, smol_tokenizer):
    from preflab.models.loading import load_model
    from utils.errors import UserError

    assert train(*train_args(tiny, prefs, tmp_path), "--max_steps", 1)[0] == 0
    adapter = str(tmp_path / "ck" / "r")
    assert load_model(str(tiny), adapter=adapter).active_adapter == "default"
    for extra in ({"hidden_size": 64}, {"num_hidden_layers": 3}):
        other = save_tiny(tmp_path / f"other{len(extra)}{next(iter(extra))}", smol_tokenizer, **extra)
        with pytest.raises(UserError, match="adapter.*tiny-llama"):
            load_model(str(other), adapter=adapter)
    with pytest.raises(UserError, match="adapter_config.json"):
        load_model(str(tiny), adapter=str(tmp_path))


def test_unwritable_folder(train, tiny, prefs, tmp_path):
    (tmp_path / "file").write_text("")
    for flag in ("--output_dir", "--eval_out"):
        code, _, err = train(*train_args(tiny, prefs, tmp_path), flag, tmp_path / "file" / "x")
        assert code == 2
        assert_one_line(err, flag, str(tmp_path / "file"))
