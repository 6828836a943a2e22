"""TRL's RewardTrainer as the engine, on this project's token ids: shared prompts, exact resume, per-pair rewards."""

import torch
from accelerate.utils import gather_object
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from preflab.data.tokenised_rows import ends_of
from preflab.models.logprobs import pair_batches
from preflab.models.reward_head import padding_that_ends_nothing
from preflab.training.log_keys import PAIR_MEAN
from preflab.training.pair_batches import PairBatchesMixin
from preflab.training.resumable import ResumableMixin, in_eval_mode
from utils.artifacts import RowFile
from utils.stats import pairwise_correct

# Columns of a row of `score`, in the order of a pair's sequences in a batch.
SIDES = ("chosen", "rejected")
# TRL's metrics whose mean over micro-batches would depend on how the pairs are divided into them.
EXTREMES = {"min_reward": min, "max_reward": max}


class ResumableRewardTrainer(ResumableMixin, PairBatchesMixin, RewardTrainer):
    """RewardTrainer on rows tokenised by `data.preferences`, with complete checkpoints and exact resume.

    A pair is one sequence [prompt | chosen | rejected]; its two rewards are read at the last tokens of its answers.
    """

    def __init__(self, *args, row_log: RowFile, **kwargs):
        config, tokenizer = kwargs["args"], kwargs["processing_class"]
        # The tokenizer already has its template; TRL would read the file again, or take its path for a model id.
        template, config.chat_template_path = config.chat_template_path, None
        splits = [split for split in (kwargs["train_dataset"], kwargs.get("eval_dataset")) if split is not None]
        last_ids = {ids[-1] for split in splits for side in SIDES for ids in ends_of(split, f"{side}_ids", last=1)}
        pad = padding_that_ends_nothing(tokenizer, last_ids)
        super().__init__(*args, data_collator=RewardCollator(pad), **kwargs)
        config.chat_template_path = template
        # Where pairs are padded, transformers reads a reward at the last token that is not this one.
        self.model.config.get_text_config().pad_token_id = self.model.config.pad_token_id = pad
        self.share_prompts([self.model])
        # Rewards of the current batch, shape (2 x pairs,), and of the pairs of an evaluation not logged yet.
        self._rewards: torch.Tensor | None = None
        self._eval_rewards: list[list[float]] = []
        self.set_up(row_log)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # The rows come tokenised, and without pairs longer than max_length.
        return dataset

    def _set_signature_columns_if_needed(self):
        # Columns that are not in this list are removed before the collator sees them.
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "margin"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's Bradley-Terry loss; the rewards of packed pairs are read at the two last tokens only."""

        # TRL passes every key of the batch to the model.
        def without_margin(**batch):
            batch.pop("margin", None)
            return model(**batch)

        inputs.pop("completion_mask", None)
        if "packed_ids" in inputs:
            inputs = at_last_tokens(inputs)
        loss, outputs = super().compute_loss(without_margin, inputs, True, num_items_in_batch)
        self._rewards = outputs.logits.detach().squeeze(-1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, extreme in EXTREMES.items():
            metrics[name] = [extreme(metrics[name])]
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        """transformers' step of an evaluation; also collects the rewards of the pairs, for their means."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        # Shape (pairs, 2). Rows that fill up the last batch of several processes are removed.
        rewards = self.accelerator.gather_for_metrics(torch.stack(self._rewards.float().chunk(2), 1))
        self._eval_rewards += rewards.tolist()
        return result

    def log(self, logs, start_time=None):
        """TRL's log; an evaluation's row also gets the means over pairs, under keys that end in `_pair_mean`."""
        if self._eval_rewards and not self.model.training:
            logs |= {f"eval_{key}{PAIR_MEAN}": value for key, value in pair_means(self._eval_rewards).items()}
            self._eval_rewards = []
        super().log(logs, start_time)

    @torch.no_grad()
    @in_eval_mode
    def score(self, dataset, indices=None) -> list[dict]:
        """Rewards of pairs, from TRL's own loss computation, sharded over processes.

        Args:
            indices: the rows of `dataset` to score (default: all).

        Returns:
            `{"row", "chosen", "rejected"}` in row order, on every process.
        """
        own_indices, rows = self.share(list(range(len(dataset)) if indices is None else indices)), []
        for batch_indices, batch in pair_batches(
            dataset, self.data_collator, self.args.per_device_eval_batch_size, own_indices
        ):
            with self.accelerator.autocast():
                self.compute_loss(self.scored_model, self._prepare_inputs(batch))
            values = (side.float().tolist() for side in self._rewards.chunk(2))
            rows += [dict(zip(("row", *SIDES), v, strict=True)) for v in zip(batch_indices, *values, strict=True)]
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        # Metrics of a pass that was not logged must not enter those of the next evaluation.
        self._metrics["eval"].clear()
        # `share` may have repeated the last row.
        unique = {row["row"]: row for row in rows}
        return [unique[i] for i in sorted(unique)]


def at_last_tokens(batch: dict) -> dict:
    """A packed batch from which the backbone returns only the hidden states of each sequence's last token.

    Args:
        batch: with input_ids, attention_mask and unpack of shape (2 × pairs, length).

    Returns:
        The batch with input_ids and unpack of shape (2 × pairs, 1); transformers reads the rewards there.
    """
    last = batch["attention_mask"].sum(1) - 1
    rows = torch.arange(len(last), device=last.device)
    return {**batch, **{name: batch[name][rows, last][:, None] for name in ("input_ids", "unpack")}}


def pair_means(rewards: list[list[float]]) -> dict:
    """TRL's metrics of an evaluation as means over its pairs, a tie as half. `rewards`: [chosen, rejected] of each."""
    pairs = torch.tensor(rewards, dtype=torch.float64)
    return {
        "accuracy": float(pairwise_correct(*pairs.T).mean()),
        "margin": float((pairs[:, 0] - pairs[:, 1]).mean()),
        "mean_reward": float(pairs.mean()),
    }


class RewardCollator:
    """TRL's collator of reward pairs for rows that hold each prompt once.

    Its batches have input_ids, attention_mask and completion_mask of shape (2 × pairs, length), right-padded, the
    chosen sequences first; and margin, shape (pairs,), where the rows have one.
    """

    def __init__(self, pad: int):
        self.collator = DataCollatorForPreference(pad_token_id=pad)

    def __call__(self, examples: list[dict]) -> dict:
        rows = [
            {**{f"{side}_ids": [*e["prompt_ids"], *e[f"{side}_ids"]] for side in SIDES},
             **({"margin": e["margin"]} if "margin" in e else {})}
            for e in examples
        ]  # fmt: skip
        batch = self.collator(rows)
        # The same prompts precede both answers of a pair, so the mask is 0 on their tokens.
        prompts = torch.tensor([len(e["prompt_ids"]) for e in examples] * 2)[:, None]
        answer = torch.arange(batch["input_ids"].shape[1])[None] >= prompts
        return {**batch, "completion_mask": batch["attention_mask"] * answer}
