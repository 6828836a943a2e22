"""Pairs out of sampled answers: each prompt's distinct answers, the best against the worst, held-out prompts."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

from preflab.data.prompts import Prompt
from preflab.data.sources import folded, select_by_hash
from preflab.pairs.scorers import Candidates, Scores
from utils.provenance import sha256_of


@dataclass
class Sampled:
    """A prompt and the answers sampled for it: one line of samples.jsonl.

    Attributes:
        answers: `{text, tokens, finish_reason, seed}` each, in the order of sampling.
        held_out: whether its pair goes to test.jsonl.
        given: the dataset's own numbers for the answers, `{"scores": [...]}` or `{"wins": [...]}`, in their order.
    """

    prompt: Prompt
    answers: list[dict]
    held_out: bool
    given: dict | None = None

    def row(self) -> dict:
        """The line of samples.jsonl."""
        return {
            "prompt_id": self.prompt.key,
            "where": self.prompt.source,
            "held_out": self.held_out,
            "messages": self.prompt.messages,
            "answers": self.answers,
            "given": self.given,
        }

    @classmethod
    def read(cls, row: dict) -> "Sampled":
        """The inverse of `row`."""
        return cls(Prompt(row["messages"], row["where"]), row["answers"], row["held_out"], row["given"])


@dataclass
class Pairs:
    """The preference pairs of one call, and what they were made from.

    Attributes:
        train, test: preference rows from `pairs_of`.
        samples: every prompt with its answers.
        scored: the main scorer's candidates and scores by prompt_id.
        other_scorers: `{scorer: {prompt_id: Scores}}` of --also_score.
        dropped: how many prompts gave no pair, by reason.
        shuffled: whether the scores were assigned at random (--shuffle_scores).
    """

    train: list[dict]
    test: list[dict]
    samples: list[Sampled]
    scored: dict[str, tuple[Candidates, Scores]]
    other_scorers: dict[str, dict[str, Scores]]
    dropped: dict[str, int]
    shuffled: bool

    @property
    def counts(self) -> dict:
        """Prompts, train and test pairs, and prompts without a pair by reason."""
        return {
            "prompts": len(self.samples),
            "train": len(self.train),
            "test": len(self.test),
            "dropped": dict(self.dropped),
        }


def part_of(prompts: list, parts: int | None, part: int | None) -> list:
    """Every `parts`-th prompt, starting with the `part`-th (1 to `parts`): disjoint parts of nearly equal size."""
    # Strided, not in blocks: data sets are often sorted by source, and every part should have the same mix.
    return prompts if parts is None else prompts[part - 1 :: parts]


def held_out_keys(prompts: list[Prompt], count: int) -> set[str]:
    """The keys of about `count` prompts, held out for testing. The choice depends on a hash of their text alone.

    Prompts that differ only in case and spacing stay together: training treats them as the same prompt.
    """
    folded_text = {prompt.key: folded(prompt.text) for prompt in prompts}
    # The selection is over folded texts, so all spellings of a prompt are on the same side.
    chosen = select_by_hash(Counter(folded_text.values()), count)
    return {key for key, text in folded_text.items() if text in chosen}


def candidates_of(sampled: Sampled) -> Candidates | str:
    """The distinct, non-empty answers in the order of sampling, or the reason why they make no pair."""
    counts, first_index = {}, {}
    for k, answer in enumerate(sampled.answers):
        # Counted by text: `counts` weighs the win probabilities, and each distinct answer is scored once.
        text = answer["text"].strip()
        if text:
            counts[text] = counts.get(text, 0) + 1
            first_index.setdefault(text, k)
    if len(counts) < 2:
        return "all_samples_empty" if not counts else "all_samples_identical"
    # `first_index` maps each distinct answer to its first sample; equal texts are taken to have equal numbers.
    given = {kind: [values[k] for k in first_index.values()] for kind, values in (sampled.given or {}).items()}
    return Candidates(sampled.prompt, list(counts), list(counts.values()), given)


def shuffled(candidates: Candidates, scores: Scores, seed: int) -> Scores:
    """A control: the same scores, assigned to the prompt's answers at random, so that they carry no preference."""
    order = list(range(len(scores.scores)))
    # Seeded per prompt, so that the result does not depend on the number or order of the prompts.
    random.Random(sha256_of(str(seed), candidates.prompt.key)).shuffle(order)
    # Scores and win probabilities move together, so that each pair of numbers stays consistent.
    return Scores([scores.scores[k] for k in order], [scores.wins[k] for k in order])


def pair_of(sampled: Sampled, candidates: Candidates, scores: Scores) -> dict | str:
    """The best against the worst answer as a preference row, or the reason why there is none.

    Chosen and rejected carry their scores and their estimated win probabilities (`win_chosen`, `win_rejected`).
    """
    best, worst = int(np.argmax(scores.scores)), int(np.argmin(scores.scores))
    # Equal best and worst means that all scores are equal: no preference, so no pair.
    if scores.scores[best] == scores.scores[worst]:
        return "all_scores_equal"
    return _row(sampled, candidates, scores, best, worst)


def pairs_of(
    sampled: Sampled, candidates: Candidates, scores: Scores, every: bool = False, min_margin: float = 0.0
) -> list[dict] | str:
    """The pairs of a prompt as preference rows, or the reason why there is none.

    Args:
        every: every two answers whose scores differ, the largest difference first; otherwise best against worst.
        min_margin: pairs with a smaller difference of scores are left out.
    """
    best_worst = pair_of(sampled, candidates, scores)
    if isinstance(best_worst, str):
        return best_worst
    rows = [best_worst]
    if every:
        values = scores.scores
        order = sorted(range(len(values)), key=lambda k: -values[k])
        twos = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :] if values[a] > values[b]]
        # Training drops the later pairs of a prompt unless --keep_duplicate_prompts is given.
        twos.sort(key=lambda two: values[two[1]] - values[two[0]])
        rows = [_row(sampled, candidates, scores, a, b) for a, b in twos]
    wide = [row for row in rows if row["score_chosen"] - row["score_rejected"] >= min_margin]
    return wide or "score_margin_below_threshold"


def _row(sampled: Sampled, candidates: Candidates, scores: Scores, best: int, worst: int) -> dict:
    """The preference row of two answers."""
    # Reversed, so that of equal answers the first sample is described.
    answer_of = {answer["text"].strip(): answer for answer in reversed(sampled.answers)}

    def sampling_facts(k: int) -> dict:
        return {key: answer_of[candidates.answers[k]].get(key) for key in ("tokens", "finish_reason")}

    return {
        "prompt": sampled.prompt.messages,
        "prompt_id": sampled.prompt.key,
        "chosen": [{"role": "assistant", "content": candidates.answers[best]}],
        "rejected": [{"role": "assistant", "content": candidates.answers[worst]}],
        # The targets of SPPO's loss.
        "win_chosen": scores.wins[best],
        "win_rejected": scores.wins[worst],
        "score_chosen": scores.scores[best],
        "score_rejected": scores.scores[worst],
        "sampled_chosen": sampling_facts(best),
        "sampled_rejected": sampling_facts(worst),
    }
