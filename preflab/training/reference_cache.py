"""The frozen reference's log-probabilities, computed once and kept: losses, betas and learning rates share them.

A pair's entry is keyed by its token ids, so that tokenizer, template and truncation are in the key; the folder by the
reference's weights and precision. Evaluations read the same kind of cache (utils.cache).
"""

import time

import torch

from preflab.models.batching import token_batches
from preflab.training.dpo_trainer import STEP0_TOLERANCE
from utils.cache import ResultCache, cache_key
from utils.errors import UserError
from utils.progress import progress

PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")
# A few cached pairs are computed again before any is believed.
CHECKED = 4


def unsupported_reason(trainer) -> str | None:
    """Why the reference is computed in every step, None where it can be cached."""
    if not trainer.args.reference_cache:
        return "--no_reference_cache"
    if trainer.args.precompute_ref_log_probs:
        return "TRL precomputes it (--precompute_ref_log_probs)"
    if trainer.is_sharded:
        return "a sharded model exists only inside training"
    if trainer.ld_alpha is not None:
        return "ld_alpha discounts its log-probabilities"
    return None


def use(trainer, eval_out: str, identity: dict) -> dict:
    """Give every train and test pair its reference log-probabilities. Call after the preflight, before training.

    The order of training, and every random number in it, stay as they are: nothing here draws one.

    Args:
        identity: what identifies the reference: weights, precision, quantisation.

    Returns:
        `{computed, read, seconds}`. Raises UserError where kept figures are not those of this reference.
    """
    started = time.monotonic()
    cache = ResultCache(eval_out, "reference", {"kind": "summed response log-probabilities", **identity})
    known, counts = cache.finished, {"computed": 0, "read": 0}
    splits = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    keys = {
        name: [cache_key(*(row[part] for part in PARTS)) for row in dataset]
        for name, dataset in splits.items()
        if dataset is not None
    }
    for name, mine in keys.items():
        _check(trainer, splits[name], mine, known, cache.folder)
        todo = list({key: i for i, key in enumerate(mine) if key not in known}.values())
        counts["computed"] += len(todo)
        counts["read"] += len(mine) - len(todo)
        _compute(trainer, splits[name], mine, todo, cache)
    found = cache.gather()
    for name, mine in keys.items():
        dataset = splits[name]
        for side in ("chosen", "rejected"):
            dataset = dataset.add_column(f"ref_{side}_logps", [found[key][side] for key in mine])
        setattr(trainer, name, dataset)
    trainer.precompute_ref_logps = True
    return {**counts, "seconds": round(time.monotonic() - started, 1)}


def _compute(trainer, dataset, keys: list[str], todo: list[int], cache: ResultCache) -> None:

    lengths = [sum(len(dataset[i][part]) for part in PARTS) for i in todo]
    batches = cache.own_share(token_batches(lengths, 4096 if trainer.accelerator.device.type == "cpu" else 32768))
    with progress(sum(map(len, batches)), "reference", "pair") as bar:
        for batch in batches:
            rows = [todo[k] for k in batch]
            for i, (chosen, rejected) in zip(rows, reference_logps(trainer, dataset, rows), strict=True):
                cache.add(keys[i], {"chosen": chosen, "rejected": rejected})
            bar.update(len(rows))


@torch.no_grad()
def reference_logps(trainer, dataset, rows: list[int]) -> list[tuple[float, float]]:
    """(chosen, rejected) summed reference log-probabilities of `rows`, in nats, by TRL's own reference forward."""
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    was_training = model.training
    model.eval()
    batch = trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in rows]))
    sides = [side.float().tolist() for side in trainer.compute_ref_log_probs(model, batch)]
    model.train(was_training)
    return list(zip(*sides, strict=True))


def _check(trainer, dataset, keys: list[str], known: dict, folder) -> None:
    """Refuse kept figures that the reference does not give today."""
    kept = [i for i, key in enumerate(keys) if key in known]
    some = kept[:: max(1, len(kept) // CHECKED)][:CHECKED]
    if not some:
        return
    tolerance = STEP0_TOLERANCE["float32" if trainer.args.precision == "fp32" else "16-bit"]
    for i, now in zip(some, reference_logps(trainer, dataset, some), strict=True):
        before = (known[keys[i]]["chosen"], known[keys[i]]["rejected"])
        apart = max(abs(a - b) for a, b in zip(before, now, strict=True))
        if not apart <= tolerance:
            raise UserError(
                f"{folder}: the reference log-probabilities kept there are not those of this model ({before[0]:.3f}"
                f" kept, {now[0]:.3f} now); delete the folder, or train with --no_reference_cache"
            )
