"""Votes to preference pairs: ties, both bad, agreement, disagreement; the votes files of a chat."""

import json

import pytest
from conftest import assert_one_line, write_jsonl

from preflab.chat.votes import VotesFile, judgements, read_votes, votes_path
from preflab.data.pair_rows import to_pair
from preflab.judging.vote_pairs import Judgement, preference_pairs, sentence
from utils.errors import UserError

PROMPT = [{"role": "user", "content": "Name a colour."}]


def vote(outcome, annotator="ann", answers=("Red.", "Blue."), both_bad=False, prompt="Name a colour."):
    messages = [{"role": "user", "content": prompt}]
    return Judgement(annotator, messages, answers, ("base", "tuned"), outcome, both_bad)


def texts(rows) -> list[tuple]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_ties_and_both_bad_make_no_pair():
    votes = [vote(1), vote(0, prompt="b"), vote(0.5, prompt="c"), vote(0.5, prompt="d", both_bad=True)]
    rows, counts = preference_pairs(votes)
    assert texts(rows) == [("Red.", "Blue."), ("Blue.", "Red.")]
    assert [row["chosen_model"] for row in rows] == ["base", "tuned"]
    assert {k: counts[k] for k in ("ties", "both_bad", "undecided", "pairs", "compared")} == {
        "ties": 1, "both_bad": 1, "undecided": 2, "pairs": 2, "compared": 4
    }  # fmt: skip


def test_two_annotators_who_disagree_are_counted():
    rows, counts = preference_pairs([vote(1), vote(0, "bob"), vote(1, prompt="b"), vote(1, "bob", prompt="b")])
    assert len(rows) == 1 and rows[0]["votes"] == 2 and rows[0]["votes_chosen"] == 2
    assert counts["disagreements"] == 1 and counts["undecided"] == 1 and counts["by_several"] == 2
    assert "1 with annotators who disagree" in " ".join(sentence(counts, "x.jsonl").split())


@pytest.mark.parametrize(
    ("outcomes", "least", "written"),
    # By hand: 2 of 3 votes are 0.667; a tie counts as a vote for neither.
    [
        ((1, 1, 0), 0.5, True),
        ((1, 1, 0), 0.66, True),
        ((1, 1, 0), 0.67, False),
        ((1, 0.5), 0.5, True),
        ((1, 0.5), 0.51, False),
        ((1, 0.5, 0.5), 0.5, False),
        ((1, 1), 1.0, True),
    ],
)
def test_agreement(outcomes, least, written):
    rows, counts = preference_pairs([vote(o, f"annotator {k}") for k, o in enumerate(outcomes)], least)
    assert bool(rows) is written and counts["low_agreement"] == (not written)


def test_last_vote_of_an_annotator_counts_in_either_order_of_the_answers():
    later = Judgement("ann", PROMPT, ("Blue.", "Red."), ("tuned", "base"), 1)
    rows, counts = preference_pairs([vote(1), later])
    assert texts(rows) == [("Blue.", "Red.")] and rows[0]["votes"] == 1 and counts["replaced"] == 1


def test_identical_answers_make_no_pair():
    rows, counts = preference_pairs([vote(1, answers=("Red.", "Red."))])
    assert rows == [] and counts["identical"] == 1


def test_rows_are_read_as_training_pairs():
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "A colour?"},
    ]
    (row,), _ = preference_pairs([Judgement("ann", conversation, ("Red.", "Blue."), ("base", "tuned"), 0)])
    pair = to_pair(json.loads(json.dumps(row)), "x")
    assert (pair.messages, pair.chosen, pair.rejected) == (conversation, "Blue.", "Red.")


def test_winner_of_three_beats_each_other_one():
    row = {"annotator": "ann", "prompt": PROMPT, "answers": {"base": "a", "tuned": "b", "other": "c"}}
    rows, _ = preference_pairs(judgements([{**row, "winner": "tuned", "both_bad": False}]))
    assert sorted(texts(rows)) == [("b", "a"), ("b", "c")]
    assert preference_pairs(judgements([{**row, "winner": None, "both_bad": True}]))[1]["both_bad"] == 3


def test_votes_are_appended_and_pairs_follow(tmp_path):
    path = tmp_path / "mine.jsonl"
    VotesFile(path, "ann").add(PROMPT, {"base": "Red.", "tuned": "Blue."}, "tuned")
    bob = VotesFile(path, "bob", 0.6)
    bob.held = True  # one process cannot hold the lock twice
    bob.add(PROMPT, {"base": "Red.", "tuned": "Blue."}, None)
    assert len(read_votes(votes_path(path))) == 2
    # 1 of 2 votes is below 0.6, and the earlier pair is gone.
    assert path.read_text() == "" and bob.counts["low_agreement"] == 1


def test_other_files_are_not_overwritten(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match="exists"):
        VotesFile(tmp_path / "mine.jsonl", "ann")


GOOD = {"annotator": "ann", "prompt": PROMPT, "answers": {"a": "x", "b": "y"}, "winner": "a", "both_bad": False}


@pytest.mark.parametrize(
    "change",
    [{"winner": "c"}, {"answers": {"a": "x"}}, {"both_bad": True}, {"prompt": "text"}, {"annotator": None}],
    ids=str,
)
def test_damaged_votes_are_named(change, tmp_path, call):
    write_jsonl(tmp_path / "v.jsonl", [GOOD, {**GOOD, **change}])
    code, _, err = call("chat", "--score", tmp_path / "v.jsonl", "--pairs", tmp_path / "p.jsonl")
    assert code == 2 and not (tmp_path / "p.jsonl").exists()
    assert_one_line(err, "v.jsonl line 2")


def test_score_joins_the_votes_of_several_people(tmp_path, call):
    other = {**GOOD, "prompt": [{"role": "user", "content": "b"}]}
    write_jsonl(tmp_path / "ann.jsonl", [GOOD, other])
    write_jsonl(tmp_path / "bob.jsonl", [{**GOOD, "annotator": "bob", "winner": "b"}, {**other, "annotator": "bob"}])
    args = ("--score", tmp_path / "ann.jsonl", tmp_path / "bob.jsonl", "--pairs", tmp_path / "p.jsonl")
    code, out, err = call("chat", *args)
    assert code == 0, err
    assert "1 preference pairs of 2 judged ones" in out and "1 with annotators who disagree" in " ".join(out.split())
    (row,) = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    assert row["prompt"][0]["content"] == "b" and row["votes_chosen"] == 2
    code, _, err = call("chat", *args)
    assert code == 2
    assert_one_line(err, "--pairs", "--overwrite")
