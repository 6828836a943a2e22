"""Trainer mixin and callbacks: complete checkpoints, exact resume, one log row per step, and a graceful stop."""

import functools
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints

from preflab.evaluation.runs import MANIFEST, checkpoints
from preflab.models.fast import compiled_layers, fused_lora, fused_norm
from preflab.training.log_keys import TIES_HALF
from preflab.training.run_folder import write_manifest
from preflab.training.throughput import synchronize
from utils.artifacts import RowFile, read_json
from utils.errors import STOP_SIGNALS, UserError, is_main_process
from utils.machine import keep_freed_memory
from utils.progress import progress


def in_eval_mode(method):
    """Run a trainer's method with its model in eval mode; afterwards the model has its earlier mode."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        was_training = self.model.training
        self.model.eval()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.model.train(was_training)

    return run


class ResumableMixin:
    """Complete checkpoints, exact resume, timing and logs for one of TRL's trainers. Put before it in the bases."""

    # Wall time of earlier calls, and the start and the end of this one.
    seconds_before, started, ended = 0.0, None, None
    # Metrics of steps that the call before saved, but had not logged yet (--logging_steps above 1); None without any.
    not_yet_logged: dict | None = None
    # The largest |reward| of the first micro-batch, where the trainer has to measure it during training.
    step0_reward: float | None = None

    def set_up(self, row_log: RowFile, warn: Callable[[dict], str | None] | None = None) -> None:
        """Complete TRL's __init__: fused LoRA, trained parameters in float32, and this project's callbacks.

        Args:
            row_log: gets one row per logged step.
            warn: returns a warning for the row of an evaluation, or None.
        """
        self.row_log = row_log
        if self.args.use_cpu:
            keep_freed_memory()
        if self.args.compile_layers:
            self._compile_layers()
        elif not self.is_sharded:
            # Sharding gathers a layer's LoRA matrices when they are called as modules; the fused kernel reads them
            # directly.
            fused_lora.attach(self.model)
            fused_norm.attach(self.model)
        for param in self.model.parameters():
            # TRL casts QLoRA adapters to bf16. Its 8 significant bits round an Adam update of 2e-6 on a weight of 1e-2
            # to zero, so the adapters are kept in float32.
            if param.requires_grad and param.dtype in (torch.bfloat16, torch.float16) and self.is_quantized:
                param.data = param.data.float()
        # transformers' callbacks print every log row; TrainingProgress and RowLog replace them.
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.add_callback(TrainingProgress())
        self.add_callback(RowLog(row_log, warn, lambda: self.seconds))
        self.stopper = GracefulStop(self.accelerator)
        self.add_callback(self.stopper)

    def _compile_layers(self) -> None:
        """Compile the decoder layers of the policy, and of the reference model where there is one."""
        models = [m for m in (self.model, getattr(self, "ref_model", None)) if m is not None]
        # Only rows without padding are compiled.
        reasons = [self.padded_because, *(compiled_layers.attach(self.accelerator.unwrap_model(m)) for m in models)]
        if any(reasons):
            raise UserError(f"--compile_layers: rows are padded here ({next(filter(None, reasons))}); remove it")

    @property
    def is_quantized(self) -> bool:
        """Whether the base's weights are quantised by bitsandbytes."""
        return getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False)

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over processes once training starts (FSDP, DeepSpeed ZeRO-3)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def scored_model(self):
        """The model for forwards outside training: DeepSpeed's engine where there is one, which gathers parameters."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.model

    def share(self, indices: list[int]) -> list[int]:
        """The indices that this process scores: number rank, rank + world, rank + 2 world, ...

        Every process gets equally many, because the forwards may be collective (FSDP): where the numbers do not
        divide, the last index is repeated. Whoever gathers the results removes the duplicates.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = -(-len(indices) // world)
        return [indices[min(k, len(indices) - 1)] for k in range(rank, count * world, world)]

    def rows_per_forward(self, mean_tokens: int) -> int:
        """Rows that one forward of training computes, given the mean tokens of a row."""
        return self.args.per_device_train_batch_size

    def time_forward(self, rows: list[int]) -> float:
        """Seconds of a forward without gradients on rows of the train split."""
        started = time.monotonic()
        self.score(self.train_dataset, rows)
        # `score` shares the rows out over the processes.
        return (time.monotonic() - started) * len(rows) / len(self.share(rows))

    def time_step(self, rows: list[int]) -> float:
        """Seconds of a training step (forward, backward) on rows of the train split."""
        return self._time_step([self.train_dataset[i] for i in rows])

    def _time_step(self, examples: list[dict]) -> float:
        """Seconds of a forward and backward. Gradients, random state and TRL's counts are as before afterwards."""
        was_training, tokens = self.model.training, self._total_train_tokens
        self.model.train()
        if self.args.gradient_checkpointing:
            # transformers switches it on when training starts; without it these rows might not fit into memory.
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        device = self.accelerator.device
        # The CPU's random state is always restored.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            inputs = self._prepare_inputs(self.data_collator(examples))
            started = time.monotonic()
            with self.accelerator.autocast():
                loss = self.compute_loss(self.model, inputs)
            loss.backward()
            synchronize(device)
            seconds = time.monotonic() - started
        self.model.zero_grad(set_to_none=True)
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        self._metrics["train"].clear()
        self._total_train_tokens = tokens
        self.model.train(was_training)
        return seconds

    def create_model_card(self, *args, **kwargs):
        """Do nothing: preflab.models.card writes the card once, at the end, with the results in it."""

    def init_hf_repo(self, *args, **kwargs):
        """Do nothing: preflab.training.hub_uploads uploads, after the checkpoint is complete and the card written."""

    _push_from_checkpoint = push_to_hub = init_hf_repo

    def train(self, *args, **kwargs):
        """transformers' train, timed."""
        self.started = time.monotonic()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of training so far, evaluations and saves included, in seconds, summed over all calls."""
        return self.seconds_before + ((self.ended or time.monotonic()) - self.started if self.started else 0.0)

    def _save_checkpoint(self, model, trial):
        # The manifest is written last and renamed into place, so a folder without it is incomplete. Older checkpoints
        # are deleted only after that (transformers would do it before): a kill at any point leaves a complete one.
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # Left by a call that was interrupted: its files would otherwise be listed in the new manifest.
        if is_main_process() and folder.exists():
            shutil.rmtree(folder)
        # No rank writes before the old folder is deleted.
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        # Every rank writes its random state; the manifest lists all of them.
        self.accelerator.wait_for_everyone()
        # The mean over the processes, as transformers logs it.
        loss = self.accelerator.gather(self._tr_loss).mean().item()
        not_yet_logged = {"step": self._globalstep_last_logged, "loss": loss, "metrics": dict(self._metrics["train"])}
        if is_main_process():
            write_manifest(
                folder,
                step=self.state.global_step,
                num_tokens=self._total_train_tokens,
                seconds=self.seconds,
                not_yet_logged=not_yet_logged,
                sharding=self.args.sharding,
                processes=self.accelerator.num_processes,
            )
            _make_newest(folder)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
        # No rank continues, or exits after a stop, while rank 0 still writes.
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **kwargs):
        if self.not_yet_logged:
            # Here, since transformers sets its sum of losses to 0 when training starts.
            self._tr_loss += self.not_yet_logged["loss"]
            self._globalstep_last_logged = self.not_yet_logged["step"]
            for name, values in self.not_yet_logged["metrics"].items():
                # JSON has no NaN: the manifest holds null.
                self._metrics["train"][name] = [math.nan if value is None else value for value in values]
            self.not_yet_logged = None
        # transformers takes one step too many if the checkpoint that it resumes from is the last.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def continue_from(self, checkpoint: Path | None) -> None:
        """Restore what transformers does not: TRL's token count, metrics not logged yet, and the wall time so far.

        Args:
            checkpoint: None for a run without one, of which only the wall time counts.
        """
        state = {} if checkpoint is None else read_json(checkpoint / MANIFEST)
        # A killed call took longer than to its last checkpoint; the log has its time up to the last logged step.
        logged = [row["seconds"] for row in self.row_log.read() if "seconds" in row]
        self.seconds_before = max([state.get("seconds", 0.0), *logged])
        if checkpoint is not None:
            self._total_train_tokens = state["num_tokens"]
            # Checkpoints of earlier versions do not have it.
            self.not_yet_logged = state.get("not_yet_logged")


def _make_newest(checkpoint: Path) -> None:
    """Give a checkpoint a later time than all others of its run.

    transformers deletes the oldest by their times: after the clock was set back, that would be the new one.
    """
    latest = max((p.stat().st_mtime for p in checkpoints(checkpoint.parent) if p != checkpoint), default=0.0)
    if checkpoint.stat().st_mtime <= latest:
        os.utime(checkpoint, (latest + 2, latest + 2))


class BeforeFirstStep(TrainerCallback):
    """Calls `compute` when training begins: a sharded model exists from here. Its time is not counted as training."""

    def __init__(self, trainer, compute: Callable[[], None]):
        self.trainer, self.compute = trainer, compute

    def on_train_begin(self, args, state, control, **kwargs):
        before = time.monotonic()
        self.compute()
        self.trainer.started += time.monotonic() - before


class RowLog(TrainerCallback):
    """Writes every metric of every logged step to train_log.jsonl, each step once, also after a resume."""

    def __init__(
        self,
        rows: RowFile,
        warn: Callable[[dict], str | None] | None = None,
        seconds: Callable[[], float] = lambda: 0.0,
    ):
        self.rows, self.warn, self.seconds = rows, warn, seconds

    def on_train_begin(self, args, state, control, **kwargs):
        # A killed run may have logged steps after its last checkpoint; they are trained and logged again.
        # transformers has already restored global_step from the checkpoint (0 without one).
        self.rows.keep(lambda row: row["step"] <= state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # transformers' closing summary ("train_runtime") belongs to no step.
        if "train_runtime" in logs or not state.is_world_process_zero:
            return
        split = "eval" if any(k.startswith("eval_") for k in logs) else "train"
        loss = logs.get("loss", logs.get("eval_loss"))
        # RunConfig sets logging_nan_inf_filter to false, so that NaN and infinite losses arrive here unchanged.
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the {split} loss at step {state.global_step} is {loss}: lower --learning_rate, or train in float32"
                " (--bf16 false --fp16 false); with --save_steps earlier checkpoints are kept"
            )
        # eval_ is removed so that train and eval rows have the same keys.
        row = {"split": split, "step": state.global_step, **{k.removeprefix("eval_"): v for k, v in logs.items()}}
        # The wall time of training up to this step, over all calls: what a killed call took is known from here.
        row["seconds"] = round(self.seconds(), 2)
        self.rows.append(row)
        warning = self.warn(row) if self.warn and split == "eval" else None
        if warning:
            print(f"\nwarning: step {state.global_step}: {warning}", file=sys.stderr)


class TrainingProgress(TrainerCallback):
    """Progress with the latest loss and accuracy: a bar on a terminal, plain lines in a log (utils.progress)."""

    # Name in the display -> key of the log. Ties count half: TRL's own accuracy starts at 0 where all rewards are 0.
    SHOWN = {
        "loss": "loss", "accuracy": TIES_HALF, "margin": "rewards/margins",
        "token accuracy": "mean_token_accuracy",
    }  # fmt: skip

    def __init__(self):
        # The evaluation's bar is inside the training's, so the two are opened and closed separately.
        self.bar, self.evaluation, self.step = None, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        # After a resume the steps before it are finished, and took no time of this call.
        self.step = state.global_step
        self.bar = progress(state.max_steps, "training", "step", initial=self.step)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.step)
        self.step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix({name: f"{logs[key]:.3f}" for name, key in self.SHOWN.items() if key in logs})

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if has_length(eval_dataloader):
            if self.evaluation is None:
                self.evaluation = progress(len(eval_dataloader), "evaluating", "batch", leave=False)
            self.evaluation.update(1)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        self.bar = None


class GracefulStop(TrainerCallback):
    """Ctrl-C, SIGTERM or SIGUSR1: finish the optimizer step, save a checkpoint, stop. A second Ctrl-C stops at once.

    A launcher forwards the Ctrl-C that the terminal already sent to its processes, so a second signal counts only
    after some seconds. Used as a context manager around training.

    Attributes:
        received: the first signal that this process got, 0 without one.
        stopped_by: the signal that ended training, the same on every process; 0 if training ended by itself.
    """

    SAME_KEYSTROKE_SECONDS = 3.0

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.received, self.received_at, self.stopped_by = 0, 0.0, 0

    def __enter__(self):
        # A shell starts background commands with SIGINT ignored, and `kill -INT` should stop those too.
        handled = [signal.SIGINT, *(s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN)]
        self.previous = {s: signal.signal(s, self._request) for s in handled}
        return self

    def __exit__(self, *exc):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        if self.received:
            # A repeated SIGTERM, or the launcher's copy of the same Ctrl-C, changes nothing: the step is finished
            # first.
            if number == signal.SIGINT and time.monotonic() - self.received_at > self.SAME_KEYSTROKE_SECONDS:
                raise KeyboardInterrupt
            return
        self.received, self.received_at = number, time.monotonic()
        if is_main_process():
            name = "" if number == signal.SIGINT else f"{signal.Signals(number).name}: "
            print(f"\n{name}stopping after this step, with a checkpoint (Ctrl-C again: stop at once)", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        number = self.received
        if self.accelerator.num_processes > 1:
            # The signal reaches the processes at different moments, or only one of them; all must leave at the same
            # step, and with the same exit code.
            number = int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
        if number:
            self.stopped_by, control.should_save, control.should_training_stop = number, True, True
