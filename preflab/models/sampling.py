"""Sampling of the next token, with one random generator per answer, so that an answer does not depend on its batch."""

import json

import torch
from transformers import LogitsProcessor

from utils.provenance import sha256_of

# Number of most likely tokens to search for the nucleus first: sorting a complete vocabulary can take longer than a
# small model's forward pass.
TOP_TOKENS = 256


def prompt_seed(seed: int, messages: list[dict]) -> int:
    """The seed of one prompt's sampled answer."""
    # 15 hexadecimal digits are 60 bits, within the seed range of torch.Generator.
    return int(sha256_of(str(seed), json.dumps(messages))[:15], 16)


class Sampler:
    """Draws one token per row.

    Gumbel-max trick: argmax_i (z_i - log E_i) with E_i ~ Exp(1) is distributed as softmax(z). Top-p keeps the most
    likely tokens up to the one at which their probabilities reach `top_p` (Holtzman et al. 2019, arXiv 1904.09751).

    Args:
        top_k: sample among this many most likely tokens, before `top_p` (as transformers orders them); 0 for all.
    """

    def __init__(self, temperature: float, top_p: float = 1.0, top_k: int = 0):
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, scores: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Draw from scores of shape (rows, vocabulary), each row with its generator: shape (rows,)."""
        scores = scores.float() / self.temperature
        if 0 < self.top_k < scores.shape[1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], float("-inf"))
        if self.top_p < 1:
            return self.nucleus(scores, generators)
        return torch.stack([_sample(row, g) for row, g in zip(scores, generators, strict=True)])

    def nucleus(self, scores, generators):
        """One token per row, sampled from its nucleus: shape (rows,)."""
        # Normalised over the complete vocabulary, so that probabilities of the top tokens are exact.
        log_z = scores.logsumexp(-1, keepdim=True)
        top_scores, top_ids = scores.topk(min(TOP_TOKENS, scores.shape[1]))  # (rows, TOP_TOKENS), descending
        p = (top_scores - log_z).exp()
        mass = p.cumsum(-1)
        complete = (mass[:, -1] >= self.top_p).tolist()
        tokens = []
        for row, generator in enumerate(generators):
            if complete[row]:
                # mass - p is the probability of all more likely tokens.
                k = self.sample_nucleus(top_scores[row], mass[row] - p[row], generator)
                tokens.append(top_ids[row, k])
            else:
                # A flat distribution: its nucleus has more than TOP_TOKENS tokens.
                all_scores, order = scores[row].sort(descending=True)
                all_p = (all_scores - log_z[row]).exp()
                tokens.append(order[self.sample_nucleus(all_scores, all_p.cumsum(-1) - all_p, generator)])
        return torch.stack(tokens)

    def sample_nucleus(self, scores, mass_before, generator):
        """As `_sample`, among the tokens whose more likely tokens have less than `top_p` probability together."""
        return _sample(scores.masked_fill(mass_before >= self.top_p, float("-inf")), generator)


def _sample(scores, generator):
    """The index of a sample from softmax(scores), scores of shape (tokens,)."""
    return (scores - torch.empty_like(scores).exponential_(generator=generator).log()).argmax()


class Sampled(LogitsProcessor):
    """Makes transformers' greedy decoding pick the sampled tokens: their score becomes 0, all others -inf.

    Args:
        generators: one per row of the batch.
    """

    def __init__(self, sampler: Sampler, generators: list[torch.Generator]):
        self.sampler, self.generators = sampler, generators

    def __call__(self, input_ids, scores):
        tokens = self.sampler(scores, self.generators)
        return torch.full_like(scores, float("-inf"), dtype=torch.float32).scatter_(1, tokens[:, None], 0.0)
