"""The shipped preference pairs are what data/README.md says."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

from preflab.data.preferences import load_pairs
from preflab.evaluation.surface_baseline import bag_of_words_scores
from utils.stats import pairwise_correct

FOLDER = ROOT / "data" / "quickstart_prefs"
ROWS = {s: [json.loads(line) for line in (FOLDER / f"{s}.jsonl").read_text().splitlines()] for s in ("train", "test")}
CATEGORIES = {
    "facts", "explaining", "writing", "formatting", "code", "arithmetic", "advice", "refusing", "multi-turn", "system",
}  # fmt: skip


def answers(split):
    return [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in ROWS[split]]


def prompt_words(row) -> set[str]:
    return set(" ".join(m["content"] for m in row["chosen"][:-1] if m["role"] == "user").lower().split())


def test_counts_schema_and_variety():
    assert len(ROWS["train"]) >= 200 and len(ROWS["test"]) >= 100
    for split, rows in ROWS.items():
        assert {row["category"] for row in rows} == CATEGORIES, split
        assert len({row["prompt_id"] for row in rows}) == len(rows)
        for row in rows:
            assert row["chosen"][:-1] == row["rejected"][:-1] and row["messages"] == row["chosen"] and row["flaw"]
            assert row["score_chosen"] > row["score_rejected"]
            assert row["prompt"] == next(m["content"] for m in row["chosen"] if m["role"] == "user")
    turns = [len(row["chosen"]) for rows in ROWS.values() for row in rows]
    assert sum(n > 3 for n in turns) >= 10
    assert sum(row["chosen"][0]["role"] == "system" for rows in ROWS.values() for row in rows) >= 10


def test_no_filter_drops_a_shipped_row():
    for split, rows in ROWS.items():
        data = load_pairs([{"name": str(FOLDER), "split": split}])
        assert len(data.pairs) == len(rows) and not data.dropped


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_short_without_length_bias(split):
    lengths = np.array([[len(text.split()) for text in pair] for pair in answers(split)])
    assert lengths.max() <= 80
    assert 0.45 <= (lengths[:, 0] > lengths[:, 1]).mean() <= 0.55


def test_splits_share_no_similar_prompt():
    for test_row in ROWS["test"]:
        words = prompt_words(test_row)
        for train_row in ROWS["train"]:
            other = prompt_words(train_row)
            assert len(words & other) / len(words | other) < 0.6, (test_row["prompt"], train_row["prompt"])


def test_surface_baseline_is_at_most_65_percent():
    scores = bag_of_words_scores(answers("train"), answers("test"))
    accuracy = pairwise_correct(scores, np.zeros(len(scores))).mean()
    assert accuracy <= 0.65, accuracy
    # The classifier itself works: it finds a word that gives the label away.
    labelled = (
        [(f"{c} good", f"{r} bad") for c, r in answers("train")],
        [(f"{c} good", f"{r} bad") for c, r in answers("test")],
    )
    assert pairwise_correct(bag_of_words_scores(*labelled), np.zeros(len(scores))).mean() > 0.95


def test_reference_prompts_are_balanced_and_new():
    path = ROOT / "data/eval_prompts/reference.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 60 and len({row["instruction"] for row in rows}) == 60
    assert set(Counter(row["category"] for row in rows).values()) == {5}
    others = [prompt_words(pair) for pairs in ROWS.values() for pair in pairs]
    for row in rows:
        words = set(row["instruction"].lower().split())
        assert max(len(words & other) / len(words | other) for other in others) < 0.5, row["instruction"]
