"""Turn a base model and its LoRA adapter into one plain model folder, and prove that they are the same model.

    python merge_adapter.py                                     # the quickstart run -> checkpoints/quickstart-merged
    python merge_adapter.py --run_name gemma-2b-it-dpo --dtype bfloat16
    python merge_adapter.py --adapter_path FOLDER --base_model google/gemma-2b-it --dataset_name my_pairs.jsonl

Answers: does the merged folder say what adapter and base say? The adapter is merged into the base's full-precision
weights, also where it was trained on a quantised base. The folder is written, read again, and its log-probabilities of
the held-out pairs are compared with the adapter's; it gets its name only if they differ by no more than the precision
allows. Writes merge.json and merge_rows.jsonl to eval_out/<run_name>/, and a model card into the folder.

  --merged_dir FOLDER   where the model goes (default: <checkpoints>/<run_name>-merged)
  --dtype float32|bfloat16|float16   precision of the merged weights (default: as trained)
  --limit N             compare on the first N held-out pairs
"""

from dataclasses import dataclass

from preflab.evaluation.arguments import ComparisonArguments
from utils.cli import option, quick_help
from utils.errors import UserError, run

SIDES = ("chosen", "rejected")


@dataclass
class MergeArguments:
    """Keys of this script."""

    merged_dir: str | None = option("Folder of the merged model (default: <checkpoints>/<run_name>-merged).")


def target_folder(args, merge, comparison):
    """(folder, where it is written first, where what it replaces is kept meanwhile).

    Raises UserError where there is no adapter, or a place is taken.
    """
    from pathlib import Path

    from preflab.models.merging import MARK

    if comparison.adapter is None:
        raise UserError(f"{comparison.tuned} is a model of its own: there is no adapter to merge")
    folder = Path(merge.merged_dir or Path(args.checkpoints) / f"{comparison.name}-merged")
    if folder.exists() and not args.overwrite:
        raise UserError(f"{folder} is there already: name another folder with --merged_dir, or --overwrite it")
    staging, old = (folder.with_name(folder.name + ending) for ending in (".part", ".old"))
    for place in (folder, staging, old):
        if place.exists() and not (place / MARK).exists():
            raise UserError(
                f"{place}: not overwritten, since this script did not write it; choose another --merged_dir"
            )
    return folder, staging, old


def main():
    quick_help(__doc__, runs_bare=True)

    import os
    import shutil
    import time

    import numpy as np

    from preflab.evaluation.comparison import resolve
    from preflab.evaluation.held_out import held_out_pairs
    from preflab.evaluation.two_models import TwoModels
    from preflab.models.merging import card, conclude, response_logps, tolerance, write_merged
    from utils.artifacts import all_arguments, envelope, metric, write_json, write_rows, write_text
    from utils.cli import parse
    from utils.distributed import quiet_libraries
    from utils.provenance import run_record
    from utils.stats import bootstrap

    # What to merge, where to, and on which pairs to compare.
    started = time.monotonic()
    quiet_libraries()
    args, merge = parse((ComparisonArguments, MergeArguments))
    comparison = resolve(args)
    folder, staging, old = target_folder(args, merge, comparison)
    models = TwoModels(comparison)
    data, ids, _ = held_out_pairs(comparison, models.tokenizer)

    # The adapter's figures, and the merged model on disk.
    model = models.load_one(comparison.base, args.base_revision, comparison.adapter, quantized=False)
    adapted = response_logps(model, models.tokenizer, ids, args.shared_prompt, "adapter")
    write_merged(
        staging, model, models.tokenizer, {"base": comparison.base, "adapter": models.identity("tuned")}
    )  # fmt: skip
    del model

    # What was written, read again.
    model = models.load_one(str(staging), quantized=False)
    plain = response_logps(model, models.tokenizer, ids, args.shared_prompt, "merged")

    # Compare: log-probabilities of both answers, and which of them each model prefers.
    tokens = np.array([[len(row[f"{side}_ids"]) for side in SIDES] for row in ids])
    apart, allowed = np.abs(plain - adapted), tolerance(adapted, tokens, models.dtype)
    metrics = {
        "largest_difference": metric(float(apart.max()), n=apart.size),
        "largest_share_of_allowed": metric(float((apart / allowed).max()), n=apart.size),
        "mean_difference": bootstrap((plain - adapted).mean(1), args.seed),
        "logps_adapter": bootstrap(adapted.mean(1), args.seed),
        "logps_merged": bootstrap(plain.mean(1), args.seed),
        "same_preference": bootstrap(np.sign(plain[:, 0] - plain[:, 1]) == np.sign(adapted[:, 0] - adapted[:, 1])),
    }
    text, verdict, same = conclude(metrics, comparison, models.dtype)
    if not same:
        shutil.rmtree(staging)
        raise UserError(f"{verdict} Nothing was kept; merge with --dtype float32, or look for a broken adapter")

    # Write: rows, card, summary, and last the folder's name.
    rows = [
        {
            "row": i,
            "where": pair.source,
            "adapter": dict(zip(SIDES, one, strict=True)),
            "merged": dict(zip(SIDES, other, strict=True)),
        }
        for i, (pair, one, other) in enumerate(zip(data.pairs, adapted.tolist(), plain.tolist(), strict=True))
    ]
    summary = envelope(
        "merge",
        models.describe(),
        metrics,
        all_arguments([args, merge]),
        run_record(args.seed, time.monotonic() - started, run_name=comparison.name, limit=args.limit),
        claim=verdict,
        text=text,
        merged={"folder": str(folder), "dtype": models.dtype, "trained_on_quantised_base": bool(models.quantized)},
        data=data.summary(),
    )
    write_rows(comparison.path("merge", ".jsonl", rows=True), rows)
    write_text(staging / "README.md", card(summary, comparison, str(folder)))
    # The old folder leaves only once the new one is whole beside it: a kill costs neither.
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(staging, folder)
    write_json(comparison.path("merge", ".json"), summary)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{text}\n\nwrote {folder}/ and {comparison.path('merge', '.json')}")


if __name__ == "__main__":
    run(main, "use --dtype bfloat16, or compare on fewer pairs with --limit")
