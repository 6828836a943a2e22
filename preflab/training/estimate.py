"""How long a run will take, from the speed of a few of its own rows, measured before the first step."""

import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from preflab.training.run_config import SAMPLE_TOKENS
from preflab.training.throughput import synchronize

# Micro-batches that are timed: this many, but none is started after this many seconds.
TIMED_BATCHES, MOST_SECONDS = 2, 20.0
# Tokens of a timed micro-batch on a CPU. Measured on 2 cores: with 500 tokens a step takes 30% more time per token.
CPU_TOKENS = 1024
# Forwards with one token per prompt, of which the median is taken.
DECODED_TOKENS = 5


@dataclass
class Speed:
    """Measured seconds of one process. All of them are maxima over the processes, which wait for the slowest.

    Attributes:
        step: seconds of a training step (forward, backward) per token of its rows.
        forward: seconds of a forward without gradients per token.
        decode: seconds in which one model generates one token of every sample answer.
    """

    step: float
    forward: float
    decode: float


@dataclass
class Work:
    """What a run computes, in tokens of its rows (a shared prompt counts once).

    Attributes:
        epoch_tokens: tokens of one epoch of training.
        once_tokens: {name of a phase that happens once, beside training: tokens of its forwards}.
        held_out_tokens: tokens of the forwards of one evaluation on the test split.
        sampling_models: models that answer the sample prompts after training.
    """

    epoch_tokens: int
    once_tokens: dict[str, int]
    held_out_tokens: int
    sampling_models: int


def measure_speed(trainer, tokens: list[int]) -> Speed | None:
    """Time a few micro-batches of training rows, drawn at random. No weight and no random state changes.

    Call after a first forward, which includes warm-up (threads, kernel selection). Collective: every process calls it.

    Args:
        tokens: tokens of every row of `trainer.train_dataset`.

    Returns:
        None for a sharded model, which exists only inside training.
    """
    if trainer.is_sharded:
        return None
    mean = round(np.mean(tokens))
    size = trainer.rows_per_forward(mean)
    if trainer.accelerator.device.type == "cpu":
        size = min(size, max(1, CPU_TOKENS // mean))
    # Equal on every process, since the forwards are collective.
    order = np.random.default_rng(0).permutation(len(tokens)).tolist()
    batches = [order[k : k + size] for k in range(0, len(order), size)][:TIMED_BATCHES]
    decode, steps, elapsed = _time_decoding(trainer), [], 0.0
    forward = trainer.time_forward(batches[0]) / sum(tokens[i] for i in batches[0])
    for rows in batches:
        (seconds,) = slowest(trainer, [trainer.time_step(rows)])
        steps.append(seconds / sum(tokens[i] for i in rows))
        elapsed += seconds
        if elapsed > MOST_SECONDS:
            break
    # The minimum, because other work on the machine can only slow down a measurement.
    step = min(steps)
    forward, decode = slowest(trainer, [forward, decode])
    # A backward costs at least as much as its forward, so a slower forward was disturbed.
    return Speed(step, min(forward, step / 2), decode)


def slowest(trainer, seconds: list[float]) -> list[float]:
    """The largest of each value over the processes, which wait for the slowest of them."""
    values = torch.tensor(seconds, dtype=torch.float64, device=trainer.accelerator.device)
    # (processes, values) -> (values,).
    return trainer.accelerator.gather(values[None]).amax(0).tolist()


@torch.no_grad()
def _time_decoding(trainer) -> float:
    """Seconds of a forward with one token per sample prompt: the cost of one generated token, without the cache."""
    device, prompts = trainer.accelerator.device, max(1, trainer.args.sample_prompts)
    token = torch.full((prompts, 1), trainer.processing_class.eos_token_id or 0, device=device)
    seconds = []
    with trainer.accelerator.autocast():
        for _ in range(DECODED_TOKENS):
            started = time.monotonic()
            trainer.model(input_ids=token)
            synchronize(device)
            seconds.append(time.monotonic() - started)
    return float(np.median(seconds))


def estimated_minutes(work: Work, speed: Speed | None, plan: dict, config, rows: int) -> dict:
    """Minutes from the preflight to the end of the run, and of each phase. The time of saves is not included.

    Args:
        plan: the plan of training (`preflab.training.plan.plan_training`).
        rows: rows of one epoch.

    Returns:
        `{minutes, phases, speed}`; empty where no speed was measured.
    """
    if speed is None:
        return {}
    processes = plan["batch"]["processes"]
    phases = {name: tokens * speed.forward / processes for name, tokens in work.once_tokens.items()}
    phases["training"] = work.epoch_tokens * plan["rows_seen"] / rows * speed.step / processes
    # One evaluation at the end, and those during training.
    evaluations = 1 + evaluations_during_training(config, plan["steps"], plan["epochs"])
    phases["held-out rows"] = evaluations * work.held_out_tokens * speed.forward / processes
    # Rank 0 alone generates the samples.
    phases["samples"] = work.sampling_models * SAMPLE_TOKENS * speed.decode
    return {
        "minutes": round(sum(phases.values()) / 60, 1),
        "phases": {name: round(seconds / 60, 2) for name, seconds in phases.items() if seconds},
        "speed": {name: float(f"{value:.3g}") for name, value in asdict(speed).items()},
    }


def evaluations_during_training(config, steps: int, epochs: float) -> int:
    """Evaluations that transformers runs before the last step, from `eval_strategy` and `eval_steps`."""
    if config.eval_strategy == "epoch":
        return math.ceil(epochs) - 1
    if config.eval_strategy != "steps":
        return 0
    # A value below 1 is a share of all steps; transformers uses logging_steps where eval_steps is not set.
    interval = config.eval_steps or config.logging_steps
    interval = max(1, math.ceil(interval * steps) if interval < 1 else int(interval))
    return (steps - 1) // interval


def estimate_text(estimate: dict) -> str:
    """The estimate as printed in the preflight."""
    memory = f"{estimate['memory_gib']} GiB (rough)"
    if "minutes" not in estimate:
        return f"time unknown (a sharded model exists only inside training), {memory}"
    phases = ", ".join(f"{name} {minutes:.1f}" for name, minutes in estimate["phases"].items())
    return f"{estimate['minutes']} minutes ({phases}), {memory}"
