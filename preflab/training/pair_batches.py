"""Pairs of one of TRL's trainers: shared prompts, and micro-batches divided by their tokens."""

from functools import cached_property

import torch

from preflab.models.checks import largest_and_longest
from preflab.models.fast import shared_prompt


class PairBatchesMixin:
    """Computes each pair's prompt once and rebatches an optimizer step's pairs. Put before TRL's trainer in the bases.

    The trainer's batches hold input_ids of shape (2 × pairs, length), the chosen sequences before the rejected ones.

    Attributes:
        padded_because: why pairs are computed padded, for the preflight; None where prompts are shared.
    """

    # Columns of the token ids of a row's sequences.
    SEQUENCES = (("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids"))

    def share_prompts(self, models: list, aux_loss: bool = False) -> None:
        """Compute pairs with shared prompts, unless --no_shared_prompt or the architecture forbids it.

        Args:
            models: those that compute the trainer's batches, as accelerate wrapped them.
            aux_loss: whether the model trains a mixture-of-experts router.
        """
        self.padded_because = "--no_shared_prompt"
        if self.args.shared_prompt:
            self.padded_because = shared_prompt.unsupported_reason(self.model, aux_loss)
        if self.padded_because is None:
            for model in models:
                # `attach` replaces a method of the transformers model itself, so accelerate's wrapper is taken off
                # first.
                shared_prompt.attach(self.accelerator.unwrap_model(model))
            # TRL passes every key that it does not know to the model, so the packed layout reaches the backbone.
            self.data_collator = shared_prompt.PackingCollator(self.data_collator)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest training sequence."""
        # Cached, because it reads every row and each optimizer step needs it where max_length is not set.
        return largest_and_longest(self.train_dataset, self.SEQUENCES)[1]

    @property
    def rebatches(self) -> bool:
        """Whether the pairs of a step are divided into micro-batches by their tokens."""
        return self.padded_because is None

    def rows_per_forward(self, mean_tokens: int) -> int:
        """Pairs that one forward of training computes, given the mean tokens of a pair."""
        configured = self.args.per_device_train_batch_size
        if not self.rebatches:
            return configured
        budget = self.args.token_budget(self.args.max_length or self.longest)
        return max(1, min(configured * self.args.gradient_accumulation_steps, budget // mean_tokens))

    def rows_of_batch(self, batch: dict) -> int:
        """Number of pairs in a collated batch."""
        return len(batch["input_ids"]) // 2

    def examples_of_batch(self, batch: dict) -> list[dict]:
        """The examples of a collated batch."""
        return shared_prompt.split(batch)

    def complete_batch(self, batch: dict) -> None:
        """Complete a collated batch of training before its pairs are rebatched."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step: the configured ones, or the same pairs rebatched by tokens."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.complete_batch(batch)
        if not self.rebatches:
            return batches, items
        # At the end of an epoch the last micro-batch may be short. Stock TRL then weights its pairs more, and these
        # batches stay as they are to give the same result.
        if len({self.rows_of_batch(batch) for batch in batches}) != 1:
            return batches, items
        budget = self.args.token_budget(self.args.max_length or self.longest)
        split = self.examples_of_batch
        return shared_prompt.rebatch(batches, budget, self.data_collator, self.accelerator, split), items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """transformers' training step; 0 for the empty batches that rebatching leaves."""
        if inputs["input_ids"].numel() == 0:
            # Empty batches come first in a step (`shared_prompt.rebatch`), so the backward that synchronises gradients
            # is never one of those skipped here.
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss; a rebatched micro-batch counts in proportion to its pairs."""
        # loss_weight is the number of pairs here over the number in a configured micro-batch.
        weight, pairs = inputs.pop("loss_weight", None), self.rows_of_batch(inputs)
        counts_before = {name: len(values) for name, values in self._metrics["train"].items()}
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            loss = (result[0] if return_outputs else result).detach()
            # It replaces transformers' mean over optimizer steps in the log.
            self._metrics["train"]["loss"].append(self.accelerator.gather(loss).mean().item())
        # TRL logs the plain mean over micro-batches. With each metric of this one repeated once per pair it is the mean
        # over pairs, also over several steps and a short last step of an epoch.
        for name, values in self._metrics["train"].items():
            values += values[counts_before.get(name, 0) :] * (pairs - 1)
        if weight is None:
            return result
        # transformers divides each loss by the number of micro-batches of the step, empty ones included. With these
        # weights the sum is the mean over the step's pairs, as with the configured micro-batches.
        return (result[0] * weight, *result[1:]) if return_outputs else result * weight
