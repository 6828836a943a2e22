"""TRL's DPOTrainer as the engine, with this project's token ids, checkpoints that survive kill -9, and logs."""

import math
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import load_from_disk
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import DPOConfig, DPOTrainer

from utils import fused_head, fused_lora, losses, shared_prompt
from utils.artifacts import RowFile, read_json
from utils.errors import UserError, is_main_process
from utils.logps import pair_batches, sum_logps
from utils.preferences import WIN_KEYS
from utils.rewards import displacement_text
from utils.runs import MANIFEST, seal

TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
LOSS_TYPES = (*TRL_LOSSES, *losses.OWN_LOSSES)
WINS = tuple(WIN_KEYS)
# Their value depends on how a step is cut into micro-batches, which are kept whole for them.
CUT_MATTERS = {"aot", "aot_unpaired", "bco_pair", "sft"}
SCORE_KEYS = ("row", "chosen", "rejected", "ref_chosen", "ref_rejected")
STEP0_TOLERANCE = {"float32": 1e-3, "16-bit": 0.5}


@dataclass
class PreferenceConfig(DPOConfig):
    """TRL's DPOConfig with this project's keys; every other key is TRL's or transformers' own."""

    output_dir: str = field(default="checkpoints", metadata={"help": "Weights go to <output_dir>/<run_name>/."})
    eval_out: str = field(default="eval_out", metadata={"help": "Results go to <eval_out>/<run_name>/."})
    gamma_beta_ratio: float = field(
        default=0.5, metadata={"help": "simpo: the margin gamma that the loss asks for, as a multiple of beta."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "In pairs longer than max_length the prompt is cut to this (default: half of max_length)."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs per optimiser step over all processes; gradient accumulation is derived from it."},
    )
    resume: str = field(default="auto", metadata={"help": "auto, never, or the path of a checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run of this name wrote."})
    preflight_only: bool = field(default=False, metadata={"help": "Stop after the preflight."})
    shared_prompt: bool = field(
        default=True,
        metadata={"help": "Compute each pair's prompt once and no padding at all; the figures stay the same."},
    )
    reference_cache: bool = field(
        default=True,
        metadata={"help": "Compute the reference's log-probabilities once, and keep them below <eval_out>/.cache."},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Compute activations twice instead of keeping them (default: where memory asks for it)."},
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "With shared prompts: tokens up to which the pairs of one optimiser step are computed together"
            " (default: what the configured micro-batch could hold padded)."
        },
    )
    sample_prompts: int = field(default=4, metadata={"help": "Test prompts answered by base and tuned at the end."})
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

    def token_budget(self, longest: int) -> int:
        """Tokens up to which pairs are computed together. `longest`: tokens of the longest sequence in the data."""
        return self.micro_batch_tokens or 2 * self.per_device_train_batch_size * (self.max_length or longest)

    def decide_checkpointing(self, model, trained: int, dataset, reference_beside: bool) -> str | None:
        """Where neither YAML nor command line decided, checkpointing only if memory asks for it: why, or None.

        All processes decide alike: where one of them is short of memory, all compute activations twice.
        """
        from utils.memory import asks_for_checkpointing, free_bytes, needed

        if not self.checkpointing_is_open:
            return None
        memory = needed(model, self, trained, longest_sequence(dataset), reference_beside)
        why = asks_for_checkpointing(memory, free_bytes(model))
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


# ---------------------------------------------------------------------------------------------------------- trainer


class PreferenceTrainer(DPOTrainer):
    """DPOTrainer on rows that utils.preferences tokenised. Adds whole checkpoints, exact resume and per-pair scores."""

    def __init__(self, *args, row_log: RowFile, **kwargs):
        fused_head.install()
        self.row_log, self.step0_reward = row_log, None
        self.seconds_before, self.started, self.ended = 0.0, None, None
        super().__init__(*args, **kwargs)
        if "sppo" in self.loss_types:
            self.data_collator = WinCollator(self.data_collator)
        self.padded_because = "--no_shared_prompt"
        if self.args.shared_prompt:
            self.padded_because = shared_prompt.why_not(self.model, self.aux_loss_enabled)
        if self.padded_because is None:
            for model in (self.model, self.ref_model):
                if model is not None:
                    shared_prompt.attach(self.accelerator.unwrap_model(model))
            self.data_collator = shared_prompt.PackingCollator(self.data_collator)
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
        self.add_callback(RowLog(row_log))
        self.stopper = GracefulStop(self.accelerator)
        self.add_callback(self.stopper)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest training sequence."""
        return longest_sequence(self.train_dataset)

    @property
    def is_quantized(self) -> bool:
        """Whether the base's weights are quantised by bitsandbytes."""
        return getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False)

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over processes once training starts (FSDP, DeepSpeed ZeRO-3)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # TRL would tokenise here, with no max_prompt_length; the rows come tokenised by utils.preferences.
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in WINS if name not in self._signature_columns]

    def compute_ref_log_probs(self, model, inputs):
        """TRL's, without what only the loss wants to know of a pair."""
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in WINS})

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimiser step's micro-batches: the configured ones, or the same pairs cut anew by tokens."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.padded_because is not None or CUT_MATTERS & set(self.loss_types):
            return batches, items
        # At the end of an epoch the last micro-batch may be short, and stock then weighs its pairs more: left alone.
        if len({len(batch["input_ids"]) for batch in batches}) != 1:
            return batches, items
        return shared_prompt.recut(
            batches, self.args.token_budget(self.args.max_length or self.longest), self.data_collator, self.accelerator
        ), items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """transformers' step; nothing for the places that recutting left empty."""
        if inputs["input_ids"].numel() == 0:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, weighed by the pairs of a micro-batch where they are not those of the configured one."""
        weight, pairs = inputs.pop("loss_weight", None), len(inputs["input_ids"]) // 2
        before = {name: len(values) for name, values in self._metrics["train"].items()}
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if weight is None:
            return found
        # TRL logs the plain mean over micro-batches: each counts as often as it has pairs.
        for name, values in self._metrics["train"].items():
            values += values[before.get(name, 0) :] * (pairs - 1)
        return (found[0] * weight, *found[1:]) if return_outputs else found * weight

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if self.accelerator.num_processes > 1:
            # TRL lets rank 0 write a cache that the others open; rows in memory have another cache on each process.
            shared = Path(self.args.output_dir) / ".tokenized" / name
            if is_main_process():
                shutil.rmtree(shared, ignore_errors=True)
                dataset.save_to_disk(str(shared))
            self.accelerator.wait_for_everyone()
            dataset = load_from_disk(str(shared))
        return super()._precompute_ref_logps(dataset, name, batch_size)

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

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's loss and metrics, and the losses of utils.losses on the same forward passes."""
        wins = [inputs.pop(name, None) for name in WINS]
        asked = list(zip(self.loss_types, self.loss_weights, strict=True))
        own = [(loss, weight) for loss, weight in asked if loss in losses.OWN_LOSSES]
        if not own:
            return self._loss_of_trl(model, inputs, return_outputs)
        theirs = [pair for pair in asked if pair not in own]
        self.loss_types, self.loss_weights = [loss for loss, _ in theirs], [weight for _, weight in theirs]
        outputs = []

        def policy(**kwargs):
            outputs.append(model(**kwargs))
            return outputs[-1]

        try:
            with self._captured_logps() as captured:
                found = self._loss_of_trl(policy, inputs, return_outputs)
        finally:
            self.loss_types, self.loss_weights = [loss for loss, _ in asked], [weight for _, weight in asked]
        logps = sum_logps(outputs[0])
        reference = cached_reference(inputs) or captured[1].chunk(2)
        more = sum(weight * self._own_loss(loss, logps, reference, inputs, wins).mean() for loss, weight in own)
        return (found[0] + more, *found[1:]) if return_outputs else found + more

    def _own_loss(self, loss: str, logps, reference, inputs, wins):
        if loss == "simpo":
            lengths = inputs["completion_mask"].sum(1).clamp(min=1)
            chosen_mean, rejected_mean = (logps / lengths).chunk(2)
            self._log_simpo(self.beta * chosen_mean.detach(), self.beta * rejected_mean.detach())
            return losses.simpo(
                chosen_mean, rejected_mean, self.beta, self.args.gamma_beta_ratio, self.label_smoothing
            )  # fmt: skip
        ratios = (side - ref for side, ref in zip(logps.chunk(2), reference, strict=True))
        return losses.sppo(*ratios, *wins, self.beta)

    def _log_simpo(self, chosen, rejected):
        """SimPO's rewards (beta x mean log-probability), under names of their own: rewards/* are log-ratios always."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = self.accelerator.gather(chosen), self.accelerator.gather(rejected)
        metrics["simpo/chosen"].append(chosen.mean().item())
        metrics["simpo/rejected"].append(rejected.mean().item())
        metrics["simpo/accuracies"].append((chosen > rejected).float().mean().item())

    def _loss_of_trl(self, model, inputs, return_outputs):
        if not (self.is_sharded and self.model.training and self.state.global_step == 0 and self.step0_reward is None):
            return super()._compute_loss(model, inputs, return_outputs)
        # A sharded model exists only inside training, so its step-0 rewards are read off the first micro-batch.
        with self._captured_logps() as captured:
            result = super()._compute_loss(model, inputs, return_outputs)
        cached = cached_reference(inputs)
        reference = torch.cat(cached) if cached else captured[1]
        rewards = self.args.beta * (captured[0].detach() - reference).abs().max()
        self.step0_reward = self.accelerator.gather(rewards).max().item()
        check_step0(self.step0_reward, self.args)
        return result

    @torch.no_grad()
    def score(self, dataset, indices=None, log: bool = False) -> list[dict]:
        """Policy and reference log-probabilities of pairs, from TRL's own loss computation, sharded over processes.

        Args:
            indices: the rows of `dataset` to score (default: all).
            log: also log TRL's metrics of this pass, as an evaluation does.

        Returns:
            `{"row", "chosen", "rejected", "ref_chosen", "ref_rejected"}` in row order, on every process: summed
            response log-probabilities in nats.
        """
        indices = list(range(len(dataset)) if indices is None else indices)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Every process must run equally many forwards (they may be collective): the last rows are repeated.
        share = -(-len(indices) // world)
        mine = [indices[min(k, len(indices) - 1)] for k in range(rank, share * world, world)]
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        was_training = self.model.training
        self.model.eval()
        rows, losses = [], []
        with self._captured_logps() as captured:
            for take, batch in pair_batches(dataset, self.data_collator, self.args.per_device_eval_batch_size, mine):
                captured.clear()
                batch = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    losses += [self.compute_loss(model, batch).item()] * len(take)
                cached = cached_reference(batch)
                reference = torch.cat(cached) if cached else captured[1]
                sides = (*captured[0].chunk(2), *reference.float().chunk(2))
                values = zip(take, *(side.tolist() for side in sides), strict=True)
                rows += [dict(zip(SCORE_KEYS, v, strict=True)) for v in values]
        if world > 1:
            rows, losses = gather_object(rows), gather_object(losses)
        if log:
            epoch = {} if self.state.epoch is None else {"epoch": self.state.epoch}
            # For whoever recomputes these batch means from the rows: the batches were not cut in the data's order.
            self.log({"eval_loss": sum(losses) / len(losses), "eval_longest_first": 1.0, **epoch})
        self._metrics["eval"].clear()
        self.model.train(was_training)
        unique = {row["row"]: row for row in rows}
        return [unique[i] for i in sorted(unique)]

    @contextmanager
    def _captured_logps(self):
        """A list that gets the summed log-probabilities of each forward: the policy's, then the reference's."""
        captured = []
        policy = self.accelerator.unwrap_model(self.model)
        heads = [policy.get_base_model() if hasattr(policy, "get_base_model") else policy]
        if self.ref_model is not None:
            heads.append(self.accelerator.unwrap_model(self.ref_model))
        hooks = [m.register_forward_hook(lambda _m, _a, out: captured.append(sum_logps(out))) for m in heads]
        try:
            yield captured
        finally:
            for hook in hooks:
                hook.remove()


def longest_sequence(dataset) -> int:
    """Tokens of the longest prompt with its longer answer."""
    columns = (dataset[f"{part}_ids"] for part in ("prompt", "chosen", "rejected"))
    return max(len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True))


def cached_reference(batch: dict) -> list:
    """[chosen, rejected] reference log-probabilities of a batch, each (pairs,); empty where none were kept."""
    return [batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps") if name in batch]


class WinCollator:
    """TRL's collator, with the pairs' win probabilities (shape (pairs,)) where the rows have them."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: list[dict]) -> dict:
        wins = {name: torch.tensor([e[name] for e in examples]) for name in WINS if name in examples[0]}
        return {**self.collator(examples), **wins}


def check_step0(reward: float, args: PreferenceConfig) -> None:
    """Stop unless the largest |reward| or |margin| before the first step is 0 within the precision's tolerance."""
    tolerance = step0_tolerance(args)
    if not reward <= tolerance:
        raise UserError(
            f"the margins at step 0 must be 0 but reach {reward:.4g} (tolerance {tolerance}): the policy is not the"
            " reference; look for dropout left on, an adapter that does not start at zero, or a stale reference"
        )


def step0_tolerance(args: PreferenceConfig) -> float:
    """Tolerance of the step-0 reward margin: 1e-3 in float32; beta x 0.5 nats in 16 bits, where the batch's shape
    moves a log-probability by up to about 0.1 nats a side."""
    if args.precision == "fp32":
        return STEP0_TOLERANCE["float32"]
    return max(STEP0_TOLERANCE["float32"], args.beta * STEP0_TOLERANCE["16-bit"])


# -------------------------------------------------------------------------------------------------------- callbacks


class RowLog(TrainerCallback):
    """Every metric of every logged step in train_log.jsonl, each step once, also after a resume."""

    def __init__(self, rows: RowFile):
        self.rows = rows

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
        if split == "eval":
            falls = [row[f"rewards/{side}"] / args.beta for side in ("chosen", "rejected")]
            # Means without intervals: a fall of less than a hundredth of the log-probability is not told.
            if falls[0] < -0.01 * abs(row["logps/chosen"]) and falls[1] < 0:
                print(f"\nwarning: step {state.global_step}: {displacement_text(*falls)}", file=sys.stderr)


class QuietProgress(ProgressCallback):
    """A progress bar that carries the latest loss, accuracy and margin instead of printing each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            names = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
            self.training_bar.set_postfix({k: f"{logs[v]:.3f}" for k, v in names.items() if v in logs})


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
