"""How long a run will take, from the speed of a few of its own rows, measured before the first step."""

import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from preflab.training.run_config import SAMPLE_TOKENS
from preflab.training.throughput import synchronize
from utils.artifacts import read_json, write_json
from utils.cache import user_cache
from utils.distributed import on_main_process
from utils.errors import UserError
from utils.machine import usable_cores
from utils.provenance import sha256_of, versions

# Micro-batches that are timed: this many, but none is started after this many seconds.
TIMED_BATCHES, MOST_SECONDS = 2, 8.0
# Seconds for which a measured speed is used by further runs: a machine that was busy then is idle another day.
VALID_SECONDS = 24 * 3600
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
        measured_utc: when another run with the same model, settings and rows measured it; "" for this run's own.
    """

    step: float
    forward: float
    decode: float
    measured_utc: str = ""


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


def speed_of(trainer, tokens: list[int]) -> Speed | None:
    """The speed that a run of the last day measured with the same model, settings and rows, or `measure_speed`.

    Collective: every process calls it. Arguments and result as those of `measure_speed`.
    """
    if trainer.is_sharded:
        return None
    file = user_cache() / "speed" / f"{sha256_of(str(_speed_identity(trainer, tokens)))[:16]}.json"
    known = on_main_process(lambda: _read_speed(file))
    if known is not None:
        return known
    speed = measure_speed(trainer, tokens)
    on_main_process(lambda: _store_speed(file, speed))
    return speed


def _speed_identity(trainer, tokens: list[int]) -> list:
    """What the speed of a training step depends on."""
    args, device = trainer.args, trainer.accelerator.device
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{usable_cores()} cores"
    config = {k: v for k, v in trainer.model.config.to_dict().items() if k != "_name_or_path"}
    return [
        *(type(trainer).__name__, device.type, machine, torch.get_num_threads(), trainer.accelerator.num_processes),
        *(args.precision, args.gradient_checkpointing, args.token_budget(max(tokens)), args.sample_prompts),
        *(getattr(args, name, None) for name in ("max_length", "per_device_train_batch_size", "loss_type")),
        *(sorted(config.items(), key=str), [(p.shape, p.requires_grad) for p in trainer.model.parameters()]),
        *(versions(), len(tokens), sum(tokens)),
    ]


def _read_speed(file: Path) -> Speed | None:
    """A stored speed that is still valid."""
    try:
        speed = Speed(**read_json(file))
        age = datetime.now(UTC) - datetime.fromisoformat(speed.measured_utc)
    # No file, or a damaged one.
    except (UserError, TypeError, ValueError):
        return None
    return speed if 0 <= age.total_seconds() < VALID_SECONDS else None


def _store_speed(file: Path, speed: Speed) -> None:
    """Store a speed for other runs, where the user's cache can be written to; delete those that are too old."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for other in file.parent.iterdir():
            if time.time() - other.stat().st_mtime > VALID_SECONDS:
                other.unlink(missing_ok=True)
        write_json(file, {**asdict(speed), "measured_utc": datetime.now(UTC).isoformat(timespec="seconds")})
    except OSError:
        return


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
    if trainer.args.compile_layers:
        # The first step compiles.
        trainer.time_step(batches[0])
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
        "speed": {name: float(f"{value:.3g}") for name, value in asdict(speed).items() if name != "measured_utc"},
        **({"measured_utc": speed.measured_utc} if speed.measured_utc else {}),
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
    memory = f"{estimate['memory_gib']} GiB {'(rough)' if estimate.get('memory_is_rough') else 'at the peak'}"
    if "minutes" not in estimate:
        return f"time unknown (a sharded model exists only inside training), {memory}"
    phases = ", ".join(f"{name} {minutes:.1f}" for name, minutes in estimate["phases"].items())
    measured = estimate.get("measured_utc", "")
    source = f", by the speed of an equal run at {measured[11:16]} UTC" if measured else ""
    return f"{estimate['minutes']} minutes ({phases}{source}), {memory}"
