"""Configuration of a preference-training run: TRL's DPOConfig, this project's keys, and their checks."""

from dataclasses import dataclass, field

from trl import DPOConfig

from preflab.training.decisions import REFUSED, REFUSED_FOR_PAIRS
from preflab.training.losses import OWN_LOSSES
from preflab.training.pair_config import PairRunConfig
from preflab.training.run_config import check_positive
from utils.errors import UserError
from utils.suggestions import choose_from, did_you_mean

TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
LOSS_TYPES = (*TRL_LOSSES, *OWN_LOSSES)
# Names of methods, and the loss that each of them is.
METHODS = {
    "dpo": "sigmoid", "cdpo": "sigmoid", "rdpo": "robust", "robust_dpo": "robust", "slic": "hinge", "rso": "hinge",
    "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "apo": "apo_zero", "nll": "sft",
}  # fmt: skip
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Keys of TRL's own losses, each with the value that has no effect.
KEYS_OF_TRL_LOSSES = (("ld_alpha", None), ("use_weighting", False), ("f_divergence_type", "reverse_kl"))


@dataclass
class DPORunConfig(PairRunConfig, DPOConfig):
    """TRL's DPOConfig with this project's keys; every other key is TRL's or transformers' own."""

    gamma_beta_ratio: float = field(
        default=0.5, metadata={"help": "simpo: the target margin gamma as a multiple of beta."}
    )
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

    def keeps_reference_model(self, use_peft: bool) -> bool:
        """Whether a second copy of the weights is loaded as the reference.

        With LoRA the reference is the policy with its adapter switched off.
        """
        return not (use_peft or self.precompute_ref_log_probs)

    def check(self) -> None:
        """Raise UserError for values that do not fit together; fill in the default of `max_prompt_length`."""
        unknown = [loss for loss in self.loss_type if loss not in LOSS_TYPES]
        if unknown:
            method = METHODS.get(unknown[0].lower())
            hint = f"did you mean {method} ({unknown[0].upper()})? " if method else did_you_mean(unknown[0], LOSS_TYPES)
            raise UserError(f"--loss_type {unknown[0]}: unknown; {hint}choose from {', '.join(LOSS_TYPES)}")
        check_positive((self, ("beta", "micro_batch_tokens")))
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
        if set(self.loss_type) & set(OWN_LOSSES):
            for key, unused in KEYS_OF_TRL_LOSSES:
                if getattr(self, key) != unused:
                    raise UserError(f"--{key}: has no effect on simpo and sppo; remove it")
            if "sppo" in self.loss_type and self.label_smoothing:
                raise UserError(
                    "--label_smoothing: has no effect on sppo, whose win probabilities express label noise; remove it"
                )
        # The loss has a term log(label_smoothing) (Ji et al. 2024, arXiv 2402.00856, eq. 16).
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise UserError("--loss_type exo_pair needs --label_smoothing above 0 (its paper recommends 1e-3)")
