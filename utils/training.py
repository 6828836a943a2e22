"""What every training stage shares: its keys, checkpoints that survive kill -9, logs, and a stop that loses nothing."""

import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from utils import fused_lora
from utils.artifacts import RowFile, read_json
from utils.errors import UserError, is_main_process
from utils.runs import MANIFEST, seal


@dataclass
class RunKeys:
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

    def decide_checkpointing(self, model, trained: int, longest: Callable[[], int], reference_beside: bool):
        """Where neither YAML nor command line decided, checkpointing only if memory asks for it: why, or None.

        All processes decide alike: where one of them is short of memory, all compute activations twice.

        Args:
            longest: gives the tokens of the longest sequence in the data.
        """
        from utils.memory import asks_for_checkpointing, free_bytes, needed

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


def say(text: str) -> None:
    """Print from rank 0 alone."""
    if is_main_process():
        print(text, flush=True)


def check_positive(*holders_and_keys: tuple[object, tuple[str, ...]]) -> None:
    """Raise UserError for a number that is given and not above 0."""
    for holder, keys in holders_and_keys:
        for key in keys:
            value = getattr(holder, key)
            if value is not None and not value > 0:
                raise UserError(f"--{key} {value}: must be above 0")


def check_run(args, model) -> None:
    """Refuse keys of a run that fit together in no training stage.

    Args:
        args: a config with RunKeys.
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
        say(f"resuming from {checkpoint}")
        trainer.continue_from(checkpoint)
    with trainer.stopper:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopper.asked and trainer.state.global_step < trainer.state.max_steps:
        say(
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
        operations: a parameter and token (utils.throughput).
    """
    from utils.throughput import matmul_rate, model_flops

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


# ---------------------------------------------------------------------------------------------------------- trainer


class Resumable:
    """Whole checkpoints, exact resume, timing and logs for a trainer of TRL's. Put before it in the bases."""

    seconds_before, started, ended = 0.0, None, None

    def set_up(self, row_log: RowFile, watch: Callable[[dict], str | None] | None = None) -> None:
        """What comes after TRL's own __init__: LoRA in place, adapters in float32, and this project's callbacks.

        Args:
            row_log: where every logged step goes.
            watch: says what is to be warned of in an evaluation's row, or None.
        """
        self.row_log = row_log
        if not self.is_sharded:
            # Sharding may gather a layer's A and B only when they are called as modules.
            fused_lora.attach(self.model)
        for param in self.model.parameters():
            # TRL casts QLoRA adapters to bf16, where an Adam update of 2e-6 on a weight of 1e-2 rounds to nothing.
            if param.requires_grad and param.dtype in (torch.bfloat16, torch.float16) and self.is_quantized:
                param.data = param.data.float()
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.add_callback(QuietProgress())
        self.add_callback(RowLog(row_log, watch))
        self.stopper = GracefulStop(self.accelerator)
        self.add_callback(self.stopper)

    @property
    def is_quantized(self) -> bool:
        """Whether the base's weights are quantised by bitsandbytes."""
        return getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False)

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over processes once training starts (FSDP, DeepSpeed ZeRO-3)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_model_card(self, *args, **kwargs):
        """Nothing: utils.card writes the card once, at the end, with the results in it."""

    def train(self, *args, **kwargs):
        """transformers' train, timed."""
        self.started = time.monotonic()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of training so far, its evaluations and saves included, in seconds, over all interruptions."""
        return self.seconds_before + ((self.ended or time.monotonic()) - self.started if self.started else 0.0)

    def _save_checkpoint(self, model, trial):
        # The manifest comes last and is renamed into place, so a folder without it is half-written. Older checkpoints
        # go only after that: a kill at any point leaves one whole checkpoint.
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if is_main_process() and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if is_main_process():
            seal(folder, step=self.state.global_step, num_tokens=self._total_train_tokens, seconds=self.seconds)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **kwargs):
        # transformers takes one step too many where the checkpoint it resumes from is the last.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def continue_from(self, checkpoint: Path) -> None:
        """Take over what transformers does not restore: TRL's token count, and the wall time so far."""
        state = read_json(checkpoint / MANIFEST)
        self._total_train_tokens = state["num_tokens"]
        self.seconds_before = state["seconds"]


# -------------------------------------------------------------------------------------------------------- callbacks


class RowLog(TrainerCallback):
    """Every metric of every logged step in train_log.jsonl, each step once, also after a resume."""

    def __init__(self, rows: RowFile, watch: Callable[[dict], str | None] | None = None):
        self.rows, self.watch = rows, watch

    def on_train_begin(self, args, state, control, **kwargs):
        self.rows.keep(lambda row: row["step"] <= state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in logs or not state.is_world_process_zero:
            return
        split = "eval" if any(k.startswith("eval_") for k in logs) else "train"
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the {split} loss at step {state.global_step} is {loss}: lower --learning_rate, or leave 16 bits"
                " (--bf16 false --fp16 false); with --save_steps the checkpoints before it are kept"
            )
        row = {"split": split, "step": state.global_step, **{k.removeprefix("eval_"): v for k, v in logs.items()}}
        self.rows.append(row)
        warning = self.watch(row) if self.watch and split == "eval" else None
        if warning:
            print(f"\nwarning: step {state.global_step}: {warning}", file=sys.stderr)


class QuietProgress(ProgressCallback):
    """A progress bar that carries the latest figures instead of printing each log."""

    SHOWN = {
        "loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins", "right": "mean_token_accuracy",
    }  # fmt: skip

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix({k: f"{logs[v]:.3f}" for k, v in self.SHOWN.items() if v in logs})


class GracefulStop(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the optimiser step, save a checkpoint, stop. A second Ctrl-C stops at once.

    A launcher passes on the Ctrl-C that its processes got already: a second one counts only after some seconds.
    """

    SAME_KEYSTROKE_SECONDS = 3.0

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.asked, self.asked_at = False, 0.0

    def __enter__(self):
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            if number == signal.SIGINT and time.monotonic() - self.asked_at > self.SAME_KEYSTROKE_SECONDS:
                raise KeyboardInterrupt
            return
        self.asked, self.asked_at = True, time.monotonic()
        if is_main_process():
            print("\nstopping after this step, with a checkpoint (Ctrl-C again: stop at once)", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if self.accelerator.num_processes > 1:
            # The signal reaches the processes at different moments; all must leave at the same step.
            flag = torch.tensor([int(asked)], device=self.accelerator.device)
            asked = bool(self.accelerator.reduce(flag, "sum").item())
        if asked:
            self.asked = control.should_save = control.should_training_stop = True
