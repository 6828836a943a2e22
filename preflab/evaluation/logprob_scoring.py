"""Token sequences scored under base and tuned: batched by token budget, sharded over processes, kept as they come.

Two neighbours that begin alike, as the two answers to one prompt do, are read as one: what they share is computed once
(preflab.models.fast.shared_prompt).
"""

import math
import time
from dataclasses import dataclass

from preflab.evaluation.comparison import ensure_models_differ
from preflab.evaluation.two_models import TwoModels
from preflab.models.batching import pad_right, token_batches
from preflab.models.fast.shared_prompt import pack
from preflab.models.logprobs import captured_hidden, kl_divergence, token_logps
from utils.cache import ResultCache
from utils.errors import UserError, is_main_process
from utils.progress import progress
from utils.provenance import sha256_of

UNCHANGED = 1e-5


@dataclass
class Sequence:
    """Token ids of which those from index `start` on are scored (`start` >= 1), and KL measured from `kl_start` on."""

    ids: list[int]
    start: int
    kl_start: int | None = None


@dataclass
class TokenScores:
    """One sequence's figures, each of shape (scored tokens,): log-probabilities in nats, and KL in nats."""

    base: object
    tuned: object
    kl: object


def score_sequences(models: TwoModels, sequences: list[Sequence], summarise, kind: str) -> tuple[list[dict], dict]:
    """`summarise(index, TokenScores)` of every sequence, in order, on every process.

    Weights are loaded only where a sequence is left to score: a rerun of finished work reads what was kept.

    Args:
        summarise: reduces a sequence's token figures to the JSON numbers that are kept.
        kind: names the cache; with models, token ids and scored spans it identifies what was kept.

    Returns:
        (rows, speed): speed holds tokens and seconds of this call's scoring, and, outside float32, by how much a
        sequence's log-probability moved when it was scored alone instead of in its batch (`batch_spread_nats`).

    Raises:
        UserError: where tuned equals base on every sequence, so that the adapter was not applied.
    """

    args = models.comparison.args
    identity = {
        **{side: models.identity(side) for side in models.sides},
        "ids_sha256": sha256_of(*(str(s.ids) for s in sequences)),
        "spans_sha256": sha256_of(*(f"{s.start}:{s.kl_start}" for s in sequences)),
    }
    cache = ResultCache(args.eval_out, kind, identity, args.overwrite)
    done = cache.finished
    todo = [i for i in range(len(sequences)) if str(i) not in done]
    if todo:
        models.load()
    # Cut before what is done is left out, so that a rerun reads the same neighbours together.
    units = units_of([s.ids for s in sequences], models.shares_prompts)
    batches = batches_of([u for u in units if any(str(i) not in done for i in u[0])], args)
    tokens, started = sum(len(sequences[i].ids) for i in todo), time.monotonic()
    scored = shown = 0
    with progress(tokens, kind, "tok", scale=True) as bar:
        for take in cache.own_share(batches):
            for i, scores in zip(take, score_batch(models, [sequences[i] for i in take]), strict=True):
                moved = float((scores.tuned - scores.base).abs().max())
                if not math.isfinite(moved):
                    raise UserError(
                        f"{kind}: sequence {i} has a log-probability that is no number under {models.dtype}: give"
                        " --dtype bfloat16 or float32; or the weights themselves are broken"
                    )
                cache.add(str(i), {**summarise(i, scores), "moved": moved, "sum": float(scores.tuned.sum())})
            # Every process takes batches of about the same size; only rank 0 shows the total.
            scored = min(tokens, scored + cache.state.num_processes * sum(len(sequences[i].ids) for i in take))
            bar.update(scored - shown)
            shown = scored
    seconds = time.monotonic() - started
    if todo and not models.is_float32 and is_main_process():
        some = [todo[k] for k in range(0, len(todo), -(-len(todo) // 8))]
        alone = {i: float(score_batch(models, [sequences[i]])[0].tuned.sum()) for i in some}
        kept = cache.read()
        spread = max((abs(alone[i] - kept[str(i)]["sum"]) for i in some if str(i) in kept), default=None)
        cache.add("spread", {"batch_spread_nats": spread})
    found = cache.gather()
    rows = [found[str(i)] for i in range(len(sequences))]
    changes = [row.pop("moved") for row in rows]
    ensure_models_differ(
        max(changes, default=0.0) <= UNCHANGED, f"the same log-probability to every token of all {len(rows)} sequences"
    )
    for row in rows:
        row.pop("sum")
    speed = {"tokens": tokens, "seconds": round(seconds, 2), "rows_kept_before": len(sequences) - len(todo)}
    return rows, {**speed, **found.get("spread", {})}


def units_of(ids: list[list[int]], pairs: bool) -> list[tuple[tuple[int, ...], int]]:
    """(sequences, tokens) that are read as one: neighbours (2k, 2k + 1), what they share counted once; else each alone.

    `pairs` is taken back where a sequence has no neighbour that begins as it does.
    """
    shared = shared_lengths(ids) if pairs else None
    if shared is None:
        return [((i,), len(row)) for i, row in enumerate(ids)]
    return [((2 * k, 2 * k + 1), len(ids[2 * k]) + len(ids[2 * k + 1]) - n) for k, n in enumerate(shared)]


def batches_of(units: list[tuple[tuple[int, ...], int]], args) -> list[list[int]]:
    """The sequences of `units` in batches by `batch_tokens` and `batch_size`; what is read as one stays together."""
    most = max(1, args.batch_size // len(units[0][0])) if args.batch_size and units else None
    batches = token_batches([tokens for _, tokens in units], args.batch_tokens, most)
    return [[i for k in batch for i in units[k][0]] for batch in batches]


def shared_lengths(ids: list[list[int]]) -> list[int] | None:
    """Leading tokens that (2k, 2k + 1) share, at most all but one of the shorter; None where some share none."""
    if len(ids) % 2:
        return None
    found = []
    for a, b in zip(ids[::2], ids[1::2], strict=True):
        most = min(len(a), len(b)) - 1
        found.append(next((n for n in range(most) if a[n] != b[n]), most))
    return found if all(n > 0 for n in found) else None


def collate(models: TwoModels, sequences: list[Sequence]):
    """(input_ids, attention_mask, scored), each (batch, length), right-padded; scored is 1 on the tokens to score."""
    ids, mask = pad_right([s.ids for s in sequences], models.tokenizer.pad_token_id, models.device)
    scored = mask.clone()
    for row, s in enumerate(sequences):
        scored[row, : s.start] = 0
    return ids, mask, scored


def score_batch(models: TwoModels, sequences: list[Sequence]) -> list[TokenScores]:
    """The token figures of one batch, both models, on the CPU."""
    shared = shared_lengths([s.ids for s in sequences]) if models.shares_prompts else None
    if shared:
        return _score_pairs(models, sequences, shared)
    return _score(models, sequences, *collate(models, sequences), {})


def _score_pairs(models, sequences, shared):
    """Neighbours packed: all firsts before all seconds, as `pack` has it, and back in order."""
    half = len(shared)
    rows = sequences[::2] + sequences[1::2]
    ids, mask, scored = collate(models, rows)
    found = _score(models, rows, ids, mask, scored, pack({"input_ids": ids, "attention_mask": mask}, shared))
    return [found[k + side * half] for k in range(half) for side in (0, 1)]


def _score(models, sequences, ids, mask, scored, packed) -> list[TokenScores]:
    import torch

    logps, hidden = {}, {}
    with torch.inference_mode():
        for side in models.sides:
            with models.side(side) as model, captured_hidden(model) as states:
                logps[side] = token_logps(model, ids, mask, scored, **packed).cpu()
                hidden[side] = states[0]
        kls = [None] * len(sequences)
        if any(s.kl_start is not None for s in sequences):
            spans = [(s.kl_start if s.kl_start is not None else len(s.ids), len(s.ids)) for s in sequences]
            picked = {
                side: torch.cat([h[row, a - 1 : b - 1] for row, (a, b) in enumerate(spans)])
                for side, h in hidden.items()
            }
            kl = kl_divergence(models.tuned, models.base, picked["tuned"], picked["base"]).cpu()
            kls = list(kl.split([b - a for a, b in spans]))
    return [
        TokenScores(*(logps[side][row, s.start - 1 : len(s.ids) - 1].double() for side in models.sides), kls[row])
        for row, s in enumerate(sequences)
    ]
