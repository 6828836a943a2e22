"""Best-of-n sampling: how reward and length grow with n, against the KL divergence from the sampling model."""

from math import comb, log
from pathlib import Path

import numpy as np

from preflab.data.candidates import load_candidates
from preflab.data.sources import reading
from preflab.pairs.pairing import Sampled
from preflab.pairs.scorers import Candidates
from utils.artifacts import RowFile
from utils.errors import UserError
from utils.stats import bootstrap


def read_samples(name: str, split: str, limit: int | None) -> list[tuple[Candidates, list[int]]]:
    """(distinct answers, index of each sample's answer) of every prompt.

    Args:
        name: a folder of generate_preference_pairs.py (its samples.jsonl), or data with several answers per row.

    Raises:
        UserError: no prompt has two samples.
    """
    path = Path(name).expanduser() / "samples.jsonl"
    if path.exists():
        samples = [Sampled.read(row) for row in RowFile(path).read()][:limit]
        prompts = [(s.prompt, [answer["text"] for answer in s.answers]) for s in samples]
    else:
        rows, _ = load_candidates([{"name": name, "split": split, **reading(None, None)}], limit)
        prompts = [(prompt, texts) for prompt, texts, _ in rows]
    result = []
    for prompt, texts in prompts:
        texts = [text.strip() for text in texts if text.strip()]
        distinct = list(dict.fromkeys(texts))
        if len(texts) > 1:
            counts = [texts.count(text) for text in distinct]
            result.append((Candidates(prompt, distinct, counts), [distinct.index(text) for text in texts]))
    if not result:
        raise UserError(f"--best_of {name}: no prompt has two answers")
    return result


def kl_of_best_of(n: int) -> float:
    """log n - (n - 1) / n nats, an upper bound of KL(best of n || one sample) (Stiennon et al. 2020, appendix G.3)."""
    return log(n) - (n - 1) / n


def best_of_weights(samples: int, n: int) -> np.ndarray:
    """Probability that the k-th worst of `samples` answers is the best of n drawn from them, shape (samples,).

    C(k - 1, n - 1) / C(samples, n) (Nakano et al. 2021, section 3.3): the estimate uses every sample, without noise of
    its own.
    """
    return np.array([comb(k, n - 1) for k in range(samples)]) / comb(samples, n)


def curve(prompts: list[dict], most: int, seed: int) -> list[dict]:
    """Mean reward, length and second score of the best of n = 1 ... most samples, over prompts.

    Rewards are relative to each prompt's mean over its samples, since only differences within a prompt mean something.

    Args:
        prompts: with rewards and chars of the samples, each of shape (samples,), and `other`, the scores of a second
            scorer, or None.

    Returns:
        `{n, kl, reward, chars, other}` per n, the last three metrics over prompts.
    """
    points = []
    for n in range(1, most + 1):
        usable = [p for p in prompts if len(p["rewards"]) >= n]
        values: dict[str, list[float]] = {"reward": [], "chars": [], "other": []}
        for p in usable:
            rewards = np.array(p["rewards"], float)
            order, weights = np.argsort(rewards, kind="stable"), best_of_weights(len(rewards), n)
            for name, column in (("reward", rewards - rewards.mean()), ("chars", np.array(p["chars"], float)),
                                 ("other", p["other"])):  # fmt: skip
                if column is not None:
                    column = np.asarray(column, float)
                    column = column - column.mean() if name == "other" else column
                    values[name].append(float(weights @ column[order]))
        if len(usable) < 2:
            break
        point = {name: bootstrap(v, seed) for name, v in values.items() if v}
        points.append({"n": n, "kl": kl_of_best_of(n), "prompts": len(usable), **point})
    return points
