"""TRL's DPOTrainer as the engine, on this project's token ids: shared prompts, further losses, scores of each pair."""

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import load_from_disk
from trl import DPOConfig, DPOTrainer

from preflab.data.preferences import WIN_KEYS
from preflab.models.fast import fused_head, shared_prompt
from preflab.models.logprobs import pair_batches, sum_logps
from preflab.training import losses
from preflab.training.dpo_report import displacement_text
from preflab.training.resumable import ResumableMixin
from preflab.training.run_config import RunConfig
from utils.artifacts import RowFile
from utils.errors import UserError, is_main_process

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
class DPORunConfig(RunConfig, DPOConfig):
    """TRL's DPOConfig with this project's keys; every other key is TRL's or transformers' own."""

    gamma_beta_ratio: float = field(
        default=0.5, metadata={"help": "simpo: the margin gamma that the loss asks for, as a multiple of beta."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "In pairs longer than max_length the prompt is cut to this (default: half of max_length)."},
    )
    shared_prompt: bool = field(
        default=True,
        metadata={"help": "Compute each pair's prompt once and no padding at all; the figures stay the same."},
    )
    reference_cache: bool = field(
        default=True,
        metadata={"help": "Compute the reference's log-probabilities once, and keep them below <eval_out>/.cache."},
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "With shared prompts: tokens up to which the pairs of one optimiser step are computed together"
            " (default: what the configured micro-batch could hold padded)."
        },
    )

    # A pair is at most two sequences.
    sequences_a_row = 2

    def token_budget(self, longest: int) -> int:
        """Tokens up to which pairs are computed together. `longest`: tokens of the longest sequence in the data."""
        return self.micro_batch_tokens or 2 * self.per_device_train_batch_size * (self.max_length or longest)

    def choose_micro_batch_tokens(
        self, model, trained: int, longest: Callable[[], int], reference_beside: bool
    ) -> None:
        """Where nobody set it, compute more tokens together on a GPU that has room for them; arguments as
        `choose_checkpointing`. All processes decide alike."""
        from preflab.training.memory import card_bytes, gpu_micro_batch_tokens, needed

        card = card_bytes()
        if self.micro_batch_tokens or not self.shared_prompt or card is None:
            return

        def estimate(tokens: int) -> float:
            args = copy(self)
            args.micro_batch_tokens = tokens
            return needed(model, args, trained, longest(), reference_beside).total(bool(self.gradient_checkpointing))

        found = gpu_micro_batch_tokens(estimate, self.token_budget(longest()), card)
        if self.world_size > 1:
            found = min(gather_object([found or 0])) or None
        self.micro_batch_tokens = found


# ---------------------------------------------------------------------------------------------------------- trainer


class ResumableDPOTrainer(ResumableMixin, DPOTrainer):
    """DPOTrainer on rows tokenised by `data.preferences`, with complete checkpoints, exact resume, per-pair scores."""

    def __init__(self, *args, row_log: RowFile, **kwargs):
        fused_head.install()
        self.step0_reward = None
        super().__init__(*args, **kwargs)
        if "sppo" in self.loss_types:
            self.data_collator = WinCollator(self.data_collator)
        self.padded_because = "--no_shared_prompt"
        if self.args.shared_prompt:
            self.padded_because = shared_prompt.unsupported_reason(self.model, self.aux_loss_enabled)
        if self.padded_because is None:
            for model in (self.model, self.ref_model):
                if model is not None:
                    shared_prompt.attach(self.accelerator.unwrap_model(model))
            self.data_collator = shared_prompt.PackingCollator(self.data_collator)
        self.set_up(row_log, self._displacement)

    def _displacement(self, row: dict) -> str | None:
        """What an evaluation's means say of likelihood displacement: a fall of a hundredth or more is told."""
        falls = [row[f"rewards/{side}"] / self.args.beta for side in ("chosen", "rejected")]
        told = falls[0] < -0.01 * abs(row["logps/chosen"]) and falls[1] < 0
        return displacement_text(*falls) if told else None

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest training sequence."""
        return longest_sequence(self.train_dataset)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # TRL would tokenise here, with no max_prompt_length; the rows come tokenised by preflab.data.preferences.
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
        return shared_prompt.rebatch(
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

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's loss and metrics, and the losses of preflab.training.losses on the same forward passes."""
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


def check_step0(reward: float, args: DPORunConfig) -> None:
    """Stop unless the largest |reward| or |margin| before the first step is 0 within the precision's tolerance."""
    tolerance = step0_tolerance(args)
    if not reward <= tolerance:
        raise UserError(
            f"the margins at step 0 must be 0 but reach {reward:.4g} (tolerance {tolerance}): the policy is not the"
            " reference; look for dropout left on, an adapter that does not start at zero, or a stale reference"
        )


def step0_tolerance(args: DPORunConfig) -> float:
    """Tolerance of the step-0 reward margin: 1e-3 in float32; beta x 0.5 nats in 16 bits, where the batch's shape
    moves a log-probability by up to about 0.1 nats a side."""
    if args.precision == "fp32":
        return STEP0_TOLERANCE["float32"]
    return max(STEP0_TOLERANCE["float32"], args.beta * STEP0_TOLERANCE["16-bit"])
