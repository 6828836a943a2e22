"""The check that policy and reference are the same model before the first step: all rewards and margins are 0."""

from preflab.training.dpo_config import DPORunConfig
from utils.errors import UserError

# In nats. In 16 bits the batch's shape moves a log-probability by up to about 0.1 nats per answer.
STEP0_TOLERANCE = {"float32": 1e-3, "16-bit": 0.5}


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
