"""Checks of the machine, one function per topic. Each yields its findings; none changes anything.

Only the standard library is imported at the top: the first check is whether the other packages are installed.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.machine import free_memory, usable_cores

OK, WARNING, PROBLEM = "ok", "warning", "problem"
GIB = 2**30
# Measured: the quickstart needs 3.3 GiB of memory.
QUICKSTART_MEMORY_GIB = 4
# Below this, the first results of a long run can already fill the disk.
LITTLE_DISK_GIB = 10


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        topic: what was checked.
        state: OK, WARNING (works, but not as well as it could) or PROBLEM (a run would fail).
        text: what was seen, and the fix unless the state is OK.
    """

    topic: str
    state: str
    text: str


def pinned_versions(requirements: Path) -> dict[str, str]:
    """{package: version} of the lines `package==version` in a requirements file."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", requirements.read_text(encoding="utf-8"), re.MULTILINE))


def check_python(requirements: Path) -> Iterator[Finding]:
    """The interpreter and the pinned packages."""
    yield Finding("python", OK, f"{platform.python_version()} ({sys.executable})")
    missing, other = [], []
    for name, version in pinned_versions(requirements).items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        # A local build, such as 2.13.0+cpu, is the pinned version.
        if installed.split("+")[0] != version:
            other.append(f"{name} {installed} (pinned: {version})")
    if missing:
        text = f"not installed: {', '.join(missing)}; `bash quickstart.sh` installs them into .venv"
        yield Finding("packages", PROBLEM, text)
    if other:
        fix = f"untested together: pip install -r {requirements.name}"
        yield Finding("packages", WARNING, f"{', '.join(other)}; {fix}")
    if not missing and not other:
        yield Finding("packages", OK, f"all versions as in {requirements.name}")


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver reports; [] without a driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []


def check_gpu() -> Iterator[Finding]:
    """GPUs, the build of torch, bf16 and free memory."""
    import torch

    gpus, build = nvidia_gpus(), torch.version.cuda or torch.version.hip
    if not torch.accelerator.is_available():
        if not gpus:
            yield Finding(
                "gpu", WARNING, "none: training uses the CPU, which suits models of up to some 100M parameters"
            )
        elif build is None:
            fix = "pip install torch from PyPI, or from https://download.pytorch.org/whl/cu128 for an older driver"
            yield Finding("gpu", PROBLEM, f"{gpus[0]}, but this torch ({torch.__version__}) is a CPU build: {fix}")
        else:
            fix = "update the driver, or install torch for an older CUDA (https://pytorch.org/get-started/previous-versions)"
            yield Finding("gpu", PROBLEM, f"{gpus[0]}, but torch for CUDA {build} cannot use this driver: {fix}")
        return
    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda":
        yield Finding("gpu", WARNING, f"{kind}: not tested with this project")
        return
    for k in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(k)
        text = f"{k}: {torch.cuda.get_device_name(k)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, CUDA {build}"
        if free < 0.8 * total:
            yield Finding("gpu", WARNING, f"{text}; another process uses it (nvidia-smi lists it)")
        else:
            yield Finding("gpu", OK, text)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bf16", OK, "supported by the GPU")
    else:
        yield Finding("bf16", WARNING, "not supported by this GPU: train with --bf16 false --fp16 true, or in float32")


def check_quantisation() -> Iterator[Finding]:
    """Whether bitsandbytes quantises and multiplies on this device (--load_in_4bit)."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        weight = layer.weight.data.clone()
        layer = layer.to(device)
        x = torch.randn(8, 64)
        expected, result = x @ weight.T, layer(x.to(device)).cpu()
        # nf4 has 16 values per block of 64: the error of a product is below a third of its size.
        good = (result - expected).norm() < 0.33 * expected.norm()
    except Exception as error:
        # Missing libraries, drivers and kernels raise errors of many kinds.
        yield Finding(
            "4 bits", WARNING, f"bitsandbytes fails ({error}): train without --load_in_4bit".replace("\n", " ")
        )
        return
    if good:
        yield Finding("4 bits", OK, f"bitsandbytes {importlib.metadata.version('bitsandbytes')} works on {device}")
    else:
        yield Finding(
            "4 bits", PROBLEM, f"bitsandbytes computes wrong products on {device}: train without --load_in_4bit"
        )


def check_memory() -> Iterator[Finding]:
    """Processor cores and memory."""
    import psutil

    cores, free = usable_cores(), free_memory()
    text = f"{free / GIB:.1f} of {psutil.virtual_memory().total / GIB:.1f} GiB free, {cores} cores"
    if free < QUICKSTART_MEMORY_GIB * GIB:
        fix = f"the quickstart needs {QUICKSTART_MEMORY_GIB} GiB: close other programs"
        yield Finding("memory", PROBLEM, f"{text}; {fix}")
    else:
        yield Finding("memory", OK, text)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) < cores:
        text = f"OMP_NUM_THREADS={threads} limits a CPU run to {threads} of {cores} cores: unset it"
        yield Finding("threads", WARNING, text)


def check_disk(folders: dict[str, Path], needed: dict[str, float]) -> Iterator[Finding]:
    """Room and permissions where files are written.

    Args:
        folders: {purpose: folder}, which need not exist yet.
        needed: {purpose: bytes that a run will write there}.
    """
    for purpose, folder in folders.items():
        place = folder.expanduser()
        # The first parent that exists is where the folder would be created.
        existing = next(p for p in (place, *place.absolute().parents) if p.exists())
        if not os.access(existing, os.W_OK):
            yield Finding("disk", PROBLEM, f"{folder} ({purpose}) is not writable: choose another folder")
            continue
        free, wanted = shutil.disk_usage(existing).free, needed.get(purpose, 0)
        text = f"{folder} ({purpose}): {free / GIB:.0f} GiB free"
        text += f", about {wanted / GIB:.1f} GiB needed" if wanted else ""
        if wanted > free:
            yield Finding(
                "disk", PROBLEM, f"{text}: free some space (bash doctor.sh --clean), or choose another folder"
            )
        elif free - wanted < LITTLE_DISK_GIB * GIB:
            yield Finding("disk", WARNING, f"{text}; under {LITTLE_DISK_GIB} GiB would remain")
        else:
            yield Finding("disk", OK, text)


def check_vllm() -> Iterator[Finding]:
    """The environment of vLLM, where `bash install_vllm.sh` made one."""
    from preflab.models.vllm_environment import FOLDER, outdated

    if (FOLDER / "requirements.stamp").exists():
        command = outdated()
        state, text = (WARNING, f"outdated, its requirement file has changed: run {command}") if command else (OK, "")
        yield Finding("vllm", state, f"{FOLDER.name} {text or 'has the versions of its requirement file'}")


def check_accelerate() -> Iterator[Finding]:
    """The user's default configuration of `accelerate launch` against the GPUs of this machine."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    from utils.artifacts import read_yaml
    from utils.errors import UserError

    path, gpus = Path(default_config_file), torch.cuda.device_count()
    if not path.exists():
        if gpus > 1:
            text = (
                f"{gpus} GPUs: start training with `accelerate launch --config_file configs/accelerate/multi_gpu.yaml`"
            )
            yield Finding("accelerate", OK, text)
        return
    try:
        config = read_yaml(path)
        processes, on_cpu = int(config.get("num_processes", 1)), bool(config.get("use_cpu"))
    except (UserError, ValueError, AttributeError, TypeError):
        yield Finding("accelerate", PROBLEM, f"{path} cannot be read: run `accelerate config` again, or delete it")
        return
    if not on_cpu and processes > max(gpus, 1) * int(config.get("num_machines") or 1):
        text = f"{path} starts {processes} processes on {gpus} GPUs: run `accelerate config`, or pass --config_file"
        yield Finding("accelerate", PROBLEM, text)
    elif on_cpu and gpus:
        yield Finding(
            "accelerate", WARNING, f"{path} has use_cpu: true, so `accelerate launch` ignores the {gpus} GPUs"
        )
    else:
        yield Finding("accelerate", OK, f"{path}: {processes} processes")
