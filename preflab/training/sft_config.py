"""Configuration of a supervised fine-tuning run: TRL's SFTConfig, this project's keys, and their checks."""

from dataclasses import dataclass, field

from trl import SFTConfig

from preflab.data.tokenised_rows import lengths
from preflab.training.memory_parts import Batch
from preflab.training.run_config import RunConfig
from utils.errors import UserError
from utils.suggestions import choose_from

LOSS_TYPES = ("nll", "dft")
# TRL's packing strategies whose rows keep the boundaries of their conversations.
PACKING_STRATEGIES = ("bfd", "bfd_split")


@dataclass
class SFTRunConfig(RunConfig, SFTConfig):
    """TRL's SFTConfig with this project's keys; every other key is TRL's or transformers' own."""

    # TRL's default, None, packs the test split where the train split is packed.
    eval_packing: bool | None = field(
        default=False,
        metadata={"help": "Pack the test split in the trainer's evaluations; held-out metrics never pack."},
    )
    padding_free: bool = field(
        default=True,
        metadata={"help": "Compute the conversations of a micro-batch without padding; results are the same."},
    )

    # A conversation is one sequence.
    sequences_a_row = 1
    # For the run's default name and its title.
    objectives = ("sft",)

    def token_budget(self, longest: int) -> int:
        """Tokens per forward. `longest`: tokens of the longest sequence in the data."""
        # A packed row is filled up to max_length; a padded one is as long as the longest conversation at most.
        width = self.max_length if self.packing else min(longest, self.max_length or longest)
        return self.per_device_train_batch_size * width

    def largest_row(self, dataset) -> tuple[int, int]:
        """Tokens of the longest conversation of a tokenised split, and how many of them are trained on at most."""
        longest = int(lengths(dataset, "input_ids").max())
        return longest, longest

    def largest_batch(self, row: tuple[int, int], longest: int, model_config) -> tuple[Batch, bool]:
        """The largest batch of a forward, and whether a step has several of them.

        Args:
            row: from `largest_row`. longest: tokens of the longest conversation.
        """
        rows, length = self.per_device_train_batch_size, self.token_budget(longest) // self.per_device_train_batch_size
        scored = length if self.packing else row[1]
        return Batch((), rows, length, rows * scored), self.gradient_accumulation_steps > 1

    def check(self) -> None:
        """Raise UserError for values that do not fit together."""
        if self.loss_type not in LOSS_TYPES:
            raise UserError(f"--loss_type {self.loss_type}: unknown; {choose_from(self.loss_type, LOSS_TYPES)}")
        if self.packing and self.max_length is None:
            raise UserError("--packing needs --max_length, the number of tokens per packed row")
        if self.packing and self.packing_strategy not in PACKING_STRATEGIES:
            raise UserError(
                f"--packing_strategy {self.packing_strategy}: conversations would attend to each other; choose from"
                f" {', '.join(PACKING_STRATEGIES)}"
            )
