"""Calls of lm-evaluation-harness through its command line: one per model and number of shots, resumable."""

import ctypes
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from preflab.data.chat_template import ChatRenderer
from preflab.data.template_date import template_date, with_fixed_date
from preflab.evaluation.comparison import Comparison, resolve
from preflab.evaluation.two_models import TwoModels
from preflab.harness.suites import Suite
from preflab.harness.tasks import hash_of_local_tasks
from preflab.models import vllm_environment
from preflab.models.loading import load_tokenizer, locate
from preflab.models.vllm_engine import lora_rank
from utils.artifacts import dumps, read_json, write_json
from utils.errors import UserError, explain
from utils.progress import LineProgress
from utils.provenance import ROOT, sha256_of, sha256_of_files, versions

# Requests per batch on a CPU, where the harness's detection (a trial of the GPU's memory) does not apply.
AUTO_ON_CPU = 8
OUT_OF_MEMORY = "use a smaller --batch-size and run the same command again to continue"


@dataclass
class Call:
    """One run of the harness: one model, the tasks with one number of shots, and the folder of its files."""

    side: str
    tasks: list[str]
    shots: int | None
    command: list[str]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether an earlier run of the same command succeeded."""
        return (self.folder / "call.json").exists() and any(self.folder.glob("results_*.json"))

    @property
    def seconds(self) -> float:
        """Duration of the finished run."""
        return read_json(self.folder / "call.json")["seconds"]


UNQUANTISED = (
    "The adapter was trained on a quantised base; lm-eval 0.4.13 cannot quantise under transformers 5, so both models"
    " run on the base in full precision."
)


def resolve_models(args, extra: list[str]) -> Comparison:
    """Resolve the two models and record the arguments after `--`.

    --batch_size and --max_length keep the user's values: `resolve` expects a number for the first and fills the second
    from the run, but lm_eval gets --max_length only if the user set it.
    """
    requested = args.batch_size, args.max_length
    args.batch_size, args.after_dashes = None, extra
    comparison = resolve(args, alone=True)
    args.batch_size, args.max_length = requested
    return comparison


def arguments_of_models(models: TwoModels, suite: Suite, folder: Path) -> dict[str, dict]:
    """The harness's --model_args by side ("base", "tuned").

    Args:
        folder: where a tokenizer with another chat template is saved.
    """
    comparison, args = models.comparison, models.comparison.args
    # Used by vLLM only: the GPUs that share the weights of one engine.
    gpus = args.tensor_parallel or max(torch.cuda.device_count(), 1)
    arguments = {side: model_arguments(models, side, args.backend, args.max_length, gpus) for side in models.sides}
    # The base model's own template: only another one must be passed to lm_eval.
    own = load_tokenizer(comparison.base, args.base_revision, trust_remote_code=args.trust_remote_code)
    template = models.tokenizer.chat_template
    if suite.apply_chat_template and template:
        # lm_eval renders it without limits of time and memory: a template that exceeds them is refused here.
        ChatRenderer(models.tokenizer)
    if suite.apply_chat_template and (template != own.chat_template or template_date(template)):
        # The harness reads a chat template only from a tokenizer's folder, and would print the day of each call.
        tokenizer = copy(models.tokenizer)
        tokenizer.chat_template = with_fixed_date(template) if template else template
        tokenizer.save_pretrained(folder / "tokenizer")
        place = str((folder / "tokenizer").resolve())
        arguments = {side: {**values, "tokenizer": place} for side, values in arguments.items()}
    return arguments


def model_arguments(models, side: str, backend: str, max_length: int | None, tensor_parallel: int) -> dict:
    """The harness's --model_args of one side ("base" or "tuned"), in the precision of training.

    A base that was quantised for training is loaded in its compute precision: see `UNQUANTISED`.
    """
    c, args = models.comparison, models.comparison.args
    name, revision, adapter = c.weights(side)
    # The precision of matrix products in training: that of autocast if there was one, else that of the weights.
    compute = models.dtype if models.autocast is None else str(models.autocast).removeprefix("torch.")
    # Absolute, since the calls run in the folder that run_lm_eval.sh was called in.
    adapter = str(Path(adapter).resolve()) if adapter else None
    # Weights in one precision under autocast in another exist only with transformers and without quantisation.
    autocast = backend == "hf" and not models.quantized
    arguments = {"pretrained": _absolute(locate(name, revision)), "dtype": models.dtype if autocast else compute}
    if revision:
        arguments["revision"] = revision
    if args.trust_remote_code:
        arguments["trust_remote_code"] = True
    if backend == "vllm":
        # vLLM's names of the same settings; its LoRA kernels need the largest rank in advance.
        length = {"max_model_len": max_length} if max_length else {}
        lora = {"lora_local_path": adapter, "max_lora_rank": lora_rank(adapter)} if adapter else {}
        return {**arguments, "tensor_parallel_size": tensor_parallel, **length, **lora}
    # As in training: weights in models.dtype, matrix products under autocast in `compute`.
    if autocast and compute != models.dtype:
        arguments["mixed_precision_dtype"] = compute
    if args.attn_implementation:
        arguments["attn_implementation"] = args.attn_implementation
    if max_length:
        arguments["max_length"] = max_length
    return {**arguments, **({"peft": adapter} if adapter else {})}


def _absolute(name: str) -> str:
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


def batch_size(requested: str, backend: str, arguments: dict, cached: Path) -> str:
    """The batch size of both models. `auto` is detected once, on a GPU by the harness's trial of what fits.

    Args:
        cached: a file with the detected number, so that a later call continues with the same.
    """
    # vLLM batches continuously and detects its own limit, so `auto` is passed on.
    if requested != "auto" or backend == "vllm":
        return requested
    if not torch.cuda.is_available():
        return str(AUTO_ON_CPU)
    # Another length, precision or model changes what fits. The responses' cache depends on the batch size, so a
    # detection that came out differently would discard cached responses.
    key = dumps(arguments)
    if cached.exists() and (entry := read_json(cached))["arguments"] == key:
        return entry["batch_size"]
    # A separate process, so that the GPU's memory is free again when it ends.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        detected = str(pool.submit(_detect, arguments).result())
    write_json(cached, {"batch_size": detected, "arguments": key})
    return detected


def _detect(arguments: dict) -> int:
    # Only the process that detects needs the harness's model class.
    from lm_eval.models.huggingface import HFLM

    # Without requests, the trial uses sequences of the model's maximum length: the worst case of every task.
    return HFLM(**arguments, batch_size="auto")._detect_batch_size()


def call_options(suite: Suite, args, documents: int, extra: list[str]) -> dict:
    """The options of every call, for `plan`.

    Args:
        documents: of the smallest task; lm_eval fails if a rank gets none.
        extra: arguments after `--`.
    """
    gpus = torch.cuda.device_count()
    return {
        **{key: getattr(args, key) for key in ("backend", "batch_size", "limit", "seed", "num_fewshot")},
        **{
            key: getattr(suite, key)
            for key in ("apply_chat_template", "fewshot_as_multiturn", "include_path", "gen_kwargs")
        },
        # Data parallel: every rank needs at least one document.
        "processes": min(args.processes or max(gpus, 1), documents),
        "tasks_sha256": hash_of_local_tasks(suite),
        "device": "cuda" if gpus else "cpu",
        "extra": extra,
        # Those of the environment that answers, in which other versions are installed than here.
        "engine_versions": vllm_environment.versions() if args.backend == "vllm" else None,
    }


def run_calls(
    suite: Suite, models: TwoModels, arguments: dict[str, dict], options: dict, folder: Path, caller: Path
) -> dict[str, list[Call]]:
    """Run the harness on base and then tuned; finished calls are not run again. Returns the calls by side.

    Args:
        arguments: from `arguments_of_models`. options: from `call_options`.
        folder: of the results. caller: the folder in which the calls run.
    """
    args, calls = models.comparison.args, {}
    cache = (Path(args.eval_out) / ".cache").resolve()
    # Base is complete before tuned starts, so that only one model occupies the GPU.
    for side in models.sides:
        # `identity` identifies the weights: an adapter trained again into the same folder gets its own cache.
        calls[side] = plan(suite, side, arguments[side], models.identity(side), options, folder, cache)
        if args.overwrite:
            delete_results(calls[side])
        for k, call in enumerate(calls[side], 1):
            execute(call, f"{side} {k}/{len(calls[side])}", caller)
    return calls


def delete_results(calls: list[Call]) -> None:
    """Delete the files and the cached responses of earlier calls (--overwrite)."""
    for call in calls:
        shutil.rmtree(call.folder, ignore_errors=True)
        # The folder of this model's responses; lm_eval appends `_rank<k>.db` to the path for each process.
        cache = Path(call.command[call.command.index("--use_cache") + 1])
        shutil.rmtree(cache.parent, ignore_errors=True)


def plan(
    suite: Suite, side: str, arguments: dict, identity: dict, options: dict, folder: Path, cache: Path
) -> list[Call]:
    """The calls of one model in the suite's order: tasks with the same number of shots share a call.

    Args:
        arguments: from `model_arguments`. identity: of the model's weights and precision.
        options: backend, batch_size, limit, seed, apply_chat_template, fewshot_as_multiturn, num_fewshot,
            gen_kwargs, include_path, tasks_sha256 (of local task files), processes, device, extra (arguments after
            `--`), engine_versions (with vLLM).
        cache: the folder of response caches. lm_eval looks responses up by request alone, so each model, precision,
            backend, length and batch size needs its own.
    """
    o, groups = options, {}
    for entry in suite.tasks:
        # None: the task's own number of shots. lm_eval's --num_fewshot applies to all tasks of a call, hence the
        # groups.
        shots = o["num_fewshot"] if o["num_fewshot"] is not None else entry.get("num_fewshot")
        groups.setdefault(shots, []).append(entry["task"])
    # `setting` is everything that a response depends on apart from the request; tasks and shots are part of the
    # request.
    setting = {"arguments": arguments, "identity": identity, "versions": versions(), "extra": o["extra"]}
    setting |= {key: o[key] for key in ("backend", "batch_size", "processes", "device")}
    if o["backend"] == "vllm":
        setting["engine_versions"] = o["engine_versions"]
    # A changed chat template or tokenizer changes responses, but not the hash of the weights.
    setting["files"] = _model_files(arguments)
    responses = cache / f"lm_eval-{sha256_of(dumps(setting))[:16]}" / "responses"
    calls = []
    for shots, tasks in groups.items():
        command = _launcher(o) + _harness(o, arguments, tasks, shots)
        # Any change of command, model or local task files leads to another folder, so `finished` is never true for
        # other settings.
        call_hash = sha256_of(dumps([setting, command, o["tasks_sha256"]]))[:8]
        place = folder / f"{side}-{'own' if shots is None else shots}shot-{call_hash}"
        # Not part of the hash: `place` contains it, and paths of outputs do not change figures.
        outputs = ["--log_samples", "--output_path", str(place / "results.json"), "--use_cache", str(responses)]
        calls.append(Call(side, tasks, shots, [*command, *outputs, *o["extra"]], place))
    return calls


def _model_files(arguments: dict) -> str | None:
    """SHA-256 of a local model's tokenizer and configuration, which the hash of its weights does not include."""
    folders = [Path(arguments[key]) for key in ("pretrained", "tokenizer") if key in arguments]
    files = [path for folder in folders if folder.is_dir() for path in folder.glob("*.json")]
    return sha256_of_files(files) if files else None


def _launcher(o: dict) -> list[str]:
    """The start of the command: lm_eval alone, or under accelerate launch with several processes."""
    if o["backend"] == "hf" and o["processes"] > 1:
        config = ROOT / "configs" / "accelerate" / ("cpu_2proc.yaml" if o["device"] == "cpu" else "multi_gpu.yaml")
        launch = ["--config_file", str(config), "--num_processes", str(o["processes"])]
        return [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "lm_eval"]
    return [vllm_environment.find_python() if o["backend"] == "vllm" else sys.executable, "-m", "lm_eval"]


def _harness(o: dict, arguments: dict, tasks: list[str], shots: int | None) -> list[str]:
    """The arguments of `lm_eval run` that decide its figures."""
    command = ["run", "--model", o["backend"], "--model_args", json.dumps(arguments), "--tasks", ",".join(tasks)]
    command += ["--batch_size", o["batch_size"], "--seed", str(o["seed"])]
    if o["backend"] == "hf" and o["device"] == "cpu":
        command += ["--device", "cpu"]
    if shots is not None:
        command += ["--num_fewshot", str(shots)]
    if o["limit"] is not None:
        command += ["--limit", str(o["limit"])]
    if o["apply_chat_template"]:
        command += ["--apply_chat_template"]
        if o["fewshot_as_multiturn"] is not None:
            command += ["--fewshot_as_multiturn", str(o["fewshot_as_multiturn"]).lower()]
    if o.get("gen_kwargs"):
        command += ["--gen_kwargs", ",".join(f"{key}={value}" for key, value in o["gen_kwargs"].items())]
    if o["include_path"]:
        command += ["--include_path", o["include_path"]]
    return command


def execute(call: Call, title: str, cwd: Path) -> None:
    """Run the call unless it is finished. Its output goes to log.txt; its progress is shown.

    Raises:
        UserError: lm_eval failed. The message has its last error line; finished responses stay in its cache.
    """
    if call.finished:
        print(f"{title}: already finished, in {call.seconds:.0f} s", file=sys.stderr)
        return
    shutil.rmtree(call.folder, ignore_errors=True)
    call.folder.mkdir(parents=True)
    print(f"{title}: {shlex.join(_readable(call.command))}", file=sys.stderr)
    started, log = time.monotonic(), call.folder / "log.txt"
    code, output = _run(call.command, log, cwd)
    if code:
        lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
        # The last line that names an error (Error or error): progress bars and clean-up messages may follow it.
        last = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no output")
        fix = explain(RuntimeError(last), OUT_OF_MEMORY)
        raise UserError(f"{title}: {fix or last.strip()} (lm_eval exited with {code}; its log: {log})")
    # An exit code of 0 does not prove that results were written.
    if not any(call.folder.glob("results_*.json")):
        raise UserError(f"{title}: lm_eval wrote no results (its log: {log})")
    record = {"command": shlex.join(_readable(call.command)), "tasks": call.tasks}
    # Written last: `finished` requires it, so an interrupted call runs again and takes its responses from the cache.
    write_json(call.folder / "call.json", {**record, "seconds": round(time.monotonic() - started, 1)})


def _run(command: list[str], log: Path, cwd: Path) -> tuple[int, str]:
    """Run a command of the harness with its output in `log`. Returns (exit code, the end of its stderr)."""
    # The user's own environment variables take precedence.
    uses_vllm = any(pair == ("--model", "vllm") for pair in itertools.pairwise(command))
    inherited = vllm_environment.environment() if uses_vllm else os.environ
    environment = {"LMEVAL_LOG_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false", **inherited}
    with log.open("wb") as out:
        # A new session, so that Ctrl-C reaches the harness and its children once, through killpg below.
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_terminate_with_parent(),
        )
        try:
            output = _follow(process.stderr, out)
            return process.wait(), output
        except BaseException:
            # The group, since accelerate launch starts a process per GPU. BaseException includes KeyboardInterrupt.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise


def _terminate_with_parent():
    """A preexec_fn that ends the child when this process is killed with SIGKILL; None outside Linux."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    return (lambda: prctl(death_signal, signal.SIGTERM)) if prctl else None


def _readable(command: list[str]) -> list[str]:
    """The command as a user would type it."""
    return ["lm_eval", *command[3:]] if command[2] == "lm_eval" else ["accelerate", "launch", *command[3:]]


# The harness's tqdm bars of requests; all other output goes to the log only.
PROGRESS = re.compile(r"^(?P<name>(?:Running|Checking cached)[^|:]*):? *\d+%\|[^|]*\| *(?P<done>\d+)/(?P<total>\d+)")


def _follow(stream, log) -> str:
    """Copy the harness's stderr to the log and show its progress bars. Returns the end of the output."""
    output, rest, show = b"", "", _progress_display()
    # read1 returns what has arrived; read would wait for a full buffer and delay the progress.
    while chunk := stream.read1(65536):
        # Bounded, because hours of progress bars would fill memory; the error is at the end.
        output = (output + chunk)[-20000:]
        # tqdm redraws with \r and no newline. `rest` keeps an incomplete line for the next chunk.
        *lines, rest = re.split(r"[\r\n]", rest + chunk.decode(errors="replace"))
        for line in filter(PROGRESS.match, lines):
            show(line)
        _log(lines, log)
    _log([rest], log)
    return output.decode(errors="replace")


def _log(lines: list[str], log) -> None:
    """Write lines of the harness to its log, of its bars (tqdm's, of all kinds) only the completed ones."""
    kept = [line for line in lines if line.strip() and ("100%|" in line or not re.search(r"\d%\|", line))]
    log.write("".join(f"{line}\n" for line in kept).encode())
    log.flush()


def _progress_display():
    """A function that shows one state of a bar: redrawn on a terminal, as occasional plain lines in a log file."""
    if sys.stderr.isatty():
        return lambda line: print(f"\r{line}", end="\n" if "100%" in line else "", file=sys.stderr, flush=True)
    bars: dict[str, LineProgress] = {}

    def show(line: str) -> None:
        name, done, total = PROGRESS.match(line).group("name", "done", "total")
        # A completed bar is removed, since the harness may start another one under the same name.
        bar = bars.setdefault(name, LineProgress(int(total), name, "request"))
        bar.total = int(total)
        bar.update(int(done) - bar.n)
        if done == total:
            bars.pop(name).close()

    return show
