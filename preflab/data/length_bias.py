"""The length bias of preference data, as the field tells it: is the chosen answer simply the longer one?"""

import numpy as np

from utils.artifacts import metric
from utils.stats import bootstrap, sign_test


def words(text: str) -> int:
    """Whitespace-separated words."""
    return len(text.split())


def length_bias(lengths: list[tuple[int, int]], seed: int = 42) -> dict:
    """Mean lengths of chosen and rejected answers, their relative difference, and which side is longer.

    Args:
        lengths: (chosen, rejected) of each pair, in one unit.

    Returns:
        `{name: metric}`; relative_difference is (mean chosen - mean rejected) / mean rejected, shares are of pairs, and
        p_chosen_longer_is_half tests the longer side among pairs of unequal length (exact sign test).
    """
    x = np.array(lengths, dtype=np.float64)
    longer = 0.5 * (np.sign(x[:, 0] - x[:, 1]) + 1)
    return {
        "mean_chosen": bootstrap(x[:, 0], seed),
        "mean_rejected": bootstrap(x[:, 1], seed),
        "difference": bootstrap(x, seed),
        "relative_difference": bootstrap(x, seed, statistic=lambda r: r[:, 0].mean() / r[:, 1].mean() - 1),
        "share_chosen_longer": bootstrap(longer == 1, seed),
        "share_rejected_longer": bootstrap(longer == 0, seed),
        "share_equal": bootstrap(longer == 0.5, seed),
        "p_chosen_longer_is_half": metric(sign_test(longer), n=len(x)),
    }


def split_bias(pairs: list, tokenizer, seed: int = 42) -> dict:
    """Both units of one split of preflab.data.preferences.Pair: words of the final assistant message, and its tokens.

    Tokens are those of the whole answer's text, with no special token and nothing cut.
    """
    sides = [[p.chosen for p in pairs], [p.rejected for p in pairs]]
    tokens = [[len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] for texts in sides]
    return {
        "pairs": len(pairs),
        "words": length_bias([(words(p.chosen), words(p.rejected)) for p in pairs], seed),
        "tokens": length_bias(list(zip(*tokens, strict=True)), seed),
    }


def sentence(split: str, bias: dict) -> str:
    """The bias of one split in words, as both evaluation scripts print it."""
    w = bias["words"]
    return (
        f"length bias of {split} ({bias['pairs']} pairs): chosen {w['mean_chosen']['value']:.2f} words, rejected"
        f" {w['mean_rejected']['value']:.2f} ({w['relative_difference']['value']:+.1%}); chosen longer in"
        f" {w['share_chosen_longer']['value']:.2%}, rejected longer in {w['share_rejected_longer']['value']:.2%}, equal"
        f" in {w['share_equal']['value']:.2%}"
    )
