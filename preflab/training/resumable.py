"""Trainer mixin and callbacks: whole checkpoints, exact resume, row logs, and a stop that saves first."""

import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from preflab.models.fast import fused_lora
from preflab.training.run_folder import MANIFEST, write_manifest
from utils.artifacts import RowFile, read_json
from utils.errors import UserError, is_main_process


class ResumableMixin:
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
        """Nothing: preflab.models.card writes the card once, at the end, with the results in it."""

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
            write_manifest(
                folder, step=self.state.global_step, num_tokens=self._total_train_tokens, seconds=self.seconds
            )
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
