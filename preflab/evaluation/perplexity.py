"""Perplexity: sliding windows over plain text, and figures per token, per sequence and per byte."""

import math
from pathlib import Path

import numpy as np

from preflab.data.rows import read_rows
from preflab.evaluation.logprob_scoring import Sequence
from utils.artifacts import metric
from utils.errors import UserError
from utils.stats import bootstrap, ratio_of_sums, signed_rank

BOS_PROTOCOLS = ("auto", "once", "per_window", "none")


# ------------------------------------------------------------------------------------------------------------- text


def read_documents(files: list[str], dataset: str | None, config, split: str, column: str) -> tuple[list[dict], dict]:
    """Documents of plain-text files (one each) and of a dataset's text column (one a row).

    Returns:
        (documents, left_out): `{where, text}` each, and how many rows were empty. Raises UserError where nothing is
        left, where a file is not UTF-8 text, and where a row has no such column.
    """
    documents, left_out = [], {}
    for name in files:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"--text_file {name}: no such file") from None
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise UserError(f"--text_file {name}: not a UTF-8 text file ({error})") from None
        if not text.strip():
            raise UserError(f"--text_file {name}: the file is empty; give one with text")
        documents.append({"where": name, "text": text})
    rows, source = read_rows(dataset, split, config) if dataset else ([], None)
    for where, row in rows:
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{where}: no text in column {column!r} (there: {keys}); --text_column names another")
        if text.strip():
            documents.append({"where": where, "text": text})
        else:
            left_out["empty_text"] = left_out.get("empty_text", 0) + 1
    if not documents:
        raise UserError(f"--text_dataset {dataset} split {split}: every row is empty")
    return documents, {"left_out": left_out, "source": source}


def bos_protocol(asked: str, tokenizer) -> str:
    """once, per_window or none. "auto": per_window where the tokenizer puts a BOS before every text, else once.

    Gemma's family is lost in a window without BOS; models that were trained without one take their BOS (or EOS) as
    the first context, as lm-evaluation-harness does.
    """
    if asked != "auto":
        return asked
    ids = tokenizer("x")["input_ids"]
    return "per_window" if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else "once"


def prefix_id(tokenizer) -> int:
    """The id that opens a text: BOS, else EOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def windows(count: int, window: int, stride: int, bos: str) -> list[tuple[int, int, int]]:
    """Cut a text of `count` tokens into windows of at most `window` input tokens, each token predicted once.

    The first window predicts `window` tokens, every later one the next `stride`, with as much context as fits: one
    token where stride equals window, which are lm-evaluation-harness's rolling windows. With a BOS in every window
    the context is one token shorter.

    Returns:
        (context, first, end) each: tokens [first, end) are predicted from those from `context` on.
    """
    found, first = [], 0
    while first < count:
        end = min(first + (stride if first else window), count)
        context = max(0, end - window - (bos != "per_window")) if first else 0
        found.append((context, first, end))
        first = end
    return found


def window_sequences(tokens: list[int], window: int, stride: int, bos: str, prefix: int) -> list[Sequence]:
    """The windows of one text as sequences to score. Without a prefix, the text's first token is not predicted."""
    found = []
    for context, first, end in windows(len(tokens), window, stride, bos):
        opens = bos == "per_window" or (bos == "once" and first == 0)
        ids = ([prefix] if opens else []) + tokens[context:end]
        start = max(1, first - context + opens)
        found.append(Sequence(ids, start))
    return found


def cut_documents(documents: list[dict], tokenizer, window: int, stride: int, bos: str) -> tuple[list, list[dict]]:
    """Sequences of all documents, and a row for each: document, window, predicted tokens, and their UTF-8 bytes."""
    sequences, rows = [], []
    for number, document in enumerate(documents):
        read = tokenizer(document["text"], add_special_tokens=False, return_offsets_mapping=True)
        tokens, offsets = read["input_ids"], [a for a, _ in read["offset_mapping"]]
        cut = windows(len(tokens), window, stride, bos)
        found = window_sequences(tokens, window, stride, bos, prefix_id(tokenizer))
        for k, ((_, first, end), sequence) in enumerate(zip(cut, found, strict=True)):
            # From where the window's first token begins to where the next one's does, so that bytes add up.
            last = offsets[end] if end < len(tokens) else len(document["text"])
            text = document["text"][offsets[first] if first else 0 : last]
            count = len(sequence.ids) - sequence.start
            if count:
                sequences.append(sequence)
                row = {"set": "text", "document": number, "where": document["where"], "window": k}
                rows.append({**row, "tokens": count, "bytes": len(text.encode())})
    return sequences, rows


# ---------------------------------------------------------------------------------------------------------- figures


def section_metrics(name: str, units: np.ndarray, seed: int) -> dict:
    """Every figure of one section, base beside tuned.

    Args:
        name: response_chosen, response_rejected, whole_chosen, whole_rejected or text; opens each metric's name.
        units: shape (n, 4): negative log-likelihood under base and under tuned (nats), tokens, bytes of each unit
            that is resampled.

    Returns:
        ppl_* is exp(sum of nll / sum of tokens), ppl_mean_* the mean over units of exp(nll / tokens) (as
        `evaluate` averages), nll_* nats a token, bits_per_byte_* of the scored text; p_* Wilcoxon's signed ranks on the
        units' mean nll.
    """
    base, tuned, tokens, size = units.T
    found = {}
    for side, nll in (("base", base), ("tuned", tuned)):
        pair = np.stack([nll, tokens], 1)
        found[f"{name}_ppl_{side}"] = bootstrap(pair, seed, statistic=lambda x: math.exp(ratio_of_sums(x)))
        found[f"{name}_ppl_mean_{side}"] = bootstrap(np.exp(nll / tokens), seed)
        found[f"{name}_nll_{side}"] = bootstrap(pair, seed, statistic=ratio_of_sums)
        found[f"{name}_bits_per_byte_{side}"] = bootstrap(
            np.stack([nll / math.log(2), size], 1), seed, statistic=ratio_of_sums
        )
    moved = np.stack([tuned - base, tokens], 1)
    found[f"{name}_nll_difference"] = bootstrap(moved, seed, statistic=ratio_of_sums)
    found[f"{name}_ppl_ratio"] = bootstrap(moved, seed, statistic=lambda x: math.exp(ratio_of_sums(x)))
    found[f"{name}_ppl_difference"] = bootstrap(
        units[:, :3],
        seed,
        statistic=lambda x: math.exp(ratio_of_sums(x[:, [1, 2]])) - math.exp(ratio_of_sums(x[:, [0, 2]])),
    )
    found[f"p_{name}_nll_difference"] = metric(signed_rank((tuned - base) / tokens), n=len(units))
    found[f"{name}_tokens"] = metric(int(tokens.sum()), n=len(units))
    found[f"{name}_bytes"] = metric(int(size.sum()), n=len(units))
    return found


def text_units(rows: list[dict]) -> tuple[np.ndarray, str]:
    """Units of the text rows, shape (n, 4): documents where there are several, else the windows of the one document."""
    keys = [row["document"] for row in rows]
    unit = "documents" if len(set(keys)) > 1 else "windows"
    if unit == "windows":
        keys = [row["window"] for row in rows]
    columns = np.array([[row["nll_base"], row["nll_tuned"], row["tokens"], row["bytes"]] for row in rows], float)
    _, where = np.unique(keys, return_inverse=True)
    units = np.zeros((where.max() + 1, 4))
    np.add.at(units, where, columns)
    return units, unit


def pair_units(rows: list[dict], part: str, side: str) -> np.ndarray:
    """Units of the pair rows, shape (n, 4). `part` is response or whole, `side` chosen or rejected."""
    keys = [f"nll_{part}_{side}_base", f"nll_{part}_{side}_tuned", f"tokens_{part}_{side}", f"bytes_{part}_{side}"]
    return np.array([[row[k] for k in keys] for row in rows], float)
