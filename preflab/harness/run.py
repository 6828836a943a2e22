"""run_lm_eval.sh: lm-evaluation-harness on base and tuned, one table of both with paired tests.

    bash run_lm_eval.sh   # the `quick` suite on the latest run, offline
    bash run_lm_eval.sh --run-name gemma-2b-it-dpo --suite seed
    bash run_lm_eval.sh --base-model google/gemma-2b-it \\
        --adapter-path checkpoints/checkpoint-7000 --suite openllm_v1
    bash run_lm_eval.sh --tasks arc_easy,winogrande --num-fewshot 5 --limit 100 \\
        -- --gen_kwargs temperature=0
    bash run_lm_eval.sh --compare FOLDER_A FOLDER_B   # samples that lm_eval logged elsewhere

Every call uses lm_eval's own command line. The command is printed, and the reported figures equal
those of that command. Writes lm_eval.json, lm_eval.md (the full table) and lm_eval.png to
eval_out/<run_name>/lm_eval/<suite>/, together with the files of the harness.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  models   --run-name NAME | --base-model ID with --adapter-path FOLDER or --tuned-model ID
           --base-run NAME (a run in the base's place)   --list (all runs with state and figures)
           --dtype float32|bfloat16|float16 (default: as trained)   --attn-implementation NAME
  tasks    --suite quick|seed|zeroshot|openllm_v1|openllm_v2|nous|eq_bench|generated|FILE.yaml
           (default: quick)   --tasks a,b   --num-fewshot N   --limit N or a share, per task
           --apply-chat-template (--no-apply-chat-template)   --skip-missing
           --contamination RUN|DATASET (figures without questions that are in its training data)
  run      --backend hf|vllm [hf]   --batch-size N|auto [auto]   --processes N (GPUs, data parallel)
           --tensor-parallel N (vLLM)   --max-length N   --seed N [1234]   --output-dir DIR
           --overwrite
  harness  -- ARGUMENTS (passed to lm_eval unchanged)

Flags may be written with dashes or underscores. Finished calls are not run again, and an
interrupted call continues from its cached responses.
"""

import os
import sys
from pathlib import Path

from preflab.evaluation.run_list import print_runs
from preflab.harness.arguments import HarnessArguments, check, make_paths_absolute, split_at_dashes
from preflab.harness.suites import load_suite
from utils.artifacts import with_limit_suffix
from utils.errors import UserError, run
from utils.provenance import shorten_paths
from utils.stage import start

USAGE = (
    "usage: bash run_lm_eval.sh [--suite NAME | --tasks a,b] [--run-name NAME | --base-model ID --adapter-path FOLDER]"
)


def parse() -> tuple:
    """(Stage, HarnessArguments, arguments after `--`), checked."""
    # Split before parsing: lm_eval's flags would be unknown keys here.
    argv, extra = split_at_dashes(sys.argv[1:])
    try:
        stage, args = start("lm_eval", __doc__, HarnessArguments, argv=argv, listing=print_runs)
    except UserError as error:
        raise UserError(f"{error} ({USAGE})") from None
    check(args, extra)
    # Not the field's default, so that --suite and --tasks together can be refused.
    if not (args.tasks or args.compare):
        args.suite = args.suite or "quick"
    return stage, args, extra


def main():
    stage, args, extra = parse()
    # Before anything resolves a path: this process runs in the repository, the user may be elsewhere.
    caller = Path(os.environ.get("INVOKED_FROM", "."))
    make_paths_absolute(args, caller)
    # A wrong name fails here, before the imports below, which take seconds.
    if args.suite:
        load_suite(args.suite)

    if args.compare:
        from preflab.harness.logged import publish_comparison

        return publish_comparison(stage, args)

    from preflab.evaluation.contamination import TrainingText
    from preflab.evaluation.two_models import TwoModels
    from preflab.harness import contamination, report
    from preflab.harness.calls import arguments_of_models, batch_size, call_options, resolve_models, run_calls
    from preflab.harness.metrics import compare, leading_bos, metrics, settings_of
    from preflab.harness.tasks import choose_suite, drop_missing

    # Everything that can be wrong is checked before the first request: names of tasks first, then the models.
    suite = choose_suite(args)
    training = TrainingText.read(args, args.checkpoints)
    comparison = resolve_models(args, extra)
    models = TwoModels(comparison)
    folder = comparison.out / "lm_eval" / with_limit_suffix(suite.name, args.limit)
    # Before a file is written: the folder may hold results of other models or settings.
    comparison.ensure_same_evaluation("lm_eval", [args], folder)
    # It changes `suite.tasks`, so the calls below contain only tasks that can run.
    missing, documents = drop_missing(suite, args)
    arguments = arguments_of_models(models, suite, folder)
    # Detected for tuned, which has the adapter in addition, and used for both models.
    args.batch_size = batch_size(args.batch_size, args.backend, arguments[models.sides[-1]], folder / "batch_size.json")
    options = call_options(suite, args, documents, extra)

    calls = run_calls(suite, models, arguments, options, folder, caller)
    settings = settings_of(options, arguments[models.sides[-1]], missing, bool(models.quantized))
    results = compare(comparison, suite, calls, settings, args.seed)
    if training:
        results.contamination = contamination.contamination(results, training, args.seed)
    base = results.sides["base"]
    settings["tokenizer_bos"] = leading_bos(models.tokenizer, base.first_prompt)
    stage.publish(
        folder / "lm_eval.json",
        models.describe(),
        metrics(results),
        report.render(results).noted(comparison.identical),
        run={"run_name": comparison.name, "limit": args.limit},
        seed=args.seed,
        summary_rows=report.rows_for_summary(results),
        figure=lambda path: report.draw(path, results),
        files={folder / "lm_eval.md": report.markdown(results)},
        averages=results.averages,
        **({"contamination": results.contamination} if training else {}),
        suite={**suite.__dict__, "include_path": suite.include_path and shorten_paths(suite.include_path)},
        settings={**settings, "first_prompt": base.first_prompt[:2000]},
        headers={name: side.headers for name, side in results.sides.items()},
        generated_characters={name: side.lengths for name, side in results.sides.items()},
        seconds={name: side.seconds for name, side in results.sides.items()},
        # The published rows are attached to the rows of the results.
        references=[{k: v for k, v in reference.items() if k != "rows"} for reference in results.references],
    )


if __name__ == "__main__":
    run(main, "use a smaller --batch-size and run the same command again to continue")
