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
           --dtype float32|bfloat16|float16   --load_in_4bit   --attn_implementation
  data     --dataset_name ID|FILE|FOLDER --split test_prefs   --max_length 1024   --limit N
           left out: what the tuned model's run held out, else UltraFeedback's test_prefs
  reward   --beta 0.1   --expected FILE (the trainer's own eval metrics, to be found again within 1e-3)
  battle   --judge hf:MODEL|openai:MODEL@URL|rm:MODEL|longer|random   --judge_prompt configs/judges/pairwise.yaml
           --prompts ID|FILE   --max_new_tokens 256 --temperature 0 --top_p 1   --models name=FOLDER ...
           --opponent_outputs FILE   --published FILE
  run      --batch_tokens N   --batch_size N   --seed 42   --output_dir DIR | --output_json FILE   --overwrite

What was scored, answered or judged is kept as it comes: the same command goes on where another call stopped.
"""

from dataclasses import dataclass

from utils.cli import quick_help
from utils.comparison import ComparisonArguments, option
from utils.errors import UserError, is_main_process, run


@dataclass
class WinRateArguments:
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


def implicit_rewards(comparison, models, args):
    """Held-out pairs scored under both models: (data, rows, speed)."""
    from utils.evaluation_data import held_out_pairs
    from utils.rewards import reward_rows
    from utils.scoring import Sequence, score_sequences

    data, ids = held_out_pairs(comparison, models.tokenizer)
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
        row |= {"where": pair.where, "score_chosen": pair.score_chosen, "score_rejected": pair.score_rejected}
    return data, rows, speed


def check_expected(args, comparison, rows):
    """The trainer's figures beside ours, None without --expected."""
    from utils.reward_analysis import compare_expected, read_expected, training_batches

    if args.expected is None:
        return None
    batch, processes = training_batches(args.expected)
    return compare_expected(
        rows,
        read_expected(args.expected),
        args.expected_batch_size or batch or comparison.trained.get("per_device_eval_batch_size") or 8,
        args.expected_processes or processes or 1,
    )


def reward_mode(comparison, args, started):
    """Win rate by implicit rewards: score, compute, write, print."""
    import time

    from utils.artifacts import envelope, write_json, write_rows
    from utils.comparison import TwoModels
    from utils.evaluation_data import length_bias_of_splits
    from utils.plots import win_rate_figure
    from utils.provenance import run_record
    from utils.reward_analysis import calibration_bins, margins, slices, win_rate_metrics
    from utils.runs import all_arguments
    from utils.win_rate_report import conclude

    models = TwoModels(comparison)
    data, rows, speed = implicit_rewards(comparison, models, args)
    if not is_main_process():
        return
    seed = comparison.args.seed
    metrics = win_rate_metrics(rows, args.beta, data.dropped, seed)
    parts, bins = slices(rows, seed), calibration_bins(margins(rows), seed)
    bias = length_bias_of_splits(comparison, data, models.tokenizer, args.length_bias_splits or [])
    expected = check_expected(args, comparison, rows)
    title = f"{comparison.name}: {comparison.adapter or comparison.tuned} against {comparison.base}"
    text, verdict = conclude(metrics, parts, bias, expected, title)

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
        data=data.summary(),
    )
    write_json(path("win_rate", ".json"), summary)
    print(text)
    print(f"\nwrote {path('win_rate', '.json')}, {path('win_rate', '.jsonl', rows=True)}, {path('win_rate', '.png')}")
    if expected and not expected["agrees"]:
        raise UserError(f"--expected {args.expected}: the trainer's figures do not come out again (table above)")


def main():
    quick_help(__doc__, runs_bare=True)

    import time

    from utils.cli import parse
    from utils.comparison import resolve
    from utils.distributed import join_processes
    from utils.logs import quiet_libraries

    started = time.monotonic()
    quiet_libraries()
    comparison_args, args = parse((ComparisonArguments, WinRateArguments))
    comparison = resolve(comparison_args)
    args.beta = args.beta if args.beta is not None else comparison.trained.get("beta") or 0.1
    if not args.beta > 0:
        raise UserError(f"--beta {args.beta}: must be above 0")
    join_processes()
    reward_mode(comparison, args, started)


if __name__ == "__main__":
    run(main)
