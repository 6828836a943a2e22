"""Merge a LoRA adapter into its base, and check that the merged folder is the same model.

    python merge_adapter.py   # the latest run -> checkpoints/<run_name>-merged
    python merge_adapter.py --run_name gemma-2b-it-dpo --dtype bfloat16
    python merge_adapter.py --adapter_path FOLDER --base_model google/gemma-2b-it \\
        --dataset_name my_pairs.jsonl

The adapter is merged into the base's full-precision weights, even if it was trained on a quantised
base. The folder is written, loaded again, and its log-probabilities of the held-out pairs (of the
shipped ones, where the run held none out) are compared with the adapter's. It gets its name only if
they differ by no more than rounding explains. Writes merge.json and merge_rows.jsonl to
eval_out/<run_name>/, and a model card into the folder.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  --run_name NAME | --base_model ID --adapter_path FOLDER   --list (all runs with state and figures)
  --merged_dir FOLDER   folder of the merged model (default: <checkpoints>/<run_name>-merged)
  --dtype float32|bfloat16|float16   precision of the merged weights (default: as trained)
  --limit N             compare on the first N held-out pairs (default: all)
  --overwrite           replace an earlier merged folder
"""

from dataclasses import dataclass
from pathlib import Path

from preflab.evaluation.arguments import ComparisonArguments
from preflab.evaluation.run_list import print_runs
from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start


@dataclass
class MergeArguments:
    """Arguments of this script."""

    merged_dir: str | None = option("Folder of the merged model (default: <checkpoints>/<run_name>-merged).")
    base_hub_id: str | None = option("Hub id of a base model that is a local folder, for the model card.")


def main():
    stage, args, merge_args = start("merge", __doc__, ComparisonArguments, MergeArguments, listing=print_runs)

    # Heavy imports only now: --help is answered before torch is imported.
    from preflab.evaluation import merge_check
    from preflab.evaluation.comparison import has_held_out, resolve
    from preflab.evaluation.held_out import SHIPPED_PAIRS, held_out_pairs, shipped_pairs
    from preflab.evaluation.two_models import TwoModels
    from preflab.models.card import merged_card
    from preflab.models.merging import MergedFolder, write_merged
    from preflab.models.public_names import public_name
    from utils.artifacts import write_text
    from utils.provenance import run_record

    # Models, target folder, and the pairs to compare on.
    if args.base_run:
        raise UserError("--base_run: only one run is merged; name it with --run_name")
    chooses_pairs = args.dataset_name is not None
    comparison = resolve(args)
    if comparison.adapter is None:
        raise UserError(f"{comparison.tuned} is a complete model, so there is no adapter to merge")
    comparison.hold(comparison.path("merge", ".json"))
    name = f"{comparison.name}-merged"
    models = TwoModels(comparison)
    base, adapter, dtype = comparison.base, comparison.adapter, models.dtype
    merged_from = {"base": base, "adapter": models.identity("tuned")}
    # The summary is the last file: without it, the call that wrote the folder was interrupted.
    unfinished = None if comparison.path("merge", ".json").exists() else merged_from
    folder = MergedFolder(Path(merge_args.merged_dir or Path(args.checkpoints) / name), args.overwrite, unfinished)
    note = None
    if chooses_pairs or has_held_out(comparison.trained):
        data, ids, _ = held_out_pairs(comparison, models.tokenizer)
    else:
        # Any text shows whether two models are the same.
        data, ids = shipped_pairs(models.tokenizer, args.max_length, args.max_prompt_length, args.limit)
        note = f"No held-out pairs are known, so the {len(ids)} pairs are those shipped in {SHIPPED_PAIRS}."

    # Score with the adapter, merge, and score what was written.
    model = models.load_one(base, args.base_revision, adapter, quantized=False)
    adapter_logps = merge_check.response_logps(model, models.tokenizer, ids, args.shared_prompt, "adapter")
    # Written beside the final folder; the name is given after the comparison.
    write_merged(folder.staging, model, models.tokenizer, merged_from)
    # Frees its memory before the merged model is loaded.
    del model
    model = models.load_one(str(folder.staging), quantized=False)
    merged_logps = merge_check.response_logps(model, models.tokenizer, ids, args.shared_prompt, "merged")

    # Compare.
    metrics = merge_check.metrics_of(adapter_logps, merged_logps, ids, dtype, args.seed)
    # The report becomes part of the card, which names no paths of this machine.
    names = public_name(base, merge_args.base_hub_id), public_name(adapter)
    title = f"{comparison.name}: {names[1].shown} merged into {names[0].shown}, {dtype}"
    report = merge_check.render(metrics, title, dtype, note)
    if not merge_check.is_same_model(metrics):
        folder.discard()
        raise UserError(f"{report.verdict} It was deleted; merge with --dtype float32, or check the adapter's weights")

    # The card first, then the folder's name, and the summary last.
    quantised, run_info = bool(models.quantized), run_record(args.seed, stage.seconds)
    text = all(pair.messages is None for pair in data.pairs)
    card = merged_card(str(folder.path), comparison.name, *names, dtype, quantised, report, run_info, text)
    write_text(folder.staging / "README.md", card)
    stage.publish(
        comparison.path("merge", ".json"),
        models.describe(),
        metrics,
        report,
        run={"run_name": comparison.name, "limit": args.limit},
        seed=args.seed,
        rows=merge_check.rows_of(data.pairs, adapter_logps, merged_logps),
        files={folder.path: lambda _: folder.publish()},
        merged={"folder": str(folder.path), "dtype": dtype, "trained_on_quantised_base": quantised},
        data=data.summary(),
    )


if __name__ == "__main__":
    run(main, "give --dtype bfloat16, or compare on fewer pairs with --limit")
