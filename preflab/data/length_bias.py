"""Length bias of preference data: how often is the chosen answer simply the longer one?"""

import numpy as np

from utils.artifacts import metric
from utils.stats import bootstrap, of_sums, ratio, share, sign_test


def words(text: str) -> int:
    """Number of whitespace-separated words."""
    return len(text.split())


def length_bias(lengths: list[tuple[int, int]], seed: int = 42, prompts: list[str] | None = None) -> dict:
    """Mean lengths of chosen and rejected answers, their relative difference, and how often each side is longer.

    Args:
        lengths: (chosen, rejected) of each pair, in words or in tokens.
        seed: of the bootstrap.
        prompts: of each pair; pairs of a prompt are resampled together.

    Returns:
        `{name: metric}`: relative_difference is (mean chosen - mean rejected) / mean rejected, shares are of pairs, and
        p_chosen_longer_is_half is an exact sign test over the pairs of unequal length.
    """
    x = np.array(lengths, dtype=np.float64)  # (pairs, 2)
    # 1: chosen is longer, 0: rejected is longer, 0.5: equal.
    longer = 0.5 * (np.sign(x[:, 0] - x[:, 1]) + 1)
    return {
        "mean_chosen": bootstrap(x[:, 0], seed, groups=prompts),
        "mean_rejected": bootstrap(x[:, 1], seed, groups=prompts),
        # Two columns: the mean of chosen minus rejected, paired by row.
        "difference": bootstrap(x, seed, groups=prompts),
        # A ratio of means, not a mean of ratios: one very short rejected answer would dominate the latter.
        "relative_difference": of_sums(x, lambda sums: ratio(sums) - 1, seed, groups=prompts),
        "share_chosen_longer": share(longer == 1, seed, groups=prompts),
        "share_rejected_longer": share(longer == 0, seed, groups=prompts),
        "share_equal": share(longer == 0.5, seed, groups=prompts),
        "p_chosen_longer_is_half": metric(sign_test(longer, prompts), n=len(x)),
    }


def split_bias(pairs: list, tokenizer, seed: int = 42) -> dict:
    """Length bias of one split in words and in tokens of the answers.

    Tokens are those of the complete answer, without special tokens and without truncation.

    Args:
        pairs: items with `chosen`, `rejected` and `prompt_key` (preflab.data.preferences.Pair).
    """
    sides = [[p.chosen for p in pairs], [p.rejected for p in pairs]]
    # Two lists of lengths, chosen and rejected; zip below turns them into one (chosen, rejected) per pair.
    tokens = [[len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] for texts in sides]
    prompts = [p.prompt_key for p in pairs]
    return {
        "pairs": len(pairs),
        # Words allow comparison across tokenizers; tokens are what the loss sums over and what `max_length` truncates.
        "words": length_bias([(words(p.chosen), words(p.rejected)) for p in pairs], seed, prompts),
        "tokens": length_bias(list(zip(*tokens, strict=True)), seed, prompts),
    }


def sentence(split: str, bias: dict) -> str:
    """One sentence on the length bias of a split, as the evaluations print it."""
    w = bias["words"]
    return (
        f"length bias of {split} ({bias['pairs']} pairs): chosen {w['mean_chosen']['value']:.2f} words, rejected"
        f" {w['mean_rejected']['value']:.2f} ({w['relative_difference']['value']:+.1%}); chosen longer in"
        f" {w['share_chosen_longer']['value']:.2%}, rejected longer in {w['share_rejected_longer']['value']:.2%}, equal"
        f" in {w['share_equal']['value']:.2%}"
    )
