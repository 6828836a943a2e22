"""Flags of run_lm_eval.sh: which of them the user sets, and which of lm_eval's own are reserved."""

from dataclasses import dataclass
from pathlib import Path

from preflab.evaluation.arguments import ComparisonArguments, ContaminationArguments
from preflab.models.vllm_environment import INSTALL, has_package, require_python
from utils.cli import option
from utils.errors import UserError


@dataclass
class HarnessArguments(ComparisonArguments, ContaminationArguments):
    """Keys of run_lm_eval.sh: those of every evaluation, and the harness's."""

    batch_size: str = option("Requests per batch, the same for both models; auto detects it once.", "auto")
    seed: int = option("Seed of the harness (few-shot examples, order) and of the resampling.", 1234)
    suite: str | None = option("A suite of configs/lm_eval, or a YAML file in that format (default: quick).")
    tasks: str | None = option("Names of harness tasks, separated by commas, instead of a suite.")
    limit: float | None = option("Documents per task, or below 1 a share of them; adds LIMIT to the folder's name.")
    num_fewshot: int | None = option("Shots of every task (default: the suite's, else the task's).")
    apply_chat_template: bool | None = option("Apply the model's chat template to prompts (default: the suite's).")
    backend: str = option("Inference backend: hf or vllm.", "hf", choices=["hf", "vllm"])
    processes: int | None = option("Data-parallel processes of accelerate launch (default: one per GPU).")
    tensor_parallel: int | None = option("GPUs of one vLLM engine (default: all).")
    skip_missing: bool = option("Skip tasks whose data or packages are missing, and run the others.", False)
    include_path: str | None = option("Folder with your own task YAML files, for --tasks.")
    compare: list[str] | None = option(
        "Two folders of lm_eval's --log_samples, made anywhere: base, then tuned. No model runs."
    )
    overwrite: bool = option("Run everything again and delete the cached responses of these two models.", False)
    after_dashes: list[str] | None = option("The arguments after -- on the command line; not to be set as a key.")


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before `--`, for this script, and those after it, for lm_eval."""
    # The first `--` separates; a later one belongs to lm_eval.
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def check(args: HarnessArguments, extra: list[str]) -> None:
    """Raise UserError for arguments that cannot be run; bring --tasks and --limit into one form.

    Args:
        extra: arguments after `--`.
    """
    if args.compare and (len(args.compare) != 2 or args.suite or args.tasks):
        raise UserError("--compare: give two folders of logged samples, without --suite and --tasks")
    if args.suite and args.tasks:
        raise UserError("--suite and --tasks: give only one of the two")
    if args.tasks is not None:
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
        if not names:
            raise UserError(f"--tasks {args.tasks!r}: names no task; give names separated by commas")
        args.tasks = ",".join(names)
    if args.limit is not None:
        args.limit = _documents(args.limit)
    # A text, unlike in the other evaluations, because lm_eval accepts `auto`.
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size) > 0):
        raise UserError(f"--batch-size {args.batch_size}: must be a number above 0, or auto")
    for key in ("processes", "tensor_parallel"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot}: must be at least 0")
    if args.output_json:
        raise UserError("--output-json: this stage writes a folder of files; choose it with --output-dir")
    # An inherited flag of every comparison; ignored silently, it would report other figures than the user expects.
    if args.load_in_4bit:
        raise UserError("--load-in-4bit: lm-eval 0.4.13 cannot quantise a model under transformers 5; omit it")
    for argument in extra:
        ensure_not_reserved(argument)
    if args.backend == "vllm" and not has_package(require_python("--backend vllm", "--backend hf"), "lm_eval"):
        raise UserError(f"--backend vllm: the environment of vLLM has no lm_eval; {INSTALL} makes one that has")


def _documents(limit: float) -> int | float:
    """--limit as lm_eval reads it: a number of documents per task, or below 1 their share."""
    # `not limit > 0` also refuses NaN.
    if not limit > 0 or limit == float("inf"):
        raise UserError(f"--limit {limit:g}: must be a number of documents above 0, or a share below 1")
    if limit > 1 and limit != int(limit):
        raise UserError(f"--limit {limit:g}: above 1 it counts documents, so it must be an integer")
    return int(limit) if limit >= 1 else limit


# Flags of `lm_eval run` that run_lm_eval.sh sets, with their short forms.
RESERVED = {
    "tasks": "-t", "model": "-M", "limit": "-L", "batch_size": "-b", "num_fewshot": "-f", "use_cache": "-c",
    "output_path": "-o", "log_samples": "-s", "samples": "-E", "apply_chat_template": None, "include_path": None,
    "device": None, "config": "-C", "predict_only": "-x", "seed": None,
}  # fmt: skip


def ensure_not_reserved(argument: str) -> None:
    """Raise UserError for a flag after `--` that run_lm_eval.sh sets, also in its short or an abbreviated form."""
    flag = argument.split("=")[0]
    # argparse accepts abbreviations (--lim) and lm_eval takes dashes for underscores; the leading two dashes stay.
    spelled = flag.replace("-", "_").replace("__", "--", 1)
    for name, short in RESERVED.items():
        if flag == short or (len(flag) > 3 and f"--{name}".startswith(spelled)):
            raise UserError(f"-- {flag}: run_lm_eval.sh sets this flag; give it before the -- (see --help)")


def make_paths_absolute(args: HarnessArguments, caller: Path) -> None:
    """Resolve relative paths from the folder that run_lm_eval.sh was called in; the stage runs in the repository."""

    def absolute(value: str) -> str:
        return str((caller / Path(value).expanduser()).resolve())

    for key in ("output_dir", "checkpoints", "eval_out", "include_path", "chat_template_path"):
        value = getattr(args, key)
        # Defaults are relative to the repository, values of the user to the caller's folder.
        if value not in (None, HarnessArguments.__dataclass_fields__[key].default):
            setattr(args, key, absolute(value))
    for key in ("adapter_path", "base_model", "tuned_model", "contamination"):
        value = getattr(args, key)
        # A name that is not a folder (or file) there is a hub id, a run, or a folder of the repository.
        if value is not None and Path(absolute(value)).exists():
            setattr(args, key, absolute(value))
    for folder in args.compare or []:
        if not Path(absolute(folder)).is_dir():
            raise UserError(f"--compare {folder}: no such folder")
    args.compare = args.compare and [absolute(folder) for folder in args.compare]
    if args.suite and args.suite.endswith((".yaml", ".yml")):
        args.suite = absolute(args.suite)
    if args.tasks:
        names = args.tasks.split(",")
        args.tasks = ",".join(absolute(name) if name.endswith(".yaml") else name for name in names)
