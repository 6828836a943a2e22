"""Battles: every model answers the same prompts, and judges compare the answers in both orders."""

from dataclasses import dataclass
from itertools import combinations

from preflab.data.prompts import Prompt, load_answers, load_prompts, prompt_columns
from preflab.data.sources import reading
from preflab.evaluation.comparison import held_out_sources
from preflab.evaluation.trained_prompts import without_trained
from preflab.evaluation.two_models import TwoModels
from preflab.judging.answers import (
    AnsweringModel,
    answer_notes,
    answer_prompts_with_all,
    answerable,
    answering_models,
    given_answers,
)
from preflab.judging.judge_prompt import Item, Judge, Verdict
from preflab.judging.judges import judge_all, make_judge, notes_of

CONTROLS = ("longer", "random")


@dataclass
class Battle:
    """Answers of all models to the same prompts, and which models meet.

    Attributes:
        prompts: the prompts that every model could answer.
        answering: the models that answered here, base and tuned first.
        answers: {model: one answer per prompt}; answers read from a file come first.
        pairs: the pairings, as model names (a, b).
        data: what was read, what was left out, and the source of the opponent's answers.
    """

    prompts: list[Prompt]
    answering: list[AnsweringModel]
    answers: dict[str, list[dict | None]]
    pairs: list[tuple[str, str]]
    data: dict

    @property
    def names(self) -> list[str]:
        """The names of the models that answered here."""
        return [model.name for model in self.answering]

    @property
    def title(self) -> str:
        """The pairings and the number of prompts, for headings."""
        pairings_text = " vs ".join(self.pairs[0]) if len(self.pairs) == 1 else f"{len(self.pairs)} pairings"
        return f"{pairings_text}, {len(self.prompts)} prompts"


def make_judges(args, comparison_args) -> tuple[list[Judge], list[Judge]]:
    """(the judges of `--judge`, their controls). Raises UserError for a judge that cannot be made."""
    options = args.judge_options(comparison_args)
    # A control that is the judge itself is not its own control.
    controls = [name for name in CONTROLS if [name] != args.judges]
    return tuple([make_judge(spec, args.judge_prompt, options) for spec in specs] for specs in (args.judges, controls))


def answer_prompts(models: TwoModels, args) -> Battle:
    """Read the prompts and let base, tuned and `--models` answer them; read the answers of `--opponent_outputs`."""
    comparison = models.comparison
    sources = [
        {
            "name": args.prompts,
            "split": args.prompts_split,
            "config": args.prompts_config,
            **reading(comparison.args.columns, comparison.args.on_bad_row),
        }
    ]
    own = False
    if args.prompts is None:
        sources, own = held_out_sources(comparison.args, comparison.trained)
    columns = comparison.args.columns or sources[0].get("columns")
    if args.opponent_outputs:
        sources = [{**source, "columns": prompt_columns(source.get("columns"))} for source in sources]
    prompts, data = load_prompts(sources, args.category_key, comparison.args.limit)
    prompts = evaluated_prompts(comparison, prompts, data, own)
    answering = answering_models(models, args)
    names, opponent, answers, source = [model.name for model in answering], None, {}, None
    prompts, refused = answerable(answering, prompts)
    if refused:
        data["left_out"]["prompts refused by a chat template"] = refused
    if args.opponent_outputs:
        opponent, given, source = load_answers(args.opponent_outputs, prompts, columns)
        # Rows and metrics are keyed by name, and the file may name its model base or tuned.
        opponent = opponent if opponent not in names else f"{opponent} (given)"
        answered = [k for k, answer in enumerate(given) if answer is not None]
        if len(answered) < len(prompts):
            data["left_out"][f"prompts without an answer of {opponent}"] = len(prompts) - len(answered)
        prompts = [prompts[k] for k in answered]
        # Counted with the tokenizer of base and tuned, so that lengths are comparable.
        answers[opponent] = given_answers([given[k] for k in answered], models.tokenizer)
    answers |= answer_prompts_with_all(models, answering, prompts, args.sampling(comparison.args.seed))
    notes = [f"{name}: {note}" for name in names for note in answer_notes(answers[name])]
    if notes:
        data["answer_notes"] = notes
    return Battle(prompts, answering, answers, pairings(names, opponent), {**data, "opponent": source})


def evaluated_prompts(comparison, prompts: list[Prompt], data: dict, own: bool = False) -> list[Prompt]:
    """The prompts that the compared models were not trained on (`without_trained`); records in `data` what was found.

    Args:
        data: of `load_prompts`. own: whether the run held these prompts out itself.
    """
    check = without_trained(comparison, prompts, own, "prompts")
    if check.dropped:
        data["left_out"]["prompts that the run was trained on"] = check.dropped
        data["trained_on"] = check.note
    if check.not_held_out:
        data["not_held_out"] = check.not_held_out
    return check.items


def pairings(names: list[str], opponent: str | None) -> list[tuple[str, str]]:
    """Which models meet, as (a, b): every two of `names`, the later against the earlier, or each against `opponent`."""
    if opponent:
        return [(name, opponent) for name in names]
    # `a` is the later model, so that win rates read as tuned against base.
    return [(b, a) for a, b in combinations(names, 2)]


def both_orders(
    prompts: list[Prompt], answers: dict[str, list[dict | None]], pairs: list[tuple[str, str]]
) -> tuple[list[Item], list[dict]]:
    """The judge's items, each pair of answers in both orders.

    Returns:
        (items, rows): items 2k and 2k + 1 belong to rows[k]; in the first of them `a` is in the first slot.
    """
    items, rows = [], []
    for number, prompt in enumerate(prompts):
        for a, b in pairs:
            answer_a, answer_b = answers[a][number], answers[b][number]
            if answer_a is None or answer_b is None:
                continue
            items += [
                Item(prompt, answer_a["text"], answer_b["text"]),
                Item(prompt, answer_b["text"], answer_a["text"]),
            ]
            rows.append(
                {
                    "prompt": number,
                    "where": prompt.source,
                    "category": prompt.category,
                    "text": prompt.text,
                    "a": a,
                    "b": b,
                    "answer_a": answer_a,
                    "answer_b": answer_b,
                }
            )
    return items, rows


def judge_rows(judge: Judge, items: list[Item], rows: list[dict], eval_out: str, overwrite: bool) -> list[dict]:
    """The rows of `both_orders` with the judge's verdicts on their items, combined over both orders."""
    # Verdicts 2k and 2k + 1 are the two orders of rows[k].
    verdicts = judge_all(judge, items, eval_out, overwrite)
    return [{**row, **combine_orders(*verdicts[2 * k : 2 * k + 2])} for k, row in enumerate(rows)]


def combine_orders(first: Verdict, second: Verdict) -> dict:
    """Combine the verdicts on one pair of answers: `a` in the first slot, then in the second.

    Returns:
        orders: both verdicts.
        consistent: score of `a` (1 win, 0 loss) by FastChat's rule: a tie if the orders disagree.
        average: mean score of `a` over both orders.
        probability: mean probability that `a` is better; None if the judge gives none.
        flipped: whether the orders disagree.
        votes: [votes for `a`, all votes], strong verdicts weighted.
        All are None if an order has no verdict.
    """
    orders = {"orders": [first.__dict__, second.__dict__]}
    if first.first is None or second.first is None:
        return {**orders, "consistent": None, "average": None, "probability": None, "flipped": None, "votes": None}
    # In the second order `a` is in the second slot, so its score is the complement.
    score_1, score_2 = first.first, 1 - second.first
    has_probability = first.probability is not None and second.probability is not None
    return {
        **orders,
        # A win counts only if it holds in both orders (Zheng et al. 2023, MT-bench, section 3.4).
        "consistent": score_1 if score_1 == score_2 else 0.5,
        "average": (score_1 + score_2) / 2,
        "probability": (first.probability + 1 - second.probability) / 2 if has_probability else None,
        "flipped": score_1 != score_2,
        "votes": [score_1 * first.weight + score_2 * second.weight, first.weight + second.weight],
    }


def judge_notes(rows: list[dict]) -> list[str]:
    """What the judge gave up for its verdicts on these rows (`notes_of`)."""
    return notes_of([verdict for row in rows for verdict in row["orders"]])


def rows_with_controls(judged: dict[str, list[dict]]) -> list[dict]:
    """The first judge's rows, each with the score that every control gave it."""
    # Every judge has the same rows in the same order, so position k is the same battle.
    main, *controls = judged
    return [
        {**row, "controls": {name: judged[name][k]["consistent"] for name in controls}}
        for k, row in enumerate(judged[main])
    ]
