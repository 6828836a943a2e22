"""Judging a battle: by one judge or a panel, audited or not, all prompts or until the verdict is certain enough."""

from dataclasses import dataclass, field

import numpy as np

from preflab.judging.audit_run import Labelled, audit_judges
from preflab.judging.battles import Battle, both_orders, judge_rows, rows_with_controls
from preflab.judging.judge_prompt import Judge
from preflab.judging.panel import Member, Panel, close, judge_with_members, panel_rows, panel_section, with_members
from utils.cache import ResultCache, cache_key, measured_work
from utils.confidence_sequence import Sequence, confidence_sequence
from utils.errors import is_main_process

# Prompts per batch of --stop_when: the sequence may be looked at after each, and a smaller batch saves more verdicts.
STOP_BATCH = 16


@dataclass
class Judged:
    """A battle's verdicts.

    Attributes:
        by_judge: `{judge: rows}`, the judge or the panel before its controls.
        rows: of `battle_rows.jsonl`.
        identity: of the judge or the panel.
        work: `{seconds, computed, of}` of the judging.
        sections: of the artifact: `panel`, `audit` and `stopping`, where there is one.
    """

    by_judge: dict[str, list[dict]]
    rows: list[dict]
    identity: dict
    work: dict
    sections: dict = field(default_factory=dict)

    @property
    def judge(self) -> str:
        """The name of the judge or the panel."""
        return next(iter(self.by_judge))


def judge_battle(
    battle: Battle, judges: list[Judge], controls: list[Judge], labelled: Labelled | None, stop_when: float | None, c
) -> Judged:
    """The verdicts of one judge, or of a panel of those that pass their audit (of all, where none does).

    Args:
        labelled: the pairs of the judge audit (`labelled_pairs`), None for no audit.
        stop_when: half the width, in points, at which judging stops; None to judge all prompts.
        c: eval_out, overwrite, seed.
    """
    sections, voting = {}, judges
    if labelled:
        sections["audit"] = audit_judges(labelled, judges, controls, c)
        passed = {name for name, member in sections["audit"].get("members", {}).items() if member["passed"]}
        voting = [judge for judge in judges if judge.name in passed] or judges
    with measured_work("judgements") as work:
        members, stopping = _in_batches(battle, judges, voting, stop_when, c)
    close(judges)
    work["of"] = sum(member.cost["of"] for member in members)
    if stopping:
        sections["stopping"] = stopping
    votes = [member for member in members if member.judge in voting]
    if len(judges) == 1:
        name, rows, identity = judges[0].name, members[0].rows, judges[0].identity()
    else:
        panel = Panel(voting, c.eval_out)
        name, rows, identity = panel.name, panel_rows(votes), panel.identity()
        # Statistics are the work of rank 0.
        if is_main_process():
            pair = ("tuned", "base") if ("tuned", "base") in battle.pairs else None
            sections["panel"] = panel_section(members, votes, pair, c.seed)
    places = {(row["prompt"], row["a"], row["b"]) for row in rows}
    items, control_rows = both_orders(battle.prompts, battle.answers, battle.pairs)
    shown = [k for k, row in enumerate(control_rows) if (row["prompt"], row["a"], row["b"]) in places]
    items, control_rows = [item for k in shown for item in items[2 * k : 2 * k + 2]], [control_rows[k] for k in shown]
    judged = {name: rows}
    judged |= {each.name: judge_rows(each, items, control_rows, c.eval_out, c.overwrite) for each in controls}
    written = rows_with_controls(judged)
    return Judged(judged, with_members(written, members) if len(judges) > 1 else written, identity, work, sections)


def _in_batches(
    battle: Battle, judges: list[Judge], voting: list[Judge], stop_when: float | None, c
) -> tuple[list[Member], dict | None]:
    """(every judge's rows in the prompts' order, the section `stopping`); without --stop_when in one batch."""
    if stop_when is None:
        return judge_with_members(judges, *both_orders(battle.prompts, battle.answers, battle.pairs), c), None
    # A random order, so that the prompts judged so far are a fair sample; seeded, so that a resumed call has the same.
    order = np.random.default_rng(c.seed).permutation(len(battle.prompts)).tolist()
    decision = _decision(battle, judges, voting, stop_when, c)
    earlier = decision.finished.get("decision", {})
    members: list[Member] = []
    for end in range(STOP_BATCH, len(order) + STOP_BATCH, STOP_BATCH):
        batch = order[end - STOP_BATCH : end]
        part = _subset(battle, batch)
        _extend(members, judge_with_members(judges, *part, c))
        sequence, reason = stop_reason(members, voting, battle.pairs, stop_when)
        done = min(end, len(order))
        # A decision once made is not made again: a verdict that was missing then may be there now.
        if done == earlier.get("prompts") or (reason and not earlier):
            break
    if earlier:
        reason = earlier["reason"]
    elif reason and is_main_process():
        decision.add("decision", {"prompts": done, "reason": reason})
    for member in members:
        member.rows.sort(key=lambda row: (row["prompt"], battle.pairs.index((row["a"], row["b"]))))
    return members, {
        "points": stop_when,
        "reason": reason,
        "judged": done,
        "of": len(order),
        "saved": 1 - done / len(order),
        "low": sequence.low,
        "high": sequence.high,
        "p": sequence.p,
        "n": sequence.n,
        "quantity": "difference" if _against_opponent(battle.pairs) else "rate",
    }


def _decision(battle: Battle, judges: list[Judge], voting: list[Judge], stop_when: float, c) -> ResultCache:
    """The cache of the decision to stop, which depends on judges, prompts, answers, their order and the target."""
    keys = [cache_key(prompt.messages) for prompt in battle.prompts]
    texts = {name: cache_key([answer and answer["text"] for answer in of]) for name, of in battle.answers.items()}
    identity = {
        "judges": [judge.identity() for judge in judges],
        "voting": [judge.name for judge in voting],
        "prompts": keys,
        "answers": texts,
        "pairs": battle.pairs,
        "seed": c.seed,
        "points": stop_when,
        "batch": STOP_BATCH,
    }
    return ResultCache(c.eval_out, "stopping", identity, c.overwrite)


def _subset(battle: Battle, prompts: list[int]) -> tuple[list, list[dict]]:
    """`both_orders` of some prompts, which keep their numbers."""
    answers = {name: [of[k] for k in prompts] for name, of in battle.answers.items()}
    items, rows = both_orders([battle.prompts[k] for k in prompts], answers, battle.pairs)
    return items, [{**row, "prompt": prompts[row["prompt"]]} for row in rows]


def _extend(members: list[Member], batch: list[Member]) -> None:
    """Add a batch's rows and cost to those before, member by member."""
    if not members:
        members += batch
        return
    for member, new in zip(members, batch, strict=True):
        member.rows += new.rows
        for name, count in new.cost.items():
            member.cost[name] = round(member.cost[name] + count, 3)


def _against_opponent(pairs: list[tuple[str, str]]) -> bool:
    """Whether base and tuned meet answers from a file instead of each other."""
    return any(a == "base" for a, _ in pairs) and any(a == "tuned" for a, _ in pairs)


def stop_reason(
    members: list[Member], voting: list[Judge], pairs: list[tuple[str, str]], points: float
) -> tuple[Sequence, str | None]:
    """The confidence sequence of the rows so far, in the order of judging, and why to stop: narrow, decided or None.

    The sequence is on the scale of the win rate of tuned against base; against an opponent on that of their difference,
    from -1 to 1.
    """
    votes = [member for member in members if member.judge in voting]
    rows = panel_rows(votes) if len(votes) > 1 else votes[0].rows
    outcomes: dict[int, dict] = {}
    for row in rows:
        if row["consistent"] is not None:
            outcomes.setdefault(row["prompt"], {})[row["a"], row["b"]] = row["consistent"]
    if _against_opponent(pairs):
        opponent = pairs[0][1]
        # A difference from -1 to 1 becomes an outcome from 0 to 1.
        x = [(1 + of["tuned", opponent] - of["base", opponent]) / 2 for of in outcomes.values()
             if ("tuned", opponent) in of and ("base", opponent) in of]  # fmt: skip
    else:
        main = ("tuned", "base") if ("tuned", "base") in pairs else pairs[0]
        x = [of[main] for of in outcomes.values() if main in of]
    sequence = confidence_sequence(x)
    scale = 200 if _against_opponent(pairs) else 100
    reason = "decided" if sequence.excludes_half else "narrow" if scale * sequence.half_width <= points else None
    if scale == 200:
        sequence = Sequence(2 * sequence.low - 1, 2 * sequence.high - 1, sequence.p, sequence.n)
    return sequence, reason
