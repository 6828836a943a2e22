"""Keys of every stage that trains on preference pairs: shared prompts and the tokens of a micro-batch."""

from copy import copy
from dataclasses import dataclass, field

from accelerate.utils import gather_object

from preflab.training.memory import card_bytes, gpu_micro_batch_tokens, needed
from preflab.training.run_config import RunConfig


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

    def token_budget(self, longest: int) -> int:
        """Maximum tokens per forward. `longest`: tokens of the longest sequence in the data."""
        # Padded, each pair of a micro-batch takes two sequences of up to max_length tokens.
        sequences = self.sequences_a_row * self.per_device_train_batch_size
        return self.micro_batch_tokens or sequences * (self.max_length or longest)

    def fit_memory(self, model, trained: int, longest: int, reference_beside: bool) -> str | None:
        """Choose micro-batch tokens, then gradient checkpointing; arguments and return as `RunConfig.fit_memory`."""
        self.choose_micro_batch_tokens(model, trained, longest, reference_beside)
        return super().fit_memory(model, trained, longest, reference_beside)

    def choose_micro_batch_tokens(self, model, trained: int, longest: int, reference_beside: bool) -> None:
        """Set `micro_batch_tokens`, unless the user did, to more tokens on a GPU with enough memory.

        All processes choose the same value. Arguments as `fit_memory`.
        """
        card = card_bytes()
        if self.micro_batch_tokens or not self.shared_prompt or card is None:
            return

        def estimate(tokens: int) -> float:
            # `needed` reads the budget from the config, so each candidate is set in a copy.
            args = copy(self)
            args.micro_batch_tokens = tokens
            return needed(model, args, trained, longest, reference_beside).total(bool(self.gradient_checkpointing))

        chosen = gpu_micro_batch_tokens(estimate, self.token_budget(longest), card)
        if self.world_size > 1:
            # 0 stands for "keep the default", so that the smallest card decides.
            chosen = min(gather_object([chosen or 0])) or None
        self.micro_batch_tokens = chosen
