"""The order in which a training run reaches its rows, known before the first step."""

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, SequentialSampler


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
