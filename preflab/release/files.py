"""The upload-ready folder: weights linked, small files copied, and nothing of this machine in it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from preflab.models.public_names import HUB_ID, PublicName
from preflab.models.weight_files import SMALL, WEIGHTS, matches
from preflab.release.sources import MACHINE_PATH
from utils.artifacts import dumps, holds_files, read_json, remove_folder, write_text
from utils.errors import UserError
from utils.secrets_in_text import without_secrets

# The file that marks a folder as one that this script wrote.
MARK = "card_sources.json"
# Keys of configs that name where the model was loaded from.
NAMES = ("base_model_name_or_path", "_name_or_path", "name_or_path")
# Files of words, in which "/home" is a token.
VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "*.model", MARK)


class ReleaseFolder:
    """Written to `<path>.part`, and renamed to `path` once it is complete.

    Raises:
        UserError: a folder that this script did not write is in the way.
    """

    def __init__(self, path: Path):
        self.path, self.staging = path, Path(f"{path}.part")
        for folder in (path, self.staging):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--release_dir {folder}: is a file; choose another folder")
            if holds_files(folder) and not (folder / MARK).exists():
                raise UserError(f"--release_dir {folder}: holds files of another origin; choose another folder")

    def fill(self, weights: Path, base: PublicName, texts: dict[str, str], pictures: dict[str, Path]) -> None:
        """Write everything to the staging folder, and check it.

        Raises:
            UserError: a file names this machine, or holds a secret.
        """
        remove_folder(self.staging, [MARK])
        self.staging.mkdir(parents=True)
        # The mark first: what an interrupted call leaves may then be deleted by the next one.
        write_text(self.staging / MARK, "{}\n")
        for path in sorted(weights.iterdir()):
            if path.is_file() and matches(path.name, WEIGHTS):
                link_or_copy(path, self.staging / path.name)
            elif path.is_file() and matches(path.name, SMALL):
                self._copy(path, base)
        for name, path in pictures.items():
            shutil.copyfile(path, self.staging / name)
        for name, text in texts.items():
            write_text(self.staging / name, text)
        for path in files_of(self.staging):
            ensure_public(path, self.staging)

    def publish(self) -> None:
        """Give the folder its name."""
        remove_folder(self.path, [MARK])
        os.replace(self.staging, self.path)

    def _copy(self, path: Path, base: PublicName) -> None:
        target = self.staging / path.name
        if not matches(path.name, ("adapter_config.json", "config.json", "tokenizer_config.json")):
            shutil.copyfile(path, target)
            return
        content = read_json(path)
        for key in NAMES:
            value = content.get(key)
            if value is None or (HUB_ID.fullmatch(str(value)) and not Path(str(value)).exists()):
                continue
            if key == "base_model_name_or_path":
                content[key] = base.hub_id
            else:
                del content[key]
        write_text(target, dumps(content) + "\n")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a complete adapter or model."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    configured = "adapter_config.json" in names or "config.json" in names
    return configured and any(matches(name, WEIGHTS) for name in names)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def ensure_public(path: Path, folder: Path) -> None:
    """Raise UserError if a text file holds a secret or a path of this machine."""
    if path.suffix in (".safetensors", ".bin", ".png") or path.suffix == ".model":
        return
    name, text = path.relative_to(folder), path.read_text(encoding="utf-8", errors="replace")
    # The address of a login is removed by the same function, so any difference is a secret.
    if without_secrets(text) != text:
        raise UserError(f"{name}: holds a token, key or login; remove it from the file that it was made from")
    places = {str(Path.cwd()), str(folder.parent.resolve()), str(Path.home())} - {"/", "/root", "/home"}
    local = next((place for place in sorted(places) if place in text), None)
    if local is None and not matches(path.name, VOCABULARIES):
        local = next((match for match in _paths(text) if Path(match).is_absolute() and Path(match).exists()), None)
    if local:
        raise UserError(f"{name}: names the path {local} of this machine; load the model by its hub id (--base_hub_id)")


def _paths(text: str) -> Iterator[str]:
    # Addresses are no paths.
    text = re.sub(r"\w+://\S+", " ", text)
    return (match[0].strip() for match in MACHINE_PATH.finditer(text))


def sources_text(entries: list[dict], run: str) -> str:
    """card_sources.json."""
    note = "file: relative to the run's folder of results; key: the path inside it; shown = value * scale, rounded"
    return json.dumps({"run": run, "note": note, "figures": entries}, indent=1, ensure_ascii=False) + "\n"
