"""TRL's KTOTrainer as the engine, on this project's token ids: complete checkpoints, exact resume, scores."""

from copy import copy

import torch
from accelerate.utils import gather_object
from trl import KTOTrainer
from trl.trainer.utils import use_adapter

from preflab.models.batching import pad_right, token_batches
from preflab.models.fast import fused_head
from preflab.models.logprobs import apply_adapters_to_head, sequence_logps, without_adapter_shell
from preflab.training.resumable import ResumableMixin, in_eval_mode
from utils.artifacts import RowFile


class ThumbsTrainer(ResumableMixin, KTOTrainer):
    """KTOTrainer on rows that preflab.data.thumbs tokenised (prompt_ids, completion_ids, label)."""

    # Columns of the token ids of a row's sequence.
    SEQUENCES = (("prompt_ids", "completion_ids"),)
    padded_because = "KTO reads single answers"
    uncached_reference_because = "TRL's KTOTrainer computes it beside the policy"

    def __init__(self, *args, row_log: RowFile, **kwargs):
        fused_head.install()
        # A copy: KTOTrainer takes one loss by its name, and only rows in their order (`data.thumbs.shuffle`).
        config = copy(kwargs["args"])
        config.loss_type, config.train_sampling_strategy = config.loss_type[0], "sequential"
        super().__init__(*args, **{**kwargs, "args": config})
        if hasattr(self.model, "peft_config"):
            apply_adapters_to_head(without_adapter_shell(self.model))
        self.set_up(row_log)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # The rows come tokenised. As in TRL, each answer is scored under the prompt of the next row of its micro-batch
        # too; the log-ratios of these pairs estimate the KL divergence.
        if not self.calculate_KL:
            return dataset
        answers, size = dataset["completion_ids"], args.per_device_train_batch_size
        groups = [answers[start : start + size] for start in range(0, len(answers), size)]
        return dataset.add_column("KL_completion_ids", [ids for group in groups for ids in (group[-1:] + group[:-1])])

    def complete_reference(self) -> None:
        """Do nothing: the reference is computed with every batch."""

    @torch.no_grad()
    @in_eval_mode
    def score(self, dataset, indices=None) -> list[dict]:
        """Policy and reference log-probabilities of answers, sharded over processes.

        Args:
            indices: the rows of `dataset` to score (default: all).

        Returns:
            `{"row", "tuned", "base"}` in row order, on every process: summed log-probabilities of the answer, in nats.
        """
        indices = list(range(len(dataset)) if indices is None else indices)
        places = self.share(list(range(len(indices))))
        rows = [dataset[indices[place]] for place in places]
        # One process batches rows of similar length; several must run equally many forwards.
        world = self.accelerator.num_processes
        lengths = (
            [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows] if world == 1 else [1] * len(rows)
        )
        scores = {}
        for batch in token_batches(lengths, 10**9, self.args.per_device_eval_batch_size):
            device, pad = self.accelerator.device, self.processing_class.pad_token_id
            ids, mask = pad_right([rows[k]["prompt_ids"] + rows[k]["completion_ids"] for k in batch], pad, device)
            answer = [[0] * len(rows[k]["prompt_ids"]) + [1] * len(rows[k]["completion_ids"]) for k in batch]
            answer, _ = pad_right(answer, 0, device)
            with self.accelerator.autocast():
                tuned = sequence_logps(self.scored_model, ids, mask, answer).tolist()
                base = self._reference_logps(ids, mask, answer).tolist()
            for k, pair in zip(batch, zip(tuned, base, strict=True), strict=True):
                scores[places[k]] = pair
        if world > 1:
            # `share` may have repeated the last place; both results are the same.
            scores = dict(gather_object(list(scores.items())))
        return [
            {"row": indices[place], "tuned": scores[place][0], "base": scores[place][1]} for place in sorted(scores)
        ]

    def _reference_logps(self, ids, mask, answer):
        """Summed log-probabilities of answers under the reference; arguments as for `sequence_logps`."""
        if self.ref_model is not None:
            return sequence_logps(self.ref_model, ids, mask, answer)
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return sequence_logps(self.scored_model, ids, mask, answer)
