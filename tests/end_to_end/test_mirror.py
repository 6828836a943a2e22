"""Real hub data through the real hub client, where a local mirror of the hub stands beside the checkout."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import MIRROR, ROOT, eval_args, train_args

from utils.artifacts import read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MIRROR / "serve.py").exists(), reason="no mirror of the hub beside this checkout"),
]


def through_the_mirror(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(MIRROR / "serve.py"), "--", sys.executable, *map(str, args)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=900)


@pytest.mark.parametrize(
    ("dataset", "train_split", "test_split"),
    [("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs"), ("Anthropic/hh-rlhf", "train", "test")],
)
def test_hub_datasets_train(tiny, tmp_path, dataset, train_split, test_split):
    splits = ("--dataset_train_split", train_split, "--dataset_test_split", test_split)
    done = through_the_mirror(
        "dpo_train_human_preference.py",
        *train_args(tiny, dataset, tmp_path, *splits, "--limit", 12, "--max_steps", 2, "--max_length", 256),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    data = read_json(tmp_path / "out/r_LIMIT12/train.json")["data"]
    assert data["train"]["pairs"] == data["test"]["pairs"] == 12
    assert len(data["train"]["sources"][0]["revision"]) == 40


def test_the_seed_recipe_runs_as_it_stands(tmp_path):
    """google/gemma-2b-it (stand-in weights, real tokenizer), nf4: only steps, warmup and rows are cut."""
    cut = ("--limit", 8, "--max_steps", 1, "--warmup_steps", 0, "--eval_strategy", "no", "--sample_prompts", 0)
    folders = ("--output_dir", tmp_path / "ck", "--eval_out", tmp_path / "out")
    done = through_the_mirror(
        "dpo_train_human_preference.py", "--config", "configs/gemma-2b-it-dpo.yaml", *cut, *folders
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = read_json(tmp_path / "out/gemma-2b-it-dpo_LIMIT8/train.json")
    assert summary["model"]["quantized"] == "4bit" and summary["plan"]["global_batch_size"] == 8
    assert len(summary["model"]["revision"]) == 40
    for key, value in {
        "lora_r": 16,
        "lora_alpha": 32,
        "beta": 0.1,
        "max_length": 512,
        "max_prompt_length": 256,
    }.items():
        assert summary["args"][key] == value, key


HELD_OUT = [("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"), ("Anthropic/hh-rlhf", "test")]


@pytest.mark.parametrize("script", ["eval_win_rate", "eval_perplexity"])
@pytest.mark.parametrize(("dataset", "split"), HELD_OUT)
def test_hub_datasets_are_evaluated(trained, tmp_path, script, dataset, split):
    flags = ("--dataset_name", dataset, "--split", split, "--limit", 12, "--max_length", 256)
    done = through_the_mirror(f"{script}.py", *eval_args(trained, tmp_path, *flags))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = read_json(tmp_path / f"r/{script.removeprefix('eval_')}_LIMIT12.json")
    assert summary["data"].get("pairs", summary["data"]) and summary["length_bias"][split]["pairs"] == 12
    assert summary["run"]["limit"] == 12


def test_the_published_win_rate_command_runs(tmp_path):
    """The seed project's command, on stand-in weights of gemma-2b-it: only rows are cut."""
    cut = ("--limit", 4, "--max_steps", 1, "--warmup_steps", 0, "--eval_strategy", "no", "--sample_prompts", 0)
    folders = ("--output_dir", tmp_path / "ck", "--eval_out", tmp_path / "out", "--learning_rate", 1e-2)
    done = through_the_mirror(
        "dpo_train_human_preference.py", "--config", "configs/gemma-2b-it-dpo.yaml", *cut, *folders
    )
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = tmp_path / "checkpoints/checkpoint-7000"
    shutil.copytree(tmp_path / "ck/gemma-2b-it-dpo_LIMIT4", adapter, ignore=shutil.ignore_patterns("run.json"))
    seed = ("--adapter-path", adapter, "--base-model", "google/gemma-2b-it", "--batch-size", 4, "--max-length", 1024)
    seed += ("--output-json", tmp_path / "eval_out/dpo_winrate.json")
    done = through_the_mirror("eval_win_rate.py", *seed, "--limit", 4, "--eval_out", tmp_path / "eval_out")
    assert done.returncode == 0, done.stderr[-2000:]
    summary = read_json(tmp_path / "eval_out/dpo_winrate_LIMIT4.json")
    assert summary["data"]["sources"][0]["name"] == "HuggingFaceH4/ultrafeedback_binarized"
    assert summary["data"]["sources"][0]["split"] == "test_prefs" and summary["args"]["max_length"] == 1024


def test_arena_hard_reads_its_prompts_and_answers_from_the_hub(trained, tmp_path):
    flags = ("--config", ROOT / "configs/battle_arena_hard.yaml", "--limit", 3, "--max_new_tokens", 4)
    done = through_the_mirror("eval_win_rate.py", *eval_args(trained, tmp_path, *flags, "--judge", "longer"))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = read_json(tmp_path / "r/battle_LIMIT3.json")
    assert set(summary["answers"]) == {"gpt-4-0314", "base", "tuned"} and "gemma-2-9b-it-SimPO" in done.stdout
    assert summary["answers"]["gpt-4-0314"]["answers"]["value"] == 3
    assert summary["data"]["opponent"]["sha256"]


def test_an_unknown_split_of_a_hub_dataset_lists_the_others(tiny, tmp_path):
    args = train_args(tiny, "HuggingFaceH4/ultrafeedback_binarized", tmp_path)
    done = through_the_mirror("dpo_train_human_preference.py", *args)
    assert done.returncode == 2 and "test_prefs" in done.stderr and "Traceback" not in done.stderr, done.stderr
