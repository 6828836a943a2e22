"""Figures of a few rows before the first step. Policy and reference are the same model then: all rewards are 0."""

from math import exp, log1p

from preflab.evaluation.rewards import reward_rows
from preflab.training.dpo_config import DPORunConfig
from utils.errors import UserError

# Rows per process that are scored before training: of the first FIRST_ROWS pairs the shortest ones, since a deviation
# shows in short pairs as well as in long ones, which take many times longer.
CHECKED_ROWS, FIRST_ROWS = 4, 256
# In nats. In 16 bits the batch's shape moves a log-probability by up to about 0.1 nats per answer.
STEP0_TOLERANCE = {"float32": 1e-3, "16-bit": 0.5}


def step0_margins(trainer, row_tokens: list[int]) -> dict:
    """The largest |reward| and |margin| before the first step, over a few short train pairs.

    A sharded model exists only inside training: there the trainer checks the first micro-batch.

    Args:
        row_tokens: tokens of every row of `trainer.train_dataset`.
    """
    step0 = {"largest_margin": None, "largest_reward": None, "pairs": 0, "tolerance": step0_tolerance(trainer.args)}
    if trainer.is_sharded:
        later = "will be checked on the first micro-batch: a sharded model exists only there"
        if trainer.args.reference_free:
            later = "not checked: a sharded model exists only in training, which needs no reference with this loss"
        return {**step0, "checked": later}
    checked = short_rows(row_tokens, CHECKED_ROWS * trainer.accelerator.num_processes)
    rows = reward_rows(trainer.score(trainer.train_dataset, checked), trainer.args.beta)
    return {
        **step0,
        "largest_margin": max(abs(row["margin"]) for row in rows),
        "largest_reward": max(abs(row[f"reward_{side}"]) for row in rows for side in ("chosen", "rejected")),
        "pairs": len(checked),
        "checked": "before training",
    }


def step0_rewards(trainer, row_tokens: list[int]) -> dict:
    """`step0_margins` of single answers with thumbs, which have rewards only."""
    step0 = {"largest_margin": None, "largest_reward": None, "pairs": 0, "tolerance": step0_tolerance(trainer.args)}
    if trainer.is_sharded:
        return {**step0, "checked": "not checked: a sharded model exists only in training"}
    checked = short_rows(row_tokens, CHECKED_ROWS * trainer.accelerator.num_processes)
    rows = trainer.score(trainer.train_dataset, checked)
    largest = max(trainer.args.beta * abs(row["tuned"] - row["base"]) for row in rows)
    return {**step0, "largest_margin": largest, "largest_reward": largest, "pairs": len(checked),
            "checked": "before training"}  # fmt: skip


def short_rows(row_tokens: list[int], count: int) -> list[int]:
    """The `count` shortest of the first rows, in their order."""
    first = range(min(len(row_tokens), max(FIRST_ROWS, count)))
    return sorted(sorted(first, key=lambda i: row_tokens[i])[:count])


def step0_line(step0: dict) -> str:
    """The printed line about the margins before the first step."""
    if step0["largest_margin"] is None:
        return f"  step 0    {step0['checked']}"
    return (
        f"  step 0    largest reward margin {step0['largest_margin']:.2g} over {step0['pairs']} pairs (must be 0"
        f" within {step0['tolerance']:g})"
    )


def check_step0_margins(step0: dict, config: DPORunConfig) -> None:
    """Raise UserError where the preflight's rewards or margins before the first step are not 0.

    Args:
        step0: that section of the preflight; its figures are None where the trainer checks the first micro-batch.
    """
    if step0["largest_reward"] is not None:
        check_step0(max(step0["largest_margin"], step0["largest_reward"]), config)


def check_step0(reward: float, config: DPORunConfig) -> None:
    """Raise UserError unless the largest |reward| or |margin| before the first step is 0 within the tolerance."""
    tolerance = step0_tolerance(config)
    # Written so that NaN fails too.
    if not reward <= tolerance:
        raise UserError(
            f"the margins at step 0 must be 0 but reach {reward:.4g} (tolerance {tolerance}): the policy is not the"
            " reference; check for active dropout, an adapter that does not start at zero, or a stale reference cache"
        )


def step0_tolerance(config: DPORunConfig) -> float:
    """Tolerance of the step-0 reward margin: 1e-3 in float32, beta x 0.5 nats in 16 bits."""
    if config.precision == "fp32":
        return STEP0_TOLERANCE["float32"]
    # A reward is beta x nats, so a tolerance in nats is multiplied by beta; it is never stricter than in float32.
    return max(STEP0_TOLERANCE["float32"], config.beta * STEP0_TOLERANCE["16-bit"])


def step0_reward_model(trainer, row_tokens: list[int]) -> dict:
    """Loss and rewards of a few short train pairs before the first step. Arguments as `step0_margins`.

    The reward layer of a language model is new and random: the loss is near log 2 = 0.693. None for a sharded model,
    which exists only inside training.
    """
    if trainer.is_sharded:
        return {"loss": None, "smallest_reward": None, "largest_reward": None, "pairs": 0}
    checked = short_rows(row_tokens, CHECKED_ROWS * trainer.accelerator.num_processes)
    rows = trainer.score(trainer.train_dataset, checked)
    rewards = [row[side] for row in rows for side in ("chosen", "rejected")]
    margins = [row["chosen"] - row["rejected"] for row in rows]
    loss = sum(log1p(exp(-abs(m))) + max(-m, 0.0) for m in margins) / len(margins)
    return {"loss": loss, "smallest_reward": min(rewards), "largest_reward": max(rewards), "pairs": len(checked)}


def step0_reward_model_line(step0: dict) -> str:
    """The printed line about the rewards before the first step."""
    if step0["loss"] is None:
        return "  step 0    not measured: a sharded model exists only inside training"
    return (
        f"  step 0    loss {step0['loss']:.3f} over {step0['pairs']} pairs (0.693 for equal rewards), rewards"
        f" {step0['smallest_reward']:.2f} to {step0['largest_reward']:.2f}"
    )


def step0_loss(trainer, dataset) -> dict | None:
    """The mean loss per trained token before the first step, over a few conversations.

    None for a sharded model, which exists only inside training.
    """
    if trainer.is_sharded:
        return None
    sample = range(min(len(dataset), CHECKED_ROWS * trainer.accelerator.num_processes))
    # Sums over the labelled tokens of each conversation, in nats.
    nll = trainer.score(dataset, sample)
    # The first token has no prediction.
    scored = sum(sum(label != -100 for label in dataset[i]["labels"][1:]) for i in sample)
    return {"loss": sum(nll) / scored, "conversations": len(sample)}
