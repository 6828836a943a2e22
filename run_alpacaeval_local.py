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

from utils.cli import quick_help
from utils.comparison import ComparisonArguments, option
from utils.errors import UserError, is_main_process, run


@dataclass
class AlpacaEvalArguments:
    """Keys of this script."""

    stage: str = option("generate, judge, score or all.", "all", choices=["generate", "judge", "score", "all"])
    reference: str = option("Instructions with reference answers.", "data/eval_prompts/reference.jsonl")
    annotations: str | None = option("Score this annotations.json and nothing else.")
    max_new_tokens: int = option("Longest answer in tokens.", 256)
    temperature: float = option("0 decodes greedily, above 0 samples with --seed.", 0.0)
    top_p: float = option("Nucleus of sampled answers.", 1.0)
    engine: str = option("Who answers: auto, hf or vllm.", "auto", choices=["auto", "hf", "vllm"])
    judge: str = option(
        "hf:MODEL, rm:MODEL, vllm:MODEL, openai:MODEL@URL, longer, random, or an evaluator of alpaca-eval.",
        "hf:builtin:smollm2-135m-instruct",
    )
    order: str = option("Order of the two outputs: alpaca-eval's, or both.", "package", choices=["package", "both"])
    judge_dtype: str | None = option(
        "Precision of a local judge (default: bfloat16 on a GPU, else float32).",
        choices=["float32", "bfloat16", "float16"],
    )
    judge_attempts: int = option("Further attempts where an endpoint fails or answers nonsense.", 4)
    judge_timeout: float = option("Seconds that an endpoint has for one answer.", 120.0)
    judge_concurrency: int = option("Questions that an endpoint gets at once.", 8)
    audit_dataset: str | None = option("Labelled pairs for the judge audit (default: the run's held-out pairs).")
    audit_split: str = option("Split of --audit_dataset.", "test")
    audit_limit: int = option("Labelled pairs for the judge audit; 0 leaves it out.", 200)
    lc_resamples: int = option("Refits behind the interval of the length-controlled rate.", 200)
    published: str | None = option("YAML of further published rows.", "configs/published/alpacaeval.yaml")


def check(args) -> None:
    """Refuse what cannot be run."""
    for key in ("max_new_tokens", "judge_timeout", "judge_concurrency"):
        if not getattr(args, key) > 0:
            raise UserError(f"--{key} {getattr(args, key)}: must be above 0")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.judge_attempts < 0 or args.audit_limit < 0:
        raise UserError("--temperature, --judge_attempts and --audit_limit must be at least 0, --top_p in (0, 1]")
    if args.lc_resamples < 2:
        raise UserError(f"--lc_resamples {args.lc_resamples}: must be at least 2")


def generate(comparison, args, reference, folder) -> dict:
    """Answers of base and tuned, written as model_outputs_<name>.json: `{name: seconds}`."""
    import time

    from utils.alpacaeval_files import write_outputs
    from utils.answers import answer_all, answerable, comparison_players
    from utils.battles import refuse_equal
    from utils.comparison import TwoModels
    from utils.prompts import Prompt
    from utils.vllm_engine import choose_engine

    c, models = comparison.args, TwoModels(comparison)
    prompts = [Prompt([{"role": "user", "content": row["instruction"]}], row["where"]) for row in reference]
    players = comparison_players(models)
    _, refused = answerable(players, prompts)
    if refused:
        raise UserError(
            f"the chat template refuses {refused} of {len(prompts)} instructions; choose other instructions"
        )
    settings = {key: getattr(args, key) for key in ("max_new_tokens", "temperature", "top_p")}
    settings |= {"seed": c.seed, "batch_tokens": 4 * c.batch_tokens, "batch_size": c.batch_size}
    engine, answers, seconds = choose_engine(args.engine), {}, {}
    for player in players:
        started = time.monotonic()
        answers[player.name] = answer_all(player, prompts, settings, c.eval_out, c.overwrite, engine)
        seconds[player.name] = round(time.monotonic() - started, 1)
    refuse_equal(answers)
    names = {"base": comparison.base, "tuned": comparison.adapter or comparison.tuned}
    for player in players:
        about = {
            **player.identity,
            "engine": engine,
            **{k: settings[k] for k in ("max_new_tokens", "temperature", "top_p", "seed")},
        }
        write_outputs(folder, player.name, names[player.name], reference, answers[player.name], about)
    models.unload()
    return seconds


def judge(comparison, args, reference, folder) -> dict:
    """Judgements of both models' outputs against the reference, and the judge audit: `{what: seconds}`."""
    import time

    from utils.alpacaeval_files import annotate, read_outputs, write_annotations
    from utils.artifacts import write_json
    from utils.judges import make_judge

    c, seconds = comparison.args, {}
    options = judge_options(args, c)
    asked, controls = (
        alpaca_judge(args.judge, options),
        [make_judge(name, "", options) for name in ("longer", "random")],
    )
    outputs = {name: read_outputs(folder, name, reference) for name in ("base", "tuned")}
    for name, rows in outputs.items():
        started = time.monotonic()
        annotations = annotate(asked, reference, rows, args.order, c.eval_out, c.overwrite)
        write_annotations(folder, name, annotations)
        for control in controls:
            found = annotate(control, reference, rows, args.order, c.eval_out)
            write_annotations(folder, f"{name}_{control.name}", found)
        seconds[f"judge {name}"] = round(time.monotonic() - started, 1)
    if args.audit_limit:
        started = time.monotonic()
        found = audit_judges(comparison, args, [asked, *controls])
        write_json(folder / "judge_audit.json", found)
        seconds["audit"] = round(time.monotonic() - started, 1)
    return seconds


def judge_options(args, c) -> dict:
    """What judges need to know."""
    import torch

    return {
        "dtype": args.judge_dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
        "batch_tokens": c.batch_tokens,
        "batch_size": c.batch_size,
        "attn_implementation": c.attn_implementation,
        "seed": c.seed,
        **{key: getattr(args, f"judge_{key}") for key in ("attempts", "timeout", "concurrency")},
    }


def alpaca_judge(spec: str, options: dict):
    """The judge, asked with AlpacaEval's own prompt; a name without a colon may be one of the package's evaluators."""
    from utils.alpacaeval import PackageEvaluator, clf_prompt, shipped_evaluators
    from utils.judges import make_judge

    if ":" not in spec and spec in shipped_evaluators():
        return PackageEvaluator(spec)
    return make_judge(spec, clf_prompt(), options)


def audit_judges(comparison, args, judges) -> dict:
    """The audit of the judge and its controls on labelled pairs."""
    from utils.comparison import held_out_sources
    from utils.judge_audit import against_longer, audit, audit_items, passes, table, verdict
    from utils.judges import judge_all
    from utils.preferences import load_pairs

    c = comparison.args
    if args.audit_dataset:
        sources, labels = [{"name": args.audit_dataset, "split": args.audit_split}], f"labels of {args.audit_dataset}"
    else:
        sources, _ = held_out_sources(c, comparison.trained)
        labels = f"labels of the held-out preference data ({sources[0]['name']})"
    pairs = load_pairs(sources, keep_duplicate_prompts=True, plain_as_chat=True, limit=args.audit_limit)
    if not pairs.pairs:
        raise UserError(f"{sources[0]['name']}: no labelled pair is left for the audit; dropped: {dict(pairs.dropped)}")
    items = audit_items(pairs.pairs)
    verdicts = {judge.name: judge_all(judge, items, c.eval_out, c.overwrite) for judge in judges}
    audits = {name: audit(pairs.pairs, found, c.seed) for name, found in verdicts.items()}
    first = judges[0].name
    comparison_ = against_longer(verdicts[first], verdicts["longer"], c.seed)
    return {
        "labels": labels,
        "judge": first,
        "data": pairs.summary(),
        "audits": audits,
        "against_longer": comparison_,
        "passed": passes(comparison_),
        "verdict": verdict(first, audits[first], comparison_),
        "table": table(audits, labels),
    }


def score(comparison, args, folder, started, seconds) -> None:
    """Rates, intervals, table and files from the annotations that are there."""
    import time

    from utils.alpacaeval_files import read_annotations, write_llm_comparator, write_samples
    from utils.alpacaeval_report import conclude, leaderboard, published, summarise
    from utils.artifacts import envelope, read_json, write_json, write_text
    from utils.plots import alpacaeval_figure
    from utils.provenance import run_record
    from utils.runs import all_arguments

    c = comparison.args
    sides = {name: read_annotations(folder / f"annotations_{name}.json") for name in ("base", "tuned")}
    controls = {
        f"{name}_{control}": read_annotations(folder / f"annotations_{name}_{control}.json")
        for name in sides
        for control in ("longer", "random")
    }
    found = summarise(sides, controls, c.eval_out, c.seed, args.lc_resamples)
    audit_file = folder / "judge_audit.json"
    audit = read_json(audit_file) if audit_file.exists() and args.audit_limit else None
    rows = published(args.published)
    title = f"{comparison.name}: AlpacaEval with a local judge, {sides['base'][0]['annotator']}"
    text, verdict = conclude(found, rows, audit, title)
    outputs = {name: read_json(folder / f"model_outputs_{name}.about.json") for name in sides}
    summary = envelope(
        "alpacaeval",
        {**outputs, "judge": sides["base"][0]["annotator"]},
        found["metrics"],
        all_arguments([c, args]),
        run_record(c.seed, time.monotonic() - started, run_name=comparison.name, limit=c.limit),
        claim=verdict,
        text=text,
        length_control=found["length_control"],
        audit=audit,
        published=rows,
        seconds=seconds,
    )
    write_text(folder / "leaderboard.csv", leaderboard(found, rows))
    write_samples(folder / "samples.md", sides)
    write_llm_comparator(folder / "llm_comparator.json", sides["tuned"])
    alpacaeval_figure(folder / "alpacaeval.png", found["metrics"], rows, title)
    write_json(folder / "alpacaeval.json", summary)
    print(text)
    print(f"\nwrote {folder}/:\n" + "\n".join(f"  {p.name}" for p in sorted(folder.iterdir())))


def score_file(args, c) -> None:
    """--annotations: the figures of one file, as the package computes them."""
    from pathlib import Path

    from utils.alpacaeval_files import read_annotations
    from utils.alpacaeval_report import one_file

    print(one_file(read_annotations(Path(args.annotations)), args.annotations, c.eval_out, c.seed, args.lc_resamples))


def main():
    quick_help(__doc__, runs_bare=True)

    import time

    from utils.alpacaeval_files import read_reference
    from utils.artifacts import limited
    from utils.cli import parse
    from utils.comparison import resolve
    from utils.distributed import join_processes
    from utils.logs import quiet_libraries

    started = time.monotonic()
    quiet_libraries()
    comparison_args, args = parse((ComparisonArguments, AlpacaEvalArguments))
    check(args)
    if args.annotations:
        return score_file(args, comparison_args)
    comparison = resolve(comparison_args)
    processes = join_processes()
    folder = comparison.out / limited("alpacaeval", comparison_args.limit)
    reference = read_reference(args.reference, comparison_args.limit)
    seconds = {}
    if args.stage in ("generate", "all"):
        seconds |= {f"answers of {name}": s for name, s in generate(comparison, args, reference, folder).items()}
    # Rank 0 writes the answers that all of them read.
    processes.wait_for_everyone()
    if args.stage in ("judge", "all"):
        seconds |= judge(comparison, args, reference, folder)
    if args.stage in ("score", "all") and is_main_process():
        score(comparison, args, folder, started, seconds)


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size, and the same command goes on; or give --dtype bfloat16")
