"""Merge an adapter into its base, and write the merged model to a folder that appears only when it is complete."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from preflab.models.logprobs import attach_head, sequence_logps, without_adapter_shell
from utils.artifacts import dumps, holds_files, read_json, remove_folder, write_json
from utils.errors import UserError

# The file that marks a folder as one that this project merged; it names what was merged.
MARK = "merged_from.json"

# A large logit: its rounding error is that of its token's log-probability.
LOGIT = 32.0
# Allowed even in float32, whose sums over thousands of products depend on their order.
FLOOR_NATS = 1e-3
# Any text shows whether two models are the same; this one is ordinary prose, so that no log-probability is extreme.
PROBES = (
    "Put the dough in a warm place for an hour, then divide it into eight pieces and roll each of them flat.",
    "The river rises in the mountains, passes three towns and a dam, and reaches the sea after 240 kilometres.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([3, 5, 10]))  # 6.0",
    "Sorry for the late reply. The parcel left on Tuesday; it should be with you by the end of the week.",
)


def tolerance(logps: np.ndarray, tokens: np.ndarray, dtype: str) -> np.ndarray:
    """The difference that rounding explains, in nats, shape (pairs, 2).

    Each model rounds the sum once and every token's logit once. The token errors are independent, so they grow with
    the square root of the number of tokens. 0.001 is added for the order of float32 sums.

    Args:
        logps, tokens: log-probability and number of tokens of each answer, shape (pairs, 2).
    """
    # Unit roundoff: rounding to nearest is off by at most half an epsilon, relatively. The factor 2 below is for the
    # two models.
    rounding = torch.finfo(getattr(torch, dtype)).eps / 2
    return FLOOR_NATS + 2 * rounding * (abs(logps) + LOGIT * tokens**0.5)


def probe_logps(model, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability in nats, tokens) of each of PROBES, shape (4,) each."""
    attach_head(model)
    logps, tokens = [], []
    for text in PROBES:
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
        scored = torch.ones_like(ids)
        # The first token has no context to be predicted from.
        scored[:, 0] = 0
        with torch.inference_mode():
            logps.append(sequence_logps(model, ids, torch.ones_like(ids), scored).item())
        tokens.append(int(scored.sum()))
    return np.array(logps), np.array(tokens)


def ensure_same_model(before: tuple, after: tuple, folder: Path, dtype: str) -> None:
    """Raise UserError, after deleting `folder`, if a merged model differs from base and adapter beyond rounding.

    Args:
        before, after: `probe_logps` of base and adapter, and of the written folder.
    """
    difference = np.abs(after[0] - before[0])
    share = float((difference / tolerance(*before, dtype)).max())
    # NaN is not within the tolerance.
    if not share <= 1:
        remove_folder(folder, [MARK])
        raise UserError(
            f"{folder}: the merged model is another one (log-probabilities differ by up to {difference.max():.2g} nats,"
            f" {share:.0%} of what {dtype} allows); it was deleted. Merge in float32, or check the adapter's weights"
        )


def untie_adapted_embeddings(model) -> None:
    """Give the output layer its own weight if it shares one with the embeddings and LoRA changes only one of them.

    Otherwise the merge would add the change of one layer to both.
    """
    base = without_adapter_shell(model)
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    if None in layers or not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    embeddings, head = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers)
    if head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        # Written to config.json: otherwise the next load would tie them again.
        base.config.tie_word_embeddings = False


def write_merged(folder: Path, model, tokenizer, about: dict) -> None:
    """Merge the adapter of `model` into its weights, and write the plain model with its tokenizer to `folder`.

    Args:
        folder: is emptied first.
        about: what was merged, for the folder's mark.

    Raises:
        UserError: the merged weights are not finite.
    """
    remove_folder(folder, [MARK])
    untie_adapted_embeddings(model)
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


def is_merge_of(folder: Path, about: dict) -> bool:
    """Whether a folder holds the merge that `about` names (`write_merged`)."""
    return (folder / MARK).exists() and read_json(folder / MARK) == json.loads(dumps(about))


class MergedFolder:
    """The place of a merged model: written to `<path>.part`, and renamed to `path` once it is complete.

    A folder that it replaces is kept as `<path>.old` until then, so an interruption loses neither.

    Args:
        overwrite: replace a merged folder at `path`.
        unfinished: what an interrupted call would have merged (`write_merged`); its folder is replaced too.

    Raises:
        UserError: a folder is in the way: without `overwrite` any, with it one that this project did not write.
    """

    def __init__(self, path: Path, overwrite: bool, unfinished: dict | None = None):
        self.path, self.staging, self.old = path, Path(f"{path}.part"), Path(f"{path}.old")
        if path.exists() and not (overwrite or unfinished and is_merge_of(path, unfinished)):
            raise UserError(f"{path} already exists: choose another folder with --merged_dir, or pass --overwrite")
        # Checked before anything is computed, for all three names that this class writes or deletes.
        for folder in (path, self.staging, self.old):
            # A killed call leaves the other two without their mark only while they are empty.
            exists = folder.exists() if folder == path else holds_files(folder)
            if exists and not (folder / MARK).exists():
                raise UserError(
                    f"{folder} was not written by this script, so it is not overwritten: choose another --merged_dir"
                )

    def publish(self) -> None:
        """Give the written model its name."""
        remove_folder(self.old, [MARK])
        # os.replace cannot replace a folder that is not empty, so the old one is moved away first.
        if self.path.exists():
            os.replace(self.path, self.old)
        os.replace(self.staging, self.path)
        remove_folder(self.old, [MARK])

    def discard(self) -> None:
        """Delete what was written."""
        remove_folder(self.staging, [MARK])
