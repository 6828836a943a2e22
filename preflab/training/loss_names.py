"""The names of the losses of preference training, importable without torch.

python -m preflab.training.loss_names NAME ...      # exit code 2 and one line for an unknown name
"""

import sys

from utils.errors import UserError, run
from utils.suggestions import did_you_mean

TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# Losses of preflab.training.losses.
OWN_LOSSES = ("simpo", "sppo", "cpo", "orpo")
# Losses of preflab.training.list_losses, on rows with several scored answers.
LIST_LOSSES = ("all_pairs", "best_vs_rest", "plackett_luce")
# Losses of TRL's KTOTrainer, on answers with a thumb up or down.
THUMB_LOSSES = ("kto", "apo_zero_unpaired")
LOSS_TYPES = (*TRL_LOSSES, *OWN_LOSSES, *LIST_LOSSES, *THUMB_LOSSES)
# Losses whose steps need no reference model; TRL's `sft` may be added to them.
REFERENCE_FREE = {"simpo", "cpo", "orpo"}
# Names of methods, and the loss that each of them is.
METHODS = {
    "dpo": "sigmoid", "cdpo": "sigmoid", "rdpo": "robust", "robust_dpo": "robust", "slic": "hinge", "rso": "hinge",
    "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "apo": "apo_zero", "nll": "sft",
    "pl": "plackett_luce", "list_mle": "plackett_luce", "listwise": "plackett_luce",
}  # fmt: skip


def reference_free(names: list[str]) -> bool:
    """Whether training with these losses needs no reference model."""
    return bool(set(names) & REFERENCE_FREE) and set(names) <= REFERENCE_FREE | {"sft"}


def check_names(names: list[str], flag: str = "--loss_type") -> None:
    """Raise UserError for the first name that is not a loss; for the name of a method it names the loss."""
    for name in names:
        if name in LOSS_TYPES:
            continue
        method = METHODS.get(name.lower())
        hint = f"did you mean {method} ({name.upper()})? " if method else did_you_mean(name, LOSS_TYPES)
        raise UserError(f"{flag} {name}: unknown; {hint}choose from {', '.join(LOSS_TYPES)}")


if __name__ == "__main__":
    run(lambda: check_names(sys.argv[1:], "--loss"))
