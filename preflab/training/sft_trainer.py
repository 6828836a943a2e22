"""TRL's SFTTrainer as the engine, on this project's token ids: complete checkpoints, exact resume, per-row scores."""

import torch
from accelerate.utils import gather_object
from trl import SFTTrainer

from preflab.models.batching import pad_right, token_batches
from preflab.models.fast import fused_head, shared_prompt
from preflab.models.logprobs import apply_adapters_to_head, token_logps, without_adapter_shell
from preflab.training.resumable import ResumableMixin, in_eval_mode
from utils.artifacts import RowFile
from utils.cache import ResultCache, cache_key


class ResumableSFTTrainer(ResumableMixin, SFTTrainer):
    """SFTTrainer on rows that preflab.data.conversations tokenised (input_ids, labels)."""

    # Columns of the token ids of a row's sequence.
    SEQUENCES = (("input_ids",),)

    # Negative log-likelihood of each test conversation under the base, in nats (`score_base`); None where unknown.
    base_nll: list[float] | None = None

    def __init__(self, *args, row_log: RowFile, **kwargs):
        fused_head.install()
        # The tokenizer already has its template; TRL would read the file again, or take its path for a model id.
        # It also refuses padding_free together with max_length, and rows are padding-free here without its collator.
        config = kwargs["args"]
        own = {"chat_template_path": config.chat_template_path, "padding_free": config.padding_free}
        config.chat_template_path, config.padding_free = None, False
        super().__init__(*args, **kwargs)
        if hasattr(self.model, "peft_config"):
            apply_adapters_to_head(without_adapter_shell(self.model))
        for key, value in own.items():
            setattr(config, key, value)
        self._compute_without_padding()
        self.set_up(row_log)

    def _compute_without_padding(self) -> None:
        """Compute each conversation of a batch by itself in one row, unless the run or its model forbids it.

        Sets `padded_because`: why not, for the preflight; None where nothing is padded.
        """
        self.padded_because = "--no_padding_free"
        if self.args.padding_free:
            self.padded_because = shared_prompt.unsupported_reason(self.model, self.aux_loss_enabled)
        if "flash" in without_adapter_shell(self.model).config._attn_implementation:
            self.padded_because = "--attn_implementation: flash attention has its own kernels for packed rows"
        if self.padded_because is None:
            shared_prompt.attach(self.accelerator.unwrap_model(self.model))
            self.data_collator = shared_prompt.PackingCollator(self.data_collator, shared_prompt.pack_sequences)

    @torch.no_grad()
    @in_eval_mode
    def score(self, dataset, indices=None) -> list[float]:
        """Negative log-likelihood of the labelled tokens of each row, in nats, sharded over processes.

        Args:
            dataset: rows with input_ids and labels (-100: not scored).
            indices: the rows to score (default: all).

        Returns:
            One sum per row, in the order of `indices`, on every process.
        """
        indices = list(range(len(dataset)) if indices is None else indices)
        # Places in `indices`, so that the processes' results can be put together in order.
        places = self.share(list(range(len(indices))))
        own_rows = [dataset[indices[place]] for place in places]
        device, world = self.accelerator.device, self.accelerator.num_processes
        nll = [0.0] * len(own_rows)
        # One process batches rows of similar length. Several must run equally many forwards (they may be collective),
        # so they batch by count, in order.
        lengths = [len(row["input_ids"]) for row in own_rows] if world == 1 else [1] * len(own_rows)
        # The token budget is larger than any batch, so only the number of rows limits it.
        for batch in token_batches(lengths, 10**9, self.args.per_device_eval_batch_size):
            # ids, mask and scored have shape (rows, length).
            ids, mask = pad_right([own_rows[k]["input_ids"] for k in batch], self.processing_class.pad_token_id, device)
            labels = [[int(label != -100) for label in own_rows[k]["labels"]] for k in batch]
            scored, _ = pad_right(labels, 0, device)
            # Nothing precedes the first token, so it has no prediction.
            scored[:, 0] = 0
            with self.accelerator.autocast():
                # Summed in float64: sums over thousands of tokens are compared between base and tuned model.
                sums = token_logps(self.scored_model, ids, mask, scored).double().sum(1)
            for k, total in zip(batch, sums.tolist(), strict=True):
                nll[k] = -total
        by_place = dict(zip(places, nll, strict=True))
        if world > 1:
            # `share` may have repeated the last place; both results are the same and one remains.
            by_place = dict(gather_object(list(by_place.items())))
        return [by_place[place] for place in range(len(indices))]

    def score_base(self, dataset, eval_out: str, identity: dict) -> None:
        """`score` of every row before the first step, as `base_nll`; cached on disk, so that a resumed run has it too.

        `base_nll` remains None for a sharded run that is resumed without that cache: its weights are trained already.

        Args:
            identity: what identifies the base: weights, precision, quantisation, start adapter.
        """
        cache = ResultCache(eval_out, "sft-base", identity)
        keys = [cache_key(row["input_ids"], row["labels"]) for row in dataset]
        # `finished` is equal on every process, so all of them score the same rows.
        missing = [i for i, key in enumerate(keys) if key not in cache.finished]
        # Only a sharded model is scored inside training, where a resumed run has its checkpoint's weights.
        if missing and self.state.global_step > 0:
            return
        for i, nll in zip(missing, self.score(dataset, missing) if missing else [], strict=True):
            # `score` returns all rows on every process, so one of them saves them.
            if self.accelerator.is_main_process:
                cache.add(keys[i], {"nll": nll})
        cached = cache.gather()
        self.base_nll = [cached[key]["nll"] for key in keys]
