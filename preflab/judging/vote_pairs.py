"""Preference pairs out of people's votes, in the row format that dpo_train_human_preference.py reads."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.cache import cache_key
from utils.errors import UserError
from utils.tables import paragraphs

# A pair has a chosen answer where more votes prefer it than the other, and at least this share of all its votes.
LEAST_AGREEMENT = 0.5


@dataclass
class Judgement:
    """One person's judgement of two answers to one prompt.

    Attributes:
        prompt: the conversation in front of the answers.
        answers: the two texts, `a` and `b`.
        models: the names of their models.
        outcome: 1 where `a` is better, 0 where `b` is, 0.5 for a tie or where both are bad.
    """

    annotator: str
    prompt: list[dict]
    answers: tuple[str, str]
    models: tuple[str, str]
    outcome: float
    both_bad: bool = False


def check_agreement(share: float) -> None:
    """Raise UserError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"--min_agreement {share}: must be above 0 and at most 1")


def check_pairs_file(path: Path) -> None:
    """Raise UserError where --pairs is not the name of a JSON lines file."""
    if path.suffix != ".jsonl" or path.is_dir():
        raise UserError(f"--pairs {path}: give the name of a file that ends with .jsonl")


def preference_pairs(judgements: list[Judgement], least: float = LEAST_AGREEMENT) -> tuple[list[dict], dict]:
    """Rows of `{prompt, chosen, rejected, ...}` and counts.

    A pair of answers is written where more votes prefer one answer than the other, and these are at least the share
    `least` of the pair's votes. Ties and "both bad" count as votes for neither. Of several votes by one annotator on
    one pair, the last counts.

    Returns:
        (rows, counts). counts: judgements, replaced (by a later one of the same annotator), ties, both_bad, compared
        (pairs of answers), by_several (annotators), disagreements (pairs on which two annotators prefer different
        answers), identical (both answers are one text), undecided (no majority, ties included), low_agreement, pairs.
    """
    compared: dict[str, dict[str, Judgement]] = {}
    for judgement in judgements:
        # Of the sorted texts: the same two answers may be shown in either order.
        votes = compared.setdefault(cache_key([judgement.prompt, sorted(judgement.answers)]), {})
        votes[judgement.annotator] = judgement
    counts = Counter(judgements=len(judgements), compared=len(compared))
    rows = []
    for votes in compared.values():
        row, facts = _row(list(votes.values()), least)
        counts.update(facts)
        rows += [row] if row else []
    counts["replaced"] = len(judgements) - sum(map(len, compared.values()))
    names = ("judgements", "replaced", "ties", "both_bad", "compared", "by_several", "disagreements", "identical",
             "undecided", "low_agreement", "pairs")  # fmt: skip
    return rows, {name: counts[name] for name in names}


def _row(votes: list[Judgement], least: float) -> tuple[dict | None, Counter]:
    """The row of one pair of answers, or None, and what to count."""
    prefer = Counter(_preferred(vote) for vote in votes)
    facts = Counter(both_bad=sum(vote.both_bad for vote in votes), by_several=len(votes) > 1)
    facts["ties"] = prefer.pop(None, 0) - facts["both_bad"]
    facts["disagreements"] = len(prefer) > 1
    (best, wins), losses = (prefer.most_common(1) or [(None, 0)])[0], sum(prefer.values())
    losses -= wins
    if votes[0].answers[0] == votes[0].answers[1]:
        facts["identical"] = 1
    elif wins <= losses:
        facts["undecided"] = 1
    elif wins / len(votes) < least:
        facts["low_agreement"] = 1
    else:
        facts["pairs"] = 1
        vote = next(vote for vote in votes if _preferred(vote) == best)
        k = vote.answers.index(best)
        chosen, rejected = vote.answers[k], vote.answers[1 - k]
        return {
            "prompt": vote.prompt,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "chosen_model": vote.models[k],
            "rejected_model": vote.models[1 - k],
            "votes": len(votes),
            "votes_chosen": wins,
            "votes_rejected": losses,
        }, facts
    return None, facts


def _preferred(vote: Judgement) -> str | None:
    """The text that a vote prefers."""
    if vote.outcome == 0.5 or vote.both_bad:
        return None
    return vote.answers[0] if vote.outcome == 1 else vote.answers[1]


def sentence(counts: dict, path, least: float = LEAST_AGREEMENT) -> str:
    """What was written to `path`, what was not, and why."""
    left_out = {
        "undecided (ties, both bad or as many votes for one as for the other)": counts["undecided"],
        f"below --min_agreement {least:g}": counts["low_agreement"],
        "two identical answers": counts["identical"],
    }
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    return paragraphs(
        f"{counts['pairs']} preference pairs of {counts['compared']} judged ones"
        + (f" ({reasons})" if reasons else "")
        + f". {counts['judgements']} votes, {counts['ties']} ties, {counts['both_bad']} both bad; of"
        f" {counts['by_several']} pairs judged by several annotators, {counts['disagreements']} with annotators who"
        " disagree." + (f" Train with --dataset_name {path}" if counts["pairs"] else " No pair was written.")
    )
