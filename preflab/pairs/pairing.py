"""Pairs out of sampled answers: each prompt's candidates, the best and the worst of them, where scorers disagree."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

from preflab.data.prompts import Prompt
from preflab.data.sources import folded, select_by_hash
from preflab.pairs.scorers import Candidates, Scores
from utils.artifacts import metric
from utils.errors import UserError
from utils.provenance import sha256_of
from utils.stats import bootstrap, sign_test


@dataclass
class Sampled:
    """A prompt with its sampled answers (`{text, tokens, finish_reason, seed}` each), and whether it is held out.

    `given` is what the data say of the answers: `{"scores": [...]}` or `{"wins": [...]}`, in their order.
    """

    prompt: Prompt
    answers: list[dict]
    held_out: bool
    given: dict | None = None

    def row(self) -> dict:
        """A line of samples.jsonl."""
        p = self.prompt
        about = {"prompt_id": p.key, "where": p.source, "held_out": self.held_out, "messages": p.messages}
        return {**about, "answers": self.answers, "given": self.given}

    @classmethod
    def read(cls, row: dict) -> "Sampled":
        """A line of samples.jsonl again."""
        return cls(Prompt(row["messages"], row["where"]), row["answers"], row["held_out"], row["given"])


def part_of(prompts: list[Prompt], parts: int | None, part: int | None) -> list[Prompt]:
    """Every `parts`-th prompt from the `part`-th on (1 to `parts`): shares of like size that have none in common."""
    return prompts if parts is None else prompts[part - 1 :: parts]


def held_out_keys(prompts: list[Prompt], count: int) -> set[str]:
    """About `count` prompts that are kept for testing, chosen by a hash of their text alone.

    Prompts that differ in nothing but case and spacing go together, as training tells them apart.
    """
    distinct = {p.key: folded(p.text) for p in prompts}
    chosen = select_by_hash(Counter(distinct.values()), count)
    return {key for key, text in distinct.items() if text in chosen}


def candidates_of(sampled: Sampled) -> Candidates | str:
    """The distinct, non-empty answers in the order of sampling, or why no pair can come of them."""
    counts, first = {}, {}
    for k, answer in enumerate(sampled.answers):
        text = answer["text"].strip()
        if text:
            counts[text] = counts.get(text, 0) + 1
            first.setdefault(text, k)
    if len(counts) < 2:
        return "all_samples_empty" if not counts else "all_samples_identical"
    given = {kind: [values[k] for k in first.values()] for kind, values in (sampled.given or {}).items()}
    return Candidates(sampled.prompt, list(counts), list(counts.values()), given)


def shuffled(candidates: Candidates, scores: Scores, seed: int) -> Scores:
    """The same scores dealt out at random among a prompt's answers: labels that say nothing, as a control."""
    order = list(range(len(scores.scores)))
    random.Random(sha256_of(str(seed), candidates.prompt.key)).shuffle(order)
    return Scores([scores.scores[k] for k in order], [scores.wins[k] for k in order])


def pair_of(sampled: Sampled, candidates: Candidates, scores: Scores) -> dict | str:
    """The best against the worst answer as a preference row, or why there is none.

    Chosen and rejected carry their estimated win probabilities (`win_chosen`, `win_rejected`) and scores.
    """
    best, worst = int(np.argmax(scores.scores)), int(np.argmin(scores.scores))
    if scores.scores[best] == scores.scores[worst]:
        return "all_scores_equal"
    ends = {a["text"].strip(): a for a in reversed(sampled.answers)}

    def side(k: int) -> dict:
        return {key: ends[candidates.answers[k]].get(key) for key in ("tokens", "finish_reason")}

    return {
        "prompt": sampled.prompt.messages,
        "prompt_id": sampled.prompt.key,
        "chosen": [{"role": "assistant", "content": candidates.answers[best]}],
        "rejected": [{"role": "assistant", "content": candidates.answers[worst]}],
        "win_chosen": scores.wins[best],
        "win_rejected": scores.wins[worst],
        "score_chosen": scores.scores[best],
        "score_rejected": scores.scores[worst],
        "sampled_chosen": side(best),
        "sampled_rejected": side(worst),
    }


# ---------------------------------------------------------------------------------------------------------- figures


def sampling_metrics(samples: list[Sampled], seed: int = 42) -> dict:
    """Of the answers as sampled, prompts resampled: tokens, shares cut off and empty, distinct answers a prompt."""
    known = [s for s in samples if s.answers and s.answers[0].get("tokens") is not None]
    distinct = [len({a["text"].strip() for a in s.answers}) for s in samples]
    empty = [np.mean([not a["text"].strip() for a in s.answers]) for s in samples]
    found = {
        "samples": metric(sum(len(s.answers) for s in samples), n=len(samples)),
        "distinct_answers": bootstrap(distinct, seed),
        "empty_share": bootstrap(empty, seed),
    }
    if known:
        found["tokens"] = bootstrap([np.mean([a["tokens"] for a in s.answers]) for s in known], seed)
        cut = [np.mean([a["finish_reason"] == "length" for a in s.answers]) for s in known]
        found["truncated_share"] = bootstrap(cut, seed)
    return found


def pair_metrics(rows: list[dict], scored: list[tuple[Candidates, Scores]], seed: int = 42) -> dict:
    """Of the pairs: scores of all samples, of chosen and rejected, win probabilities, and which side is longer.

    Args:
        rows: from `pair_of`.
        scored: every prompt's candidates with the scorer's word on them.
    """
    longer = [0.5 + 0.5 * np.sign(_length(r, "chosen") - _length(r, "rejected")) for r in rows]
    everyone = [np.average(s.scores, weights=c.counts) for c, s in scored]
    return {
        "score_mean": bootstrap(everyone, seed),
        "score_chosen": bootstrap([r["score_chosen"] for r in rows], seed),
        "score_rejected": bootstrap([r["score_rejected"] for r in rows], seed),
        "win_chosen": bootstrap([r["win_chosen"] for r in rows], seed),
        "win_rejected": bootstrap([r["win_rejected"] for r in rows], seed),
        "chosen_longer": bootstrap(longer, seed),
        "p_chosen_longer_is_half": metric(sign_test(longer), n=len(rows)),
    }


def _length(row: dict, side: str) -> int:
    return len(row[side][0]["content"])


def agreement(rows: list[dict], scored: dict[str, tuple[Candidates, Scores]], others: dict, seed: int = 42) -> dict:
    """How other scorers see the same answers: `{scorer: metrics}`.

    Args:
        rows: from `pair_of`.
        scored: the main scorer's candidates and scores by prompt_id.
        others: `{scorer: {prompt_id: Scores}}`; a prompt that a scorer said nothing of is left out there.

    Returns:
        same_order is the share of pairs whose chosen answer the other scorer puts above the rejected one (ties half),
        same_best the share of prompts with the same best answer, rank_correlation Kendall's tau-b over a prompt's
        answers, averaged over prompts.
    """
    from scipy.stats import kendalltau

    found = {}
    for name, theirs in others.items():
        order, best, tau = [], [], []
        for row in rows:
            if row["prompt_id"] not in theirs:
                continue
            candidates, mine = scored[row["prompt_id"]]
            other = theirs[row["prompt_id"]].scores
            chosen, rejected = (candidates.answers.index(row[s][0]["content"]) for s in ("chosen", "rejected"))
            order.append(0.5 + 0.5 * np.sign(other[chosen] - other[rejected]))
            best.append(float(int(np.argmax(other)) == chosen))
            value = kendalltau(mine.scores, other).statistic
            if np.isfinite(value):
                tau.append(value)
        if not order:
            raise UserError(f"--also_score {name}: said nothing of any pair")
        found[name] = {
            "same_order": bootstrap(order, seed),
            "p_same_order_is_half": metric(sign_test(order), n=len(order)),
            "same_best": bootstrap(best, seed),
            "rank_correlation": bootstrap(tau, seed) if tau else metric(float("nan"), n=0),
        }
    return found
