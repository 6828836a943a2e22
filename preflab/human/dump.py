"""The answers of a study: every model answers the prompts, and the study's files are written."""

from preflab.data.prompts import load_prompts
from preflab.data.sources import reading
from preflab.evaluation.two_models import TwoModels
from preflab.human.study import STEMS, write_study
from preflab.judging.answers import answer_prompts_with_all, answerable, answering_models
from preflab.judging.battle_metrics import answer_metrics
from preflab.judging.battles import evaluated_prompts
from utils.artifacts import all_arguments
from utils.provenance import run_record


def answer_prompts(stage, comparison, args) -> tuple[list, dict[str, list[dict]], dict]:
    """Answer the prompts with base, tuned and the models of --models, sharded over all processes.

    Returns:
        (prompts, `{model: answers}`, what made them: the content of the candidates' .about.json).
    """
    c, models = comparison.args, TwoModels(comparison)
    source = {"name": args.prompts, "split": args.prompts_split, "config": args.prompts_config}
    source |= reading(c.columns, c.on_bad_row)
    prompts, data = load_prompts([source], args.category_key, c.limit)
    prompts = evaluated_prompts(comparison, prompts, data)
    answering = answering_models(models, args)
    # A prompt needs an answer of every model, so one refusal removes it for all.
    prompts, refused = answerable(answering, prompts)
    if refused:
        data["left_out"]["prompts refused by a chat template"] = refused
    answers = answer_prompts_with_all(models, answering, prompts, args.sampling(c.seed))
    about = {
        "stage": "human_eval_dump",
        # `answering` starts with base and tuned, which describe() covers.
        "model": {
            **models.describe(),
            "others": {model.name: model.identity for model in answering[len(models.sides) :]},
        },
        "sampling": args.sampling(c.seed),
        "metrics": {name: answer_metrics(by_model, c.seed) for name, by_model in answers.items()},
        "args": all_arguments(stage.arguments),
        "run": run_record(c.seed, stage.seconds, run_name=comparison.name, limit=c.limit),
        "data": data,
        # The candidates' file has no place for these, because its columns are prompt and models.
        "prompts": [{"where": p.source, "uid": p.uid, "category": p.category, "messages": p.messages} for p in prompts],
        "answers": {
            name: [{k: answer[k] for k in ("tokens", "finish_reason")} for answer in by_model]
            for name, by_model in answers.items()
        },
    }
    return prompts, answers, about


def write(comparison, args, prompts: list, answers: dict, about: dict, title: str) -> tuple[dict, dict]:
    """Write candidates, page and key; (key, paths of `candidates`, `page` and `key`)."""
    kinds = zip(("candidates", "page", "key"), STEMS, (".json", ".html", ".json"), strict=True)
    paths = {kind: comparison.path(stem, suffix) for kind, stem, suffix in kinds}
    settings = {k: getattr(args, k) for k in ("pairs_per_prompt", "repeat_share", "sides_seed")}
    settings["limit"] = comparison.args.limit
    return write_study(paths, prompts, answers, title, about, settings, comparison.args.overwrite), paths
