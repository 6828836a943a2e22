"""What every training stage shares: its keys, checkpoints that survive kill -9, logs, and a stop that loses nothing."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object

from utils.errors import UserError
from utils.stage import print_main


@dataclass
class RunConfig:
    """Keys of this project that every training stage has beside TRL's own. Put before TRL's config in the bases."""

    output_dir: str = field(default="checkpoints", metadata={"help": "Weights go to <output_dir>/<run_name>/."})
    eval_out: str = field(default="eval_out", metadata={"help": "Results go to <eval_out>/<run_name>/."})
    start_adapter: str | None = field(
        default=None, metadata={"help": "LoRA folder or hub id that the model starts from, on top of its base."}
    )
    start_adapter_use: str | None = field(
        default=None,
        metadata={
            "help": "merge: into the base, which a new adapter is trained on; continue: train that adapter further.",
            "choices": ["merge", "continue"],
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per optimiser step over all processes; gradient accumulation is derived from it."},
    )
    resume: str = field(default="auto", metadata={"help": "auto, never, or the path of a checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run of this name wrote."})
    preflight_only: bool = field(default=False, metadata={"help": "Stop after the preflight."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Compute activations twice instead of keeping them (default: where memory asks for it)."},
    )
    sample_prompts: int = field(default=4, metadata={"help": "Test prompts answered by base and tuned at the end."})
    published: str | None = field(
        default=None, metadata={"help": "YAML of published results, shown in the model card beside the run's own."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimiser steps."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "tensorboard, trackio, wandb or none."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Replace NaN losses in the log."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the oldest are deleted."})

    def __post_init__(self):
        # transformers asks for use_cpu before it allows bf16 there; without an accelerator nothing else can be meant.
        self.checkpointing_is_open = self.gradient_checkpointing is None and self.activation_checkpointing is None
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.disable_tqdm = bool(self.disable_tqdm)
        if self.bf16 is None and not self.fp16:
            # TRL's default is bf16 everywhere; a plain CPU run is float32 unless asked otherwise.
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()

    def choose_checkpointing(self, model, trained: int, longest: Callable[[], int], reference_beside: bool):
        """Where neither YAML nor command line decided, checkpointing only if memory asks for it: why, or None.

        All processes decide alike: where one of them is short of memory, all compute activations twice.

        Args:
            longest: gives the tokens of the longest sequence in the data.
        """
        from preflab.training.memory import asks_for_checkpointing, free_bytes, needed

        if not self.checkpointing_is_open:
            return None
        why = asks_for_checkpointing(needed(model, self, trained, longest(), reference_beside), free_bytes(model))
        if self.world_size > 1:
            why = next((one for one in gather_object([why]) if one), None)
        self.gradient_checkpointing = self.activation_checkpointing = why is not None
        return why

    @property
    def precision(self) -> str:
        """The precision that the forward pass runs in."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def dtype_name(self) -> str:
        """torch's name of that precision."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.precision]


# ------------------------------------------------------------------------------------------------- the script's steps


def check_positive(*holders_and_keys: tuple[object, tuple[str, ...]]) -> None:
    """Raise UserError for a number that is given and not above 0."""
    for holder, keys in holders_and_keys:
        for key in keys:
            value = getattr(holder, key)
            if value is not None and not value > 0:
                raise UserError(f"--{key} {value}: must be above 0")


def check_run_config(args, model) -> None:
    """Refuse keys of a run that fit together in no training stage.

    Args:
        args: a config with RunConfig.
        model: TRL's ModelConfig.
    """
    check_positive((args, POSITIVE), (model, ("lora_r", "lora_alpha")))
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise UserError(f"--num_train_epochs {args.num_train_epochs}: must be above 0 (or give --max_steps)")
    if model.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: a hub id, a folder, or builtin:smollm2-135m-instruct")
    if (model.load_in_4bit or model.load_in_8bit) and not model.use_peft:
        raise UserError("--load_in_4bit and --load_in_8bit need --use_peft: quantised weights cannot be trained")
    if args.resume_from_checkpoint:
        raise UserError("--resume_from_checkpoint: here the flag is --resume auto|PATH|never")
    if (args.start_adapter is None) != (args.start_adapter_use is None):
        raise UserError(
            "--start_adapter needs --start_adapter_use, and says nothing by itself: merge puts it into the base, which"
            " a new adapter is trained on; continue trains that adapter further"
        )
    if args.start_adapter_use == "continue" and not model.use_peft:
        raise UserError("--start_adapter_use continue needs --use_peft: it is an adapter that is trained further")


POSITIVE = (
    "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "global_batch_size", "max_length",
)  # fmt: skip


def fit_global_batch(args) -> list[str]:
    """Derive accumulation (and, where needed, the per-process batch) from `global_batch_size`; returns what to note."""
    world, wanted = args.world_size, args.global_batch_size
    before = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if wanted is None:
        one = before[0] * before[1]
        return [f"global batch is {one * world} on {world} processes; on one it is {one}"] if world > 1 else []
    if wanted % world:
        raise UserError(f"--global_batch_size {wanted} does not divide over {world} processes; choose a multiple")
    share = wanted // world
    args.per_device_train_batch_size = next(n for n in range(min(before[0], share), 0, -1) if share % n == 0)
    args.gradient_accumulation_steps = share // args.per_device_train_batch_size
    after = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if after == before:
        return []
    return [
        f"batch {before[0]} × {before[1]} became {after[0]} × {after[1]} on {world} processes: the global batch stays"
        f" {wanted}"
    ]


def train_or_resume(trainer, checkpoint, run_) -> None:
    """Train to the last step; leave with code 130 where Ctrl-C stopped it, after saving a checkpoint."""
    if checkpoint:
        print_main(f"resuming from {checkpoint}")
        trainer.continue_from(checkpoint)
    with trainer.stopper:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopper.asked and trainer.state.global_step < trainer.state.max_steps:
        print_main(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in {run_.folder}; the"
            " same command (without --overwrite) goes on from there"
        )
        sys.exit(130)


def training_summary(log: list[dict], trainer, flight: dict, unit: str, tokens: int, operations: float) -> dict:
    """Figures of the training itself, from train_log.jsonl: steps, tokens, speed, loss of its first and last tenth.

    Speed is over all processes and the whole of training, its evaluations and saves included; mfu is its share of the
    measured rate of matrix products.

    Args:
        unit: what a row is, in the plural.
        tokens: those that count as work: each row's, stored once.
        operations: a parameter and token (preflab.training.throughput).
    """
    from preflab.training.throughput import matmul_rate, model_flops

    losses, plan = [row["loss"] for row in log if row["split"] == "train"], flight["plan"]
    tenth = max(1, len(losses) // 10)
    rate = matmul_rate(trainer.args.dtype_name, trainer.accelerator.device.type) * plan["batch"]["processes"]
    needed = model_flops(flight["parameters"]["total"], tokens, operations)
    return {
        "steps": trainer.state.global_step,
        "seconds": round(trainer.seconds, 1),
        "num_tokens": trainer._total_train_tokens,
        f"{unit}_per_second": round(plan["rows_seen"] / trainer.seconds, 3),
        "tokens_per_second": round(tokens / trainer.seconds, 1),
        "mfu": round(needed / trainer.seconds / rate, 4),
        "loss_first_tenth": sum(losses[:tenth]) / tenth if losses else None,
        "loss_last_tenth": sum(losses[-tenth:]) / tenth if losses else None,
    }
