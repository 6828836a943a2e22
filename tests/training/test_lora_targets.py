"""LoRA's names of modules: one name, a wrong name, a regular expression; checked before training."""

import pytest
from conftest import assert_one_line, train_args
from trl import ModelConfig

from preflab.models.loading import load_model
from preflab.training.lora_targets import as_names, check_targets
from utils.errors import UserError


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, None),
        (["q_proj"], ["q_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["q_proj,", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["layers.0.self_attn.q_proj", "v_proj"], ["layers.0.self_attn.q_proj", "v_proj"]),
    ],
)
def test_names(given, names):
    # TRL's config makes a text of a list of one.
    assert as_names(ModelConfig(lora_target_modules=given).lora_target_modules) == names


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(str(tiny))


@pytest.mark.parametrize(
    "targets", [None, ["q_proj"], ["layers.1.mlp.up_proj"], "all-linear", r".*\.(q|v)_proj", ["lm_head"]]
)
def test_right_targets(model, targets):
    from peft import LoraConfig, get_peft_model

    config = ModelConfig(lora_target_modules=targets)
    config.lora_target_modules = as_names(config.lora_target_modules)
    check_targets(model, config)
    # PEFT accepts them too.
    get_peft_model(model, LoraConfig(target_modules=config.lora_target_modules, task_type="CAUSAL_LM")).unload()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_target_modules": ["q_proj", "v_prj"]}, ("v_prj", "did you mean v_proj", "k_proj", "all-linear")),
        ({"lora_target_modules": ["c_attn"]}, ("c_attn", "q_proj, k_proj, v_proj, o_proj")),
        ({"lora_target_modules": ["proj", "q_proj"]}, ("--lora_target_modules proj",)),
        ({"lora_target_modules": [r".*_attn\d"]}, ("regular expression", "q_proj")),
        ({"lora_modules_to_save": ["lm_hed"]}, ("--lora_modules_to_save lm_hed", "did you mean lm_head")),
        ({"lora_target_parameters": ["experts"]}, ("--lora_target_parameters experts",)),
    ],
)
def test_wrong_targets(model, keys, words):
    config = ModelConfig(**keys)
    config.lora_target_modules = as_names(config.lora_target_modules)
    with pytest.raises(UserError) as error:
        check_targets(model, config)
    assert all(word in str(error.value) for word in words), error.value


def test_model_without_defaults(model, monkeypatch):
    monkeypatch.setattr(model.config, "model_type", "unknown_kind")
    with pytest.raises(UserError, match="--lora_target_modules is missing.*unknown_kind.*q_proj"):
        check_targets(model, ModelConfig())


def test_command(train, tiny, prefs, tmp_path):
    """One name trains two modules of the tiny model, one per layer; a wrong one ends before training."""
    code, out, err = train(*train_args(tiny, prefs, tmp_path, "--lora_target_modules", "q_proj", "--preflight_only"))
    assert code == 0, err
    # Two layers, rank 4, 32 inputs and outputs each.
    assert f"{2 * 4 * (32 + 32):,}" in out
    code, _, err = train(*train_args(tiny, prefs, tmp_path / "b", "--lora_target_modules", "q_proj", "vproj"))
    assert code == 2
    assert_one_line(err, "--lora_target_modules vproj", "did you mean v_proj", "down_proj")
