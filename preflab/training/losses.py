"""Preference losses that TRL's DPOTrainer does not have. Arguments and results have shape (pairs,)."""

import torch
from torch.nn.functional import logsigmoid


def simpo(chosen_mean, rejected_mean, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0):
    """-log sigma(beta (r_w - r_l) - gamma), with r the mean log-probability per token, gamma = gamma_beta_ratio x beta.

    Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward" (arXiv 2405.14734), eq. 6;
    label smoothing as in its published code. The loss does not use the reference model.

    Args:
        chosen_mean, rejected_mean: mean log-probability per response token, nats. Shape (pairs,).

    Returns:
        The loss of each pair. Shape (pairs,).
    """
    # beta (r_w - r_l) - gamma, with beta factored out as in the published code.
    margin = beta * (chosen_mean - rejected_mean - gamma_beta_ratio)
    # With probability label_smoothing the label is wrong and the pair counts the other way round.
    # logsigmoid stays finite at large negative margins, where the log of a sigmoid underflows to -inf.
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def cpo(chosen_sum, rejected_sum, chosen_mean, beta: float, alpha: float, label_smoothing: float = 0.0):
    """-log sigma(beta (log pi(y_w) - log pi(y_l))) - alpha x mean log-probability per token of y_w.

    Xu et al. 2024, "Contrastive Preference Optimization" (arXiv 2401.08417): DPO with a uniform reference, plus the
    negative log-likelihood of the chosen answer. As in its published code, the likelihood is a mean over tokens; here
    over those of each pair, so that the loss does not depend on the micro-batch.

    Args:
        chosen_sum, rejected_sum: log-probability summed over the answer, nats. Shape (pairs,).
        chosen_mean: mean log-probability per token of the chosen answer, nats. Shape (pairs,).
        alpha: weight of the negative log-likelihood.

    Returns:
        The loss of each pair. Shape (pairs,).
    """
    margin = beta * (chosen_sum - rejected_sum)
    preference = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return preference - alpha * chosen_mean


def orpo(chosen_mean, rejected_mean, weight: float):
    """-log P(y_w) - weight x log sigma(log odds(y_w) - log odds(y_l)), with odds P / (1 - P), P = exp(mean log-prob).

    Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model" (arXiv 2403.07691), eq. 6, 7.
    The first term is the negative log-likelihood per token of the chosen answer.

    Args:
        chosen_mean, rejected_mean: mean log-probability per token of the answer, nats, below 0. Shape (pairs,).
        weight: the paper's lambda.

    Returns:
        The loss of each pair. Shape (pairs,).
    """
    return -chosen_mean - weight * logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def log_odds(mean_logp):
    """log(P / (1 - P)) of P = exp(mean_logp), in nats; finite for P that rounds to 1."""
    # expm1 is exact near 0, where 1 - exp() would cancel; the bound is the nearest probability below 1 in float32.
    mean_logp = mean_logp.clamp(max=-1.2e-7)
    return mean_logp - torch.log(-torch.expm1(mean_logp))


def sppo(chosen_ratio, rejected_ratio, win_chosen, win_rejected, beta: float):
    """((d_w - (P_w - 1/2) / beta)^2 + (d_l - (P_l - 1/2) / beta)^2) / 2, with d = log pi - log pi_ref of the response.

    Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment" (arXiv 2405.00675), eq. 4.7, with
    eta = 1 / beta and the factor 1/2 of its published code. TRL's sppo_hard is twice this at P_w = 1, P_l = 0.

    Args:
        chosen_ratio, rejected_ratio: d of each answer, summed over the response, nats. Shape (pairs,).
        win_chosen, win_rejected: estimated probability that the answer beats the policy's own, 0 to 1. Shape (pairs,).

    Returns:
        The loss of each pair. Shape (pairs,).
    """
    # Each log-ratio is regressed onto its target (P - 1/2) / beta: positive for likely winners, negative for losers.
    # At P = 1/2 the target is 0: the answer should stay as likely as under the reference.
    chosen = (chosen_ratio - (win_chosen - 0.5) / beta).square()
    rejected = (rejected_ratio - (win_rejected - 0.5) / beta).square()
    return (chosen + rejected) / 2
