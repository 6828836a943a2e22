"""Perplexity of base and tuned on the same token ids: what happened to the model's language?

    python eval_perplexity.py                                      # the latest run in checkpoints/
    python eval_perplexity.py --run_name gemma-2b-it-dpo           # any run in checkpoints/
    python eval_perplexity.py --base_model google/gemma-2b-it \\
        --adapter_path checkpoints/checkpoint-7000
    python eval_perplexity.py --text_file README.md --skip_pairs   # plain text
    python eval_perplexity.py --base_model google/gemma-2b-it --text_file README.md --skip_pairs
                                                                   # one model, no comparison
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        eval_perplexity.py --run_name gemma-2b-it-dpo

On held-out pairs: the chosen and rejected answers given the prompt, and prompt and answer as one
text. On plain text: non-overlapping windows, or windows that move by --stride. Each is reported as
exp of the mean over tokens and as the mean over sequences, with bits per byte, 95% intervals and a
paired test; KL(tuned || base) is measured on the answers' tokens. Writes perplexity.json,
perplexity_rows.jsonl and perplexity.png to eval_out/<run_name>/.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  models   --run_name NAME | --base_model ID with --adapter_path FOLDER or --tuned_model ID
           --base_run NAME (a run in the base's place)   --list (all runs with state and figures)
           --dtype float32|bfloat16|float16 (default: as trained)   --load_in_4bit
           --attn_implementation NAME
  pairs    --dataset_name ID|FILE|FOLDER   --split NAME   --max_length N
           --limit N (default of the first three: as trained)   --skip_pairs   --skip_kl
  text     --text_file FILE ...   --text_dataset ID|FILE   --text_split NAME [test]
           --text_column NAME [text]   --text_config NAME
           --window N (input tokens; default: max_length)   --stride N (default: the window)
           --bos auto|once|per_window|none [auto]
  run      --batch_tokens N   --batch_size N   --seed N [42]   --output_dir DIR | --output_json FILE
           --overwrite

Scores are cached as they are computed: after an interruption, the same command continues.
"""

from dataclasses import dataclass

from preflab.evaluation.arguments import ComparisonArguments
from preflab.evaluation.run_list import print_runs
from utils.cli import option
from utils.errors import UserError, is_main_process, run
from utils.stage import start


@dataclass
class PerplexityArguments:
    """Arguments of this script."""

    skip_pairs: bool = option("Skip the preference pairs; measure plain text only.", False)
    skip_kl: bool = option("Skip KL(tuned || base).", False)
    text_file: list[str] | None = option("Plain-text files, one document per file.")
    text_dataset: str | None = option("Hub id, file or folder with a text column, one document per row.")
    text_config: str | None = option("Configuration of --text_dataset.")
    text_split: str = option("Split of --text_dataset.", "test")
    text_column: str = option("Column of --text_dataset.", "text")
    window: int | None = option("Input tokens per window (default: --max_length).")
    stride: int | None = option("Tokens by which a window moves (default: --window, so that windows do not overlap).")
    bos: str = option("Where a BOS is placed in plain text.", "auto", choices=["auto", "once", "per_window", "none"])
    length_bias_splits: list[str] | None = option("Further splits whose length bias is reported.")


def check(args, comparison) -> None:
    """Set defaults of --window and --stride, and validate the arguments."""
    if args.skip_pairs and not (args.text_file or args.text_dataset):
        raise UserError("--skip_pairs leaves nothing to measure: give --text_file or --text_dataset")
    # 0 must reach the checks below instead of being replaced by the default.
    args.window = args.window if args.window is not None else comparison.args.max_length
    args.stride = args.stride if args.stride is not None else args.window
    if args.window < 2:
        raise UserError(f"--window {args.window}: must be at least 2")
    # A stride above the window would leave tokens unscored.
    if not 0 < args.stride <= args.window:
        raise UserError(f"--stride {args.stride}: must be above 0 and at most --window {args.window}")


def main():
    stage, comparison_args, args = start(
        "perplexity", __doc__, ComparisonArguments, PerplexityArguments, listing=print_runs
    )
    from preflab.evaluation import perplexity, perplexity_report
    from preflab.evaluation.comparison import resolve
    from preflab.evaluation.held_out import left_out, length_bias
    from preflab.evaluation.two_models import TwoModels
    from utils.distributed import join_processes

    comparison = resolve(comparison_args, alone=True)
    # KL is between two models.
    args.skip_kl = args.skip_kl or len(comparison.sides) == 1
    check(args, comparison)
    join_processes()
    comparison.ensure_same_evaluation("perplexity", stage.arguments)
    models = TwoModels(comparison)

    # Read all data first, so that bad input fails before the weights are loaded.
    text = perplexity.cut_text(models, args)
    bias = {} if args.skip_pairs else length_bias(comparison, models.tokenizer, args.length_bias_splits or [])
    pairs = perplexity.PairScores() if args.skip_pairs else perplexity.score_pairs(models, args.skip_kl)
    text = perplexity.score_text(models, text)
    # No collective operation follows: statistics and files are the work of rank 0.
    if not is_main_process():
        return

    metrics, unit = perplexity.perplexity_metrics(pairs, text, args.skip_kl, comparison_args.seed)
    note = left_out(pairs.data, pairs.truncation) if pairs.data else None
    not_held_out = pairs.data.not_held_out if pairs.data else ""
    stage.publish(
        comparison.path("perplexity", ".json"),
        models.describe(),
        metrics,
        perplexity_report.render(metrics, bias, comparison.title, note, not_held_out).noted(comparison.identical),
        run=comparison.run_fields,
        seed=comparison_args.seed,
        rows=[*pairs.rows, *text.rows],
        figure=lambda path: perplexity_report.draw(path, metrics, pairs.rows, text.rows, comparison.title),
        protocol=perplexity.protocol(args, models.tokenizer, unit),
        length_bias=bias,
        scoring={"pairs": pairs.speed, "text": text.speed},
        data={"pairs": pairs.summary(), "text": text.source},
    )


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size and run the same command again; or use --dtype bfloat16")
