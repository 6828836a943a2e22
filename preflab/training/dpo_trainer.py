"""TRL's DPOTrainer as the engine, on this project's token ids: shared prompts, further losses, per-pair scores."""

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import load_from_disk
from trl import DPOTrainer

from preflab.data.row_fields import WIN_KEYS
from preflab.models.fast import fused_head
from preflab.models.logprobs import apply_adapters_to_head, pair_batches, sum_logps, without_adapter_shell
from preflab.training import losses
from preflab.training.dpo_report import displacement_text
from preflab.training.log_keys import PAIR_MEAN, TIES_HALF
from preflab.training.loss_names import OWN_LOSSES
from preflab.training.pair_batches import PairBatchesMixin
from preflab.training.pair_means import pair_means
from preflab.training.resumable import ResumableMixin, in_eval_mode
from preflab.training.step0 import check_step0
from utils.artifacts import RowFile
from utils.errors import is_main_process
from utils.stats import pairwise_correct

# Columns of SPPO's win probabilities: of the chosen and of the rejected answer.
WINS = tuple(WIN_KEYS)
# TRL's columns of a precomputed reference.
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
# TRL's metrics that are differences to the reference.
RATIOS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
# Keys of a scored pair, in the order in which `score` reads the forwards.
SCORE_KEYS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


class ResumableDPOTrainer(ResumableMixin, PairBatchesMixin, DPOTrainer):
    """DPOTrainer on rows tokenised by `data.preferences`, with complete checkpoints, exact resume, per-pair scores."""

    # The cached reference (preflab.training.reference_cache); None where it is computed in every step.
    reference = None
    # Columns on which a row's reference depends, and per value of it the column that holds it.
    KEYED = ("prompt_ids", "chosen_ids", "rejected_ids")
    REFERENCE_COLUMNS = dict(zip(("chosen", "rejected"), REFERENCE, strict=True))
    # In place of the reference of a row that the run does not reach.
    UNKNOWN = torch.nan

    def __init__(self, *args, row_log: RowFile, **kwargs):
        # Before TRL's __init__, which already runs forwards under --precompute_ref_log_probs.
        fused_head.install()
        super().__init__(*args, **kwargs)
        if hasattr(self.model, "peft_config"):
            apply_adapters_to_head(without_adapter_shell(self.model))
        # TRL's collator keeps only the columns that it knows.
        if "sppo" in self.loss_types:
            self.data_collator = WinCollator(self.data_collator)
        # Policy and reference compute the same batches, each through its own forward.
        models = [model for model in (self.model, self.ref_model) if model is not None]
        self.share_prompts(models, self.aux_loss_enabled)
        # Scores of the pairs of an evaluation that has not been logged yet.
        self._eval_scores: list[dict] = []
        self.set_up(row_log, self._displacement)

    def _displacement(self, row: dict) -> str | None:
        """A warning where the means of an evaluation show likelihood displacement.

        Both log-probabilities fell, that of the chosen answers by more than 1%.
        """

        def mean(key: str) -> float:
            return row.get(key + PAIR_MEAN, row[key])

        # rewards/* are beta x (log pi - log pi_ref), so that dividing by beta gives the change in nats.
        changes = [mean(f"rewards/{side}") / self.args.beta for side in ("chosen", "rejected")]
        # logps/* are negative, so the 1% is of the absolute value.
        fell = changes[0] < -0.01 * abs(mean("logps/chosen")) and changes[1] < 0
        return displacement_text(*changes) if fell else None

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # TRL would tokenise here, without max_prompt_length; the rows come tokenised by preflab.data.preferences.
        return dataset

    def _set_signature_columns_if_needed(self):
        # Columns that are not in this list are removed before the collator sees them.
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in WINS if name not in self._signature_columns]

    def compute_ref_log_probs(self, model, inputs):
        """TRL's reference forward, without the win probabilities, which only the loss uses."""
        # As the layout above, the win probabilities would be passed to the model's forward.
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in WINS})

    # ------------------------------------------------------------------------------------------------ micro-batches

    def complete_batch(self, batch: dict) -> None:
        """Compute the reference of a pair that the plan of training did not foresee."""
        cached = cached_reference(batch)
        if cached and torch.cat(cached).isnan().any():
            batch.update(zip(REFERENCE, self.reference_of_batch(batch), strict=True))

    def evaluate(self, *args, **kwargs):
        """TRL's evaluation; the reference of the test pairs is computed before the first one."""
        self.complete_reference()
        return super().evaluate(*args, **kwargs)

    def complete_reference(self) -> None:
        """Give the test pairs their reference log-probabilities, where those of the train pairs are cached."""
        if self.reference is not None and self.eval_dataset is not None:
            seconds = self.reference.add_missing("eval_dataset")
            if self.started is not None and self.ended is None:
                # Not part of the time of training, whose evaluation needs it.
                self.started += seconds

    @property
    def uncached_reference_because(self) -> str | None:
        """Why the reference is computed in every step; None where it can be computed once, before training."""
        if not self.args.reference_cache:
            return "--no_reference_cache"
        if self.args.precompute_ref_log_probs:
            return "TRL precomputes it (--precompute_ref_log_probs)"
        if self.is_sharded:
            return "a sharded model exists only inside training"
        if self.ld_alpha is not None:
            return "ld_alpha discounts its log-probabilities"
        return None

    @property
    def rebatches(self) -> bool:
        """Whether the pairs of a step are divided into micro-batches by their tokens."""
        return super().rebatches and self.args.merges_micro_batches

    def unknown_reference(self, row: dict) -> dict:
        """The columns of the reference as during training, with values that do not matter."""
        return dict.fromkeys(REFERENCE, 0.0)

    def time_forward(self, rows: list[int]) -> float:
        """Seconds of the reference's forward on rows of the train split."""
        started = time.monotonic()
        # The values are read on the host, so a GPU's kernels are finished.
        self.reference_logps(self.train_dataset, rows)
        return time.monotonic() - started

    def time_step(self, rows: list[int]) -> float:
        """Seconds of a training step; it contains the reference's forward where that is not cached."""
        if self.uncached_reference_because is not None:
            return super().time_step(rows)
        examples = [self.train_dataset[i] for i in rows]
        self.precompute_ref_logps = True
        try:
            return self._time_step([{**example, **self.unknown_reference(example)} for example in examples])
        finally:
            self.precompute_ref_logps = False

    # -------------------------------------------------------------------------------------------------------- losses

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's losses and metrics, plus the losses of preflab.training.losses from the same forward passes."""
        outputs = []
        without_reference = self.model.training and self.args.reference_free and not cached_reference(inputs)
        if without_reference:
            # TRL takes these in place of a forward of the reference; no loss reads them, and what it logs is removed.
            pairs, device = len(inputs["input_ids"]) // 2, inputs["input_ids"].device
            inputs = {**inputs, **dict.fromkeys(REFERENCE, torch.full((pairs,), torch.nan, device=device))}

        # TRL runs the reference through self.model or self.ref_model, so this sees the policy's forward only: its
        # output after wrappers such as DDP, with the autograd graph that the further losses need.
        def policy(**kwargs):
            outputs.append(model(**kwargs))
            return outputs[-1]

        with self._captured_logps() as captured:
            result = self._compute_all_losses(policy, inputs, return_outputs, captured, outputs)
        if without_reference:
            for name in RATIOS:
                del self._metrics["train"][name]
            return result
        # With ld_alpha the rewards that TRL logs are not differences of these log-probabilities.
        if self.model.training and self.ld_alpha is None:
            self._log_accuracy(sum_logps(outputs[0]).detach(), reference_of(captured, inputs))
        return result

    def _log_accuracy(self, logps, reference) -> None:
        """Log the share of a micro-batch's pairs whose chosen answer has the higher reward, ties half.

        Args:
            logps: summed response log-probabilities of the policy, chosen then rejected. Shape (2 x pairs,).
            reference: [chosen, rejected] of the reference, each of shape (pairs,).
        """
        # Each of shape (pairs,), in float32 as TRL's rewards.
        self._log_accuracy_of(*(side - ref for side, ref in zip(logps.chunk(2), reference, strict=True)))

    def _log_accuracy_of(self, chosen, rejected) -> None:
        """Log the share of rewards `chosen` above those of `rejected`, ties half, both of shape (pairs,)."""
        right = torch.from_numpy(pairwise_correct(chosen.cpu(), rejected.cpu())).float().to(chosen.device)
        self._metrics["train"][TIES_HALF].append(self.accelerator.gather(right).mean().item())

    def _compute_all_losses(self, policy, inputs, return_outputs, captured: list, outputs: list):
        """The weighted sum of TRL's and of this project's losses.

        Args:
            policy: the policy's forward; appends its output to `outputs`.
            captured: from `_captured_logps`.
        """
        # Removed from the inputs, since TRL passes keys that it does not know to the model.
        wins = [inputs.pop(name, None) for name in WINS]
        weighted = list(zip(self.loss_types, self.loss_weights, strict=True))
        own = [(loss, weight) for loss, weight in weighted if loss in OWN_LOSSES]
        if not own:
            return self._compute_trl_loss(policy, inputs, return_outputs, captured)
        # TRL gets its own losses only; with none left it still runs both forwards and logs its metrics.
        trl_losses = [pair for pair in weighted if pair not in own]
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, REFERENCE[0] in inputs
        self.loss_types, self.loss_weights = [loss for loss, _ in trl_losses], [weight for _, weight in trl_losses]
        try:
            result = self._compute_trl_loss(policy, inputs, return_outputs, captured)
        finally:
            # Restored after an error too: the next micro-batch reads the complete lists again.
            self.precompute_ref_logps = precomputed
            self.loss_types, self.loss_weights = [loss for loss, _ in weighted], [weight for _, weight in weighted]
        # Both of shape (2 x pairs,): chosen, then rejected. `logps` carries the policy's gradient.
        logps = sum_logps(outputs[0])
        reference = reference_of(captured, inputs)
        own_loss = sum(weight * self._own_loss(loss, logps, reference, inputs, wins).mean() for loss, weight in own)
        return (result[0] + own_loss, *result[1:]) if return_outputs else result + own_loss

    def _own_loss(self, loss: str, logps, reference, inputs, wins):
        """One of OWN_LOSSES, per pair.

        Args:
            logps: summed response log-probabilities of the policy, chosen then rejected. Shape (2 x pairs,).
            reference: [chosen, rejected] of the reference, each of shape (pairs,).
            wins: [win_chosen, win_rejected], each of shape (pairs,), or None where the rows have none.
        """
        if loss == "sppo":
            # log pi - log pi_ref, chosen and rejected, each of shape (pairs,).
            ratios = (side - ref for side, ref in zip(logps.chunk(2), reference, strict=True))
            return losses.sppo(*ratios, *wins, self.beta)
        # Response tokens, shape (2 x pairs,). The clamp keeps the mean of an empty response at 0.
        lengths = inputs["completion_mask"].sum(1).clamp(min=1)
        means, sums, smoothing = (logps / lengths).chunk(2), logps.chunk(2), self.label_smoothing
        if loss == "simpo":
            self._log_scores(loss, *means)
            return losses.simpo(*means, self.beta, self.args.gamma_beta_ratio, smoothing)
        if loss == "cpo":
            self._log_scores(loss, *sums, nll=-means[0])
            return losses.cpo(*sums, means[0], self.beta, self.args.cpo_alpha, smoothing)
        if loss == "orpo":
            self._log_scores(loss, *means, nll=-means[0])
            return losses.orpo(*means, self.beta)
        raise NotImplementedError(f"the loss {loss} is in OWN_LOSSES, but has no branch here")

    def _log_scores(self, loss: str, chosen, rejected, nll=None):
        """Log what a reference-free loss compares, times beta, as <loss>/*: rewards/* are log-ratios in every run.

        Args:
            chosen, rejected: log-probabilities, summed or per token as the loss takes them. Shape (pairs,).
            nll: mean negative log-likelihood per token of each chosen answer, where the loss has it. Shape (pairs,).
        """
        # TRL averages these lists and empties them at the next logged step.
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = (self.accelerator.gather(self.beta * side.detach()) for side in (chosen, rejected))
        metrics[f"{loss}/chosen"].append(chosen.mean().item())
        metrics[f"{loss}/rejected"].append(rejected.mean().item())
        metrics[f"{loss}/accuracies"].append((chosen > rejected).float().mean().item())
        if nll is not None:
            metrics[f"{loss}/nll"].append(self.accelerator.gather(nll.detach()).mean().item())

    def _compute_trl_loss(self, model, inputs, return_outputs, captured: list):
        """TRL's loss; a sharded model's first micro-batch is also checked for rewards of 0."""
        result = super()._compute_loss(model, inputs, return_outputs)
        if self.is_sharded and not self.args.reference_free:
            # Both terms have shape (2 x pairs,), so that chosen and rejected answers are covered.
            reference = torch.cat(tuple(reference_of(captured, inputs)))
            self.check_sharded_step0(self.args.beta * (captured[0].detach() - reference))
        return result

    def check_sharded_step0(self, rewards) -> None:
        """Check that the rewards of a sharded model's first micro-batch are 0: it exists only inside training."""
        # global_step is 0 during all micro-batches of the first step; step0_reward is set by the first of them.
        first = self.model.training and self.state.global_step == 0 and self.step0_reward is None
        if not (self.is_sharded and first):
            return
        # The largest over all processes, so that either all of them raise or none does.
        self.step0_reward = self.accelerator.gather(rewards.abs().max()).max().item()
        check_step0(self.step0_reward, self.args)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if self.accelerator.num_processes > 1:
            # TRL lets rank 0 write a cache file that the other ranks open. For rows in memory each process has another
            # cache file, so all of them read one copy of the rows from disk.
            shared = Path(self.args.output_dir) / ".tokenized" / name
            if is_main_process():
                # A copy from an interrupted call may hold other rows.
                shutil.rmtree(shared, ignore_errors=True)
                dataset.save_to_disk(str(shared))
            self.accelerator.wait_for_everyone()
            dataset = load_from_disk(str(shared))
        return super()._precompute_ref_logps(dataset, name, batch_size)

    # -------------------------------------------------------------------------------------------------------- scores

    def prediction_step(self, model, inputs, *args, **kwargs):
        """TRL's step of an evaluation; also collects the scores of the pairs, for their means."""
        with self._captured_logps() as captured:
            result = super().prediction_step(model, inputs, *args, **kwargs)
        # Rows that fill up the last batch of several processes are removed.
        scores = self.accelerator.gather_for_metrics(self.scores_of_batch(captured, inputs))
        self._eval_scores += [self.score_row(values) for values in scores.tolist()]
        return result

    def scores_of_batch(self, captured: list, batch: dict):
        """Log-probabilities of each pair of a batch in the order of SCORE_KEYS, float32, shape (pairs, 4).

        Args:
            captured: from `_captured_logps`, of this batch.
        """
        sides = (*captured[0].chunk(2), *(side.to(captured[0].device) for side in reference_of(captured, batch)))
        return torch.stack([side.float() for side in sides], 1)

    def score_row(self, values: list[float]) -> dict:
        """A pair's row of `scores_of_batch` with its keys."""
        return dict(zip(SCORE_KEYS, values, strict=True))

    def log(self, logs, start_time=None):
        """TRL's log; an evaluation's row also gets the means over pairs, under keys that end in `_pair_mean`."""
        if self._eval_scores and not self.model.training:
            # With ld_alpha the rewards that TRL logs are not differences of these log-probabilities.
            logs |= pair_means(self._eval_scores, self.beta) if self.ld_alpha is None else {}
            self._eval_scores = []
        super().log(logs, start_time)

    @torch.no_grad()
    @in_eval_mode
    def score(self, dataset, indices=None, log: bool = False) -> list[dict]:
        """Policy and reference log-probabilities of pairs, from TRL's own loss computation, sharded over processes.

        Args:
            indices: the rows of `dataset` to score (default: all).
            log: also log TRL's metrics of this pass, as an evaluation does.

        Returns:
            `{"row", "chosen", "rejected", "ref_chosen", "ref_rejected"}` in row order, on every process: summed
            response log-probabilities in nats.
        """
        own_indices = self.share(list(range(len(dataset)) if indices is None else indices))
        rows, batch_losses = [], []
        eval_batch = self.args.per_device_eval_batch_size
        with self._captured_logps() as captured:
            for batch_indices, batch in pair_batches(dataset, self.data_collator, eval_batch, own_indices):
                # From here `captured` holds this batch only: the policy's forward, then the reference's unless it is
                # cached.
                captured.clear()
                batch = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    # A batch's mean loss is repeated once per pair, so that the mean over the list is a mean over
                    # pairs.
                    batch_losses += [self.compute_loss(self.scored_model, batch).item()] * len(batch_indices)
                scores = self.scores_of_batch(captured, batch).tolist()
                rows += [{"row": i, **self.score_row(v)} for i, v in zip(batch_indices, scores, strict=True)]
        if self.accelerator.num_processes > 1:
            rows, batch_losses = gather_object(rows), gather_object(batch_losses)
        # `share` may have repeated the last row.
        unique = {row["row"]: row for row in rows}
        rows = [unique[i] for i in sorted(unique)]
        if log:
            epoch = {} if self.state.epoch is None else {"epoch": self.state.epoch}
            # eval_longest_first tells readers of the log that these means come from batches sorted by length, unlike
            # those of the trainer's own evaluations (preflab.evaluation.reward_slices recomputes both).
            self._eval_scores = rows
            self.log({"eval_loss": sum(batch_losses) / len(batch_losses), "eval_longest_first": 1.0, **epoch})
        # Metrics of a pass that was not logged must not enter the means of the next evaluation.
        self._metrics["eval"].clear()
        return rows

    @torch.no_grad()
    def reference_logps(self, dataset, rows: list[int]) -> list[dict]:
        """The keys of REFERENCE_COLUMNS for each of `rows`: summed reference log-probabilities, in nats."""
        return self.reference_values(self._prepare_inputs(self.data_collator([dataset[i] for i in rows])))

    def reference_values(self, batch: dict) -> list[dict]:
        """`reference_logps` of a collated batch, by TRL's own reference forward."""
        sides = zip(*(side.tolist() for side in self.reference_of_batch(batch)), strict=True)
        return [dict(zip(self.REFERENCE_COLUMNS, pair, strict=True)) for pair in sides]

    @torch.no_grad()
    def reference_of_batch(self, batch: dict) -> list:
        """[chosen, rejected] summed reference log-probabilities of a collated batch, float32, shape (pairs,) each."""
        # Without a reference model TRL's forward switches the policy's adapter off (or to its frozen copy).
        model = self.model if self.ref_model is None else self.ref_model
        was_training = model.training
        # Without dropout, the forward draws no random number.
        model.eval()
        sides = [side.float() for side in self.compute_ref_log_probs(model, batch)]
        model.train(was_training)
        return sides

    @contextmanager
    def _captured_logps(self):
        """A list that gets the summed log-probabilities of each forward: the policy's, then the reference's.

        Each entry has shape (2 x pairs,): chosen, then rejected.
        """
        captured = []
        policy = self.accelerator.unwrap_model(self.model)
        # PEFT's wrapper calls its base model, whose hook also sees the forward with the adapter switched off.
        heads = [without_adapter_shell(policy)]
        if self.ref_model is not None:
            heads.append(self.accelerator.unwrap_model(self.ref_model))
        hooks = [m.register_forward_hook(lambda _m, _a, out: captured.append(sum_logps(out))) for m in heads]
        try:
            yield captured
        finally:
            for hook in hooks:
                hook.remove()


def cached_reference(batch: dict) -> list:
    """[chosen, rejected] cached reference log-probabilities of a batch, each of shape (pairs,); empty without a cache.

    The keys are those of TRL's precomputed reference.
    """
    return [batch[name] for name in REFERENCE if name in batch]


def reference_of(captured: list, batch: dict):
    """[chosen, rejected] reference log-probabilities of a batch: cached ones, else of the second captured forward."""
    return cached_reference(batch) or captured[1].chunk(2)


class WinCollator:
    """TRL's collator, with the pairs' win probabilities, each of shape (pairs,), where the rows have them."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: list[dict]) -> dict:
        wins = {name: torch.tensor([e[name] for e in examples]) for name in WINS if name in examples[0]}
        return {**self.collator(examples), **wins}
