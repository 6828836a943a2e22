"""Panels: several judges, whose majority is one verdict (Verga et al. 2024, arXiv 2404.18796).

The panel reads every question in both orders, as each of its judges does. A judge that does not beat the length-only
baseline on labelled pairs (`preflab.judging.audit`) is reported, but has no vote.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from evalica import alpha
from pandas import DataFrame

from preflab.judging.battle_metrics import win_rate
from preflab.judging.battles import combine_orders, judge_rows
from preflab.judging.judge_prompt import Item, Judge, Verdict, unparsed
from preflab.judging.judges import judge_all
from preflab.judging.panel_report import panel_name
from utils.artifacts import metric
from utils.cache import measured_work
from utils.stats import bootstrap


def vote(verdicts: list[Verdict]) -> Verdict:
    """The verdict of several judges on one question: that of the majority, a tie where as many prefer either answer.

    The probability is the mean of their scores: judges' own probabilities have no common scale. A judge without a
    verdict has no vote, which the note counts.
    """
    scores = [verdict.first for verdict in verdicts if verdict.first is not None]
    if not scores:
        return unparsed(verdicts[0].error)
    first, second = sum(score > 0.5 for score in scores), sum(score < 0.5 for score in scores)
    missing = len(verdicts) - len(scores)
    return Verdict(
        0.5 + 0.5 * ((first > second) - (first < second)),
        sum(scores) / len(scores),
        label="identical" if all(verdict.label == "identical" for verdict in verdicts) else None,
        note=f"{missing} of {len(verdicts)} judges had no verdict" if missing else None,
    )


class Panel:
    """A judge that is the majority of its members. Verdicts are cached by member."""

    # Nothing is computed beyond the members' verdicts, which every process reads from their caches.
    instant = True

    def __init__(self, members: list[Judge], eval_out: str, overwrite: bool = False):
        self.members, self.eval_out, self.overwrite = members, eval_out, overwrite
        self.name = panel_name([member.name for member in members])

    def identity(self) -> dict:
        return {"judge": self.name, "members": [member.identity() for member in self.members]}

    def judge(self, items: list[Item]) -> Iterator[tuple[int, Verdict]]:
        verdicts = [judge_all(member, items, self.eval_out, self.overwrite) for member in self.members]
        yield from enumerate(map(vote, map(list, zip(*verdicts, strict=True))))

    def close(self) -> None:
        """Release what the members hold."""
        close(self.members)


def close(judges: list[Judge]) -> None:
    """Release the memory of judges that hold some beyond their own object, as those with vLLM do."""
    for judge in judges:
        if hasattr(judge, "close"):
            judge.close()


# ------------------------------------------------------------------------------------------------------------- battles


@dataclass
class Member:
    """A judge of a panel and its work on a battle.

    Attributes:
        rows: its judged rows (`preflab.judging.battles.judge_rows`).
        cost: `{seconds, computed, of}` of its verdicts; a server's judge also has the tokens it read and wrote.
    """

    judge: Judge
    rows: list[dict] = field(repr=False, default_factory=list)
    cost: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.judge.name


@contextmanager
def measured_cost(judge: Judge) -> Iterator[dict]:
    """Measure the verdicts computed inside (`measured_work`) and a server's tokens for them. The caller sets `of`."""
    usage = getattr(judge, "usage", None)
    before = dict(usage or {})
    with measured_work("judgements") as entry:
        yield entry
    if usage is not None:
        entry |= {name: count - before.get(name, 0) for name, count in usage.items()}


def judge_with_members(judges: list[Judge], items: list[Item], rows: list[dict], c) -> list[Member]:
    """Every judge's rows on the items of `both_orders`, and what they cost.

    Several judges are closed one after the other, a single one by the caller. `c`: eval_out, overwrite.
    """
    members = []
    for judge in judges:
        with measured_cost(judge) as cost:
            judged = judge_rows(judge, items, rows, c.eval_out, c.overwrite)
        # Two vLLM judges rarely fit into one GPU's memory. A single judge may have another batch to read.
        if len(judges) > 1:
            close([judge])
        cost["of"] = 0 if judge.instant else len(items)
        members.append(Member(judge, judged, cost))
    return members


def panel_rows(members: list[Member]) -> list[dict]:
    """The rows of a battle under the members' majority in each order, with each member's outcome."""
    rows = []
    for of_row in zip(*(member.rows for member in members), strict=True):
        orders = [vote([Verdict(**row["orders"][k]) for row in of_row]) for k in range(2)]
        rows.append({**of_row[0], **combine_orders(*orders)})
    return rows


def with_members(rows: list[dict], members: list[Member]) -> list[dict]:
    """Rows of a battle with the outcome under every member, those without a vote included."""
    return [
        {**row, "members": {member.name: member.rows[k]["consistent"] for member in members}}
        for k, row in enumerate(rows)
    ]


def panel_section(members: list[Member], voting: list[Member], pair: tuple[str, str] | None, seed: int) -> dict:
    """The artifact's section of a panel.

    Args:
        voting: the members whose verdicts count.
        pair: the pairing whose rates are given, or None for all rows together.

    Returns:
        members: per judge its `win_rate` and test, `without` (the panel's rate without it, where it has a vote and is
        not alone), `votes` (whether it has one) and `cost`; agreement: `alpha`, Krippendorff's (2018), of the outcomes
        loss, tie and win under all members, and `alpha_voting` of those with a vote.
    """

    def rate(rows: list[dict]) -> dict:
        outcomes = [row["consistent"] for row in rows if pair in (None, (row["a"], row["b"]))]
        outcomes = np.array([outcome for outcome in outcomes if outcome is not None])
        return win_rate(outcomes, seed) if len(outcomes) else {}

    section = {}
    for member in members:
        others = [other for other in voting if other is not member]
        section[member.name] = {
            **rate(member.rows),
            "votes": member in voting,
            "cost": member.cost,
            **({"without": rate(panel_rows(others))} if member in voting and others else {}),
        }
    return {"members": section, "agreement": panel_agreement(members, voting, seed)}


def panel_agreement(members: list[Member], voting: list[Member], seed: int) -> dict:
    """Krippendorff's alpha of the members' outcomes on prompts; empty for one member."""

    def ratings(of: list[Member]) -> np.ndarray:
        # One row per prompt and pairing, one column per judge, NaN without a verdict.
        return np.array([[np.nan if (y := row["consistent"]) is None else y for row in m.rows] for m in of], float).T

    if len(members) < 2:
        return {}
    prompts = [row["prompt"] for row in members[0].rows]
    of = {"alpha": members, **({"alpha_voting": voting} if 1 < len(voting) < len(members) else {})}
    return {name: krippendorff_alpha(ratings(judges), "ordinal", seed, prompts, 500) for name, judges in of.items()}


def krippendorff_alpha(
    ratings: np.ndarray, distance: str, seed: int, groups=None, resamples: int | None = None
) -> dict:
    """Krippendorff's alpha with an interval over units; NaN where all ratings are equal.

    Args:
        ratings: shape (units, annotators), NaN for a missing rating.
        distance: nominal or ordinal.
        groups: the group of each unit (its prompt), which is resampled as one.
        resamples: of a percentile interval; default: the BCa interval of `bootstrap`.
    """
    # Units with one rating carry no information about agreement.
    rated = (~np.isnan(ratings)).sum(1) >= 2
    ratings, groups = ratings[rated], None if groups is None else [groups[k] for k in np.flatnonzero(rated)]
    if len(np.unique(ratings[~np.isnan(ratings)])) < 2:
        return metric(float("nan"), n=len(ratings))
    options = {"resamples": resamples, "bca": False} if resamples else {}
    # evalica expects one row per annotator, hence the transpose.
    return bootstrap(
        ratings,
        seed,
        statistic=lambda rows: alpha(DataFrame(rows.T), distance=distance).alpha,
        groups=groups,
        **options,
    )
