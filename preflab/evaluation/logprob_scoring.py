"""Token log-probabilities of sequences under base and tuned: batched by token budget, sharded over processes, cached.

Two neighbouring sequences with a common start, such as two answers to one prompt, are computed together, the common
part once (preflab.models.fast.shared_prompt).
"""

import math
import time
from dataclasses import dataclass

import torch

from preflab.evaluation.comparison import ensure_models_differ
from preflab.evaluation.two_models import TwoModels
from preflab.models.batching import pad_right, token_batches
from preflab.models.checks import check_ids, check_length, fit_pad_token, has_position_table
from preflab.models.fast.shared_prompt import pack
from preflab.models.logprobs import captured_hidden, kl_divergence, token_logps
from utils.cache import ResultCache
from utils.errors import UserError, is_main_process
from utils.progress import progress
from utils.provenance import sha256_of

# If no token's log-probability differs by more than this (nats), base and tuned are the same model.
UNCHANGED = 1e-5
# Sequences that are scored again alone to measure the effect of batching in 16 bits.
SPREAD_SAMPLES = 8


@dataclass
class Sequence:
    """Token ids; those from index `start` (>= 1) on are scored, and KL is measured from index `kl_start` on."""

    ids: list[int]
    start: int
    kl_start: int | None = None


@dataclass
class TokenScores:
    """Per-token values of one sequence, shape (scored tokens,): log-probabilities and KL(tuned || base), in nats."""

    base: torch.Tensor
    tuned: torch.Tensor
    kl: torch.Tensor | None


def score_sequences(models: TwoModels, sequences: list[Sequence], summarise, kind: str) -> tuple[list[dict], dict]:
    """Score every sequence under both models. All processes share the work and return all rows, in order.

    Weights are loaded only if a sequence is not cached yet.

    Args:
        summarise: (index, TokenScores) to the JSON numbers that are cached and returned.
        kind: name of the cache. Models, token ids and scored spans identify it too.

    Returns:
        (rows, speed): rows are what `summarise` returned; speed has tokens and seconds of this call's scoring, and,
        outside float32, how much a sequence's log-probability changes when it is scored alone instead of in its batch
        (`batch_spread_nats`).

    Raises:
        UserError: tuned equals base on every sequence, or a log-probability is NaN or infinite.
    """
    args = models.comparison.args
    # The cache's identity covers the ids and spans of all sequences, so within it an index identifies a sequence.
    identity = {
        **{side: models.identity(side) for side in models.sides},
        "ids_sha256": sha256_of(*(str(s.ids) for s in sequences)),
        "spans_sha256": sha256_of(*(f"{s.start}:{s.kl_start}" for s in sequences)),
    }
    cache = ResultCache(args.eval_out, kind, identity, args.overwrite)
    # Equal on every process: `finished` was read before any of them appended.
    missing = [i for i in range(len(sequences)) if str(i) not in cache.finished]
    if missing:
        models.load()
        _check_readable(models, sequences)
    # Pair neighbours before dropping cached ones, so that a rerun computes in the same pairs.
    units = units_of([s.ids for s in sequences], models.shares_prompts)
    # A unit with one missing member is computed completely, its cached member included.
    batches = batches_of([u for u in units if any(str(i) not in cache.finished for i in u[0])], args)
    # Tokens of missing sequences only; speed excludes loading the weights and what an earlier call scored.
    tokens, started = sum(len(sequences[i].ids) for i in missing), time.monotonic()
    scored = shown = 0
    with progress(tokens, kind, "token", scale=True) as bar:
        for batch in cache.own_share(batches):
            for i, scores in zip(batch, score_batch(models, [sequences[i] for i in batch]), strict=True):
                # In nats. NaN and infinity carry over to the maximum, so one test covers every token of both models.
                change = float((scores.tuned - scores.base).abs().max())
                if not math.isfinite(change):
                    raise UserError(
                        f"{kind}: sequence {i}: log-probability is NaN or infinite in {models.dtype}: use --dtype"
                        " bfloat16 or float32; if it persists, the weights are damaged"
                    )
                # `moved` is cached too, so that the check for an idle adapter below covers sequences of earlier calls.
                # `sum` is for `_batch_spread`.
                cache.add(str(i), {**summarise(i, scores), "moved": change, "sum": float(scores.tuned.sum())})
            # Only rank 0 shows progress; it assumes that the other processes score as many tokens.
            # Capped, because batches may contain cached members, which `tokens` does not count.
            scored = min(tokens, scored + cache.state.num_processes * sum(len(sequences[i].ids) for i in batch))
            bar.update(scored - shown)
            shown = scored
    seconds = time.monotonic() - started
    if missing and not models.is_float32 and is_main_process():
        # Before `gather`, so that every process reads it; the key is not a number, so it is never a sequence's.
        cache.add("spread", {"batch_spread_nats": _batch_spread(models, sequences, missing, cache)})
    results = cache.gather()
    rows = [results[str(i)] for i in range(len(sequences))]
    changes = [row.pop("moved") for row in rows]
    ensure_models_differ(
        len(models.sides) > 1 and max(changes, default=0.0) <= UNCHANGED,
        f"the same log-probability to every token of all {len(rows)} sequences",
        models.comparison,
    )
    for row in rows:
        row.pop("sum")
    speed = {"tokens": tokens, "seconds": round(seconds, 2), "rows_kept_before": len(sequences) - len(missing)}
    return rows, {**speed, **results.get("spread", {})}


def _check_readable(models: TwoModels, sequences: list[Sequence]) -> None:
    """Raise UserError, before the first forward, for token ids or lengths that one of the models cannot read."""
    largest, longest = max(max(s.ids) for s in sequences), max(len(s.ids) for s in sequences)
    for side in models.sides:
        with models.side(side) as model:
            fit_pad_token(model, models.tokenizer)
            check_ids(model, models.tokenizer, largest)
            # A last token that is only predicted needs no position, except in a table of learned positions.
            inputs = longest - (not has_position_table(model))
            check_length(model, inputs, "--max_length {} (for plain text: --window {})")


def _batch_spread(models: TwoModels, sequences: list[Sequence], scored: list[int], cache: ResultCache):
    """Largest difference (nats) between a sequence's log-probability scored alone and in its batch, on a sample.

    In 16 bits, matrix products round differently with the batch's shape.
    """
    # Every k-th sequence, k rounded up: at most SPREAD_SAMPLES.
    sample = scored[:: -(-len(scored) // SPREAD_SAMPLES)]
    # Alone, a sequence also has no pair partner, so packing's effect is part of the difference.
    alone = {i: float(score_batch(models, [sequences[i]])[0].tuned.sum()) for i in sample}
    # Other processes may not have finished theirs.
    cached = cache.read()
    return max((abs(alone[i] - cached[str(i)]["sum"]) for i in sample if str(i) in cached), default=None)


def units_of(ids: list[list[int]], pairs: bool) -> list[tuple[tuple[int, ...], int]]:
    """Group sequences into units that are computed together: (indices, tokens) each.

    With `pairs`, a unit is the neighbours (2k, 2k + 1), and their common start counts once. Without it, or if any pair
    has no common start, each sequence is a unit.
    """
    # All or none, because `pack` lays out a batch as pairs.
    shared = shared_lengths(ids) if pairs else None
    if shared is None:
        return [((i,), len(row)) for i, row in enumerate(ids)]
    return [((2 * k, 2 * k + 1), len(ids[2 * k]) + len(ids[2 * k + 1]) - n) for k, n in enumerate(shared)]


def batches_of(units: list[tuple[tuple[int, ...], int]], args) -> list[list[int]]:
    """Sequence indices in batches limited by `args.batch_tokens` and `args.batch_size`; a unit is never split."""
    # --batch_size counts sequences, token_batches counts units of one or two.
    most = max(1, args.batch_size // len(units[0][0])) if args.batch_size and units else None
    batches = token_batches([tokens for _, tokens in units], args.batch_tokens, most)
    return [[i for k in batch for i in units[k][0]] for batch in batches]


def shared_lengths(ids: list[list[int]]) -> list[int] | None:
    """Length of the common start of each pair (2k, 2k + 1), shorter than both; None if any pair has none."""
    if len(ids) % 2:
        return None
    lengths = []
    for a, b in zip(ids[::2], ids[1::2], strict=True):
        # Each side keeps its own token.
        most = min(len(a), len(b)) - 1
        # The first position at which the two differ.
        lengths.append(next((n for n in range(most) if a[n] != b[n]), most))
    return lengths if all(n > 0 for n in lengths) else None


def collate(models: TwoModels, sequences: list[Sequence]):
    """(input_ids, attention_mask, scored), each (batch, length), right-padded; scored is 1 on the tokens to score."""
    ids, mask = pad_right([s.ids for s in sequences], models.tokenizer.pad_token_id, models.device)
    scored = mask.clone()
    for row, s in enumerate(sequences):
        # The padding is already 0 in the attention mask.
        scored[row, : s.start] = 0
    return ids, mask, scored


def score_batch(models: TwoModels, sequences: list[Sequence]) -> list[TokenScores]:
    """The token scores of one batch under both models, on the CPU."""
    shared = shared_lengths([s.ids for s in sequences]) if models.shares_prompts else None
    if shared:
        return _score_pairs(models, sequences, shared)
    return _score(models, sequences, *collate(models, sequences), {})


def _score_pairs(models: TwoModels, sequences: list[Sequence], shared: list[int]) -> list[TokenScores]:
    """Score packed neighbours: `pack` expects all first members before all second ones; the result is in order."""
    half = len(shared)
    rows = sequences[::2] + sequences[1::2]
    ids, mask, scored = collate(models, rows)
    scores = _score(models, rows, ids, mask, scored, pack({"input_ids": ids, "attention_mask": mask}, shared))
    # Back from (all first members, all second members) to pairs side by side.
    return [scores[k + side * half] for k in range(half) for side in (0, 1)]


def _score(models: TwoModels, sequences: list[Sequence], ids, mask, scored, packed: dict) -> list[TokenScores]:
    """Score a collated batch.

    Args:
        ids, mask, scored: of `collate`, shape (batch, length).
        packed: of `pack`; {} without a shared start.
    """
    logps, hidden = {}, {}
    with torch.inference_mode():
        for side in models.sides:
            with models.side(side) as model, captured_hidden(model) as states:
                # Shape (batch, length - 1): entry t is the log-probability of token t + 1.
                logps[side] = token_logps(model, ids, mask, scored, **packed).cpu()
                # Shape (batch, length, hidden size), unpacked; there is one forward pass per side.
                hidden[side] = states[0]
        kls = [None] * len(sequences)
        if any(s.kl_start is not None for s in sequences):
            # The hidden states that predict tokens [kl_start, end): positions [kl_start - 1, end - 1). Those of all
            # sequences are joined, shape (tokens, hidden size), so that no padding goes through the head.
            # A sequence without KL gets an empty span.
            spans = [(s.kl_start if s.kl_start is not None else len(s.ids), len(s.ids)) for s in sequences]
            picked = {
                side: torch.cat([h[row, a - 1 : b - 1] for row, (a, b) in enumerate(spans)])
                for side, h in hidden.items()
            }
            kl = kl_divergence(models.tuned, models.base, picked["tuned"], picked["base"]).cpu()
            kls = list(kl.split([b - a for a, b in spans]))
    # Sums over thousands of tokens follow, hence float64.
    return [
        # A model alone takes both places.
        TokenScores(
            *(logps[side][row, s.start - 1 : len(s.ids) - 1].double() for side in (models.sides[0], models.sides[-1])),
            kls[row],
        )
        for row, s in enumerate(sequences)
    ]
