"""Configuration of a reward model's training: TRL's RewardConfig, this project's keys, and their checks."""

from dataclasses import dataclass, field, replace

from trl import RewardConfig

from preflab.training.decisions import REFUSED, REFUSED_FOR_REWARDS
from preflab.training.memory_parts import Batch
from preflab.training.pair_config import PairRunConfig
from preflab.training.run_config import check_positive
from utils.errors import UserError


@dataclass
class RewardRunConfig(PairRunConfig, RewardConfig):
    """TRL's RewardConfig with this project's keys; every other key is TRL's or transformers' own."""

    margin_per_point: float | None = field(
        default=None,
        metadata={"help": "Margin of the loss: this many logits per point of score_chosen - score_rejected."},
    )
    sample_prompts: int = field(default=0, metadata={"help": "Only 0: a reward model answers no prompt."})
    base_ranking: bool = field(
        default=True,
        metadata={"help": "Also rank the test pairs by the base language model's likelihood, for comparison."},
    )

    unsupported = REFUSED | REFUSED_FOR_REWARDS
    # PEFT then trains and saves the new output layer `score` beside the adapter.
    task_type = "SEQ_CLS"
    # For the run's default name and its title.
    objectives = ("reward",)

    def largest_batch(self, row, longest: int, model_config) -> tuple[Batch, bool]:
        """As `PairRunConfig.largest_batch`: a reward model computes no log-probabilities."""
        batch, several = super().largest_batch(row, longest, model_config)
        return replace(batch, scored=0), several

    def check(self) -> None:
        """Raise UserError for values that do not fit together."""
        check_positive((self, ("micro_batch_tokens", "margin_per_point", "center_rewards_coefficient")))
        if self.sample_prompts:
            raise UserError(f"--sample_prompts {self.sample_prompts}: a reward model answers no prompt; remove it")
        if self.start_adapter_use == "continue":
            raise UserError(
                "--start_adapter_use continue: an adapter of a language model has no reward layer; use merge, which"
                " trains a new adapter on top of it"
            )
