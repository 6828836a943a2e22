"""TRL's SFTTrainer as the engine, on this project's token ids: whole checkpoints, exact resume, figures of each row."""

from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from trl import SFTConfig, SFTTrainer

from preflab.models.batching import pad_right, token_batches
from preflab.models.fast import fused_head
from preflab.models.logprobs import token_logps
from preflab.training.resumable import ResumableMixin
from preflab.training.run_config import RunConfig
from utils.artifacts import RowFile
from utils.cache import ResultCache, cache_key


@dataclass
class SFTRunConfig(RunConfig, SFTConfig):
    """TRL's SFTConfig with this project's keys; every other key is TRL's or transformers' own."""

    eval_packing: bool | None = field(
        default=False, metadata={"help": "Pack the test split too. Its own figures are of single rows either way."}
    )

    sequences_a_row = 1

    def token_budget(self, longest: int) -> int:
        """Tokens that are computed together. `longest`: tokens of the longest sequence in the data."""
        width = self.max_length if self.packing else min(longest, self.max_length or longest)
        return self.per_device_train_batch_size * width


class ResumableSFTTrainer(ResumableMixin, SFTTrainer):
    """SFTTrainer on rows that preflab.data.conversations tokenised (input_ids, labels)."""

    def __init__(self, *args, row_log: RowFile, **kwargs):
        fused_head.install()
        # The tokenizer has its template by now; TRL would read the file once more, or take it for a model.
        config = kwargs["args"]
        template, config.chat_template_path = config.chat_template_path, None
        super().__init__(*args, **kwargs)
        config.chat_template_path = template
        self.set_up(row_log)

    @torch.no_grad()
    def score(self, dataset, indices=None) -> list[float]:
        """Negative log-likelihood of the labelled tokens of each row, in nats, sharded over processes.

        Args:
            dataset: rows with input_ids and labels.
            indices: the rows to score (default: all).

        Returns:
            A sum a row, in order, on every process.
        """
        indices = list(range(len(dataset)) if indices is None else indices)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Every process must run equally many forwards (they may be collective): the last rows are repeated.
        share = -(-len(indices) // world)
        mine = [dataset[indices[min(k, len(indices) - 1)]] for k in range(rank, share * world, world)]
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        was_training, device = self.model.training, self.accelerator.device
        self.model.eval()
        most = self.args.per_device_eval_batch_size
        found = [0.0] * share
        # A batch of like length where the processes' batches need not match, else rows as they come.
        lengths = [len(row["input_ids"]) for row in mine] if world == 1 else [1] * share
        for batch in token_batches(lengths, 10**9, most):
            ids, mask = pad_right([mine[k]["input_ids"] for k in batch], self.processing_class.pad_token_id, device)
            labels = [[int(label != -100) for label in mine[k]["labels"]] for k in batch]
            scored, _ = pad_right(labels, 0, device)
            # The first token is predicted from nothing.
            scored[:, 0] = 0
            with self.accelerator.autocast():
                sums = token_logps(model, ids, mask, scored).double().sum(1)
            for k, total in zip(batch, sums.tolist(), strict=True):
                found[k] = -total
        self.model.train(was_training)
        if world == 1:
            return found
        placed = dict(gather_object([(rank + k * world, nll) for k, nll in enumerate(found)]))
        return [placed[k] for k in range(len(indices))]

    def base_figures(self, dataset, eval_out: str, identity: dict) -> list[float]:
        """`score` of every row before the first step, kept on disk, so that a resumed run has them too."""
        cache = ResultCache(eval_out, "sft-base", identity)
        keys = [cache_key(row["input_ids"], row["labels"]) for row in dataset]
        todo = [i for i, key in enumerate(keys) if key not in cache.finished]
        for i, nll in zip(todo, self.score(dataset, todo) if todo else [], strict=True):
            if self.accelerator.is_main_process:
                cache.add(keys[i], {"nll": nll})
        found = cache.gather()
        return [found[key]["nll"] for key in keys]


def longest_row(dataset) -> int:
    """Tokens of the longest row."""
    return max(map(len, dataset["input_ids"]))
