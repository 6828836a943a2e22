"""Each GGUF file beside the model that it was made from, on the same answers: differences with paired intervals."""

import numpy as np

from preflab.evaluation.merge_check import SIDES
from preflab.evaluation.perplexity import exponential
from preflab.models.merging import tolerance
from utils.artifacts import metric
from utils.errors import UserError
from utils.stats import bootstrap, mcnemar, mean_test, of_sums, pairwise_correct, share

# Types whose log-probabilities must be those of the source up to rounding, and the dtype that sets the tolerance.
# F32 has the tolerance of 16 bits: llama.cpp's exponentials and rotary tables are approximations.
ROUNDED = {"F32": "float16", "F16": "float16", "BF16": "bfloat16", "LORA": "float16"}


def ensure_rounding_only(kind: str, name: str, logps: np.ndarray, source: np.ndarray, tokens: np.ndarray) -> None:
    """Raise UserError if a file's log-probabilities are not finite, or differ beyond rounding where they must not.

    Args:
        logps, source: shape (pairs, 2), in nats; tokens: answer tokens, same shape.
    """
    if not np.isfinite(logps).all():
        raise UserError(f"{name}: log-probabilities are NaN or infinite; the file was deleted")
    if kind not in ROUNDED:
        return
    beyond = np.abs(logps - source) / tolerance(source, tokens, ROUNDED[kind])
    if beyond.max() > 1:
        raise UserError(
            f"{name}: log-probabilities differ from the model's by up to {np.abs(logps - source).max():.2g} nats,"
            f" {beyond.max():.0%} of what {ROUNDED[kind]} allows: llama.cpp computes another model; it was deleted"
        )


def file_metrics(
    kind: str,
    logps: np.ndarray,
    source: np.ndarray,
    base: np.ndarray | None,
    tokens: np.ndarray,
    seed: int,
    prompts: list[int],
) -> dict:
    """Metrics of one file; names end in its type.

    Args:
        logps, source, base: summed log-probabilities of (chosen, rejected) under the file, the model that it was made
            from, and the base model of its training (None without one); shape (pairs, 2), in nats.
        tokens: answer tokens, shape (pairs, 2).
        prompts: the group of each pair for resampling.

    Returns:
        logp_difference (nats per answer), ppl, ppl_ratio, same_preference, likelihood_ranking and reward_accuracy with
        their differences from the source model, and p-values: `utils.stats.mean_test` and exact McNemar test.
    """
    nll = -logps.sum(1), -source.sum(1)
    pairs = np.stack([nll[0] - nll[1], tokens.sum(1)], 1)
    metrics = {
        # Mean of both answers, because a pair is the unit that is resampled.
        "logp_difference": bootstrap((logps - source).mean(1), seed, groups=prompts),
        "ppl": _perplexity(nll[0], tokens, seed, prompts),
        "ppl_ratio": exponential(of_sums(pairs, seed=seed, groups=prompts)),
        "p_ppl_ratio": metric(mean_test(nll[0] - nll[1], prompts, seed), n=len(tokens)),
        "same_preference": share(
            np.sign(logps[:, 0] - logps[:, 1]) == np.sign(source[:, 0] - source[:, 1]), seed, groups=prompts
        ),
        **_ranking("likelihood_ranking", logps, source, seed, prompts),
    }
    if base is not None:
        metrics |= _ranking("reward_accuracy", logps - base, source - base, seed, prompts)
    return {f"{key}_{kind}": value for key, value in metrics.items()}


def source_metrics(source: np.ndarray, base: np.ndarray | None, tokens: np.ndarray, seed: int, prompts) -> dict:
    """The same figures of the model that the files were made from; names end in `source`. Arguments as above."""
    metrics = {
        "logp_source": bootstrap(source.mean(1), seed, groups=prompts),
        "ppl_source": _perplexity(-source.sum(1), tokens, seed, prompts),
        "likelihood_ranking_source": share(pairwise_correct(*source.T), seed, groups=prompts),
    }
    if base is not None:
        metrics["reward_accuracy_source"] = share(pairwise_correct(*(source - base).T), seed, groups=prompts)
    return metrics


def _perplexity(nll: np.ndarray, tokens: np.ndarray, seed: int, prompts) -> dict:
    """exp of nats per token of both answers of every pair."""
    units = np.stack([nll, tokens.sum(1)], 1)
    return exponential(of_sums(units, seed=seed, groups=prompts))


def _ranking(name: str, scores: np.ndarray, source: np.ndarray, seed: int, prompts) -> dict:
    """The share of pairs with the higher score on the chosen answer (ties half), beside the source's."""
    own, other = pairwise_correct(*scores.T), pairwise_correct(*source.T)
    return {
        name: share(own, seed, groups=prompts),
        f"{name}_difference": share(np.stack([own, other], 1), seed, groups=prompts),
        f"p_{name}_difference": metric(mcnemar(own, other, prompts), n=len(own)),
    }


def rows_of(pairs: list, logps: dict[str, np.ndarray], prompts: list[int]) -> list[dict]:
    """One row per pair: its source, its prompt's number, and every model's log-probabilities."""
    return [
        {
            "row": i,
            "where": pair.source,
            "prompt": prompts[i],
            **{name: dict(zip(SIDES, values[i].tolist(), strict=True)) for name, values in logps.items()},
        }
        for i, pair in enumerate(pairs)
    ]
