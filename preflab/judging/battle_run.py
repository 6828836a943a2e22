"""The work of eval_win_rate.py --battle: every model answers the same prompts, judges compare the answers."""

from dataclasses import dataclass

from preflab.data.prompts import load_answers, load_prompts
from preflab.evaluation.comparison import held_out_sources
from preflab.evaluation.two_models import TwoModels
from preflab.judging.answers import (
    AnsweringModel,
    answer_prompts_with_all,
    answerable,
    answering_models,
    given_answers,
)
from preflab.judging.battles import both_orders, judge_rows, pairings
from preflab.judging.judges import make_judge

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

    prompts: list
    answering: list[AnsweringModel]
    answers: dict[str, list[dict | None]]
    pairs: list[tuple[str, str]]
    data: dict

    @property
    def title(self) -> str:
        """The pairings and the number of prompts, for headings."""
        met = " vs ".join(self.pairs[0]) if len(self.pairs) == 1 else f"{len(self.pairs)} pairings"
        return f"{met}, {len(self.prompts)} prompts"


def make_judges(args, comparison_args) -> list:
    """The judge of `--judge`, then its controls. Raises UserError for a judge that cannot be made."""
    options = args.judge_options(comparison_args)
    return [make_judge(spec, args.judge_prompt, options) for spec in dict.fromkeys([args.judge, *CONTROLS])]


def answer_prompts(models: TwoModels, args) -> Battle:
    """Read the prompts and let base, tuned and `--models` answer them; read the answers of `--opponent_outputs`."""
    comparison = models.comparison
    sources = [{"name": args.prompts, "split": args.prompts_split, "config": args.prompts_config}]
    if args.prompts is None:
        sources, _ = held_out_sources(comparison.args, comparison.trained)
    prompts, data = load_prompts(sources, args.category_key, comparison.args.limit)
    answering = answering_models(models, args.models)
    names, opponent, answers, source = [answerer.name for answerer in answering], None, {}, None
    prompts, refused = answerable(answering, prompts)
    if refused:
        data["left_out"]["prompts refused by a chat template"] = refused
    if args.opponent_outputs:
        opponent, given, source = load_answers(args.opponent_outputs, prompts)
        opponent = opponent if opponent not in names else f"{opponent} (given)"
        answered = [k for k, answer in enumerate(given) if answer is not None]
        if len(answered) < len(prompts):
            data["left_out"][f"prompts without an answer of {opponent}"] = len(prompts) - len(answered)
        prompts = [prompts[k] for k in answered]
        answers[opponent] = given_answers([given[k] for k in answered], models.tokenizer)
    answers |= answer_prompts_with_all(models, answering, prompts, args.sampling(comparison.args.seed))
    return Battle(prompts, answering, answers, pairings(names, opponent), {**data, "opponent": source})


def judge_battle(battle: Battle, judges: list, eval_out: str, overwrite: bool) -> dict[str, list[dict]]:
    """{judge: one row per prompt and pairing}, each judged in both orders; the first judge comes first."""
    items, rows = both_orders(battle.prompts, battle.answers, battle.pairs)
    return {judge.name: judge_rows(judge, items, rows, eval_out, overwrite) for judge in judges}


def rows_with_controls(judged: dict[str, list[dict]]) -> list[dict]:
    """The first judge's rows, each with the score that every control gave it."""
    main, *controls = judged
    return [
        {**row, "controls": {name: judged[name][k]["consistent"] for name in controls}}
        for k, row in enumerate(judged[main])
    ]
