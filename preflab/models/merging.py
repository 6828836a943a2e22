"""Merge an adapter into its base, and write the merged model to a folder that appears only when it is complete."""

import os
import shutil
from pathlib import Path

from utils.artifacts import write_json
from utils.errors import UserError

# The file that marks a folder as one that this project merged; it names what was merged.
MARK = "merged_from.json"


def write_merged(folder: Path, model, tokenizer, about: dict) -> None:
    """Merge the adapter of `model` into its weights, and write the plain model with its tokenizer to `folder`.

    Args:
        folder: is emptied first.
        about: what was merged, for the folder's mark.

    Raises:
        UserError: the merged weights are not finite.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        # safe_merge: PEFT checks the merged weights for NaN and infinity and raises ValueError.
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{folder}: {error} Merge in float32, or check the adapter's weights") from None
    # The mark before the weights: the next call may then delete what an interrupted one has left.
    write_json(folder / MARK, about)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        # safetensors makes its files readable by their owner only.
        path.chmod((folder / MARK).stat().st_mode)


class MergedFolder:
    """The place of a merged model: written to `<path>.part`, and renamed to `path` once it is complete.

    A folder that it replaces is kept as `<path>.old` until then, so an interruption loses neither.

    Raises:
        UserError: a folder is in the way: without `overwrite` any, with it one that this project did not write.
    """

    def __init__(self, path: Path, overwrite: bool):
        self.path, self.staging, self.old = path, Path(f"{path}.part"), Path(f"{path}.old")
        if path.exists() and not overwrite:
            raise UserError(f"{path} already exists: choose another folder with --merged_dir, or pass --overwrite")
        # Checked before anything is computed, for all three names that this class writes or deletes.
        for folder in (path, self.staging, self.old):
            if folder.exists() and not (folder / MARK).exists():
                raise UserError(
                    f"{folder} was not written by this script, so it is not overwritten: choose another --merged_dir"
                )

    def publish(self) -> None:
        """Give the written model its name."""
        shutil.rmtree(self.old, ignore_errors=True)
        # os.replace cannot replace a folder that is not empty, so the old one is moved away first.
        if self.path.exists():
            os.replace(self.path, self.old)
        os.replace(self.staging, self.path)
        shutil.rmtree(self.old, ignore_errors=True)

    def discard(self) -> None:
        """Delete what was written."""
        shutil.rmtree(self.staging)
