"""What a model can read, checked before its first forward: its longest context, and token ids against embedding rows.

Without these checks an id without an embedding row ends in an index error (on a GPU in a failed assertion), and a
sequence beyond the context the model was made for gives figures that mean nothing.

| stage | beyond the longest context |
| --- | --- |
| training, SFT, scoring, perplexity | refused, naming both numbers and the flag |
| answers | an answer ends where the context is full (finish reason "length"); a prompt that fills it is refused |
| judges, reward models | no verdict for that item, counted as unparsed |
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer

from preflab.data.tokenised_rows import largest_id, lengths
from utils.errors import UserError, is_main_process

# Config keys of the longest context, in the order of preference (GPT-2 and MPT have other names).
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# Kinds of rotary scaling whose factor multiplies the context that the config names; in the others it is included.
MULTIPLYING = ("linear", "dynamic", "yarn")
# Tokens, for comparisons with a model that has no limit.
UNLIMITED = 10**9


def context_length(model) -> int | None:
    """The longest input of a transformers model in tokens, from its config; None if it has no limit.

    A sliding window is not a limit: it bounds what a layer sees, not the positions.
    """
    config = model.config.get_text_config()
    length = next((n for n in (getattr(config, key, None) for key in CONTEXT_KEYS) if n), None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if length and rope.get("rope_type", rope.get("type")) in MULTIPLYING:
        original = rope.get("original_max_position_embeddings") or length
        length = max(length, int(original * (rope.get("factor") or 1)))
    return length


def has_position_table(model) -> bool:
    """Whether positions have learned embeddings (GPT-2, OPT): then a longer input is an index error."""
    tables = ("wpe", "embed_positions", "position_embeddings")
    return any(isinstance(m, nn.Embedding) and name.rpartition(".")[2] in tables for name, m in model.named_modules())


def embedding_rows(model) -> int:
    """Number of token ids that have an embedding."""
    embedding = model.get_input_embeddings()
    # ZeRO-3 leaves an empty weight; the number of embeddings remains.
    return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]


def known_ids(model) -> int:
    """Token ids below this number have trained embeddings: without the rows that `fit_vocabulary` had to invent."""
    return getattr(model, "_known_ids", None) or embedding_rows(model)


def check_ids(model, tokenizer, largest: int) -> None:
    """Raise UserError if `largest`, the largest token id that the model will read, has no trained embedding."""
    known = known_ids(model)
    if largest >= known:
        raise UserError(
            f"token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of the tokenizer"
            f" ({len(tokenizer)} tokens) has no embedding in {name_of(model)} ({known} embedding rows): use the model's"
            " own tokenizer and chat template, or resize and train the embeddings before"
            " (an adapter is then saved with save_embedding_layers=True)"
        )


def check_length(model, longest: int, fix: str, in_all: str = "a sequence") -> None:
    """Raise UserError if the `longest` sequence, in tokens, exceeds the model's longest context.

    Args:
        fix: what to change, with "{}" where the longest context goes, e.g. "--max_length {}".
        in_all: what has that length.
    """
    limit = context_length(model)
    if limit is not None and longest > limit:
        raise UserError(
            f"{in_all} has {longest} tokens, but {name_of(model)} reads at most {limit} (its config): pass"
            f" {fix.replace('{}', str(limit))}"
        )


def fit_pad_token(model, tokenizer) -> None:
    """Pad with EOS where the tokenizer's pad token has no embedding row: padding is masked, but it is embedded too."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad >= embedding_rows(model) and eos is not None:
        tokenizer.pad_token = tokenizer.eos_token


def answer_room(model, prompt_ids: list[list[int]], max_new_tokens: int) -> list[int]:
    """Tokens that each answer may have, so that prompt and answer stay within the longest context.

    Raises:
        UserError: a prompt leaves no room for an answer.
    """
    limit = context_length(model)
    if limit is None:
        return [max_new_tokens] * len(prompt_ids)
    return room_within(limit, prompt_ids, max_new_tokens, name_of(model), "its config")


def room_within(limit: int, prompt_ids: list[list[int]], max_new_tokens: int, name: str, reason: str) -> list[int]:
    """As `answer_room`, for a longest context of `limit` tokens.

    Args:
        name: the model's. reason: what sets the limit.
    """
    for i, ids in enumerate(prompt_ids):
        if len(ids) >= limit:
            raise UserError(
                f"prompt {i + 1} of {len(prompt_ids)} has {len(ids)} tokens, but {name} reads at most {limit}"
                f" ({reason}), answer included: shorten or remove the prompt"
            )
    return [min(max_new_tokens, limit - len(ids)) for ids in prompt_ids]


def name_of(model) -> str:
    """The model's name as given by the user."""
    return getattr(model, "name_or_path", None) or type(model).__name__


# ------------------------------------------------------------------------------------------------------- vocabulary


def fit_vocabulary(model, adapter: str) -> None:
    """Resize the embeddings of `model` to the vocabulary that an adapter was trained with, as PEFT does.

    An adapter that holds embedding rows decides their number. Otherwise PEFT's rule applies (`AutoPeftModel`): the
    embeddings grow to the tokenizer in the adapter's folder, never shrink. Rows without weights are then the mean of
    the others, and `check_ids` refuses data that use them.

    Args:
        model: the base model, without the adapter.
        adapter: the adapter's folder.
    """
    rows, stored = embedding_rows(model), adapter_rows(model, adapter)
    wanted = stored or max(rows, tokens_in(adapter))
    if wanted == rows:
        return
    # The same rows on every process and in every call, and no effect on the random numbers of the caller.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # The mean and covariance are only worth their time for rows that the adapter does not replace.
        model.resize_token_embeddings(wanted, mean_resizing=not stored)
    if not stored:
        model._known_ids = rows
    if is_main_process():
        source = "embedding rows" if stored else "tokens in its tokenizer, and no weights for the new ones"
        print(
            f"note: {name_of(model)} has {rows} embedding rows, the adapter {adapter} {wanted} {source}: resized to"
            f" {wanted}",
            file=sys.stderr,
        )


def tokens_in(folder: str) -> int:
    """Number of tokens of the tokenizer in a folder, 0 if it has none."""
    if not (Path(folder) / "tokenizer_config.json").exists():
        return 0
    return len(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def adapter_rows(model, adapter: str) -> int | None:
    """Number of embedding rows that an adapter's weights hold, None if they hold none."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    for key, shape in weight_shapes(adapter).items():
        if any(f"{name}." in key for name in names):
            # LoRA's factors on an embedding are (r, rows) and (hidden, r), on an output layer (r, hidden), (rows, r).
            if "lora_embedding_A" in key:
                return shape[1]
            if "lora_B" in key:
                return shape[0]
            if "lora_" not in key and key.endswith(".weight"):
                return shape[0]
    return None


def weight_shapes(adapter: str) -> dict[str, list[int]]:
    """The shape of every tensor of an adapter, by name; no weights are read into memory."""
    path = Path(adapter) / "adapter_model.safetensors"
    if path.exists():
        with safe_open(path, "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}
    path = path.with_suffix(".bin")
    if not path.exists():
        return {}
    return {key: list(t.shape) for key, t in torch.load(path, map_location="meta", weights_only=True).items()}


# ----------------------------------------------------------------------------------------------------- tokenised rows


def largest_and_longest(dataset, parts: tuple[tuple[str, ...], ...]) -> tuple[int, int]:
    """(largest token id, tokens of the longest sequence) of a tokenised split.

    Args:
        parts: columns that form a sequence together, e.g. ("prompt_ids", "chosen_ids"); one entry per sequence of a
            row.
    """
    names = {name for part in parts for name in part}
    largest = max(largest_id(dataset, name) for name in names)
    sizes = {name: longest_of_each(dataset, name) for name in names}
    return largest, max(int(sum(sizes[name] for name in part).max()) for part in parts)


def longest_of_each(dataset, name: str):
    """Tokens of each row of a column, shape (rows,); of several answers in one column the longest."""
    several = name.replace("_ids", "_lengths")
    if several not in dataset.column_names:
        return lengths(dataset, name)
    return np.array([max(sizes, default=0) for sizes in dataset[several]])
