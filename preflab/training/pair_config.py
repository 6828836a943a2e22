"""Keys of every stage that trains on preference pairs: shared prompts and the tokens of a micro-batch."""

from copy import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

from accelerate.utils import gather_object

from preflab.models.fast.shared_prompt import unsupported_reason
from preflab.training.memory import card_bytes, gpu_micro_batch_tokens
from preflab.training.memory_parts import Batch, Weights, packed_rows
from preflab.training.run_config import RunConfig
from preflab.training.token_figures import pair_lengths, tokens_of_rows


@dataclass
class PairRunConfig(RunConfig):
    """RunConfig of a stage that trains on pairs. Put before TRL's config in the bases."""

    shared_prompt: bool = field(
        default=True,
        metadata={"help": "Compute each pair's prompt once and without padding; results are the same."},
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "With shared prompts: maximum tokens per forward within one optimizer step (default: what the"
            " configured micro-batch could hold padded)."
        },
    )

    # A pair is at most two sequences: prompt + chosen and prompt + rejected.
    sequences_a_row = 2
    # Whether the loss compares all answers of a row, not only two.
    uses_lists = False
    # Whether the loss reads single answers with a label.
    uses_thumbs = False

    def token_budget(self, longest: int) -> int:
        """Maximum tokens per forward. `longest`: tokens of the longest sequence in the data."""
        # Padded, each pair of a micro-batch takes two sequences of up to max_length tokens.
        sequences = self.sequences_a_row * self.per_device_train_batch_size
        return self.micro_batch_tokens or sequences * (self.max_length or longest)

    @property
    def merges_micro_batches(self) -> bool:
        """Whether the pairs of a step may be divided into micro-batches by their tokens."""
        return True

    def largest_row(self, dataset) -> tuple[int, ...]:
        """Tokens of the prompt and of each answer of the largest row of a tokenised split."""
        largest = int(tokens_of_rows(dataset, shared_prompt=True).argmax())
        others = dataset[largest]["others_lengths"] if "others_lengths" in dataset.column_names else []
        return (*(int(part[largest]) for part in pair_lengths(dataset)), *others)

    def largest_batch(self, row: tuple[int, ...], longest: int, model_config) -> tuple[Batch, bool]:
        """The largest batch of a forward, and whether a step has several of them.

        Args:
            row: from `largest_row`. longest: tokens of the longest sequence.
            model_config: transformers' config, which decides whether prompts can be shared.
        """
        rows, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if not self.shared_prompt or unsupported_reason(SimpleNamespace(config=model_config)):
            return Batch((), rows * len(row[1:]), longest, rows * sum(row[1:])), accumulation > 1
        if not self.merges_micro_batches:
            return packed_rows(row, rows * sum(row), rows), accumulation > 1
        batch = packed_rows(row, self.token_budget(longest), rows * accumulation)
        return batch, rows * accumulation * sum(row) > batch.tokens

    def fit_memory(self, weights: Weights, row: tuple[int, ...], longest: int, free: float, shards=None) -> str | None:
        """Choose micro-batch tokens, then gradient checkpointing; arguments and return as `RunConfig.fit_memory`."""
        self.choose_micro_batch_tokens(weights, row, longest, card_bytes(), shards)
        return super().fit_memory(weights, row, longest, free, shards)

    def choose_micro_batch_tokens(self, weights: Weights, row, longest: int, card: float | None, shards=None) -> None:
        """Set `micro_batch_tokens`, unless the user did, to more tokens on a GPU with enough memory.

        All processes choose the same value.

        Args:
            card: bytes of the GPU, None without one.
            weights, row, longest, shards: as for `RunConfig.memory`.
        """
        if self.micro_batch_tokens or not self.shared_prompt or card is None:
            return

        def estimate(tokens: int) -> float:
            # The budget is read from the config, so each candidate is set in a copy.
            args = copy(self)
            args.micro_batch_tokens = tokens
            checkpointing = bool(self.gradient_checkpointing)
            return args.memory(weights, row, longest, checkpointing=checkpointing, cuda=True, shards=shards).total

        chosen = gpu_micro_batch_tokens(estimate, self.token_budget(longest), card)
        if self.world_size > 1:
            # 0 stands for "keep the default", so that the smallest card decides.
            chosen = min(gather_object([chosen or 0])) or None
        self.micro_batch_tokens = chosen
