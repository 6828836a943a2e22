"""Configuration of a preference-training run: TRL's DPOConfig, this project's keys, and their checks."""

from dataclasses import dataclass, field

from trl import DPOConfig

from preflab.training.decisions import REFUSED, REFUSED_FOR_PAIRS
from preflab.training.loss_names import LIST_LOSSES, OWN_LOSSES, THUMB_LOSSES, check_names, reference_free
from preflab.training.memory_parts import Batch
from preflab.training.pair_config import PairRunConfig
from preflab.training.run_config import check_positive
from preflab.training.token_figures import tokens_of_rows
from utils.errors import UserError
from utils.suggestions import choose_from

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Losses whose value depends on which pairs share a micro-batch (sorted or running statistics, means over tokens);
# their micro-batches are never rebatched.
BATCH_DEPENDENT_LOSSES = {"aot", "aot_unpaired", "bco_pair", "sft"}
# Keys of TRL's own losses, each with the value that has no effect.
KEYS_OF_TRL_LOSSES = (("ld_alpha", None), ("use_weighting", False), ("f_divergence_type", "reverse_kl"))

# Own losses without label smoothing.
UNSMOOTHED = {
    "sppo": ", whose win probabilities express label noise",
    **dict.fromkeys(("orpo", *LIST_LOSSES, *THUMB_LOSSES), ""),
}


@dataclass
class DPORunConfig(PairRunConfig, DPOConfig):
    """TRL's DPOConfig with this project's keys; every other key is TRL's or transformers' own."""

    gamma_beta_ratio: float = field(
        default=0.5, metadata={"help": "simpo: the target margin gamma as a multiple of beta."}
    )
    cpo_alpha: float = field(
        default=1.0, metadata={"help": "cpo: weight of the chosen answer's negative log-likelihood."}
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of answers with a thumb up."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of answers with a thumb down."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "In pairs longer than max_length the prompt is truncated to this (default: half of max_length)."
        },
    )
    reference_cache: bool = field(
        default=True,
        metadata={"help": "Compute the reference's log-probabilities once and cache them in <eval_out>/.cache."},
    )
    unsupported = REFUSED | REFUSED_FOR_PAIRS

    @property
    def objectives(self) -> list[str]:
        """Names of the losses, for the run's default name and its title."""
        return self.loss_type

    @property
    def reference_free(self) -> bool:
        """Whether the training steps need no reference; evaluations compare with it in any case."""
        return reference_free(self.loss_type)

    @property
    def uses_lists(self) -> bool:
        """Whether the loss compares all answers of a row."""
        return bool(set(self.loss_type) & set(LIST_LOSSES))

    @property
    def uses_thumbs(self) -> bool:
        """Whether the loss reads single answers with a label."""
        return bool(set(self.loss_type) & set(THUMB_LOSSES))

    def adapt_data(self, data_args) -> None:
        """Read rows with several answers, where the loss is made for them."""
        data_args.lists = data_args.lists or self.uses_lists

    def largest_row(self, dataset) -> tuple[int, ...]:
        """As for pairs; of answers with thumbs the tokens of prompt and answer."""
        if not self.uses_thumbs:
            return super().largest_row(dataset)
        row = dataset[int(tokens_of_rows(dataset, shared_prompt=False).argmax())]
        return len(row["prompt_ids"]), len(row["completion_ids"])

    def largest_batch(self, row: tuple[int, ...], longest: int, model_config) -> tuple[Batch, bool]:
        """As for pairs; answers with thumbs are computed padded."""
        if not self.uses_thumbs:
            return super().largest_batch(row, longest, model_config)
        rows = self.per_device_train_batch_size
        return Batch((), rows, longest, rows * row[1]), self.gradient_accumulation_steps > 1

    def keeps_reference_model(self, use_peft: bool) -> bool:
        """Whether a second copy of the weights is loaded as the reference.

        With LoRA the reference is the policy with its adapter switched off.
        """
        return not (use_peft or self.precompute_ref_log_probs)

    @property
    def merges_micro_batches(self) -> bool:
        """Whether the pairs of a step may be divided into micro-batches by their tokens."""
        return not BATCH_DEPENDENT_LOSSES & set(self.loss_type)

    def reference_in_step(self) -> bool:
        """Whether every step computes the reference's forward."""
        cached = self.reference_cache or self.precompute_ref_log_probs
        return not self.reference_free and (not cached or self.ld_alpha is not None)

    def check(self) -> None:
        """Raise UserError for values that do not fit together; fill in the default of `max_prompt_length`."""
        check_names(self.loss_type)
        check_positive((self, ("beta", "micro_batch_tokens")))
        if not self.cpo_alpha >= 0:
            raise UserError(f"--cpo_alpha {self.cpo_alpha}: must be at least 0")
        self._check_lengths()
        self._check_losses()
        if self.f_divergence_type not in F_DIVERGENCES:
            raise UserError(
                f"--f_divergence_type {self.f_divergence_type}: unknown;"
                f" {choose_from(self.f_divergence_type, F_DIVERGENCES)}"
            )
        if self.ld_alpha is not None and self.precompute_ref_log_probs:
            raise UserError(
                "--ld_alpha cannot be combined with --precompute_ref_log_probs: the step-0 margin could not be checked"
            )

    def _check_lengths(self) -> None:
        if self.max_length is None:
            return
        if self.max_prompt_length is None:
            self.max_prompt_length = self.max_length // 2
        if not 0 < self.max_prompt_length < self.max_length:
            raise UserError(
                f"--max_prompt_length {self.max_prompt_length}: must be above 0 and below --max_length"
                f" {self.max_length}, so that at least one answer token remains"
            )

    def _check_losses(self) -> None:
        """Refuse label smoothing and TRL's keys where the chosen losses do not use them."""
        # At 0.5 `robust` divides by 1 - 2 x 0.5 = 0; above, every smoothed loss would prefer the rejected answer.
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing}: must be at least 0 and below 0.5")
        own = [loss for loss in self.loss_type if loss in (*OWN_LOSSES, *LIST_LOSSES, *THUMB_LOSSES)]
        if own:
            for key, unused in KEYS_OF_TRL_LOSSES:
                if getattr(self, key) != unused:
                    raise UserError(f"--{key}: has no effect on {', '.join(own)}; remove it")
            for loss in set(self.loss_type) & set(UNSMOOTHED):
                if self.label_smoothing:
                    raise UserError(f"--label_smoothing: has no effect on {loss}{UNSMOOTHED[loss]}; remove it")
        if self.uses_lists:
            self._check_list_loss()
        self._check_thumb_loss()
        # The loss has a term log(label_smoothing) (Ji et al. 2024, arXiv 2402.00856, eq. 16).
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise UserError("--loss_type exo_pair needs --label_smoothing above 0 (its paper recommends 1e-3)")

    def _check_list_loss(self) -> None:
        """Refuse what a loss on lists cannot be combined with."""
        if len(self.loss_type) > 1:
            raise UserError(
                f"--loss_type {' '.join(self.loss_type)}: a loss on lists ({', '.join(LIST_LOSSES)}) is not"
                " combined with others"
            )
        if self.precompute_ref_log_probs:
            raise UserError(
                f"--precompute_ref_log_probs: TRL's precomputation reads pairs; --loss_type {self.loss_type[0]} caches"
                " its reference without it"
            )

    def _check_thumb_loss(self) -> None:
        """Refuse what KTO cannot be combined with, and its weights with other losses."""
        weights = {key: getattr(self, key) for key in ("desirable_weight", "undesirable_weight")}
        for key, value in weights.items():
            if not self.uses_thumbs and value != 1:
                raise UserError(f"--{key}: only --loss_type kto has weights of thumbs; remove it")
            if not value > 0:
                raise UserError(f"--{key} {value:g}: must be above 0")
        if not self.uses_thumbs:
            return
        if len(self.loss_type) > 1 or self.loss_weights:
            raise UserError(
                f"--loss_type {' '.join(self.loss_type)}: {' and '.join(THUMB_LOSSES)} read single answers and are not"
                " combined with other losses or --loss_weights"
            )
        if self.precompute_ref_log_probs:
            raise UserError("--precompute_ref_log_probs: not supported with --loss_type kto; remove it")
        if self.per_device_train_batch_size < 2 and self.loss_type == ["kto"]:
            raise UserError(
                "--per_device_train_batch_size 1: kto estimates the KL divergence from the other answers of the"
                " micro-batch, so at least 2 are needed"
            )
