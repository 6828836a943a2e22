"""Preference losses that TRL's DPOTrainer does not have. Arguments and results have shape (pairs,)."""

from torch.nn.functional import logsigmoid

OWN_LOSSES = ("simpo", "sppo")


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
