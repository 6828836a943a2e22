"""Real hub data through the real hub client, where a local mirror of the hub stands beside the checkout."""

import os
import subprocess
import sys

import pytest
from conftest import MIRROR, ROOT, train_args

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


def test_an_unknown_split_of_a_hub_dataset_lists_the_others(tiny, tmp_path):
    args = train_args(tiny, "HuggingFaceH4/ultrafeedback_binarized", tmp_path)
    done = through_the_mirror("dpo_train_human_preference.py", *args)
    assert done.returncode == 2 and "test_prefs" in done.stderr and "Traceback" not in done.stderr, done.stderr
