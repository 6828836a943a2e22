"""run_lm_eval.sh: lm-evaluation-harness on base and tuned, one table of both, with paired tests.

    bash run_lm_eval.sh                                                  # the `quick` suite on the latest run, offline
    bash run_lm_eval.sh --run-name gemma-2b-it-dpo --suite seed
    bash run_lm_eval.sh --base-model google/gemma-2b-it --adapter-path checkpoints/checkpoint-7000 --suite openllm_v1
    bash run_lm_eval.sh --tasks arc_easy,winogrande --num-fewshot 5 --limit 100 -- --gen_kwargs temperature=0

Every call is one of lm_eval's own command line; it is printed, and its figures are those of that command, exactly.
Writes lm_eval.json, lm_eval.md and lm_eval.png to eval_out/<run_name>/lm_eval/<suite>/, with everything that the
harness wrote beside them.

  models   --run-name NAME | --base-model ID --adapter-path FOLDER | --base-model ID --tuned-model ID|FOLDER
           --dtype float32|bfloat16|float16   --attn-implementation
  tasks    --suite quick|seed|zeroshot|openllm_v1|openllm_v2|nous|eq_bench|FILE.yaml   --tasks a,b
           --num-fewshot N   --limit N   --apply-chat-template true|false   --skip-missing
  run      --backend hf|vllm   --batch-size N|auto   --processes N (GPUs, data parallel)   --tensor-parallel N (vLLM)
           --max-length N   --seed 1234   --output-dir DIR   --overwrite
  harness  -- ANYTHING (goes to lm_eval as it stands)

Finished calls are not run again; a call that was interrupted goes on from what it had answered. --help_all lists all.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from preflab.evaluation.arguments import ComparisonArguments
from utils.cli import option, quick_help
from utils.errors import UserError, run

USAGE = (
    "usage: bash run_lm_eval.sh [--suite NAME | --tasks a,b] [--run-name NAME | --base-model ID --adapter-path FOLDER]"
)


@dataclass
class HarnessArguments(ComparisonArguments):
    """Keys of run_lm_eval.sh: those of every evaluation, and the harness's."""

    batch_size: str = option("Requests a batch, the same for both models; auto detects it once.", "auto")
    seed: int = option("Seed of the harness (few-shot examples, order) and of the resampling.", 1234)
    suite: str | None = option("A suite of configs/lm_eval, or a YAML of that kind (default: quick).")
    tasks: str | None = option("Tasks of the harness by name, with commas between, in the place of a suite.")
    num_fewshot: int | None = option("Shots of every task (default: the suite's, else the task's).")
    apply_chat_template: bool | None = option("Ask through the model's chat template (default: the suite's).")
    backend: str = option("Who computes: hf or vllm.", "hf", choices=["hf", "vllm"])
    processes: int | None = option("Processes of accelerate launch, data parallel (default: one a GPU).")
    tensor_parallel: int | None = option("GPUs of one vLLM engine (default: all).")
    skip_missing: bool = option("Run what can be run where tasks lack data or packages.", False)
    include_path: str | None = option("Folder with task YAMLs of your own, for --tasks.")
    overwrite: bool = option("Ask everything again, and forget the responses kept for these two models.", False)
    after_dashes: list[str] | None = option("What follows -- on the command line; not to be given as a key.")


def own_and_harness(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line before and after `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def check(args, extra: list[str]) -> None:
    """Refuse what cannot be run."""
    if args.suite and args.tasks:
        raise UserError("--suite and --tasks: give one of the two")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size) > 0):
        raise UserError(f"--batch-size {args.batch_size}: a number above 0, or auto")
    for key in ("processes", "tensor_parallel"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot}: must be at least 0")
    if args.output_json:
        raise UserError("--output-json: this stage writes a folder of files; --output-dir names another")
    if args.load_in_4bit:
        raise UserError("--load-in-4bit: lm-eval 0.4.13 cannot quantise a model under transformers 5; leave it out")
    for word in extra:
        ensure_not_reserved(word)
    if args.backend == "vllm":
        from importlib.util import find_spec

        if find_spec("vllm") is None:
            raise UserError("--backend vllm: vLLM is not installed here; requirements/vllm.txt, or --backend hf")


# What run_lm_eval.sh decides: the harness's long names with ours, and its short ones.
DECIDED = {
    "tasks": "-t", "model": "-M", "limit": "-L", "batch_size": "-b", "num_fewshot": "-f", "use_cache": "-c",
    "output_path": "-o", "log_samples": "-s", "samples": "-E", "apply_chat_template": None, "include_path": None,
    "device": None, "config": "-C", "predict_only": "-x", "seed": None,
}  # fmt: skip


def ensure_not_reserved(word: str) -> None:
    """Raise UserError for a flag after `--` that run_lm_eval.sh decides, also where it is written short or cut off."""
    flag = word.split("=")[0]
    for name, short in DECIDED.items():
        if flag == short or (len(flag) > 3 and f"--{name}".startswith(flag.replace("-", "_").replace("__", "--", 1))):
            raise UserError(
                f"-- {flag}: run_lm_eval.sh decides that one; give it before the --, where it has it (--help)"
            )


def choose(args):
    """The suite, checked name by name, with the user's words about it carried out."""
    from preflab.harness.suites import load_suite, suite_of
    from preflab.harness.tasks import expand

    suite = suite_of(args.tasks.split(",")) if args.tasks else load_suite(args.suite)
    if args.include_path:
        suite.include_path = args.include_path
    if args.apply_chat_template not in (None, suite.apply_chat_template):
        # The suite's word on multi-turn shots was meant for its own choice of template.
        suite.apply_chat_template, suite.fewshot_as_multiturn = args.apply_chat_template, None
    expand(suite, suite.include_path)
    return suite


def runnable(suite, args) -> tuple[dict[str, str], int]:
    """(tasks that lack something here, documents of the smallest other): under --skip-missing they are taken out."""
    from preflab.harness.tasks import missing

    print(f"checking the data of {len(suite.tasks)} tasks", file=sys.stderr)
    lacking, smallest = missing(suite, suite.include_path, args.seed)
    if lacking and not args.skip_missing:
        for task, reason in lacking.items():
            print(f"{task}: {reason}", file=sys.stderr)
        raise UserError(f"{len(lacking)} of {len(suite.tasks)} tasks cannot run (above); --skip-missing runs the rest")
    if len(lacking) == len(suite.tasks):
        raise UserError("no task can run: " + "; ".join(f"{task} {reason}" for task, reason in lacking.items()))
    suite.tasks = [entry for entry in suite.tasks if entry["task"] not in lacking]
    return lacking, min(smallest, args.limit or smallest)


def leading_bos(tokenizer, prompt: str) -> int:
    """BOS tokens that the first request opens with, tokenised as the harness does (it adds none where one stands)."""
    bos = tokenizer.bos_token
    if bos is None:
        return 0
    ids = tokenizer.encode(prompt, add_special_tokens=not prompt.startswith(bos))
    count = 0
    while count < len(ids) and ids[count] == tokenizer.bos_token_id:
        count += 1
    return count


def main():
    quick_help(__doc__, runs_bare=True)

    import torch

    from preflab.evaluation.comparison import latest_run, resolve
    from preflab.evaluation.two_models import TwoModels
    from preflab.harness.calls import UNQUANTISED, batch_size, execute, model_arguments, plan
    from preflab.harness.metrics import ensure_adapter_applied, read_side, rows, suite_averages
    from preflab.harness.report import harness_figure, report
    from preflab.harness.suites import load_reference
    from preflab.models.loading import load_tokenizer
    from utils.artifacts import all_arguments, envelope, with_limit_suffix, write_json, write_text
    from utils.cli import parse
    from utils.distributed import quiet_libraries
    from utils.provenance import run_record, shorten_paths

    # What to run; whatever can be wrong is told before the first request.
    started, invoked = time.monotonic(), Path(os.environ.get("INVOKED_FROM", "."))
    quiet_libraries()
    argv, extra = own_and_harness(sys.argv[1:])
    try:
        (args,) = parse((HarnessArguments,), argv)
    except UserError as error:
        raise UserError(f"{error} ({USAGE})") from None
    check(args, extra)
    absolute_paths(args, invoked)
    if not (args.run_name or args.adapter_path or args.tuned_model):
        args.run_name = latest_run(args.checkpoints)
    if not args.tasks:
        args.suite = args.suite or "quick"
    asked_batch, asked_length, args.batch_size, args.after_dashes = args.batch_size, args.max_length, None, extra
    suite, comparison = choose(args), resolve(args)
    # What the harness is not told, it does not do: the run's own length is no word of the user's.
    args.max_length = asked_length
    models = TwoModels(comparison)
    folder = comparison.out / "lm_eval" / with_limit_suffix(suite.name, args.limit)
    comparison.ensure_same_evaluation("lm_eval", [args], folder)
    lacking, documents = runnable(suite, args)
    gpus = torch.cuda.device_count()
    arguments = {
        side: model_arguments(models, side, args.backend, asked_length, args.tensor_parallel or max(gpus, 1))
        for side in models.sides
    }
    harness_reads = load_tokenizer(comparison.base, args.base_revision, trust_remote_code=args.trust_remote_code)
    if suite.apply_chat_template and models.tokenizer.chat_template != harness_reads.chat_template:
        # The harness takes a template from a tokenizer's folder alone.
        models.tokenizer.save_pretrained(folder / "tokenizer")
        arguments = {
            side: {**found, "tokenizer": str((folder / "tokenizer").resolve())} for side, found in arguments.items()
        }
    args.batch_size = batch_size(asked_batch, args.backend, arguments["tuned"], folder / "batch_size.json")
    options = {
        **{key: getattr(args, key) for key in ("backend", "batch_size", "limit", "seed", "num_fewshot")},
        **{key: getattr(suite, key) for key in ("apply_chat_template", "fewshot_as_multiturn", "include_path")},
        # A process without a document would stop the harness.
        "processes": min(args.processes or max(gpus, 1), documents),
        "tasks_sha256": local_tasks(suite),
        "device": "cuda" if gpus else "cpu",
        "extra": extra,
    }

    # Run the harness, base and then tuned; what is finished already is not run again.
    cache, sides = Path(args.eval_out) / ".cache", {}
    for side in models.sides:
        calls = plan(suite, side, arguments[side], models.identity(side), options, folder, cache.resolve())
        if args.overwrite:
            forget(calls)
        for k, call in enumerate(calls, 1):
            execute(call, f"{side} {k}/{len(calls)}", invoked)
        sides[side] = read_side(calls)
    ensure_adapter_applied(**sides)

    # Compare.
    found = rows(**sides, suite=suite, seed=args.seed)
    means = suite_averages(suite, **sides, seed=args.seed)
    references = [load_reference(name) for name in suite.references]
    settings = {
        **{key: options[key] for key in ("apply_chat_template", "limit", "num_fewshot", "batch_size")},
        "dtype": arguments["tuned"].get("mixed_precision_dtype", arguments["tuned"]["dtype"]),
        "tokenizer_bos": leading_bos(models.tokenizer, sides["base"].first_prompt),
        "missing": lacking,
        "unquantised": UNQUANTISED if models.quantized else None,
    }
    title = f"{comparison.name}: {suite.title}"
    text, verdict = report(title, suite, sides, found, means, references, settings)
    metrics = {
        f"{r['task']}/{r['metric']},{r['filter']}/{k}": r[k] for r in found for k in ("base", "tuned", "difference")
    }
    metrics |= {f"{name}/{k}": m[k] for name, m in means.items() for k in ("base", "tuned", "difference")}
    summary = envelope(
        "lm_eval",
        models.describe(),
        metrics,
        all_arguments([args]),
        run_record(args.seed, time.monotonic() - started, run_name=comparison.name, limit=args.limit),
        claim=verdict,
        text=text,
        rows=found,
        averages=means,
        suite={**suite.__dict__, "include_path": suite.include_path and shorten_paths(suite.include_path)},
        settings={**settings, "first_prompt": sides["base"].first_prompt[:2000]},
        headers={name: side.headers for name, side in sides.items()},
        generated_characters={name: side.lengths for name, side in sides.items()},
        seconds={name: side.seconds for name, side in sides.items()},
        references=[{k: v for k, v in r.items() if k != "rows"} for r in references],
    )
    write_text(folder / "lm_eval.md", text + "\n")
    harness_figure(folder / "lm_eval.png", found, title)
    write_json(folder / "lm_eval.json", summary)
    print(text)
    print(f"\nwrote {folder}/: lm_eval.json, lm_eval.md, lm_eval.png, and the harness's own files")


def absolute_paths(args, invoked: Path) -> None:
    """Paths of the command line as seen from where the user stands; the stage itself runs in the repository."""

    def absolute(value: str) -> str:
        return str((invoked / Path(value).expanduser()).resolve())

    for key in ("output_dir", "checkpoints", "eval_out", "include_path", "chat_template_path"):
        value = getattr(args, key)
        if value not in (None, HarnessArguments.__dataclass_fields__[key].default):
            setattr(args, key, absolute(value))
    for key in ("adapter_path", "base_model", "tuned_model"):
        value = getattr(args, key)
        # A name that is no folder here is a hub id, or a folder of the repository.
        if value is not None and Path(absolute(value)).is_dir():
            setattr(args, key, absolute(value))
    if args.suite and args.suite.endswith((".yaml", ".yml")):
        args.suite = absolute(args.suite)
    if args.tasks:
        names = args.tasks.split(",")
        args.tasks = ",".join(absolute(name) if name.endswith(".yaml") else name for name in names)


def local_tasks(suite) -> str:
    """SHA-256 of the task files that do not come with the harness: their figures are other ones when they change."""
    from utils.provenance import ROOT, sha256_of_files

    folders = [Path(suite.include_path)] if suite.include_path else []
    if str(ROOT) in str(suite.include_path):
        folders.append(ROOT / "data" / "lm_eval_quick")
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".yaml", ".py", ".jsonl", ".json")
    ]
    return sha256_of_files([*files, *(e["task"] for e in suite.tasks if e["task"].endswith(".yaml"))])


def forget(calls) -> None:
    """Drop what earlier calls wrote and answered (--overwrite)."""
    import shutil

    for call in calls:
        shutil.rmtree(call.folder, ignore_errors=True)
        cache = Path(call.command[call.command.index("--use_cache") + 1])
        shutil.rmtree(cache.parent, ignore_errors=True)


if __name__ == "__main__":
    run(main, "give a smaller --batch-size, and the same command goes on")
