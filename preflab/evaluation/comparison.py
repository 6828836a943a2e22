"""Which two models an evaluation compares, and where its results go.

The base model is compared with a tuned one: a LoRA adapter on the base, or a fully tuned model. Models are named here
and not loaded (see preflab.evaluation.two_models).
"""

import difflib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from preflab.data.sources import SourceArguments, reading
from preflab.data.template_date import choose_template_date
from preflab.evaluation.arguments import ULTRAFEEDBACK, ComparisonArguments
from preflab.evaluation.runs import (
    HELD_OUT_ROWS,
    WEIGHTS,
    data_of_run,
    is_reward_model,
    latest_run,
    newest_checkpoint,
    read_manifest,
    run_folder_of,
    step_of,
)
from preflab.evaluation.servers import SERVER, model_and_url, model_of_server
from preflab.models.loading import default_batch_tokens, ensure_readable, hub_name, locate_adapter
from preflab.models.start_adapter import FROZEN
from utils.artifacts import (
    all_arguments,
    changed_arguments,
    check_writable,
    describe_changes,
    read_json,
    remove_if_empty_on_failure,
    with_limit_suffix,
)
from utils.errors import UserError, at_end, is_main_process
from utils.locks import hold, let_go
from utils.secrets_in_text import without_secrets

# Arguments that do not affect results; they may differ when existing results are reused.
ARGUMENTS_NOT_IN_IDENTITY = {
    # Batch sizes and the shared prompt change figures by rounding only.
    "batch_size", "batch_tokens", "overwrite", "checkpoints", "eval_out", "output_dir", "output_json", "run_name",
    "expected", "expected_batch_size", "expected_processes", "length_bias_splits", "published", "judge_attempts",
    "judge_timeout", "judge_concurrency", "trust_remote_code", "allow_other_base", "processes", "tensor_parallel",
    "skip_missing", "shared_prompt", "server_timeout", "server_concurrency",
    "plan", "allow_identical", "contamination", "contamination_split",
}  # fmt: skip


@dataclass
class Comparison:
    """Two models by name, and where results go. See `resolve`.

    Attributes:
        args: the arguments, with defaults filled in.
        name: the run's name, or one made of the tuned model's folder.
        base: hub id or folder of the base model.
        adapter: LoRA folder of the tuned model; None for a fully tuned model.
        tuned: hub id or folder of a fully tuned model; None with an adapter.
        trained: the arguments of the training run, {} if it is not known.
        out: folder of the results.
        step: the optimizer step, if the tuned model is a checkpoint.
        base_adapter: LoRA folder on the base model, or None.
        servers: `{side: openai:MODEL@URL}` of the sides that a server answers for. The other fields name weights:
            with a server in the base's place, `base` is what an adapter of the tuned model is loaded on.
        identical: what both models gave alike everywhere, with --allow_identical; "" where they differ.
    """

    args: ComparisonArguments
    name: str
    base: str
    adapter: str | None
    tuned: str | None
    trained: dict
    out: Path
    step: int | None = None
    base_adapter: str | None = None
    servers: dict[str, str] = field(default_factory=dict)
    identical: str = ""

    @property
    def sides(self) -> tuple[str, ...]:
        """base and tuned, or base alone (`resolve` with `alone`)."""
        return ("base", "tuned") if self.adapter or self.tuned or "tuned" in self.servers else ("base",)

    def weights(self, side: str) -> tuple[str, str | None, str | None]:
        """(model, revision, adapter) of "base" or "tuned"."""
        if side == "tuned" and self.tuned:
            return self.tuned, self.args.tuned_revision, None
        return self.base, self.args.base_revision, self.adapter if side == "tuned" else self.base_adapter

    @property
    def names(self) -> dict[str, str]:
        """The names of base and tuned in titles."""
        base = f"{self.base} with {self.base_adapter}" if self.base_adapter else self.base
        served = {side: without_secrets(server) for side, server in self.servers.items()}
        names = {"base": base, "tuned": self.adapter or self.tuned, **served}
        return {side: names[side] for side in self.sides}

    @property
    def title(self) -> str:
        """The heading of tables and pictures."""
        if len(self.sides) == 1:
            return f"{self.name}: {self.names['base']} alone"
        return f"{self.name}: {self.names['tuned']} against {self.names['base']}"

    @property
    def run_fields(self) -> dict:
        """What this comparison adds to the `run` section of an artifact."""
        return {"run_name": self.name, "limit": self.args.limit}

    def ensure_same_evaluation(self, stem: str, arguments: list, folder: Path | None = None) -> None:
        """Raise UserError if `<stem>.json` holds the results of another evaluation, unless --overwrite is given.

        Args:
            arguments: the argument dataclasses of this call.
            folder: the folder of `<stem>.json`, for stages that have their own.
        """
        path = folder / f"{stem}.json" if folder else self.path(stem, ".json")
        self.hold(path)
        if self.args.overwrite or not path.exists():
            return
        before, now = read_json(path).get("args", {}), all_arguments(arguments)
        # defaults=now: an argument that the older artifact does not have counts as unchanged.
        ignored = set(ARGUMENTS_NOT_IN_IDENTITY)
        # The frozen reference of the run itself has another path after the run was renamed, and the same weights.
        if all(Path(args.get("base_adapter") or "").name == FROZEN for args in (before, now)):
            ignored.add("base_adapter")
        changed = changed_arguments(before, now, ignored, defaults=now)
        if changed:
            raise UserError(
                f"{path} holds another evaluation ({describe_changes(before, now, changed)}): choose another folder"
                " with --output_dir, or --overwrite it"
            )

    def hold(self, path: Path) -> None:
        """Lock an artifact until the script ends. Rank 0 only.

        Raises:
            UserError: another process is writing it; the message names that process.
        """
        if is_main_process():
            remove_if_empty_on_failure(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = hold(path.with_name(f".{path.stem}.lock"), str(path), "wait for it")
            at_end(lambda: let_go(lock))

    def path(self, stem: str, suffix: str) -> Path:
        """The path of an artifact: `<out>/<stem><suffix>`, or next to --output_json; --limit adds LIMIT to it."""
        folder = self.out
        if self.args.output_json:
            folder, stem = Path(self.args.output_json).parent, Path(self.args.output_json).stem
        return folder / f"{with_limit_suffix(stem, self.args.limit)}{suffix}"


def resolve(args: ComparisonArguments, answers_only: bool = False, alone: bool = False) -> Comparison:
    """Fill in missing arguments from the run that trained the tuned model, and validate them.

    Base model, data, lengths and precision default to those in the run's `run.json`, whether the run is given by name,
    by the path of its adapter, or by one of its checkpoints.

    Args:
        answers_only: the stage reads only answers, so that a model may be behind a server (openai:MODEL@URL).
        alone: --base_model without a tuned model is that model alone, not the latest run against it.

    Raises:
        UserError: no tuned model, two tuned models, a missing run, folder or base model, or a value out of range.
    """
    for key in ("base_model", "adapter_path", "tuned_model", "base_adapter"):
        # A ~ in a YAML file or after `=` on the command line arrives unexpanded.
        if (getattr(args, key) or "").startswith("~"):
            setattr(args, key, str(Path(getattr(args, key)).expanduser()))
    servers = _servers(args, answers_only)
    _check(args)
    tuned_flags = ("adapter_path", "tuned_model", "run_name", "base_run", "base_adapter")
    if alone and args.base_model and not any(getattr(args, key) for key in tuned_flags):
        return _one_model(args, servers)
    folder = _tuned_folder(args)
    if folder and is_reward_model(folder):
        raise UserError(
            f"{folder} is a reward model, which answers no prompt: `python eval_reward_model.py --scorer rm:{folder}`"
            " evaluates it, and rm: makes it a judge or scorer"
        )
    trained = _run_arguments(folder) if folder else {}
    _note_unfinished(folder)
    # A folder without adapter_config.json holds a fully tuned model.
    adapter = str(folder) if folder and (folder / "adapter_config.json").exists() else None
    tuned = None if adapter else str(folder) if folder else args.tuned_model
    if adapter:
        ensure_readable(adapter)
    if args.base_run:
        _put_run_in_place_of_base(args, adapter, folder)
    named = None if "base" in servers else args.base_model
    base = named or trained.get("model_name_or_path") or (base_of(adapter) if adapter else None)
    if "base" in servers and tuned:
        base = tuned
    if base is None:
        raise UserError("--base_model is missing: the model that the tuned one is compared with")
    args.base_adapter = None if "base" in servers else _base_adapter(args, folder, adapter)
    for lora in (adapter, args.base_adapter):
        if lora and not args.allow_other_base:
            _ensure_same_base(lora, base)
    _set_defaults(args, trained)
    name = args.run_name or _name_of(folder or Path(model_of_server(args.tuned_model)))
    name += f"-vs-{args.base_run.replace('/', '-')}" if args.base_run else ""
    out = _results_folder(args, name)
    # For --expected: the evaluation at this step is the checkpoint's own.
    step = step_of(folder) if folder and is_checkpoint(folder) else None
    return Comparison(args, name, base, adapter, tuned, trained, out, step, args.base_adapter, servers)


def _one_model(args: ComparisonArguments, servers: dict[str, str]) -> Comparison:
    """The base model alone: figures without a comparison. Defaults come from its run, if it is one."""
    folder = Path(args.base_model)
    trained = _run_arguments(folder) if folder.is_dir() else {}
    _set_defaults(args, trained)
    name = _name_of(Path(model_of_server(args.base_model)))
    return Comparison(args, name, args.base_model, None, None, trained, _results_folder(args, name), servers=servers)


def _results_folder(args: ComparisonArguments, name: str) -> Path:
    """The folder of the results, after a check that it can be written to."""
    out = Path(args.output_dir) if args.output_dir else Path(args.eval_out) / name
    flag = "--output_json" if args.output_json else "--output_dir" if args.output_dir else "--eval_out"
    # Before the weights are loaded, so that hours of work do not end in a write error.
    check_writable(Path(args.output_json).parent if args.output_json else out, flag)
    return out


def _servers(args: ComparisonArguments, answers_only: bool) -> dict[str, str]:
    """`{side: openai:MODEL@URL}` of --base_model and --tuned_model. Raises UserError where weights are needed."""
    servers = {}
    for key in ("base_model", "tuned_model", "adapter_path", "base_adapter"):
        value = getattr(args, key) or ""
        if not value.startswith(SERVER):
            continue
        if not key.endswith("_model"):
            raise UserError(f"--{key} {value}: an adapter is a folder; name a server as --base_model or --tuned_model")
        if not answers_only:
            raise UserError(
                f"--{key} {value}: needs weights, since a server gives no log-probabilities of given answers; battles,"
                " AlpacaEval and human evaluation need answers only and accept servers"
            )
        model_and_url(value, f"--{key} {value}")
        servers[key.removesuffix("_model")] = value
    if "base" in servers and args.base_adapter:
        raise UserError("--base_adapter: the base is behind a server; remove one of the two")
    return servers


def _check(args: ComparisonArguments) -> None:
    """Raise UserError for contradicting flags and values out of range."""
    if args.adapter_path and args.tuned_model:
        raise UserError("--adapter_path and --tuned_model: give only one of them")
    if args.base_run and (args.base_model or args.base_adapter):
        raise UserError("--base_run names the base already: remove --base_model and --base_adapter")
    if args.output_json and args.output_dir:
        raise UserError("--output_json and --output_dir: give only one of them")
    for key in ("limit", "batch_size", "batch_tokens", "max_length", "max_prompt_length"):
        if getattr(args, key) is not None and getattr(args, key) <= 0:
            raise UserError(f"--{key} {getattr(args, key)}: must be above 0")


def _tuned_folder(args) -> Path | None:
    """The folder of the tuned model; None if --tuned_model is a hub id."""
    if args.adapter_path:
        folder = Path(args.adapter_path).expanduser()
        if not (folder / "adapter_config.json").exists():
            problem = "contains no adapter_config.json" if folder.is_dir() else "is not a folder"
            raise UserError(f"--adapter_path {args.adapter_path} {problem}: give the folder that training wrote")
        return folder
    if args.tuned_model:
        folder = Path(args.tuned_model).expanduser()
        return folder if folder.is_dir() else None
    if args.run_name is None:
        args.run_name = latest_run(args.checkpoints)
        if is_main_process():
            print(f"run: {args.run_name} (latest; --run_name chooses)", file=sys.stderr)
    return _run_folder(args.checkpoints, args.run_name)


def _run_folder(runs: str, name: str) -> Path:
    """The folder of the run `name`. Raises UserError, with what may be meant, if it has no trained model."""
    folder = Path(runs) / name
    if any((folder / f).exists() for f in WEIGHTS):
        return folder
    trained = [p.name for p in Path(runs).glob("*") if any((p / f).exists() for f in WEIGHTS)]
    similar = difflib.get_close_matches(name, trained, n=1)
    trials = sorted(n for n in trained if n.startswith(f"{name}_LIMIT"))
    saved = newest_checkpoint(folder)
    if trials:
        fix = f"--run_name {trials[0]} is a trial run of it"
    elif saved:
        fix = f"its training is not finished; --adapter_path {saved} is its newest checkpoint"
    elif similar:
        fix = f"did you mean {similar[0]}?"
    else:
        fix = "train it first (the quickstart run: `bash quickstart.sh`)"
    raise UserError(
        f"{folder} contains no trained model: {fix}; --list shows all runs, --base_model and --adapter_path name others"
    )


def _put_run_in_place_of_base(args: ComparisonArguments, adapter: str | None, tuned: Path | None) -> None:
    """Set the base model or its adapter to the run of --base_run.

    Raises:
        UserError: the run does not exist or is the tuned one, or one of the two is an adapter and the other a model.
    """
    other = _run_folder(args.checkpoints, args.base_run)
    if tuned and other.resolve() == tuned.resolve():
        raise UserError(f"--base_run {args.base_run} is the tuned run itself: choose another with --run_name")
    lora = (other / "adapter_config.json").exists()
    if lora and adapter:
        args.base_adapter = str(other)
    elif not lora and not adapter:
        args.base_model = str(other)
    else:
        first = args.base_run if lora else args.run_name or adapter
        raise UserError(
            f"--base_run {args.base_run}: one run is a LoRA adapter and the other a complete model; merge the adapter"
            f" with `python merge_adapter.py --run_name {first}`, then give both as --base_model and --tuned_model"
        )


def _run_arguments(weights: Path) -> dict:
    """The arguments of the run that wrote `weights` (a run's folder or one of its checkpoints); {} if it is not known.

    SFT runs trained on conversations, not pairs, so the arguments that choose their rows are ignored.
    """
    folder = run_folder_of(weights)
    if folder is None:
        return {}
    manifest = read_manifest(folder)
    arguments = manifest["args"]
    if "prompt_format" in arguments:
        # Runs that did not record it are older than the wrapping of text prompts: their `auto` left them text.
        before = "text" if arguments["prompt_format"] == "auto" else arguments["prompt_format"]
        arguments["prompt_format"] = manifest.get("prompt_format", before)
    arguments["template_date"] = manifest.get("template_date")
    if (folder / HELD_OUT_ROWS).exists():
        # Rows of the train split that training held out (--test_rows): the run's test split is this file.
        held_out = {"test_dataset_name": str(folder / HELD_OUT_ROWS), "dataset_test_split": "test"}
        arguments |= {**held_out, "test_rows": 0, "columns": None}
    # Only SFT has loss_on.
    ignored = {*SourceArguments.__dataclass_fields__} - {"prompt_format"} if "loss_on" in arguments else ()
    return {key: value for key, value in arguments.items() if key not in ignored}


def _note_unfinished(folder: Path | None) -> None:
    """Print a note if the run has not finished training."""
    manifest = folder / "run.json" if folder else None
    if manifest and manifest.exists() and not read_json(manifest).get("finished") and is_main_process():
        print(f"note: training of {folder} is not finished; its training command continues it", file=sys.stderr)


def _base_adapter(args: ComparisonArguments, folder: Path | None, adapter: str | None) -> str | None:
    """The LoRA folder on the base model: --base_adapter, else the frozen reference adapter that the run wrote."""
    requested = args.base_adapter
    if (requested or "").lower() == "none":
        return None
    # The base's adapter is loaded beside the tuned one, into the same PEFT model.
    if requested is not None and adapter is None:
        raise UserError("--base_adapter: needs a LoRA adapter as the tuned model; name the base with --base_model")
    if requested:
        return locate_adapter(requested)
    # In the weights' folder, or in the run's folder if the weights are a checkpoint's.
    folders = [folder, *([folder.parent] if is_checkpoint(folder) else [])] if folder else []
    frozen = (place / FROZEN for place in folders if (place / FROZEN / "adapter_config.json").exists())
    return next(map(str, frozen), None)


def _name_of(folder: Path) -> str:
    """A name for the results of a model folder, with its parent's name if its own is not unique."""
    folder = folder.resolve() if folder.exists() else folder
    parent = folder.parent.name
    # Two runs both have a checkpoint-7000; the top folder checkpoints/ names no run.
    other_trainer = is_checkpoint(folder) and parent != "checkpoints"
    with_parent = (folder.parent / "run.json").exists() or other_trainer
    return re.sub(r"[^\w.\-]", "-", "-".join([*([parent] if with_parent and parent else []), folder.name]))


def base_of(adapter: str) -> str | None:
    """The base model of a LoRA folder: exactly as its run recorded it, else as its config names it.

    The config of an adapter on the builtin model names the original on the hub, which plain PEFT can load.
    """
    named = read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
    recorded = _run_arguments(Path(adapter)).get("model_name_or_path")
    return recorded if recorded and hub_name(recorded) == named else named


def ensure_models_differ(identical: bool, results: str, comparison: Comparison) -> None:
    """Raise UserError if base and tuned gave identical results; with --allow_identical, note it in the comparison.

    Args:
        results: what was identical, e.g. "the same answer to all 8 prompts".
    """
    if not identical:
        return
    if comparison.args.allow_identical:
        comparison.identical = f"IDENTICAL: base and tuned gave {results}."
        return
    cause = "they are one model, or too alike to differ here; check --base_model and --tuned_model"
    if comparison.adapter and not comparison.servers:
        cause = "the adapter was not applied, or training hardly changed the model; check --adapter_path"
    raise UserError(f"base and tuned gave {results}: {cause}, or give --allow_identical for the figures")


def held_out_sources(args: ComparisonArguments, trained: dict) -> tuple[list[dict], bool]:
    """The sources to evaluate on, for `load_pairs`, and whether the run itself held them out.

    Raises:
        UserError: the run held nothing out and no data are given.
    """
    if args.dataset_name is not None:
        if args.dataset_name == ULTRAFEEDBACK and not _names_data(trained) and is_main_process():
            known = f"run {args.run_name} was not trained on pairs" if args.run_name else "no run names the pairs"
            print(f"note: {known}: reading those of {ULTRAFEEDBACK}; --dataset_name names others", file=sys.stderr)
        source = {"name": args.dataset_name, "config": args.dataset_config, "revision": args.dataset_revision}
        return [{**source, "split": args.split, **reading(args.columns, args.on_bad_row)}], False
    sources = _test_sources(trained)
    if not sources:
        raise UserError(
            f"run {args.run_name or args.adapter_path or args.tuned_model} has no held-out pairs: give data that it was"
            " not trained on with --dataset_name and --split, or choose another run (--list shows all)"
        )
    # With another split, these are not the rows that the run held out, so its filters do not apply.
    return [{**source, **({"split": args.split} if args.split else {})} for source in sources], not args.split


def has_held_out(trained: dict) -> bool:
    """Whether the run that trained the model held pairs out."""
    return bool(_names_data(trained) and _test_sources(trained))


def _names_data(trained: dict) -> bool:
    return bool(trained.get("dataset_name") or trained.get("datasets"))


def _test_sources(trained: dict) -> list[dict]:
    """The sources of a run's test split; none if it held nothing out."""
    return data_of_run(trained).sources()[1]


def _ensure_same_base(adapter: str, base: str) -> None:
    """Raise UserError if the adapter's config names another base: shapes may fit, but all results would be wrong."""
    trained_on = base_of(adapter)
    # Without its run.json, an adapter on the builtin model has only the original's name.
    if not trained_on or (trained_on == hub_name(base) and not _run_arguments(Path(adapter))):
        return
    folders = Path(trained_on).expanduser(), Path(base).expanduser()
    if all(folder.is_dir() for folder in folders):
        differs = folders[0].resolve() != folders[1].resolve()
    else:
        # A hub id and a local copy of it share their last part.
        differs = folders[0].name.lower() != folders[1].name.lower()
    if differs:
        raise UserError(
            f"adapter {adapter} was trained on {trained_on}, not on {base}: give --base_model {trained_on}, or"
            " --allow_other_base if both are the same weights"
        )


def _set_defaults(args: ComparisonArguments, trained: dict) -> None:
    """Set missing arguments to those of the run, else to the project's defaults."""
    if args.dataset_name is None and not _names_data(trained):
        args.dataset_name = ULTRAFEEDBACK
    if args.dataset_name is not None:
        args.split = args.split or ("test_prefs" if args.dataset_name == ULTRAFEEDBACK else "test")
    args.prompt_format = args.prompt_format or trained.get("prompt_format") or "auto"
    args.chat_template_path = args.chat_template_path or trained.get("chat_template_path")
    # The argument stays as given: the artifact's section `model` has the date, where a template prints one.
    choose_template_date(args.template_date or trained.get("template_date"))
    args.attn_implementation = args.attn_implementation or trained.get("attn_implementation")
    # The run's prompt length belongs to the run's total length; with another total, half of that.
    if args.max_length in (None, trained.get("max_length")):
        args.max_length = trained.get("max_length") or 1024
        args.max_prompt_length = args.max_prompt_length or trained.get("max_prompt_length")
    args.max_prompt_length = args.max_prompt_length or args.max_length // 2
    if not args.max_prompt_length < args.max_length:
        raise UserError(
            f"--max_prompt_length {args.max_prompt_length}: must be below --max_length {args.max_length}, so that"
            " every answer keeps at least one token"
        )
    if args.batch_tokens is None:
        args.batch_tokens = default_batch_tokens()


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder has the name of a trainer's checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None
