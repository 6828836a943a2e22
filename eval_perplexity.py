"""What did preference training do to the model's language? Perplexity of base and tuned on the same token ids.

    python eval_perplexity.py                                             # the quickstart run, CPU, 2 cores
    python eval_perplexity.py --run_name gemma-2b-it-dpo                  # any run below checkpoints/
    python eval_perplexity.py --base_model google/gemma-2b-it --adapter_path checkpoints/checkpoint-7000
    python eval_perplexity.py --text_file README.md --skip_pairs          # plain text
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml eval_perplexity.py --run_name gemma-2b-it-dpo

On held-out pairs: chosen and rejected answers given the prompt, and prompt and answer as one text; on plain text:
windows that do not overlap, or slide by --stride. Each as exp of the mean over tokens and as mean over sequences, with
bits per byte, 95% intervals and a paired test; and KL(tuned || base) on the answers' tokens. Writes perplexity.json,
perplexity_rows.jsonl and perplexity.png to eval_out/<run_name>/.

The keys that matter (YAML keys and flags are the same; dashes and underscores both work; --help_all lists every key):

  models   --run_name NAME | --base_model ID --adapter_path FOLDER | --base_model ID --tuned_model ID|FOLDER
           --dtype float32|bfloat16|float16   --load_in_4bit   --attn_implementation
  pairs    --dataset_name ID|FILE|FOLDER --split test_prefs   --max_length 1024   --limit N   --skip_pairs   --skip_kl
  text     --text_file FILE ...   --text_dataset ID|FILE --text_split test --text_column text --text_config NAME
           --window 1024 (input tokens) --stride 512 (default: the window)   --bos auto|once|per_window|none
  run      --batch_tokens N   --batch_size N   --seed 42   --output_dir DIR | --output_json FILE   --overwrite

What was scored is kept as it comes: the same command goes on where another call stopped.
"""

from dataclasses import dataclass

from preflab.evaluation.arguments import ComparisonArguments
from utils.cli import option, quick_help
from utils.errors import UserError, is_main_process, run


@dataclass
class PerplexityArguments:
    """Keys of this script."""

    skip_pairs: bool = option("Leave the preference pairs out: plain text alone.", False)
    skip_kl: bool = option("Leave KL(tuned || base) out.", False)
    text_file: list[str] | None = option("Plain-text files, a document each.")
    text_dataset: str | None = option("Hub id, file or folder with a text column, a document a row.")
    text_config: str | None = option("Configuration of --text_dataset.")
    text_split: str = option("Split of --text_dataset.", "test")
    text_column: str = option("Column of --text_dataset.", "text")
    window: int | None = option("Input tokens a window (default: --max_length).")
    stride: int | None = option("Tokens that a window moves on (default: the window, so that none overlap).")
    bos: str = option("Where a BOS opens plain text.", "auto", choices=["auto", "once", "per_window", "none"])
    length_bias_splits: list[str] | None = option("Further splits whose length bias is reported.")


def check(args, comparison) -> None:
    """Fill window and stride; refuse what cannot be measured."""
    if args.skip_pairs and not (args.text_file or args.text_dataset):
        raise UserError("--skip_pairs leaves nothing to measure: give --text_file or --text_dataset")
    args.window = args.window if args.window is not None else comparison.args.max_length
    args.stride = args.stride if args.stride is not None else args.window
    if args.window < 2:
        raise UserError(f"--window {args.window}: must be at least 2")
    if not 0 < args.stride <= args.window:
        raise UserError(f"--stride {args.stride}: must be above 0 and at most --window {args.window}")


def score_pairs(comparison, models, args):
    """Both answers of every held-out pair, whole text and response alone: (data, rows, speed, what was cut)."""
    from preflab.evaluation.held_out import held_out_pairs
    from preflab.evaluation.logprob_scoring import Sequence, score_sequences

    data, ids, cut = held_out_pairs(comparison, models.tokenizer)
    sequences, starts = [], []
    for row in ids:
        for side in ("chosen", "rejected"):
            start = len(row["prompt_ids"])
            starts.append(start)
            sequences.append(Sequence(row["prompt_ids"] + row[f"{side}_ids"], 1, None if args.skip_kl else start))

    def summed(index, scores):
        # Entry t of the token figures belongs to token t + 1.
        response = starts[index] - 1
        found = {"kl": None if scores.kl is None else float(scores.kl.sum())}
        for side in models.sides:
            logps = getattr(scores, side)
            found |= {f"whole_{side}": -float(logps.sum()), f"response_{side}": -float(logps[response:].sum())}
        return found

    found, speed = score_sequences(models, sequences, summed, "perplexity")
    rows = []
    for i, pair in enumerate(data.pairs):
        row = {"set": "pairs", "row": i, "where": pair.source}
        for side, k in (("chosen", 2 * i), ("rejected", 2 * i + 1)):
            for part, start in (("response", starts[k]), ("whole", 1)):
                scored = sequences[k].ids[start:]
                row[f"tokens_{part}_{side}"] = len(scored)
                row[f"bytes_{part}_{side}"] = len(models.tokenizer.decode(scored, skip_special_tokens=True).encode())
                base, tuned = found[k][f"{part}_base"], found[k][f"{part}_tuned"]
                row |= {f"nll_{part}_{side}_base": base, f"nll_{part}_{side}_tuned": tuned}
                row[f"nll_{part}_{side}_difference"] = tuned - base
            row[f"kl_{side}"] = found[k]["kl"]
        rows.append(row)
    return data, rows, speed, cut


def cut_text(models, args):
    """Plain text in windows, read before anything is scored: (sequences, rows, what was read)."""
    from preflab.evaluation.perplexity import bos_protocol, cut_documents, read_documents

    if not (args.text_file or args.text_dataset):
        return [], [], None
    named = (args.text_dataset, args.text_config, args.text_split, args.text_column)
    documents, read = read_documents(args.text_file or [], *named)
    args.bos = bos_protocol(args.bos, models.tokenizer)
    sequences, rows = cut_documents(documents, models.tokenizer, args.window, args.stride, args.bos)
    if not sequences:
        raise UserError("the text is too short to score: no token is left under --bos none; give more text")
    return sequences, rows, read


def score_text(models, sequences, rows):
    """Plain text, window by window: (rows, speed)."""
    from preflab.evaluation.logprob_scoring import score_sequences

    def summed(index, scores):
        return {"nll_base": -float(scores.base.sum()), "nll_tuned": -float(scores.tuned.sum())}

    found, speed = score_sequences(models, sequences, summed, "perplexity-text") if sequences else ([], {})
    for row, scores in zip(rows, found, strict=True):
        row |= {**scores, "nll_difference": scores["nll_tuned"] - scores["nll_base"]}
    return rows, speed


def protocol(args, models, unit) -> dict:
    """What exactly was measured, in words."""
    named = {
        "pairs": "the chat template's own special tokens and no others; response: the answer's tokens and its end of"
        " turn, given the prompt; whole: every token but the first",
        "kl": "sum over the vocabulary of p_tuned (log p_tuned - log p_base) at each answer token of the data, not of"
        " the model's own samples",
        "unit_that_is_resampled": unit,
    }
    if unit.get("text"):
        opening = {
            "once": "one BOS (EOS where there is none) opens each document",
            "per_window": "a BOS opens every window",
            "none": "no BOS; the first token of a document is not scored",
        }
        named["text"] = (
            f"no special token but: {opening[args.bos]}; windows of {args.window} input tokens, moved by {args.stride};"
            " every token is predicted once"
        )
        named["prefix_token"] = models.tokenizer.bos_token or models.tokenizer.eos_token
    return named


def compute(rows, text_rows, skip_kl, seed) -> tuple[dict, dict]:
    """(metrics, units): every section's figures, and what was resampled in each."""
    import numpy as np

    from preflab.evaluation.perplexity import pair_units, section_metrics, text_units
    from utils.stats import bootstrap, ratio_of_sums

    metrics, unit = {}, {}
    for part in ("response", "whole") if rows else ():
        for side in ("chosen", "rejected"):
            metrics |= section_metrics(f"{part}_{side}", pair_units(rows, part, side), seed)
            unit["pairs"] = "pairs"
    for side in ("chosen", "rejected") if rows and not skip_kl else ():
        kl = np.array([[row[f"kl_{side}"], row[f"tokens_response_{side}"]] for row in rows])
        metrics[f"kl_{side}"] = bootstrap(kl, seed, statistic=ratio_of_sums)
    if text_rows:
        units, unit["text"] = text_units(text_rows)
        metrics |= section_metrics("text", units, seed)
    return metrics, unit


def main():
    quick_help(__doc__, runs_bare=True)

    import time

    from preflab.evaluation.comparison import resolve
    from preflab.evaluation.held_out import left_out, length_bias
    from preflab.evaluation.perplexity_report import conclude, perplexity_figure
    from preflab.evaluation.two_models import TwoModels
    from utils.artifacts import all_arguments, envelope, metric, write_json, write_rows
    from utils.cli import parse
    from utils.distributed import join_processes, quiet_libraries
    from utils.provenance import run_record

    # What to measure.
    started = time.monotonic()
    quiet_libraries()
    comparison_args, args = parse((ComparisonArguments, PerplexityArguments))
    comparison = resolve(comparison_args)
    check(args, comparison)
    join_processes()
    comparison.ensure_same_evaluation("perplexity", [comparison_args, args])
    models = TwoModels(comparison)
    seed = comparison_args.seed

    # Read, and score.
    windows, text_rows, read = cut_text(models, args)
    bias = {}
    if is_main_process() and not args.skip_pairs:
        bias = length_bias(comparison, models.tokenizer, args.length_bias_splits or [])
    data, rows, speed, cut = (None, [], {}, {}) if args.skip_pairs else score_pairs(comparison, models, args)
    text_rows, text_speed = score_text(models, windows, text_rows)
    if not is_main_process():
        return

    # Compute.
    metrics, unit = compute(rows, text_rows, args.skip_kl, seed)
    if data:
        metrics["skipped_examples"] = metric(sum(data.dropped.values()), n=data.rows)
    title = f"{comparison.name}: {comparison.names['tuned']} against {comparison.names['base']}"
    text, verdict = conclude(metrics, bias, title, left_out(data, cut) if data else None)

    # Write, and print the table.
    path = comparison.path
    write_rows(path("perplexity", ".jsonl", rows=True), [*rows, *text_rows])
    perplexity_figure(path("perplexity", ".png"), metrics, rows, text_rows, title)
    summary = envelope(
        "perplexity",
        models.describe(),
        metrics,
        all_arguments([comparison_args, args]),
        run_record(seed, time.monotonic() - started, run_name=comparison.name, limit=comparison_args.limit),
        claim=verdict,
        text=text,
        protocol=protocol(args, models, unit),
        length_bias=bias,
        scoring={"pairs": speed, "text": text_speed},
        data={"pairs": {**data.summary(), "truncation": cut} if data else None, "text": read},
    )
    write_json(path("perplexity", ".json"), summary)
    print(text)
    written = (path("perplexity", ".json"), path("perplexity", ".jsonl", rows=True), path("perplexity", ".png"))
    print("\nwrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size and run the same command again; or use --dtype bfloat16")
