"""Make one upload-ready folder of a run: weights, and a card from the artifacts of all its stages.

    python release.py --license apache-2.0 --language en      # the latest run
    python release.py --run_name gemma-2b-it-dpo              # licence and language of its base
    python release.py --run_name gemma-2b-it-dpo --merged     # the folder of merge_adapter.py
    python release.py --push me/gemma-2b-it-dpo               # list what would be uploaded
    python release.py --push me/gemma-2b-it-dpo --no_dry_run  # upload it

The folder has weights (hard links where possible), tokenizer, training curves, README.md (the
card), .eval_results/ (the hub's benchmarks) and card_sources.json: file and key of every figure in
the card. Figures of stale results and of trials are left out, those of a judge that failed its
audit are marked. The folder holds neither secrets nor paths of this machine. Writes release.json
to eval_out/<run_name>/. A second --push uploads only what the repository does not have.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  run      --run_name NAME (default: the latest)   --merged   --list (all runs)
           --checkpoints DIR [checkpoints]   --eval_out DIR [eval_out]   --release_dir DIR
  card     --license ID   --language CODE ... (default: the base's)   --base_hub_id OWNER/NAME
           --family LABEL=OWNER/NAME ... (a run's name as label links the run)   --tracker URL
           --published FILE [configs/published/comparison.yaml]
  example  --system TEXT   --temperature T [0.7]   --top_k N [50]   --top_p P [0.95]
  upload   --push OWNER/NAME   --dry_run [true] (--no_dry_run uploads)   --private
"""

from pathlib import Path

from preflab.evaluation.run_list import print_runs
from preflab.evaluation.runs import latest_run
from preflab.release.arguments import ReleaseArguments
from utils.errors import run
from utils.stage import print_main, start


def main():
    stage, args = start("release", __doc__, ReleaseArguments, listing=print_runs)
    args.check()

    from preflab.release.card import release_card
    from preflab.release.files import ReleaseFolder, sources_text
    from preflab.release.gather import gather
    from preflab.release.push import listing, push, uploads_of
    from preflab.release.report import render
    from preflab.release.results import eval_results
    from preflab.release.sources import Sources
    from utils.artifacts import metric

    # Everything that can be wrong comes before the first file is written.
    name = args.run_name or latest_run(args.checkpoints)
    weights, release, left_out = gather(name, args)
    folder = ReleaseFolder(Path(args.release_dir or Path(args.checkpoints) / f"{name}-release"))

    # Card and metadata, each figure with its source.
    sources = Sources()
    with sources.damage_named():
        texts = {"README.md": release_card(release, folder.path, sources)}
        for file, text in eval_results(release.shown, release.run, args.push, sources).items():
            texts[f".eval_results/{file}"] = text
    texts["card_sources.json"] = sources_text(sources.entries, name)

    # The folder, then the summary, and the upload last.
    folder.fill(weights, release.base, texts, release.pictures)
    folder.publish()
    uploads = uploads_of(folder.path)
    stage.publish(
        release.run.run.results / "release.json",
        {"name": release.base.shown, "weights": weights.name},
        {"bytes": metric(sum(u.size for u in uploads)), "files": metric(len(uploads)),
         "figures": metric(len(sources.entries))},
        render(folder.path, release, left_out, listing(folder.path, args.push, uploads)),
        run={"run_name": name, "limit": release.training.limit},
        seed=args.seed,
        files_released=[vars(u) for u in uploads],
        left_out=left_out,
        folder=str(folder.path),
    )  # fmt: skip
    if args.push and not args.dry_run:
        print_main(listing(folder.path, args.push, push(folder.path, args.push, args.private)))


if __name__ == "__main__":
    run(main)
