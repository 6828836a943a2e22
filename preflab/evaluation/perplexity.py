"""Perplexity of base and tuned on the same token ids: pairs, plain text in sliding windows, and their metrics."""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from preflab.data.messages import check_unicode
from preflab.data.preferences import PreferenceData
from preflab.data.rows import read_rows
from preflab.evaluation.held_out import held_out_pairs
from preflab.evaluation.logprob_scoring import Sequence, score_sequences
from preflab.evaluation.reward_table import SIDES
from preflab.evaluation.rewards import number_prompts, prompts_of
from preflab.evaluation.two_models import TwoModels
from utils.artifacts import metric
from utils.errors import UserError
from utils.power import LEVEL, with_power
from utils.provenance import local_path
from utils.stats import bootstrap, linearised_ratio, mean_test, of_sums, ratio

# Metrics that compare two models, or are of the second.
OF_TWO_MODELS = re.compile(r"_tuned$|_difference$|_ratio$|^p_|^kl_")


@dataclass
class PairScores:
    """Scored preference pairs: rows for `perplexity_rows.jsonl`, speed of scoring, and token counts of truncation."""

    data: PreferenceData | None = None
    rows: list[dict] = field(default_factory=list)
    speed: dict = field(default_factory=dict)
    truncation: dict = field(default_factory=dict)

    def summary(self) -> dict | None:
        """The `data` entry of the artifact."""
        return {**self.data.summary(), "truncation": self.truncation} if self.data else None


@dataclass
class TextScores:
    """Plain text in windows: sequences to score, one row per sequence, speed of scoring, and what was read."""

    sequences: list[Sequence] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    speed: dict = field(default_factory=dict)
    source: dict | None = None


# ------------------------------------------------------------------------------------------------------------- pairs


def score_pairs(models: TwoModels, skip_kl: bool) -> PairScores:
    """Score both answers of every held-out pair: the whole text, and the response given the prompt."""
    data, ids, truncation = held_out_pairs(models.comparison, models.tokenizer)
    sequences, starts = [], []
    for row in ids:
        for side in SIDES:
            start = len(row["prompt_ids"])
            starts.append(start)
            # Scored from token 1 on: one forward pass serves the complete text and, as its end, the response. KL
            # only covers the response.
            sequences.append(Sequence(row["prompt_ids"] + row[f"{side}_ids"], 1, None if skip_kl else start))

    def sums(index, scores):
        # Log-probability t belongs to token t + 1: the first token has no context and is not scored.
        response = starts[index] - 1
        summed = {"kl": None if scores.kl is None else float(scores.kl.sum())}
        for model in models.sides:
            logps = getattr(scores, model)
            summed |= {f"whole_{model}": -float(logps.sum()), f"response_{model}": -float(logps[response:].sum())}
        return summed

    nlls, speed = score_sequences(models, sequences, sums, "perplexity")
    rows = []
    for i, pair in enumerate(data.pairs):
        row = {"set": "pairs", "row": i, "where": pair.source}
        # Sequences 2i and 2i + 1 hold the chosen and the rejected answer of pair i.
        for side, k in (("chosen", 2 * i), ("rejected", 2 * i + 1)):
            for part, start in (("response", starts[k]), ("whole", 1)):
                scored = sequences[k].ids[start:]
                row[f"tokens_{part}_{side}"] = len(scored)
                # Special tokens (an end of turn, for example) have no bytes of text, but their nats count in bits per
                # byte.
                row[f"bytes_{part}_{side}"] = len(models.tokenizer.decode(scored, skip_special_tokens=True).encode())
                row |= {f"nll_{part}_{side}_{model}": nlls[k][f"{part}_{model}"] for model in models.sides}
                if len(models.sides) > 1:
                    row[f"nll_{part}_{side}_difference"] = nlls[k][f"{part}_tuned"] - nlls[k][f"{part}_base"]
            row[f"kl_{side}"] = nlls[k]["kl"]
        rows.append(row)
    number_prompts(rows, data.pairs)
    return PairScores(data, rows, speed, truncation)


# ------------------------------------------------------------------------------------------------------------- text


def cut_text(models: TwoModels, args) -> TextScores:
    """Read the plain text and cut it into windows, before any scoring. Resolves `args.bos` "auto".

    Raises:
        UserError: a missing or unreadable file, a missing column, no text, or too little text to score.
    """
    if not (args.text_file or args.text_dataset):
        return TextScores()
    dataset = (args.text_dataset, args.text_config, args.text_split, args.text_column)
    documents, source = read_documents(args.text_file or [], *dataset)
    # Resolved in the arguments themselves, so that the artifact records which protocol was used.
    args.bos = bos_protocol(args.bos, models.tokenizer)
    sequences, rows = cut_documents(documents, models.tokenizer, args.window, args.stride, args.bos)
    if not sequences:
        raise UserError("the text is too short to score: no token is left under --bos none; give more text")
    return TextScores(sequences, rows, source=source)


def score_text(models: TwoModels, text: TextScores) -> TextScores:
    """Score every window; adds the negative log-likelihoods (nats) to `text.rows` and sets `text.speed`."""

    def sums(index, scores):
        return {f"nll_{model}": -float(getattr(scores, model).sum()) for model in models.sides}

    if text.sequences:
        nlls, text.speed = score_sequences(models, text.sequences, sums, "perplexity-text")
        for row, scores in zip(text.rows, nlls, strict=True):
            row |= scores
            if len(models.sides) > 1:
                row["nll_difference"] = scores["nll_tuned"] - scores["nll_base"]
    return text


def read_documents(files: list[str], dataset: str | None, config, split: str, column: str) -> tuple[list[dict], dict]:
    """Read documents from plain-text files (one per file) and from a dataset's text column (one per row).

    Returns:
        (documents, {left_out, source}): documents are `{where, text}`; left_out counts empty rows.

    Raises:
        UserError: no document is left, a file is not UTF-8 text, or a row has no such column.
    """
    documents, left_out = [], {}
    for name in files:
        try:
            text = local_path(name).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UserError(f"--text_file {name}: no such file") from None
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise UserError(f"--text_file {name}: not a UTF-8 text file ({error})") from None
        if not text.strip():
            raise UserError(f"--text_file {name}: the file is empty; give one with text")
        documents.append({"where": name, "text": text})
    rows, source = read_rows(dataset, split, config) if dataset else ([], None)
    for place, row in rows:
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{place}: no text in column {column!r} (columns: {keys}); choose one with --text_column")
        if text.strip():
            check_unicode([text], place)
            documents.append({"where": place, "text": text})
        else:
            left_out["empty_text"] = left_out.get("empty_text", 0) + 1
    if not documents:
        raise UserError(f"--text_dataset {dataset} split {split}: every row is empty")
    return documents, {"left_out": left_out, "source": source}


def bos_protocol(requested: str, tokenizer) -> str:
    """Resolve `--bos` to once, per_window or none. "auto" is per_window if the tokenizer adds a BOS, else once.

    Gemma models give wrong probabilities in windows without BOS. Models trained without a BOS take BOS (or EOS) as the
    first context only, as lm-evaluation-harness does.
    """
    if requested != "auto":
        return requested
    ids = tokenizer("x")["input_ids"]
    return "per_window" if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else "once"


def prefix_id(tokenizer) -> int:
    """The token id that opens a text: BOS, else EOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def windows(count: int, window: int, stride: int, bos: str) -> list[tuple[int, int, int]]:
    """Cut a text of `count` tokens into windows of at most `window` input tokens; each token is predicted once.

    The first window predicts `window` tokens. Every later one predicts the next `stride` tokens with as much context as
    fits: one token if stride equals window, as in lm-evaluation-harness's rolling windows. A BOS in every window
    takes the place of one context token.

    Returns:
        (context, first, end) per window: tokens [first, end) are predicted from tokens [context, first) and each other.
    """
    # Invariant: the spans [first, end) so far cover tokens [0, first) without gap or overlap.
    spans, first = [], 0
    while first < count:
        end = min(first + (stride if first else window), count)
        # window + 1 ids: the last one is predicted but is not an input, and per_window spends one on the BOS.
        context = max(0, end - window - (bos != "per_window")) if first else 0
        spans.append((context, first, end))
        first = end
    return spans


def window_sequences(tokens: list[int], window: int, stride: int, bos: str, prefix: int) -> list[Sequence]:
    """The windows of one text as sequences to score. Without a prefix, the text's first token is not predicted."""
    sequences = []
    for context, first, end in windows(len(tokens), window, stride, bos):
        # The prefix shifts every index of the window by one; a first token without context is not scored (start at
        # least 1).
        has_prefix = bos == "per_window" or (bos == "once" and first == 0)
        ids = ([prefix] if has_prefix else []) + tokens[context:end]
        sequences.append(Sequence(ids, start=max(1, first - context + has_prefix)))
    return sequences


def cut_documents(documents: list[dict], tokenizer, window: int, stride: int, bos: str) -> tuple[list, list[dict]]:
    """Sequences of all documents, with one row each: document, window, scored tokens, and their UTF-8 bytes."""
    sequences, rows = [], []
    for number, document in enumerate(documents):
        # No special tokens: the windows add the prefix that the BOS protocol requires. Offsets are in characters.
        encoded = tokenizer(document["text"], add_special_tokens=False, return_offsets_mapping=True)
        tokens, offsets = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
        spans = windows(len(tokens), window, stride, bos)
        cut = window_sequences(tokens, window, stride, bos, prefix_id(tokenizer))
        for k, ((_, _, end), sequence) in enumerate(zip(spans, cut, strict=True)):
            count = len(sequence.ids) - sequence.start
            if not count:
                # A document of a single token under --bos none.
                continue
            # From the start of the first scored token to the start of the next window's first token, so that the bytes
            # of all windows add up to the text's, also where a token holds part of a character.
            start, last = end - count, offsets[end] if end < len(tokens) else len(document["text"])
            # Leading characters without a token (stripped whitespace) belong to the first token, if that is scored.
            text = document["text"][offsets[start] if start else 0 : last]
            sequences.append(sequence)
            row = {"set": "text", "document": number, "where": document["where"], "window": k}
            rows.append({**row, "tokens": count, "bytes": len(text.encode())})
    return sequences, rows


# ---------------------------------------------------------------------------------------------------------- metrics


def perplexity_metrics(pairs: PairScores, text: TextScores, skip_kl: bool, seed: int) -> tuple[dict, dict]:
    """(metrics, units): the metrics of every section, and the unit that is resampled in `pairs` and `text`."""
    metrics, unit, sections = {}, {}, {}
    prompts = prompts_of(pairs.rows)
    for part in ("response", "whole") if pairs.rows else ():
        for side in SIDES:
            units, unit["pairs"] = pair_units(pairs.rows, part, side), "pairs"
            sections[f"{part}_{side}"] = units, unit["pairs"], prompts
            metrics |= section_metrics(f"{part}_{side}", units, seed, prompts)
    for side in SIDES if pairs.rows and not skip_kl else ():
        # Shape (pairs, 2): KL summed over an answer's tokens (nats), and their number.
        kl = np.array([[row[f"kl_{side}"], row[f"tokens_response_{side}"]] for row in pairs.rows])
        metrics[f"kl_{side}"] = of_sums(kl, seed=seed, groups=prompts)
    if text.rows:
        units, unit["text"] = text_units(text.rows)
        sections["text"] = units, unit["text"], None
        metrics |= section_metrics("text", units, seed)
    if any("nll_tuned" in row or "nll_response_chosen_tuned" in row for row in [*pairs.rows[:1], *text.rows[:1]]):
        add_power(metrics, sections)
    else:
        metrics = {name: m for name, m in metrics.items() if not OF_TWO_MODELS.search(name)}
    if pairs.data:
        metrics["skipped_examples"] = metric(sum(pairs.data.dropped.values()), n=pairs.data.rows)
    return metrics, unit


def section_metrics(name: str, units: np.ndarray, seed: int, groups=None) -> dict:
    """All metrics of one section, for base and tuned.

    Args:
        name: response_chosen, response_rejected, whole_chosen, whole_rejected or text; the prefix of each metric.
        units: shape (n, 4), one row per resampled unit: negative log-likelihood under base and under tuned (nats),
            tokens, bytes.
        groups: the group of each unit (the prompt of a pair), whose units are resampled together.

    Returns:
        ppl_* is exp(sum of nll / sum of tokens); ppl_mean_* is the mean over units of exp(nll / tokens), as in
        `evaluate`'s perplexity; nll_* is in nats per token; bits_per_byte_* is over the scored text. p_* is the
        two-sided p-value of `utils.stats.mean_test` on the units' differences in nll (nats): the perplexities are equal
        exactly where these have mean 0.
    """
    # Each of shape (n,). All figures use the same seed, so base and tuned share their resamples.
    base, tuned, tokens, size = units.T

    def per(numerator, denominator):
        # Numerator and denominator of a unit are resampled together: a ratio of sums, not a mean of ratios.
        return of_sums(np.stack([numerator, denominator], 1), seed=seed, groups=groups)

    metrics = {}
    for side, nll in (("base", base), ("tuned", tuned)):
        metrics[f"{name}_nll_{side}"] = per(nll, tokens)
        metrics[f"{name}_ppl_{side}"] = exponential(metrics[f"{name}_nll_{side}"])
        metrics[f"{name}_ppl_mean_{side}"] = bootstrap(np.exp(nll / tokens), seed, groups=groups)
        # Nats to bits: log 2 nats are one bit.
        metrics[f"{name}_bits_per_byte_{side}"] = per(nll / math.log(2), size)
    metrics |= change_metrics(name, units, seed, groups)

    def ppl_difference(sums):
        # Columns 0, 1, 2: nll under base, nll under tuned, tokens.
        return np.exp(ratio(sums[..., [1, 2]])) - np.exp(ratio(sums[..., [0, 2]]))

    metrics[f"{name}_ppl_difference"] = of_sums(units[:, :3], ppl_difference, seed, groups=groups)
    metrics[f"{name}_tokens"] = metric(int(tokens.sum()), n=len(units))
    metrics[f"{name}_bytes"] = metric(int(size.sum()), n=len(units))
    return metrics


def add_power(metrics: dict, sections: dict) -> None:
    """Give `<section>_nll_difference` its key `power`; several sections share the level, as in one verdict.

    Args:
        sections: `{name: (units, what a unit is, groups)}`, with units and groups as in `section_metrics`.
    """
    for name, (units, unit, groups) in sections.items():
        change = linearised_ratio(np.stack([units[:, 1] - units[:, 0], units[:, 2]], 1))
        m = metrics[f"{name}_nll_difference"]
        metrics[f"{name}_nll_difference"] = with_power(m, change, unit, groups=groups, level=LEVEL / len(sections))


def change_metrics(name: str, units: np.ndarray, seed: int, groups=None) -> dict:
    """The metrics of a section that its verdict rests on: difference, ratio and p-value; arguments as above."""
    base, tuned, tokens, _ = units.T
    change = of_sums(np.stack([tuned - base, tokens], 1), seed=seed, groups=groups)
    p = mean_test(tuned - base, groups, seed)
    return {
        f"{name}_nll_difference": change,
        # exp of the difference in nats per token is the ratio of the two perplexities.
        f"{name}_ppl_ratio": exponential(change),
        f"p_{name}_nll_difference": metric(p, n=len(units)),
    }


def exponential(m: dict) -> dict:
    """The metric of exp(m), for perplexities from nats per token; its error by the delta method."""
    # exp overflows beyond 709.
    value, *ends = (math.exp(min(x, 700.0)) for x in (m["value"], *(m["ci95"] or ())))
    stderr = None if m["stderr"] is None else value * m["stderr"]
    return metric(value, stderr, ends or None, m["n"])


def text_units(rows: list[dict]) -> tuple[np.ndarray, str]:
    """Units of the text rows, shape (n, 4), and their name: documents, or the windows of a single document."""
    # Windows of one document depend on each other, so documents are resampled; a single document leaves only windows.
    keys = [row["document"] for row in rows]
    unit = "documents" if len(set(keys)) > 1 else "windows"
    if unit == "windows":
        keys = [row["window"] for row in rows]
    # A model alone takes both places.
    tuned = "nll_tuned" if "nll_tuned" in rows[0] else "nll_base"
    columns = np.array([[row[key] for key in ("nll_base", tuned, "tokens", "bytes")] for row in rows], float)
    _, unit_of_row = np.unique(keys, return_inverse=True)
    units = np.zeros((unit_of_row.max() + 1, 4))
    # Not `units[unit_of_row] += columns`, which adds only one of the rows that share a unit.
    np.add.at(units, unit_of_row, columns)
    return units, unit


def pair_units(rows: list[dict], part: str, side: str) -> np.ndarray:
    """Units of the pair rows, shape (n, 4). `part` is response or whole, `side` chosen or rejected."""
    names = [f"nll_{part}_{side}_{model}" for model in ("base", "tuned")]
    # A model alone takes both places.
    keys = [names[0], names[1] if names[1] in rows[0] else names[0], f"tokens_{part}_{side}", f"bytes_{part}_{side}"]
    return np.array([[row[k] for k in keys] for row in rows], float)


def protocol(args, tokenizer, unit: dict) -> dict:
    """The `protocol` section of the artifact: in words, which tokens were scored and with which context."""
    described = {
        "pairs": "the chat template's own special tokens and no others; response: the answer's tokens and its end of"
        " turn, given the prompt; whole: every token but the first",
        "kl": "sum over the vocabulary of p_tuned (log p_tuned - log p_base) at each answer token of the data, not of"
        " the model's own samples",
        "unit_that_is_resampled": unit,
    }
    if unit.get("text"):
        opening = {
            "once": "one BOS (EOS where there is none) opens each document",
            "per_window": "a BOS opens every window",
            "none": "no BOS; the first token of a document is not scored",
        }
        described["text"] = (
            f"no special token but: {opening[args.bos]}; windows of {args.window} input tokens, moved by {args.stride};"
            " every token is predicted once"
        )
        described["prefix_token"] = tokenizer.bos_token or tokenizer.eos_token
    return described
