"""Calls of lm-evaluation-harness: its own command line, one process a model and number of shots, resumable."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from preflab.harness.suites import Suite
from utils.artifacts import dumps, read_json, write_json
from utils.errors import UserError, explain
from utils.provenance import ROOT, sha256_of, sha256_of_files, versions

AUTO_ON_CPU = 8


@dataclass
class Call:
    """One run of the harness: a model (base or tuned), tasks of one number of shots, and where its files go."""

    side: str
    tasks: list[str]
    shots: int | None
    command: list[str]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether an earlier run of this very command ended well."""
        return (self.folder / "call.json").exists() and any(self.folder.glob("results_*.json"))

    @property
    def seconds(self) -> float:
        """How long the finished run took."""
        return read_json(self.folder / "call.json")["seconds"]


UNQUANTISED = (
    "The adapter was trained on a quantised base; lm-eval 0.4.13 cannot quantise under transformers 5, so both models"
    " run on the base in full precision."
)


def model_arguments(models, side: str, backend: str, max_length: int | None, tensor_parallel: int) -> dict:
    """The harness's --model_args of base or tuned, in the precision of the comparison (as trained).

    A base that training quantised is taken in its compute precision: see `UNQUANTISED`.
    """
    from preflab.models.loading import locate
    from preflab.models.vllm_engine import lora_rank

    c, args = models.comparison, models.comparison.args
    name, revision, adapter = c.weights(side)
    compute = models.dtype if models.autocast is None else str(models.autocast).removeprefix("torch.")
    adapter = str(Path(adapter).resolve()) if adapter else None
    whole = backend == "hf" and not models.quantized
    found = {"pretrained": _absolute(locate(name, revision)), "dtype": models.dtype if whole else compute}
    if revision:
        found["revision"] = revision
    if args.trust_remote_code:
        found["trust_remote_code"] = True
    if backend == "vllm":
        length = {"max_model_len": max_length} if max_length else {}
        lora = {"lora_local_path": adapter, "max_lora_rank": lora_rank(adapter)} if adapter else {}
        return {**found, "tensor_parallel_size": tensor_parallel, **length, **lora}
    if whole and compute != models.dtype:
        found["mixed_precision_dtype"] = compute
    if args.attn_implementation:
        found["attn_implementation"] = args.attn_implementation
    if max_length:
        found["max_length"] = max_length
    return {**found, **({"peft": adapter} if adapter else {})}


def _absolute(name: str) -> str:
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


def batch_size(asked: str, backend: str, arguments: dict, remembered: Path) -> str:
    """The one batch size of both models. `auto` is detected once, on a GPU by the harness's own trial of what fits.

    Args:
        remembered: a file that keeps the detected number, so that a later call goes on with the same.
    """
    import torch

    if asked != "auto" or backend == "vllm":
        return asked
    if not torch.cuda.is_available():
        return str(AUTO_ON_CPU)
    told = dumps(arguments)
    if remembered.exists() and (kept := read_json(remembered))["arguments"] == told:
        return kept["batch_size"]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # In a process of its own, which gives the GPU's memory back when it ends.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = str(pool.submit(_detect, arguments).result())
    write_json(remembered, {"batch_size": found, "arguments": told})
    return found


def _detect(arguments: dict) -> int:
    from lm_eval.models.huggingface import HFLM

    return HFLM(**arguments, batch_size="auto")._detect_batch_size()


def plan(
    suite: Suite, side: str, arguments: dict, identity: dict, options: dict, folder: Path, cache: Path
) -> list[Call]:
    """The calls of one model, tasks of equal shots together, in the suite's order.

    Args:
        arguments: from `model_arguments`. identity: what identifies the model's weights and precision.
        options: backend, batch_size, limit, seed, apply_chat_template, fewshot_as_multiturn, num_fewshot,
            include_path, tasks_sha256 (of local task files), processes, device, extra (arguments after `--`).
        cache: the folder of response caches; each model, precision, backend, length and batch size has its own.
    """
    o, groups = options, {}
    for entry in suite.tasks:
        shots = o["num_fewshot"] if o["num_fewshot"] is not None else entry.get("num_fewshot")
        groups.setdefault(shots, []).append(entry["task"])
    told = {"arguments": arguments, "identity": identity, "versions": versions(), "extra": o["extra"]}
    told |= {key: o[key] for key in ("backend", "batch_size", "processes", "device")}
    told["files"] = _model_files(arguments)
    responses = cache / f"lm_eval-{sha256_of(dumps(told))[:16]}" / "responses"
    calls = []
    for shots, tasks in groups.items():
        command = _launcher(o) + _harness(o, arguments, tasks, shots)
        what = sha256_of(dumps([told, command, o["tasks_sha256"]]))[:8]
        place = folder / f"{side}-{'own' if shots is None else shots}shot-{what}"
        written = ["--log_samples", "--output_path", str(place / "results.json"), "--use_cache", str(responses)]
        calls.append(Call(side, tasks, shots, [*command, *written, *o["extra"]], place))
    return calls


def _model_files(arguments: dict) -> str | None:
    """SHA-256 of a local model's tokenizer and configuration, which its weights' hash does not hold."""
    folders = [Path(arguments[key]) for key in ("pretrained", "tokenizer") if key in arguments]
    files = [path for folder in folders if folder.is_dir() for path in folder.glob("*.json")]
    return sha256_of_files(files) if files else None


def _launcher(o: dict) -> list[str]:
    if o["backend"] == "hf" and o["processes"] > 1:
        config = ROOT / "configs" / "accelerate" / ("cpu_2proc.yaml" if o["device"] == "cpu" else "multi_gpu.yaml")
        launch = ["--config_file", str(config), "--num_processes", str(o["processes"])]
        return [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "lm_eval"]
    return [sys.executable, "-m", "lm_eval"]


def _harness(o: dict, arguments: dict, tasks: list[str], shots: int | None) -> list[str]:
    found = ["run", "--model", o["backend"], "--model_args", json.dumps(arguments), "--tasks", ",".join(tasks)]
    found += ["--batch_size", o["batch_size"], "--seed", str(o["seed"])]
    if o["backend"] == "hf" and o["device"] == "cpu":
        found += ["--device", "cpu"]
    if shots is not None:
        found += ["--num_fewshot", str(shots)]
    if o["limit"] is not None:
        found += ["--limit", str(o["limit"])]
    if o["apply_chat_template"]:
        found += ["--apply_chat_template"]
        if o["fewshot_as_multiturn"] is not None:
            found += ["--fewshot_as_multiturn", str(o["fewshot_as_multiturn"]).lower()]
    if o["include_path"]:
        found += ["--include_path", o["include_path"]]
    return found


def execute(call: Call, title: str, cwd: Path) -> None:
    """Run the call unless it is finished. What it prints is kept in log.txt; its progress is shown.

    Raises UserError with the harness's last words where it fails; what it had answered by then is kept in its cache.
    """
    if call.finished:
        print(f"{title}: done before, in {call.seconds:.0f} s", file=sys.stderr)
        return
    shutil.rmtree(call.folder, ignore_errors=True)
    call.folder.mkdir(parents=True)
    print(f"{title}: {shlex.join(_readable(call.command))}", file=sys.stderr)
    started = time.monotonic()
    environment = {"LMEVAL_LOG_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    log = call.folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            call.command,
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_die_with_us(),
        )
        try:
            said = _pass_on(process.stderr, out)
            code = process.wait()
        except BaseException:
            # Its own session, so that Ctrl-C reaches it once, from here, and its children with it.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if code:
        lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no word")
        mend = explain(RuntimeError(last), "give a smaller --batch-size, and the same command goes on")
        raise UserError(f"{title}: {mend or last.strip()} (lm_eval ended with {code}; its log: {log})")
    if not any(call.folder.glob("results_*.json")):
        raise UserError(f"{title}: lm_eval wrote no results (its log: {log})")
    write_json(
        call.folder / "call.json",
        {
            "command": shlex.join(_readable(call.command)),
            "tasks": call.tasks,
            "seconds": round(time.monotonic() - started, 1),
        },
    )


def _die_with_us():
    """What makes a child end when this process is killed outright, where the system can do that (Linux)."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    return (lambda: prctl(death_signal, signal.SIGTERM)) if prctl else None


def _readable(command: list[str]) -> list[str]:
    return ["lm_eval", *command[3:]] if command[2] == "lm_eval" else ["accelerate", "launch", *command[3:]]


# The harness's bars of requests; what it and its libraries say besides is kept in the log.
PROGRESS = re.compile(r"^(?:Running|Checking cached)[^|]*\d+%\|.*$")


def _pass_on(stream, log) -> str:
    """Copy the harness's stderr to the log, and its progress bars to ours. Returns its last words."""
    said, rest = b"", ""
    while chunk := stream.read1(65536):
        log.write(chunk)
        log.flush()
        said = (said + chunk)[-20000:]
        *lines, rest = re.split(r"[\r\n]", rest + chunk.decode(errors="replace"))
        for line in filter(PROGRESS.match, lines):
            print(f"\r{line}", end="\n" if "100%" in line else "", file=sys.stderr, flush=True)
    return said.decode(errors="replace")
