"""Losses on ranked lists. Arguments have shape (lists, answers), results (lists,); a list of two gives DPO's loss.

Answers of equal score are not compared with each other.
"""

import torch
from torch.nn.functional import logsigmoid


def beats(scores, given):
    """Whether answer i has a higher score than answer j, shape (lists, answers, answers).

    Args:
        scores: of each answer, higher is better.
        given: False in padding.
    """
    return (scores[:, :, None] > scores[:, None, :]) & given[:, :, None] & given[:, None, :]


def all_pairs(rewards, scores, given):
    """Mean over all pairs (i, j) of which i has the higher score: -log sigma(r_i - r_j), DPO's loss of the pair."""
    return _mean_of_pairs(rewards, beats(scores, given))


def best_vs_rest(rewards, scores, given):
    """Mean over the pairs of a best answer (more than one with ties) and an answer below it: -log sigma(r_i - r_j)."""
    compared = beats(scores, given)
    best = (scores == scores.masked_fill(~given, -torch.inf).amax(1, keepdim=True)) & given
    return _mean_of_pairs(rewards, compared & best[:, :, None])


def plackett_luce(rewards, scores, given):
    """-log of the probability of the order, prod_i exp(r_i) / (exp(r_i) + sum of exp(r_j) over the answers below i).

    Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290), eq. 20 in its appendix. Without ties it
    is the Plackett-Luce model; of answers with equal score, each is compared with the answers below both only.
    """
    below = beats(scores, given)
    itself = torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    # (lists, i, j): reward of j where j is i or below it.
    compared = rewards[:, None, :].masked_fill(~(below | itself), -torch.inf)
    # An answer without another below it, and padding, contribute log 1 = 0.
    return (compared.logsumexp(2) - rewards).sum(1)


def _mean_of_pairs(rewards, compared):
    """Mean of -log sigma(r_i - r_j) over the compared pairs (i, j) of each list."""
    losses = -logsigmoid(rewards[:, :, None] - rewards[:, None, :])
    return (losses * compared).sum((1, 2)) / compared.sum((1, 2))


def accuracy(rewards, scores, given):
    """Share of the pairs of different score whose better answer has the higher reward, ties of rewards half."""
    margins, compared = rewards[:, :, None] - rewards[:, None, :], beats(scores, given)
    right = (margins > 0).float() + (margins == 0).float() / 2
    return (right * compared).sum((1, 2)) / compared.sum((1, 2))


LOSSES = {"all_pairs": all_pairs, "best_vs_rest": best_vs_rest, "plackett_luce": plackett_luce}
