"""The record needed to repeat a run: commit, command, versions, hardware, hashes of model and data."""

import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from utils.machine import usable_cores
from utils.secrets_in_text import without_secret_flags

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "lm_eval", "numpy", "scipy",
)  # fmt: skip


def git_commit() -> str | None:
    """The repository's commit, with `-dirty` if tracked files differ from it; None outside a checkout."""

    def git(*args):
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=30)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        # docs/example_run holds committed results: a result about to be committed does not make the code dirty.
        status = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/example_run")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def versions() -> dict:
    """Installed versions of Python and of the packages that can change a figure."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return installed


def project_version() -> str:
    """The version of PreferenceLab, which CITATION.cff defines."""
    return re.search(r"^version: *(\S+)", (ROOT / "CITATION.cff").read_text(), flags=re.M)[1]


def version_page() -> str:
    """What `--version` prints: PreferenceLab with its commit, then Python and the packages, none of them imported."""
    commit = git_commit()
    installed = {name: "not installed" for name in PACKAGES[:4]} | versions()
    packages = ", ".join(f"{name} {installed[name]}" for name in ("python", *PACKAGES[:4]))
    return f"PreferenceLab {project_version()}" + (f" (commit {commit})" if commit else "") + f"\n{packages}"


def cpu_name() -> str:
    """The processor's model name from /proc/cpuinfo, else what Python's platform module reports."""
    try:
        # platform.processor() is empty or only the architecture on most Linux systems.
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware() -> dict:
    """Processor, usable cores, memory in GiB and GPUs."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu_name(), "cores": usable_cores(), "memory_gib": round(memory, 1), "gpus": gpus}


def peak_memory_gib() -> dict:
    """Peak resident memory of this process and peak allocation on its GPU, in GiB."""
    import torch

    # Linux gives ru_maxrss in KiB.
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak


def local_path(name: str | os.PathLike) -> Path:
    """The path of a file or folder that a flag names: below the current folder, else one that the repository ships.

    So a shipped default, such as data/eval_prompts/reference.jsonl, works from every folder.
    """
    path = Path(name).expanduser()
    if path.parts[:1] in (("data",), ("configs",)) and not path.exists() and (ROOT / path).exists():
        return ROOT / path
    return path


def shorten_paths(text) -> str:
    """Write paths below the repository relative to it, and those below the home folder with a tilde."""
    # Artifacts are committed and published: absolute paths differ between machines and name their user.
    return str(text).replace(str(ROOT) + os.sep, "").replace(str(Path.home()) + os.sep, f"~{os.sep}")


def command_line() -> list[str]:
    """The command line with shortened paths, without passwords; of a script that wraps a module, its name."""
    script = os.environ.get("INVOKED_AS") or Path(sys.argv[0]).name
    return without_secret_flags([shorten_paths(a) for a in [script, *sys.argv[1:]]])


def run_record(seed: int, wall_seconds: float, **extra) -> dict:
    """The envelope's `run`: commit, command, seed, versions, hardware, processes, UTC time and wall time in seconds."""
    return {
        "git_commit": git_commit(),
        "command": command_line(),
        "seed": seed,
        "versions": versions(),
        "hardware": hardware(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "finished_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_seconds": round(wall_seconds, 1),
        "peak_memory_gib": peak_memory_gib(),
        **extra,
    }


def sha256_of(*parts: str | bytes) -> str:
    """SHA-256 of the parts. Each is preceded by its length, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def sha256_of_files(paths) -> str:
    """SHA-256 of the names and contents of files, in path order."""
    # Names, not paths: the same files in another folder have the same hash. Contents are read in blocks (weights are
    # large).
    digest = hashlib.sha256()
    for path in sorted(map(Path, paths)):
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(sha256_of_file(path)))
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the content of a file, as `sha256sum` prints it."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hub_revision(name: str, kind: str, revision: str | None = None) -> str | None:
    """The commit of a hub repository: from the hub, offline from the local cache; None if neither has it.

    Args:
        kind: "model" or "dataset".
        revision: a branch, tag or commit; a full commit hash is returned unchanged.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hub

    try:
        return HfApi().repo_info(name, repo_type=kind, revision=revision).sha
    except (OSError, hub.HfHubHTTPError, hub.OfflineModeIsEnabled):
        # The hub's cache stores the commit of a branch or tag in refs/<name>.
        folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
        ref = folder / "refs" / (revision or "main")
        return ref.read_text().strip() if ref.is_file() else None
