"""Did preference training help? Win rate on held-out pairs, and battles of base against tuned under a judge.

    python eval_win_rate.py                                                  # the quickstart run, CPU, 2 cores
    python eval_win_rate.py --run_name gemma-2b-it-dpo                       # any run below checkpoints/
    python eval_win_rate.py --base_model google/gemma-2b-it --adapter_path checkpoints/checkpoint-7000
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml eval_win_rate.py --run_name gemma-2b-it-dpo
    python eval_win_rate.py --battle --judge longer                          # answers compared instead of rewards
    python eval_win_rate.py --config configs/battle_arena_hard.yaml          # Arena-Hard v0.1

Reward mode: in what share of held-out pairs is the implicit reward, beta × (log-prob under tuned - under base), higher
for the chosen answer, and how much better is that than the base model's own ranking? Writes win_rate.json,
win_rate_rows.jsonl and win_rate.png to eval_out/<run_name>/.

Battle mode (--battle): both models answer the same prompts, a judge compares the answers in both orders. Writes
battle.json, battle_rows.jsonl and battle.png.

The keys that matter (YAML keys and flags are the same; dashes and underscores both work; --help_all lists every key):

  models   --run_name NAME | --base_model ID --adapter_path FOLDER | --base_model ID --tuned_model ID|FOLDER
           --dtype float32|bfloat16|float16   --load_in_4bit   --attn_implementation   --base_adapter FOLDER|none
  data     --dataset_name ID|FILE|FOLDER --split test_prefs   --max_length 1024   --limit N
           left out: what the tuned model's run held out, else UltraFeedback's test_prefs
  reward   --beta 0.1   --expected FILE (the trainer's own eval metrics, to be found again within 1e-3)
  battle   --judge hf:MODEL|openai:MODEL@URL|rm:MODEL|longer|random   --judge_prompt configs/judges/pairwise.yaml
           --prompts ID|FILE --prompts_split test   --max_new_tokens 256 --temperature 0 --top_p 1
           --models name=FOLDER ...   --opponent_outputs FILE   --published FILE
  run      --batch_tokens N   --batch_size N   --seed 42   --output_dir DIR | --output_json FILE   --overwrite

What was scored, answered or judged is kept as it comes: the same command goes on where another call stopped.
"""

from dataclasses import dataclass

from preflab.evaluation.arguments import ComparisonArguments, JudgeArguments
from utils.cli import option, quick_help
from utils.errors import UserError, is_main_process, run


@dataclass
class WinRateArguments(JudgeArguments):
    """Keys of this script."""

    battle: bool = option("Compare answers under a judge instead of rewards.", False)
    beta: float | None = option("Scale of the implicit reward (default: the run's, else 0.1).")
    expected: str | None = option(
        "The trainer's own eval metrics: train_log.jsonl, trainer_state.json, eval_results.json."
    )
    expected_batch_size: int | None = option(
        "per_device_eval_batch_size behind --expected (default: the run's, else 8)."
    )
    expected_processes: int | None = option("Processes behind --expected (default: the run's, else 1).")
    length_bias_splits: list[str] | None = option("Further splits whose length bias is reported.")
    prompts: str | None = option(
        "Battle: prompts, a hub id, file or hf:// file (default: the held-out pairs' prompts)."
    )
    prompts_split: str = option("Battle: split of --prompts.", "test")
    prompts_config: str | None = option("Battle: configuration of --prompts.")
    category_key: str = option("Battle: column that names a prompt's category.", "category")
    models: list[str] | None = option("Battle: further models, name=PATH each.")
    opponent_outputs: str | None = option("Battle: a file of given answers that base and tuned meet.")
    published: str | None = option("Battle: YAML of published scores to print beside.")
    judge_prompt: str = option("What the judge is asked.", "configs/judges/pairwise.yaml")


def implicit_rewards(comparison, models, args):
    """Held-out pairs scored under both models: (data, rows, speed, counts of what was cut)."""
    from preflab.evaluation.held_out import held_out_pairs
    from preflab.evaluation.logprob_scoring import Sequence, score_sequences
    from preflab.evaluation.rewards import reward_rows

    data, ids, cut = held_out_pairs(comparison, models.tokenizer)
    sequences = [
        Sequence(row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"]))
        for row in ids
        for side in ("chosen", "rejected")
    ]

    def summed(index, scores):
        return {"base": float(scores.base.sum()), "tuned": float(scores.tuned.sum())}

    found, speed = score_sequences(models, sequences, summed, "win-rate")
    scores = [
        {
            "row": i,
            "chosen": chosen["tuned"],
            "rejected": rejected["tuned"],
            "ref_chosen": chosen["base"],
            "ref_rejected": rejected["base"],
        }
        for i, (chosen, rejected) in enumerate(zip(found[::2], found[1::2], strict=True))
    ]
    rows = reward_rows(scores, args.beta)
    for row, pair, tokens in zip(rows, data.pairs, ids, strict=True):
        row |= {f"tokens_{part}": len(tokens[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")}
        row |= {"where": pair.source, "score_chosen": pair.score_chosen, "score_rejected": pair.score_rejected}
    return data, rows, speed, cut


def trainers_figures(args, comparison):
    """What --expected holds, and the batching behind it, read before anything is scored; None without it."""
    from preflab.evaluation.reward_slices import read_expected, training_batches

    if args.expected is None:
        return None
    trained = comparison.trained
    if trained.get("ld_alpha") is not None:
        raise UserError(
            "--expected: the run's ld_alpha discounts log-probabilities, so its metrics are of another kind"
        )
    if trained.get("limit") != comparison.args.limit:
        raise UserError(
            f"--expected: the run used --limit {trained.get('limit')}, this call {comparison.args.limit}: give the same"
        )
    batch, processes = training_batches(args.expected)
    return (
        read_expected(args.expected, comparison.step),
        args.expected_batch_size or batch or 8,
        args.expected_processes or processes or 1,
    )


def reward_mode(comparison, args, started):
    """Win rate by implicit rewards: score, compute, write, print."""
    import time

    from preflab.evaluation.comparison import was_trained_on
    from preflab.evaluation.held_out import left_out, length_bias
    from preflab.evaluation.reward_slices import calibration_bins, compare_expected, margins, slices, win_rate_metrics
    from preflab.evaluation.two_models import TwoModels
    from preflab.evaluation.win_rate_report import conclude, win_rate_figure
    from utils.artifacts import all_arguments, envelope, write_json, write_rows
    from utils.provenance import run_record

    models = TwoModels(comparison)
    comparison.ensure_same_evaluation("win_rate", [comparison.args, args])
    trainers = trainers_figures(args, comparison)
    bias = length_bias(comparison, models.tokenizer, args.length_bias_splits or []) if is_main_process() else {}
    data, rows, speed, cut = implicit_rewards(comparison, models, args)
    if not is_main_process():
        return
    seed = comparison.args.seed
    metrics = win_rate_metrics(rows, args.beta, data.dropped, seed)
    parts, bins = slices(rows, seed), calibration_bins(margins(rows), seed)
    expected = compare_expected(rows, *trainers) if trainers else None
    title = f"{comparison.name}: {comparison.names['tuned']} against {comparison.names['base']}"
    seen = was_trained_on(comparison.args, comparison.trained)
    text, verdict = conclude(metrics, parts, bias, expected, title, left_out(data, cut), seen)

    path = comparison.path
    write_rows(path("win_rate", ".jsonl", rows=True), rows)
    win_rate_figure(path("win_rate", ".png"), rows, bins, f"{title}, {len(rows)} held-out pairs")
    summary = envelope(
        "win_rate",
        models.describe(),
        metrics,
        all_arguments([comparison.args, args]),
        run_record(seed, time.monotonic() - started, run_name=comparison.name, limit=comparison.args.limit),
        claim=verdict,
        text=text,
        slices=parts,
        calibration=bins,
        length_bias=bias,
        expected=expected,
        scoring=speed,
        data={**data.summary(), "truncation": cut},
    )
    write_json(path("win_rate", ".json"), summary)
    print(text)
    print(f"\nwrote {path('win_rate', '.json')}, {path('win_rate', '.jsonl', rows=True)}, {path('win_rate', '.png')}")
    if expected and not expected["agrees"]:
        raise UserError(f"--expected {args.expected}: the trainer's figures do not come out again (table above)")


def answers_and_pairings(args, comparison, models):
    """Prompts, every model's answers to them, who meets whom, and what was read: base and tuned come first."""
    from preflab.data.prompts import load_answers, load_prompts
    from preflab.evaluation.comparison import held_out_sources
    from preflab.judging.answers import answer_prompts_with_all, answerable, answering_models, given_answers
    from preflab.judging.battles import pairings

    c = comparison.args
    sources = [{"name": args.prompts, "split": args.prompts_split, "config": args.prompts_config}]
    if args.prompts is None:
        sources, _ = held_out_sources(c, comparison.trained)
    prompts, read = load_prompts(sources, args.category_key, c.limit)
    answering = answering_models(models, args.models)
    names, opponent, answers, source = [answerer.name for answerer in answering], None, {}, None
    prompts, refused = answerable(answering, prompts)
    if refused:
        read["left_out"]["prompts refused by a chat template"] = refused
    if args.opponent_outputs:
        opponent, given, source = load_answers(args.opponent_outputs, prompts)
        opponent = opponent if opponent not in names else f"{opponent} (given)"
        met = [k for k, answer in enumerate(given) if answer is not None]
        if len(met) < len(prompts):
            read["left_out"][f"prompts without an answer of {opponent}"] = len(prompts) - len(met)
        prompts = [prompts[k] for k in met]
        answers[opponent] = given_answers([given[k] for k in met], models.tokenizer)
    answers |= answer_prompts_with_all(models, answering, prompts, args.sampling(c.seed))
    return prompts, answering, answers, pairings(names, opponent), {**read, "opponent": source}


def battle_mode(comparison, args, started):
    """Battles under a judge: answer, judge in both orders, compute, write, print."""
    import time

    from preflab.evaluation.two_models import TwoModels
    from preflab.judging.battle_report import battle_figure, battle_summary, conclude
    from preflab.judging.battles import both_orders, judge_rows
    from preflab.judging.judges import make_judge
    from utils.artifacts import all_arguments, envelope, read_published, write_json, write_rows
    from utils.provenance import run_record

    c, models = comparison.args, TwoModels(comparison)
    comparison.ensure_same_evaluation("battle", [c, args])
    published = read_published(args.published) if args.published else None
    options = args.judge_options(c)
    judges = [make_judge(spec, args.judge_prompt, options) for spec in dict.fromkeys([args.judge, "longer", "random"])]
    prompts, answering, answers, pairs, read = answers_and_pairings(args, comparison, models)
    items, rows = both_orders(prompts, answers, pairs)
    judged = {judge.name: judge_rows(judge, items, rows, c.eval_out, c.overwrite) for judge in judges}
    if not is_main_process():
        return
    sections = battle_summary(judged, answers, pairs, [p.name for p in answering], c.seed)
    met = f"{pairs[0][0]} vs {pairs[0][1]}" if len(pairs) == 1 else f"{len(pairs)} pairings"
    title = f"{comparison.name}: {met}, {len(prompts)} prompts, judge {judges[0].name}, both orders"
    text, verdict = conclude(sections, published, title, read)

    path = comparison.path
    kept = [
        {**row, "controls": {j.name: judged[j.name][k]["consistent"] for j in judges[1:]}}
        for k, row in enumerate(judged[judges[0].name])
    ]
    write_rows(path("battle", ".jsonl", rows=True), kept)
    battle_figure(path("battle", ".png"), sections, title)
    summary = envelope(
        "battle",
        {**models.describe(), "others": {p.name: p.identity for p in answering[2:]}, "judge": judges[0].identity()},
        sections.pop("metrics"),
        all_arguments([c, args]),
        run_record(c.seed, time.monotonic() - started, run_name=comparison.name, limit=c.limit),
        claim=verdict,
        text=text,
        **sections,
        published=published,
        data=read,
    )
    write_json(path("battle", ".json"), summary)
    print(text)
    print(f"\nwrote {path('battle', '.json')}, {path('battle', '.jsonl', rows=True)}, {path('battle', '.png')}")


def check_battle(args):
    """Refuse what no battle can be fought with, and a battle's keys without a battle."""
    named = [k for k in ("prompts", "models", "opponent_outputs", "published") if getattr(args, k) is not None]
    if not args.battle and (named or args.judge != WinRateArguments.judge):
        raise UserError(f"--{(named or ['judge'])[0]} belongs to battles: give --battle too")
    args.check()


def main():
    quick_help(__doc__, runs_bare=True)

    import time

    from preflab.evaluation.comparison import resolve
    from utils.cli import parse
    from utils.distributed import join_processes, quiet_libraries

    started = time.monotonic()
    quiet_libraries()
    comparison_args, args = parse((ComparisonArguments, WinRateArguments))
    comparison = resolve(comparison_args)
    args.beta = args.beta if args.beta is not None else comparison.trained.get("beta") or 0.1
    if not args.beta > 0:
        raise UserError(f"--beta {args.beta}: must be above 0")
    check_battle(args)
    join_processes()
    (battle_mode if args.battle else reward_mode)(comparison, args, started)


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size and run the same command again; or use --dtype bfloat16")
