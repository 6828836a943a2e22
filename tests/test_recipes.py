"""Every published training recipe, loaded as it stands, runs end to end with a tiny model, and its keys arrive."""

import json

import pytest
import yaml
from conftest import ROOT

RECIPES = ("gemma-2b-it-dpo", "gemma-2-9b-it-dpo", "gemma-2-9b-it-simpo")
# What a machine without the hub, a GPU or hours must change: model, data, precision, and the number of steps.
OVERRIDDEN = {
    "model_name_or_path", "dataset_name", "dataset_train_split", "dataset_test_split", "bf16", "load_in_4bit",
    "max_steps", "num_train_epochs",
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_runs_as_it_stands(name, train, tiny_gemma2, prefs, tmp_path):
    path = ROOT / "configs" / f"{name}.yaml"
    code, out, err = train(
        *("--config", path, "--model_name_or_path", tiny_gemma2, "--dataset_name", prefs),
        *("--dataset_train_split", "train", "--dataset_test_split", "test", "--bf16", "false"),
        *("--load_in_4bit", "false", "--max_steps", "1", "--run_name", "r", "--disable_tqdm", "true"),
        *("--output_dir", tmp_path / "ck", "--eval_out", tmp_path / "out", "--sample_prompts", "0"),
    )
    assert code == 0, err
    asked = yaml.safe_load(path.read_text())
    args = json.loads((tmp_path / "out" / "r" / "train.json").read_text())["args"]
    for key in asked.keys() - OVERRIDDEN - {"gradient_accumulation_steps", "per_device_train_batch_size"}:
        wanted = [asked[key]] if key == "loss_type" else asked[key]
        assert args[key] == wanted, key
    batch = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
    assert batch == args["global_batch_size"] == asked["global_batch_size"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_recipe_names_its_source(name):
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    keys = [line for line in lines if line and not line.startswith("#")]
    bare = [line for line in keys if "#" not in line]
    assert lines[1].startswith("# Source:") and len(bare) <= 3, bare
