"""Preference losses that TRL's trainer has not got. Each takes figures of shape (pairs,) and returns (pairs,)."""

from torch.nn.functional import logsigmoid

OWN_LOSSES = ("simpo", "sppo")


def simpo(chosen_mean, rejected_mean, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0):
    """-log sigma(beta (r_w - r_l) - gamma), r the mean log-probability a token, gamma = gamma_beta_ratio x beta.

    Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward" (arXiv 2405.14734), eq. 6;
    label smoothing as in its published code. No reference enters.

    Args:
        chosen_mean, rejected_mean: mean log-probability of a response token, nats.
    """
    margin = beta * (chosen_mean - rejected_mean - gamma_beta_ratio)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def sppo(chosen_ratio, rejected_ratio, win_chosen, win_rejected, beta: float):
    """((d_w - (P_w - 1/2) / beta)^2 + (d_l - (P_l - 1/2) / beta)^2) / 2, d = log pi - log pi_ref of the response.

    Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment" (arXiv 2405.00675), eq. 4.7, with
    eta = 1 / beta and the factor of its published code. TRL's sppo_hard is twice this at P_w = 1, P_l = 0.

    Args:
        chosen_ratio, rejected_ratio: d of either answer, summed over the response, nats.
        win_chosen, win_rejected: estimated probability that the answer beats the policy's own, 0 to 1.
    """
    chosen = (chosen_ratio - (win_chosen - 0.5) / beta).square()
    rejected = (rejected_ratio - (win_rejected - 0.5) / beta).square()
    return (chosen + rejected) / 2
