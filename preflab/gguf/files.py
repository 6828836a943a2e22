"""GGUF files written by llama.cpp's own programs: the converter, its counterpart for adapters, and llama-quantize."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader

from preflab.models.llama_cpp import require_tools, threads
from utils.artifacts import holds_files, read_json, remove_folder, write_json
from utils.errors import UserError
from utils.suggestions import choose_from

# What the converter writes itself, by its own name of the type; everything else is quantised from a lossless file.
CONVERTED = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}
# Names as in published repositories. The i-quants need an importance matrix and are not offered.
QUANTISED = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
TYPES = (*CONVERTED, *QUANTISED)
DEFAULT_TYPES = ("F16", "Q8_0", "Q4_K_M")
# The converter's type that represents weights of a dtype exactly.
LOSSLESS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# The file that marks a folder as one that this project wrote; it names what the files were made from.
MARK = "gguf_from.json"


def chosen_types(requested: list[str] | None) -> list[str]:
    """The types of `--types` in the order of TYPES, without duplicates. Raises UserError for an unknown one."""
    names = [name.upper() for name in requested or DEFAULT_TYPES]
    for given, name in zip(requested or names, names, strict=True):
        if name not in TYPES:
            raise UserError(f"--types {given}: unknown; {choose_from(name, list(TYPES))}")
    return [name for name in TYPES if name in names]


@dataclass
class GgufFolder:
    """The folder of the finished files; unfinished work is in `<folder>.part`, and continues from there.

    Attributes:
        path: the folder.
        name: file names start with it.

    Raises:
        UserError: the folder holds something else, or files of another model without `overwrite`.
    """

    path: Path
    name: str
    source: dict
    overwrite: bool

    def __post_init__(self):
        self.part = Path(f"{self.path}.part")
        for folder in (self.path, self.part):
            if not holds_files(folder):
                continue
            if not (folder / MARK).exists():
                raise UserError(f"{folder} was not written by this script: choose another folder with --gguf_dir")
            if self.overwrite or (folder == self.part and read_json(folder / MARK) != self.source):
                remove_folder(folder, [MARK])
            elif read_json(folder / MARK) != self.source:
                raise UserError(
                    f"{folder} holds GGUF files of another model: choose another folder with --gguf_dir, or --overwrite"
                )

    def open(self) -> None:
        """Create both folders."""
        for folder in (self.path, self.part):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / MARK, self.source)

    def file(self, kind: str) -> Path:
        """Where the finished file of a type is."""
        return self.path / f"{self.name}-{kind}.gguf"

    def write(self, kind: str, make) -> Path:
        """The file of a type: the finished one, or an unverified one that `make(path)` writes.

        An unverified file of an interrupted call is used again if it was complete.
        """
        if self.file(kind).exists():
            return self.file(kind)
        return self.intermediate(self.file(kind).name, make)

    def intermediate(self, name: str, make) -> Path:
        """A file or folder below the folder of unfinished work, made once: it appears by a rename."""
        path, incomplete = self.part / name, self.part / f"incomplete-{name}"
        if not path.exists():
            if incomplete.is_dir():
                shutil.rmtree(incomplete)
            incomplete.unlink(missing_ok=True)
            make(incomplete)
            os.replace(incomplete, path)
        return path

    def publish(self, kind: str) -> None:
        """Give a verified file its name."""
        unverified = self.part / self.file(kind).name
        if unverified.exists():
            os.replace(unverified, self.file(kind))

    def reject(self, kind: str) -> None:
        """Delete a file that failed its verification."""
        for folder in (self.part, self.path):
            (folder / self.file(kind).name).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete what only the work needed."""
        remove_folder(self.part, [MARK])


def convert(folder: Path, target: Path, kind: str) -> None:
    """Write a transformers folder as GGUF of one of the types CONVERTED.

    Raises:
        UserError: the converter's reason, e.g. an architecture that llama.cpp does not have.
    """
    _converter("convert_hf_to_gguf.py", folder, "--outfile", target, "--outtype", CONVERTED[kind])


def convert_adapter(adapter: Path, base: Path, target: Path, kind: str) -> None:
    """Write a LoRA folder as GGUF; `base` is the transformers folder of the model that it was trained on."""
    arguments = (adapter, "--base", base, "--outfile", target, "--outtype", CONVERTED[kind])
    _converter("convert_lora_to_gguf.py", *arguments)


def _converter(program: str, *arguments) -> None:
    tools = require_tools()
    # Behind the environment's own packages, except for the converter's copy of `gguf`, which the program puts first.
    search = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(tools)])
    command = [sys.executable, str(tools / "llama.cpp" / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search})
    if done.returncode:
        raise UserError(f"{arguments[0]}: llama.cpp's converter failed: {_reason(done.stderr)}")


def quantise(source: Path, target: Path, kind: str) -> None:
    """Quantise a GGUF file to one of the types QUANTISED."""
    program = require_tools() / "ik_llama_cpp/bin/llama-quantize"
    done = subprocess.run(
        [str(program), str(source), str(target), kind, str(threads())], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise UserError(f"{source}: llama-quantize failed: {_reason(done.stderr + done.stdout)}")


def tensor_types(path: Path) -> dict[str, int]:
    """Number of tensors of a GGUF file by type."""
    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors))


def _reason(output: str) -> str:
    """The line of a program's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"error|not supported|not recognized|no space", line, re.IGNORECASE)]
    return (named or lines or ["it gives no reason"])[-1][:300]
