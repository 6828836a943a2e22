"""AlpacaEval on your own machine: a local judge compares the answers of both models with a reference.

    python run_alpacaeval_local.py                                 # the latest run, shipped prompts
    python run_alpacaeval_local.py --config configs/alpacaeval.yaml   # AlpacaEval 2
    python run_alpacaeval_local.py --config configs/alpacaeval/gemma-2-9b-it-SimPO.yaml
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        run_alpacaeval_local.py --config configs/alpacaeval.yaml --run_name gemma-2b-it-dpo
    python run_alpacaeval_local.py --annotations annotations.json     # score judgements, no model
    python run_alpacaeval_local.py --audit_annotations gpt4-*.json --judge rm:MODEL  # its audit

Reports how often the judge prefers base and tuned to the reference, raw and length-controlled,
computed by the alpaca-eval package, and whether the judge is reliable enough for a claim. Writes
model_outputs_*.json, annotations_*.json, judge_audit.json, alpacaeval.json, leaderboard.csv,
alpacaeval.png, samples.md and llm_comparator.json to eval_out/<run_name>/alpacaeval/. AlpacaEval's
leaderboard is judged by GPT-4 Turbo, so figures of a local judge are not comparable with it.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  models     --run_name NAME | --base_model ID with --adapter_path FOLDER or --tuned_model ID
             --base_run NAME (a run in the base's place)   --list (all runs, with figures)
  data       --reference FILE|hf://FILE [data/eval_prompts/reference.jsonl] (instructions with
             reference answers)   --limit N   --contamination RUN|DATASET (rates without those
             that are in its training data)
  generate   --max_new_tokens N [256]   --temperature X [0]   --top_p X [1]
             --engine auto|hf|vllm [auto]   --vllm_args KEY=VALUE ... (vLLM's settings)
             (both models may be openai:MODEL@URL, a server)
  judge      --judge hf:MODEL|rm:MODEL|pair:MODEL|implicit:RUN|vllm:MODEL|openai:MODEL@URL|longer|
             random|<an evaluator of alpaca-eval> [hf:builtin:smollm2-135m-instruct]
             (several are a panel: each is audited)   --order package|both [package]
             --judge_prompt FILE (configs/judges/alpacaeval_text.yaml: for judges that write)
  audit      --audit_dataset ID|FILE (default: the run's held-out pairs)   --audit_split NAME [test]
             --audit_limit N [200]
             --audit_annotations FILE ... (published judgements of the leaderboard's judge, one file
             per model, as labels: audits --judge on them and stops)
  plan       --plan N|FILE (N instructions are judged first, or an earlier result is read: prints
             instructions against detectable difference and time, and stops)
  run        --stage generate|judge|score|all [all]   --lc_resamples N [200]   --seed N [42]
             --output_dir DIR   --overwrite

Answers and judgements are cached: the same command continues after an interruption and repeats
failed judgements.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from preflab.evaluation.arguments import (
    HELP_OF_ENGINE,
    HELP_OF_PLAN,
    AuditedJudgeArguments,
    ComparisonArguments,
    ContaminationArguments,
)
from preflab.evaluation.run_list import print_runs
from utils.cli import option
from utils.errors import UserError, is_main_process, run
from utils.stage import start


@dataclass
class AlpacaEvalArguments(AuditedJudgeArguments, ContaminationArguments):
    """Keys of this script."""

    stage: str = option(
        "Stage to run: generate, judge, score or all.", "all", choices=["generate", "judge", "score", "all"]
    )
    reference: str = option("Instructions with reference answers.", "data/eval_prompts/reference.jsonl")
    annotations: str | None = option("Score this annotations.json only.")
    audit_annotations: list[str] | None = option(
        "Audit --judge on these annotations of another judge (GPT-4 Turbo's), one file per model, and stop."
    )
    engine: str = option(HELP_OF_ENGINE, "auto", choices=["auto", "hf", "vllm"])
    judge_prompt: str | None = option("YAML of the judge's prompt (default: alpaca-eval's own, alpaca_eval_clf).")
    order: str = option(
        "Order of the two outputs: alpaca-eval's random order, or both orders.", "package", choices=["package", "both"]
    )
    lc_resamples: int = option("Bootstrap refits for the interval of the length-controlled rate.", 200)
    published: str | None = option("YAML of further published rows.", "configs/published/alpacaeval.yaml")
    plan: str | None = option(HELP_OF_PLAN)


def check(args, c) -> None:
    """Raise UserError for contradictory or out-of-range arguments."""
    c.refuse_output_json()
    # A part of a judged file would not give the rates that its leaderboard row reports.
    if args.annotations and c.limit:
        raise UserError("--annotations with --limit: the complete file is scored; remove --limit")
    args.check()
    if args.audit_annotations and (args.annotations or args.plan or not args.audit_limit):
        raise UserError("--audit_annotations: audits a judge and stops; remove --annotations, --plan, --audit_limit 0")
    if args.plan and (args.annotations or args.stage != "all"):
        raise UserError("--plan: works on all stages of both models; remove --annotations and --stage")
    # A standard error needs two refits.
    if args.lc_resamples < 2:
        raise UserError(f"--lc_resamples {args.lc_resamples}: must be at least 2")


def score_file(stage, args, comparison_args) -> None:
    """Score one annotations.json, without a model: the table, alpacaeval.json, leaderboard.csv and the picture."""
    from preflab.alpacaeval import files, metrics, report
    from preflab.evaluation.contamination import TrainingText
    from utils.provenance import sha256_of_files, shorten_paths

    c, path = comparison_args, Path(args.annotations)
    annotations, published = files.read_annotations(path), report.published(args.published)
    folder = Path(c.output_dir or Path(c.eval_out) / (c.run_name or path.stem)) / "alpacaeval"
    files.ensure_same_file(folder / "alpacaeval.json", path, c.overwrite)
    try:
        results = metrics.summarise_file(annotations, c.eval_out, c.seed, args.lc_resamples)
        if training := TrainingText.read(args, c.checkpoints):
            settings = (training, c.eval_out, c.seed, args.lc_resamples)
            results["contamination"] = metrics.file_without_overlap(annotations, results, *settings)
    except UserError as error:
        raise UserError(f"--annotations {path}: {error}") from None
    sides, title = {results["model"]: ""}, f"{results['model']}: AlpacaEval, judged by {results['judge']}"
    stage.publish(
        folder / "alpacaeval.json",
        {"model": {"name": results["model"]}, "judge": results["judge"]},
        results["metrics"],
        report.render_file(results, path.name),
        run={"run_name": c.run_name or path.stem, "limit": None},
        seed=c.seed,
        figure=partial(report.draw, metrics=results["metrics"], published_rows=published, title=title, sides=sides),
        files={folder / "leaderboard.csv": report.leaderboard(results, published, sides)},
        length_control=results["length_control"],
        **({"contamination": results["contamination"]} if "contamination" in results else {}),
        annotations={"file": shorten_paths(str(path)), "sha256": sha256_of_files([path])},
        published=published,
    )


def audit_against_leaderboard(stage, args, comparison_args) -> None:
    """Audit --judge on published judgements: the tables and leaderboard_audit.json, without models that answer."""
    from preflab.alpacaeval import leaderboard, stages
    from utils.artifacts import check_writable

    c = comparison_args
    folder = Path(c.output_dir or Path(c.eval_out) / (c.run_name or "leaderboard")) / "alpacaeval"
    check_writable(folder, "--output_dir" if c.output_dir else "--eval_out")
    judges, controls = stages.judges_and_controls(args, c)
    result = leaderboard.compare_with_labels(args.audit_annotations, judges, controls, args, c)
    if not is_main_process():
        return
    title = f"{', '.join(judge.name for judge in judges)} against {result['about']['judge']}"
    stage.publish(
        folder / "leaderboard_audit.json",
        {"judge": result["audit"]["identity"]},
        result["metrics"],
        leaderboard.render(result, title),
        run={"run_name": c.run_name, "limit": None},
        seed=c.seed,
        rows=result["rows"],
        models=result["models"],
        audit=result["audit"],
        data=result["about"],
    )


def main():
    stage, comparison_args, args = start(
        "alpacaeval", __doc__, ComparisonArguments, AlpacaEvalArguments, listing=print_runs
    )
    check(args, comparison_args)

    from preflab.alpacaeval import files, metrics, report, stages
    from preflab.evaluation import plan
    from preflab.evaluation.comparison import resolve
    from preflab.evaluation.contamination import TrainingText
    from utils.artifacts import with_limit_suffix
    from utils.distributed import join_processes

    processes = join_processes()
    eval_out, seed = comparison_args.eval_out, comparison_args.seed
    if args.audit_annotations:
        stage.name = "leaderboard_audit"
        return audit_against_leaderboard(stage, args, comparison_args)
    if args.annotations:
        return score_file(stage, args, comparison_args) if is_main_process() else None

    if pilot := plan.pilot_file(args.plan, comparison_args.limit):
        return plan.plan_from_file(stage, pilot, comparison_args.output_dir, seed) if is_main_process() else None
    # A pilot of N instructions is a trial run with --limit N.
    comparison_args.limit = plan.pilot_size(args.plan, comparison_args.limit) or comparison_args.limit
    # Everything that can be wrong is read before the first answer is generated.
    comparison = resolve(comparison_args, answers_only=True)
    folder = comparison.out / with_limit_suffix("alpacaeval", comparison_args.limit)
    comparison.hold(folder / "alpacaeval.json")
    reference = files.read_reference(args.reference, comparison_args.limit)
    published = report.published(args.published)
    training = TrainingText.read(args, comparison_args.checkpoints)
    # Made before the answers, so that an unknown judge fails at once.
    judging = args.stage in ("judge", "all")
    judges = stages.load_judges(args, comparison_args) if judging else []

    if args.stage in ("generate", "all"):
        files.ensure_outputs_may_be_replaced(folder, comparison_args.overwrite)
        stages.generate(comparison, args, reference, folder)
    # Rank 0 writes the answers that every rank reads.
    processes.wait_for_everyone()
    if judges:
        stages.judge_outputs(comparison, args, judges, reference, folder)
    # Scoring only reads files, so one process does it.
    if args.stage not in ("score", "all") or not is_main_process():
        return stages.report_files(args.stage, folder)

    scoring_started = time.monotonic()
    # From the files, also after judging in this call: each stage alone gives the same figures.
    trained_on = stages.trained_instructions(comparison, reference)
    sides, controls, audit = stages.read_judged(folder, with_audit=args.audit_limit > 0)
    results = metrics.summarise(sides, controls, eval_out, seed, args.lc_resamples)
    if training:
        settings = (training, eval_out, seed, args.lc_resamples)
        results["contamination"] = metrics.instructions_without_overlap(sides, results, *settings)
    # What made the files, which may be an earlier call with other defaults.
    models, origins = stages.origins(folder)
    if panel := origins["base"].get("panel"):
        results["panel"] = stages.panel_section(folder, controls, panel, seed)
    title = f"{comparison.name}: AlpacaEval, judged by {results['judge']}"
    summary = stage.publish(
        folder / "alpacaeval.json",
        {**models, "judge": origins["base"].get("judge")},
        results["metrics"],
        report.render(results, published, audit, title, trained_on).noted(comparison.identical),
        run={"run_name": comparison.name, "limit": comparison_args.limit},
        seed=seed,
        figure=partial(report.draw, metrics=results["metrics"], published_rows=published, title=title),
        files={
            folder / "leaderboard.csv": report.leaderboard(results, published),
            folder / "samples.md": files.samples(sides),
            folder / "llm_comparator.json": files.llm_comparator(sides["tuned"], "llm_comparator.json"),
        },
        length_control=results["length_control"],
        order=origins["base"].get("order"),
        trained_on=trained_on,
        **({"contamination": results["contamination"]} if training else {}),
        audit=audit,
        **({"panel": results["panel"]} if panel else {}),
        published=published,
        seconds=stages.timings(models, origins, audit, time.monotonic() - scoring_started),
        work=stages.work(models, origins),
    )
    if args.plan:
        plan.publish_plan(stage, summary, folder / "alpacaeval.json", seed)


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size and run the same command again; or use --dtype bfloat16")
