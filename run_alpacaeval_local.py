"""AlpacaEval without an API bill: both models answer, a judge on your own machine compares with reference answers.

    python run_alpacaeval_local.py                                     # the quickstart run, shipped prompts, CPU
    python run_alpacaeval_local.py --config configs/alpacaeval.yaml    # AlpacaEval 2: 805 instructions
    python run_alpacaeval_local.py --config configs/alpacaeval/gemma-2-9b-it-SimPO.yaml   # as a published row
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        run_alpacaeval_local.py --config configs/alpacaeval.yaml --run_name gemma-2b-it-dpo
    python run_alpacaeval_local.py --annotations annotations.json              # scores what is judged, no model needed

Answers: how often does the judge prefer base and tuned to the reference, raw and length-controlled, exactly as the
alpaca-eval package computes it, and is this judge worth listening to? Writes model_outputs_*.json, annotations_*.json,
judge_audit.json, alpacaeval.json, leaderboard.csv, alpacaeval.png, samples.md and llm_comparator.json to
eval_out/<run_name>/alpacaeval/. A local judge's figure is none of AlpacaEval's leaderboard, where GPT-4 Turbo judges.

The keys that matter (YAML keys and flags are the same; dashes and underscores both work; --help_all lists every key):

  models     --run_name NAME | --base_model ID --adapter_path FOLDER | --base_model ID --tuned_model ID|FOLDER
  data       --reference FILE|hf://FILE (instructions with reference answers)   --limit N
  generate   --max_new_tokens 256   --temperature 0   --top_p 1   --engine auto|hf|vllm
  judge      --judge hf:MODEL|rm:MODEL|vllm:MODEL|openai:MODEL@URL|longer|random|<an evaluator that alpaca-eval ships>
             --order package|both
  audit      --audit_dataset ID|FILE --audit_split test --audit_limit 200 (default: the run's held-out pairs)
  run        --stage generate|judge|score|all   --lc_resamples 200   --seed 42   --output_dir DIR   --overwrite

Every stage keeps what it did: the same command goes on where another call stopped; failed judgements are asked again.
"""

from dataclasses import dataclass

from preflab.evaluation.arguments import ComparisonArguments, JudgeArguments
from utils.cli import option, quick_help
from utils.errors import UserError, is_main_process, run


@dataclass
class AlpacaEvalArguments(JudgeArguments):
    """Keys of this script."""

    stage: str = option("generate, judge, score or all.", "all", choices=["generate", "judge", "score", "all"])
    reference: str = option("Instructions with reference answers.", "data/eval_prompts/reference.jsonl")
    annotations: str | None = option("Score this annotations.json and nothing else.")
    engine: str = option("Who answers: auto, hf or vllm.", "auto", choices=["auto", "hf", "vllm"])
    order: str = option("Order of the two outputs: alpaca-eval's, or both.", "package", choices=["package", "both"])
    audit_dataset: str | None = option("Labelled pairs for the judge audit (default: the run's held-out pairs).")
    audit_split: str = option("Split of --audit_dataset.", "test")
    audit_limit: int = option("Labelled pairs for the judge audit; 0 leaves it out.", 200)
    lc_resamples: int = option("Refits behind the interval of the length-controlled rate.", 200)
    published: str | None = option("YAML of further published rows.", "configs/published/alpacaeval.yaml")


def check(args, c) -> None:
    """Refuse what cannot be run."""
    if c.output_json:
        raise UserError("--output_json: this script writes a folder of files; --output_dir names another")
    if args.annotations and c.limit:
        raise UserError("--annotations with --limit: the file is scored whole; leave --limit out")
    args.check()
    if args.audit_limit < 0:
        raise UserError(f"--audit_limit {args.audit_limit}: must be at least 0")
    if args.lc_resamples < 2:
        raise UserError(f"--lc_resamples {args.lc_resamples}: must be at least 2")


def generate(comparison, args, reference, folder) -> None:
    """Answers of base and tuned, written as model_outputs_<name>.json."""
    import time

    from preflab.alpacaeval.files import write_outputs
    from preflab.data.prompts import Prompt
    from preflab.evaluation.two_models import TwoModels
    from preflab.judging.answers import answer_all, answerable, base_and_tuned, ensure_adapter_applied
    from preflab.models.vllm_engine import choose_engine

    c, models = comparison.args, TwoModels(comparison)
    prompts = [Prompt([{"role": "user", "content": row["instruction"]}], row["where"]) for row in reference]
    answering = base_and_tuned(models)
    _, refused = answerable(answering, prompts)
    if refused:
        raise UserError(
            f"the chat template refuses {refused} of {len(prompts)} instructions; choose other instructions"
        )
    sampling = args.sampling(c.seed)
    engine, answers, seconds = choose_engine(args.engine, models), {}, {}
    for answerer in answering:
        started = time.monotonic()
        answers[answerer.name] = answer_all(answerer, prompts, sampling, c, engine)
        seconds[answerer.name] = round(time.monotonic() - started, 1)
    ensure_adapter_applied(answers)
    names = comparison.names
    for answerer in answering:
        made_by = {**answerer.identity, **sampling, "engine": engine, "seconds": seconds[answerer.name]}
        write_outputs(folder, answerer.name, names[answerer.name], reference, answers[answerer.name], made_by)
    models.unload()


def judge(comparison, args, asked, reference, folder) -> None:
    """Judgements of both models' outputs against the reference, and the judge audit, all written at the end."""
    import time

    from preflab.alpacaeval.files import annotate, outputs_hash, read_outputs, write_annotations
    from preflab.evaluation.two_models import TwoModels
    from preflab.judging.judges import make_judge
    from utils.artifacts import write_json

    c, models = comparison.args, TwoModels(comparison)
    controls = [make_judge(name, "", args.judge_options(c)) for name in ("longer", "random")]
    files, audit = {}, None
    for name in models.sides:
        outputs = read_outputs(folder, name, reference, {**models.identity(name), **args.sampling(c.seed)})
        for one in (asked, *controls):
            started = time.monotonic()
            found = annotate(one, reference, outputs, args.order, c.eval_out, c.overwrite)
            made_by = {
                "judge": one.identity(),
                "order": args.order,
                "reference_sha256": outputs_hash(reference),
                "outputs_sha256": outputs_hash(outputs),
                "seconds": round(time.monotonic() - started, 1),
            }
            files[name if one is asked else f"{name}_{one.name}"] = (found, made_by)
    if args.audit_limit:
        audit = audit_judges(comparison, args, [asked, *controls])
    if hasattr(asked, "close"):
        asked.close()
    for name, (found, made_by) in files.items():
        write_annotations(folder, name, found, made_by)
    if audit:
        write_json(folder / "judge_audit.json", audit)


def alpaca_judge(spec: str, options: dict):
    """The judge, asked with AlpacaEval's own prompt; a name without a colon may be one of the package's evaluators."""
    from preflab.alpacaeval.package import PackageEvaluator, clf_prompt, shipped_evaluators
    from preflab.judging.judges import make_judge

    if ":" not in spec and spec in shipped_evaluators():
        return PackageEvaluator(spec)
    return make_judge(spec, clf_prompt(), options)


def audit_judges(comparison, args, judges) -> dict:
    """The audit of the judge and its controls on a seeded sample of labelled pairs."""
    import time

    from preflab.data.preferences import load_pairs
    from preflab.evaluation.comparison import held_out_sources
    from preflab.judging.audit import against_longer, audit, audit_items, passes, sample, table, verdict, whose_labels
    from preflab.judging.judges import judge_all

    c, started = comparison.args, time.monotonic()
    sources = [{"name": args.audit_dataset, "split": args.audit_split}]
    if args.audit_dataset is None:
        sources, _ = held_out_sources(c, comparison.trained)
    data = load_pairs(sources, keep_duplicate_prompts=True, plain_as_chat=True)
    if not data.pairs:
        raise UserError(f"{sources[0]['name']}: no labelled pair is left for the audit; dropped: {dict(data.dropped)}")
    pairs = sample(data.pairs, args.audit_limit, c.seed)
    items = audit_items(pairs)
    verdicts = {judge.name: judge_all(judge, items, c.eval_out, c.overwrite) for judge in judges}
    ordered = {judge.name: not getattr(judge, "orders_itself", False) for judge in judges}
    audits = {name: audit(pairs, found, c.seed, ordered[name]) for name, found in verdicts.items()}
    first, labels = judges[0], whose_labels(sources)
    against = against_longer(verdicts[first.name], verdicts["longer"], c.seed)
    return {
        "labels": labels,
        "judge": first.name,
        "identity": first.identity(),
        "data": {**data.summary(), "sampled": len(pairs)},
        "audits": audits,
        "against_longer": against,
        "passed": passes(against),
        "verdict": verdict(first.name, audits[first.name], against),
        "table": table(audits, labels),
        "seconds": round(time.monotonic() - started, 1),
    }


def score(comparison, args, rows, folder, started) -> None:
    """Rates, intervals, table and files from the annotations that are there."""
    import time

    from preflab.alpacaeval.files import about, ensure_same_judge, read_annotations, write_llm_comparator, write_samples
    from preflab.alpacaeval.report import alpacaeval_figure, conclude, leaderboard, summarise
    from utils.artifacts import all_arguments, envelope, read_json, write_json, write_text
    from utils.provenance import run_record

    c, scoring = comparison.args, time.monotonic()
    names = ["base", "tuned", *(f"{side}_{control}" for side in ("base", "tuned") for control in ("longer", "random"))]
    found = {name: read_annotations(folder / f"annotations_{name}.json") for name in names}
    audit_file = folder / "judge_audit.json"
    audit = read_json(audit_file) if audit_file.exists() and args.audit_limit else None
    ensure_same_judge(folder, names, audit)
    sides = {name: found.pop(name) for name in ("base", "tuned")}
    figures = summarise(sides, found, c.eval_out, c.seed, args.lc_resamples)
    made_by = {name: about(folder / f"annotations_{name}.json") for name in sides}
    models = {name: about(folder / f"model_outputs_{name}.json") for name in sides}
    title = f"{comparison.name}: AlpacaEval, judged by {figures['judge']}"
    text, verdict = conclude(figures, rows, audit, title)
    summary = envelope(
        "alpacaeval",
        {**models, "judge": made_by["base"].get("judge")},
        figures["metrics"],
        all_arguments([c, args]),
        run_record(c.seed, time.monotonic() - started, run_name=comparison.name, limit=c.limit),
        claim=verdict,
        text=text,
        length_control=figures["length_control"],
        order=made_by["base"].get("order"),
        audit=audit,
        published=rows,
        # Of the call that wrote each file: work that an earlier call had kept took no time in it.
        seconds={
            **{f"answers of {name}": m.get("seconds") for name, m in models.items()},
            **{f"judging {name}": m.get("seconds") for name, m in made_by.items()},
            "audit": audit["seconds"] if audit else None,
            "scoring": round(time.monotonic() - scoring, 1),
        },
    )
    write_text(folder / "leaderboard.csv", leaderboard(figures, rows))
    write_samples(folder / "samples.md", sides)
    write_llm_comparator(folder / "llm_comparator.json", sides["tuned"])
    alpacaeval_figure(folder / "alpacaeval.png", figures["metrics"], rows, title)
    write_json(folder / "alpacaeval.json", summary)
    print(text)
    print(f"\nwrote {folder}/:\n" + "\n".join(f"  {p.name}" for p in sorted(folder.iterdir())))


def score_file(args, c) -> None:
    """--annotations: the figures of one file, as the package computes them."""
    from pathlib import Path

    from preflab.alpacaeval.files import read_annotations
    from preflab.alpacaeval.report import one_file

    print(one_file(read_annotations(Path(args.annotations)), args.annotations, c.eval_out, c.seed, args.lc_resamples))


def main():
    quick_help(__doc__, runs_bare=True)

    import time

    from preflab.alpacaeval.files import read_reference
    from preflab.alpacaeval.report import published
    from preflab.evaluation.comparison import resolve
    from utils.artifacts import with_limit_suffix
    from utils.cli import parse
    from utils.distributed import join_processes, quiet_libraries

    # What to run; whatever can be wrong is told before the first answer.
    started = time.monotonic()
    quiet_libraries()
    comparison_args, args = parse((ComparisonArguments, AlpacaEvalArguments))
    check(args, comparison_args)
    processes = join_processes()
    if args.annotations:
        return score_file(args, comparison_args) if is_main_process() else None
    comparison = resolve(comparison_args)
    folder = comparison.out / with_limit_suffix("alpacaeval", comparison_args.limit)
    reference, rows = read_reference(args.reference, comparison_args.limit), published(args.published)
    judges_now = args.stage in ("judge", "all")
    asked = alpaca_judge(args.judge, args.judge_options(comparison_args)) if judges_now else None

    # Answer, judge, score. Rank 0 writes the answers that all of them read.
    if args.stage in ("generate", "all"):
        generate(comparison, args, reference, folder)
    processes.wait_for_everyone()
    if judges_now:
        judge(comparison, args, asked, reference, folder)
    if args.stage in ("score", "all") and is_main_process():
        score(comparison, args, rows, folder, started)


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size and run the same command again; or use --dtype bfloat16")
