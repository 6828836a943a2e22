"""Token sequences scored under base and tuned: batched by token budget, sharded over processes, kept as they come."""

import math
import time
from dataclasses import dataclass

from utils.batching import pad_right, token_batches
from utils.comparison import TwoModels
from utils.errors import UserError, is_main_process
from utils.ledger import Ledger
from utils.logps import captured_hidden, kl_divergence, token_logps
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
        kind: names the ledger; with models, token ids and scored spans it identifies what was kept.

    Returns:
        (rows, speed): speed holds tokens and seconds of this call's scoring, and, outside float32, by how much a
        sequence's log-probability moved when it was scored alone instead of in its batch (`batch_spread_nats`).

    Raises:
        UserError: where tuned equals base on every sequence, so that the adapter was not applied.
    """
    from tqdm import tqdm

    args = models.comparison.args
    identity = {
        **{side: models.identity(side) for side in models.sides},
        "ids_sha256": sha256_of(*(str(s.ids) for s in sequences)),
        "spans_sha256": sha256_of(*(f"{s.start}:{s.kl_start}" for s in sequences)),
    }
    ledger = Ledger(args.eval_out, kind, identity, args.overwrite)
    done = ledger.before
    todo = [i for i in range(len(sequences)) if str(i) not in done]
    if todo:
        models.load()
    batches = token_batches([len(sequences[i].ids) for i in todo], args.batch_tokens, args.batch_size)
    tokens, started = sum(len(sequences[i].ids) for i in todo), time.monotonic()
    silent = not (todo and is_main_process())
    with tqdm(total=tokens, unit="tok", unit_scale=True, desc=kind, disable=silent) as bar:
        for batch in ledger.share(batches):
            take = [todo[k] for k in batch]
            for i, scores in zip(take, score_batch(models, [sequences[i] for i in take]), strict=True):
                moved = float((scores.tuned - scores.base).abs().max())
                if not math.isfinite(moved):
                    raise UserError(
                        f"{kind}: sequence {i} has a log-probability that is no number under {models.dtype}: give"
                        " --dtype bfloat16 or float32; or the weights themselves are broken"
                    )
                ledger.add(str(i), {**summarise(i, scores), "moved": moved, "sum": float(scores.tuned.sum())})
            done_now = ledger.state.num_processes * sum(len(sequences[i].ids) for i in take)
            bar.update(min(tokens - bar.n, done_now))
    seconds = time.monotonic() - started
    if todo and not models.is_float32 and is_main_process():
        some = [todo[k] for k in range(0, len(todo), -(-len(todo) // 8))]
        alone = {i: float(score_batch(models, [sequences[i]])[0].tuned.sum()) for i in some}
        kept = ledger.read()
        spread = max((abs(alone[i] - kept[str(i)]["sum"]) for i in some if str(i) in kept), default=None)
        ledger.add("spread", {"batch_spread_nats": spread})
    found = ledger.gather()
    rows = [found[str(i)] for i in range(len(sequences))]
    if not any([row.pop("moved") > UNCHANGED for row in rows]):
        raise UserError(
            f"base and tuned give every token of all {len(rows)} sequences the same log-probability: the adapter was"
            " not applied, or it was never trained; check --adapter_path, or --tuned_model"
        )
    for row in rows:
        row.pop("sum")
    speed = {"tokens": tokens, "seconds": round(seconds, 2), "rows_kept_before": len(sequences) - len(todo)}
    return rows, {**speed, **found.get("spread", {})}


def collate(models: TwoModels, sequences: list[Sequence]):
    """(input_ids, attention_mask, scored), each (batch, length), right-padded; scored is 1 on the tokens to score."""
    ids, mask = pad_right([s.ids for s in sequences], models.tokenizer.pad_token_id, models.device)
    scored = mask.clone()
    for row, s in enumerate(sequences):
        scored[row, : s.start] = 0
    return ids, mask, scored


def score_batch(models: TwoModels, sequences: list[Sequence]) -> list[TokenScores]:
    """The token figures of one batch, both models, on the CPU."""
    import torch

    ids, mask, scored = collate(models, sequences)
    logps, hidden = {}, {}
    with torch.inference_mode():
        for side in models.sides:
            with models.side(side) as model, captured_hidden(model) as states:
                logps[side] = token_logps(model, ids, mask, scored).cpu()
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
