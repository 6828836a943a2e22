"""Every key of TRL's configs has a decision, and a refused key is refused."""

import dataclasses

import pytest
from conftest import assert_one_line, train_args
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from preflab.training.decisions import (
    ALLOWED,
    HONOURED,
    IRRELEVANT,
    REFUSED,
    REFUSED_FOR_PAIRS,
    REFUSED_FOR_REWARDS,
    check_decisions,
)
from preflab.training.dpo_config import DPORunConfig
from preflab.training.reward_config import RewardRunConfig
from preflab.training.sft_config import SFTRunConfig
from utils.errors import UserError

CONFIGS = {"pairs": DPORunConfig, "sft": SFTRunConfig, "rewards": RewardRunConfig}
REFUSED_IN = {"pairs": REFUSED_FOR_PAIRS, "sft": {}, "rewards": REFUSED_FOR_REWARDS}
# Values that are not the default, where the default's type does not give one.
OTHER_VALUES = {
    "train_sampling_strategy": "group_by_length", "truncation_mode": "keep_end", "model_init_kwargs": {"a": 1},
    "dataset_kwargs": {"skip_prepare_dataset": True}, "liger_kernel_config": {"rope": False}, "label_names": ["x"],
    "completion_only_loss": False, "neftune_noise_alpha": 5.0,
}  # fmt: skip


def names(*types) -> set[str]:
    return {field.name for kind in types for field in dataclasses.fields(kind) if field.init}


def test_every_key_has_one_decision():
    keys = names(DPOConfig, SFTConfig, RewardConfig, ModelConfig)
    tables = [HONOURED, set(REFUSED), set(IRRELEVANT), set(REFUSED_FOR_PAIRS)]
    assert set().union(*tables) == keys, set().union(*tables) ^ keys
    assert sum(map(len, tables)) == len(keys), "a key has two decisions"
    assert set(REFUSED_FOR_REWARDS) <= set(REFUSED_FOR_PAIRS)
    assert set(ALLOWED) <= HONOURED


def other_value(name: str, default):
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    return (not default) if isinstance(default, bool) else default + 1 if isinstance(default, (int, float)) else "other"


@pytest.mark.parametrize("stage", CONFIGS)
def test_defaults_are_accepted_and_refused_keys_are_not(stage, tmp_path):
    config, model = CONFIGS[stage](output_dir=str(tmp_path)), ModelConfig()
    check_decisions(config, model)
    refused = {**REFUSED, **REFUSED_IN[stage]}
    checked = 0
    for holder in (config, model):
        for field in dataclasses.fields(holder):
            before = getattr(holder, field.name)
            if field.name in refused or field.name in ALLOWED:
                setattr(holder, field.name, other_value(field.name, before))
                with pytest.raises(UserError, match=rf"--{field.name}\b"):
                    check_decisions(config, model)
                setattr(holder, field.name, before)
                checked += 1
            elif field.name in IRRELEVANT:
                setattr(holder, field.name, other_value(field.name, before))
                check_decisions(config, model)
                setattr(holder, field.name, before)
    assert checked == len(names(type(config), ModelConfig) & (set(refused) | set(ALLOWED)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--save_only_model",), ("--save_only_model", "resumed")),
        (("--model_init_kwargs", '{"revision": "x"}'), ("--model_init_kwargs", "--model_revision")),
        (("--truncation_mode", "keep_end"), ("--truncation_mode", "--max_prompt_length")),
        (
            ("--load_best_model_at_end", "--eval_strategy", "steps", "--save_steps", "2", "--eval_steps", "2"),
            ("--load_best_model_at_end", "eval_win_rate.py"),
        ),
        (("--push_to_hub", "--hub_token", "hf_x"), ("--hub_token", "not supported", "hf auth login")),
        (("--neftune_noise_alpha", "5"), ("--neftune_noise_alpha",)),
        (("--accelerator_config", '{"split_batches": true}'), ("--accelerator_config",)),
        (("--train_sampling_strategy", "group_by_length"), ("group_by_length", "random, sequential")),
    ],
)
def test_command(train, tiny, prefs, tmp_path, flags, words):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *flags))
    assert code == 2
    assert_one_line(err, *words)
    assert not (tmp_path / "ck").exists(), "nothing was claimed"
