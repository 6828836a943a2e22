"""Few votes and many verdicts: a judge reads every pair of answers, people vote on some of them.

The judge's bias is measured where there are votes, and corrected (utils.prediction_powered).
"""

import numpy as np

from preflab.data.prompts import Prompt
from preflab.human.metrics import by_prompt, counted_votes
from preflab.human.study import COLUMN_OF
from preflab.judging.battles import both_orders
from preflab.judging.judge_prompt import Judge
from preflab.judging.judges import make_judge
from preflab.judging.panel import close, judge_with_members
from utils.errors import UserError
from utils.prediction_powered import prediction_powered
from utils.stats import share

MAIN = ("tuned", "base")


def make_judges(args, c, about: dict) -> list[Judge]:
    """The judges of --judge; none without it.

    Raises:
        UserError: a judge that cannot be made, or a study without its prompts as messages.
    """
    if not args.judge:
        return []
    if not all("messages" in prompt for prompt in about["prompts"]):
        raise UserError(
            "--judge: the study's .about.json has no messages of its prompts (an earlier version wrote it); make the"
            " page again with the same command, which keeps the study and its votes valid"
        )
    return [make_judge(spec, args.judge_prompt, args.judge_options(c)) for spec in args.judges]


def judged_pairs(judges: list[Judge], candidates: list[dict], about: dict, c) -> dict:
    """The judges' scores of tuned against base on every prompt whose answers differ.

    Returns:
        judges: identities; cost: of each; scores: {prompt: mean of the judges' probabilities (of their verdicts, where
        they give none) that tuned is better, both orders}; unparsed: prompts where a judge had no verdict.
    """
    prompts = [Prompt(prompt["messages"], prompt.get("where", "")) for prompt in about["prompts"]]
    # An answer is judged by its text alone.
    answers = {name: [{"text": row[COLUMN_OF.get(name, name)]} for row in candidates] for name in MAIN}
    items, rows = both_orders(prompts, answers, [MAIN])
    # Identical answers are not on the page either.
    different = [k for k, row in enumerate(rows) if row["answer_a"]["text"] != row["answer_b"]["text"]]
    items, rows = [item for k in different for item in items[2 * k : 2 * k + 2]], [rows[k] for k in different]
    members = judge_with_members(judges, items, rows, c)
    close(judges)
    scores = {}
    for of_row in zip(*(member.rows for member in members), strict=True):
        values = [row["probability"] if row["probability"] is not None else row["average"] for row in of_row]
        if None not in values:
            scores[of_row[0]["prompt"]] = float(np.mean(values))
    return {
        "judges": {member.name: member.judge.identity() for member in members},
        "cost": {member.name: member.cost for member in members},
        "scores": scores,
        "unparsed": len(rows) - len(scores),
    }


def add(sections: dict, rows: list[dict], judged: dict, seed: int) -> None:
    """Add the prediction-powered win rate of tuned against base to the sections of a scored study, if it has votes.

    Args:
        sections: from `preflab.human.metrics.summarise`. rows: from `preflab.human.votes.unblind`.
        judged: from `judged_pairs`.
    """
    scores = judged.pop("scores")
    units = by_prompt([row for row in counted_votes(rows) if (row["a"], row["b"]) == MAIN])
    # Prompts without a verdict have votes that the correction cannot use: the rate would mix two sets of prompts.
    voted = {unit["prompt"]: unit["consistent"] for unit in units if unit["prompt"] in scores}
    if not voted:
        return
    further = [score for prompt, score in scores.items() if prompt not in voted]
    result = prediction_powered(list(voted.values()), [scores[prompt] for prompt in voted], further)
    saved = max(0.0, result.as_precise_as - len(voted))
    sections["powered"] = {
        **judged,
        "weight": result.weight,
        "voted": len(voted),
        "judged": len(scores),
        "as_precise_as": result.as_precise_as,
        "votes_saved": saved,
        "share_saved": saved / result.as_precise_as if result.as_precise_as else 0.0,
    }
    sections["metrics"] |= {
        "win_rate_prediction_powered": result.rate,
        "p_win_rate_prediction_powered_is_half": result.p,
        "win_rate_of_judge": share(list(scores.values()), seed),
    }
