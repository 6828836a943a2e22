"""The plan of a run against transformers' own Trainer, the rows it sees by counting, and token figures by hand."""

import random

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from preflab.training.plan import part_of_epoch, plan_training
from preflab.training.token_figures import conversation_tokens, pair_lengths, pair_tokens


def rows_seen(config, rows: int, steps: int) -> int:
    """Rows in the batches of all steps, counted step by step."""
    batch, seen, done = config.per_device_train_batch_size, 0, 0
    while done < steps:
        micro_batches = [min(batch, rows - first) for first in range(0, rows, batch)]
        while micro_batches and done < steps:
            seen += sum(micro_batches[: config.gradient_accumulation_steps])
            micro_batches = micro_batches[config.gradient_accumulation_steps :]
            done += 1
    return seen


@pytest.mark.parametrize("seed", range(12))
def test_steps_are_those_of_the_trainer(seed, tmp_path):
    rng = random.Random(seed)
    rows = rng.randrange(1, 40)
    config = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rng.randrange(1, 6),
        gradient_accumulation_steps=rng.randrange(1, 5),
        num_train_epochs=rng.choice([1, 2, 0.5, 1.3]),
        max_steps=rng.choice([-1, -1, 3, 25]),
        use_cpu=True,
        report_to=[],
    )
    data = Dataset.from_dict({"input": [[0.0]] * rows})
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=config, train_dataset=data)
    _, per_epoch, _, _, batch, _, steps = trainer.set_initial_training_values(config, trainer.get_train_dataloader())
    plan = plan_training(config, rows, 1)
    assert (plan["steps"], plan["steps_per_epoch"]) == (steps, per_epoch)
    assert plan["global_batch_size"] == batch
    assert plan["rows_seen"] == rows_seen(config, rows, steps)
    assert bool(part_of_epoch(plan)) == (steps < per_epoch)


def test_two_processes_by_hand(tmp_path):
    config = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3, use_cpu=True
    )
    # 13 rows: 7 per process, 4 micro-batches, 2 steps per epoch; 3 epochs.
    plan = plan_training(config, 13, 2)
    assert (plan["steps"], plan["steps_per_epoch"], plan["global_batch_size"]) == (6, 2, 12)
    assert plan["epochs"] == 3 and plan["rows_seen"] == 39


def test_token_figures_by_hand():
    ids = {"prompt_ids": [[1] * 4, [1] * 2], "chosen_ids": [[1] * 5, [1] * 1], "rejected_ids": [[1] * 3, [1] * 1]}
    tokens = pair_tokens(*pair_lengths(Dataset.from_dict(ids)))
    assert tokens == {
        "pairs": 2, "prompt_tokens_mean": 3.0, "chosen_tokens_mean": 3.0, "rejected_tokens_mean": 2.0,
        "longest_sequence": 9, "tokens_per_epoch": 22, "tokens_stored_once": 16, "margin_tokens_mean": 1.0,
        "margin_tokens_quartiles": [0.5, 1.0, 1.5], "chosen_longer_share": 0.5, "equal_length_share": 0.5,
    }  # fmt: skip
    rows = {"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, -100], [4]]}
    assert conversation_tokens(Dataset.from_dict(rows)) == {
        "conversations": 2, "tokens_mean": 2.0, "longest_sequence": 3, "tokens_per_epoch": 4,
        "trained_tokens_per_epoch": 2,
    }  # fmt: skip
