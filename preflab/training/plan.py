"""The steps of a training run and the rows that they reach, known before the first step."""

import math

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, SequentialSampler


def plan_training(config, rows: int, world_size: int) -> dict:
    """Steps and rows of the entire training, counted as transformers' Trainer counts them.

    Args:
        rows: rows of the train split, as the trainer takes them.
    """
    # The sampler pads the last batch, so every process gets equally many rows.
    per_device = -(-rows // world_size)
    micro_batches = -(-per_device // config.per_device_train_batch_size)
    # The last step of an epoch may have fewer micro-batches than the accumulation; it counts as a step.
    steps_per_epoch = max(-(-micro_batches // config.gradient_accumulation_steps), 1)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    global_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    epochs, rest = divmod(steps, steps_per_epoch)
    # A partial epoch sees at most all rows: the last batch of an epoch may be smaller than a global batch.
    seen = epochs * rows + min(rest * global_batch, rows)
    return {
        "steps": steps,
        "steps_per_epoch": steps_per_epoch,
        "epochs": round(steps / steps_per_epoch, 3),
        "global_batch_size": global_batch,
        "batch": {
            "per_device": config.per_device_train_batch_size,
            "accumulation": config.gradient_accumulation_steps,
            "processes": world_size,
        },
        "rows_seen": seen,
    }


def part_of_epoch(plan: dict) -> str:
    """A sentence on a run that --max_steps ends before it has seen every row; "" for other runs."""
    steps, all_steps = plan["steps"], plan.get("steps_per_epoch", 0)
    if steps >= all_steps:
        return ""
    return (
        f"--max_steps ended training after {steps} of the {all_steps} steps of one epoch: read the figures as those of"
        " a trial run."
    )


def reached_rows(trainer, plan: dict, finished: int = 0) -> list[int]:
    """The train rows that the steps after the `finished` ones reach, in the order of the first epoch.

    No random state changes. All rows where the order is not known before training (sampling grouped by length).
    """
    rows = len(trainer.train_dataset)
    first, last = (step * plan["global_batch_size"] for step in (finished, plan["steps"]))
    sampler = trainer._get_train_sampler()
    if isinstance(sampler, RandomSampler) and trainer.args.accelerator_config.use_seedable_sampler:
        # As accelerate's data loader makes it.
        order = list(SeedableRandomSampler(trainer.train_dataset, data_seed=trainer.args.data_seed))
    elif isinstance(sampler, SequentialSampler):
        order = list(range(rows))
    else:
        return list(range(rows))
    # From the second epoch on, the order is another one, and every row is reached.
    return order[first:last] if plan["steps"] < plan["steps_per_epoch"] else order
