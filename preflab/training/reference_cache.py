"""The frozen reference's log-probabilities, computed once and cached: runs with other losses or betas share them.

A pair's entry is keyed by its token ids, which depend on tokenizer, template and truncation; the folder by the
reference's weights and precision. Evaluations use the same kind of cache (utils.cache).
"""

import time

from preflab.models.batching import token_batches
from preflab.training.dpo_trainer import STEP0_TOLERANCE
from preflab.training.run import TrainingRun
from utils.cache import ResultCache, cache_key
from utils.errors import UserError
from utils.progress import progress
from utils.stage import print_main

PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")
# Cached pairs per split that are computed again before the cache is used.
CHECKED = 4
# Tokens per forward.
CPU_TOKENS, GPU_TOKENS = 4096, 32768


def prepare(training: TrainingRun, trainer) -> dict:
    """Give the trainer cached reference log-probabilities, where that is possible. Call before training.

    Returns:
        `{computed, read, seconds}`, or `{in_every_step_because}` where the reference cannot be cached.
    """
    reason = trainer.uncached_reference_because
    if reason is not None:
        return {"in_every_step_because": reason}
    counts = use(trainer, training.config.eval_out, training.model_identity(trainer))
    print_main(f"reference: {counts['computed']} pairs computed, {counts['read']} read, {counts['seconds']} s")
    return counts


def use(trainer, eval_out: str, identity: dict) -> dict:
    """Give every train and test pair its reference log-probabilities. Call after the preflight, before training.

    No random number is drawn here, so the order of training and its dropout are the same as without the cache.

    Args:
        identity: what identifies the reference: weights, precision, quantisation, start adapter.

    Returns:
        `{computed, read, seconds}`.

    Raises:
        UserError: cached figures do not match this reference.
    """
    started = time.monotonic()
    cache = ResultCache(eval_out, "reference", {"kind": "summed response log-probabilities", **identity})
    # The entries at opening, equal on every process, so that all processes divide the same missing pairs.
    known, counts = cache.finished, {"computed": 0, "read": 0}
    splits = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    keys = {
        name: [cache_key(*(row[part] for part in PARTS)) for row in dataset]
        for name, dataset in splits.items()
        if dataset is not None
    }
    for name, split_keys in keys.items():
        # The cache's identity does not include library versions and kernels, so some entries are computed again first.
        _check(trainer, splits[name], split_keys, known, cache.folder)
        # Pairs with equal token ids share a key and are computed once.
        missing = list({key: i for i, key in enumerate(split_keys) if key not in known}.values())
        counts["computed"] += len(missing)
        counts["read"] += len(split_keys) - len(missing)
        _compute(trainer, splits[name], split_keys, missing, cache)
    # Each process has computed its own share only; this waits for all of them and reads their files.
    results = cache.gather()
    for name, split_keys in keys.items():
        dataset = splits[name]
        for side in ("chosen", "rejected"):
            # The columns that TRL's own precomputation adds; it then skips the reference's forward.
            dataset = dataset.add_column(f"ref_{side}_logps", [results[key][side] for key in split_keys])
        setattr(trainer, name, dataset)
    # TRL's flag, set last: from here its loss reads the two columns instead of running the reference.
    trainer.precompute_ref_logps = True
    return {**counts, "seconds": round(time.monotonic() - started, 1)}


def _compute(trainer, dataset, keys: list[str], missing: list[int], cache: ResultCache) -> None:
    """Score the `missing` rows, shared out over the processes, and add them to the cache."""
    # Tokens of the packed pair, its prompt counted once; the budget is in the same unit.
    lengths = [sum(len(dataset[i][part]) for part in PARTS) for i in missing]
    budget = CPU_TOKENS if trainer.accelerator.device.type == "cpu" else GPU_TOKENS
    batches = cache.own_share(token_batches(lengths, budget))
    with progress(sum(map(len, batches)), "reference", "pair") as bar:
        for batch in batches:
            rows = [missing[k] for k in batch]
            for i, (chosen, rejected) in zip(rows, trainer.reference_logps(dataset, rows), strict=True):
                # Saved after every batch, so that an interrupted command continues where it stopped.
                cache.add(keys[i], {"chosen": chosen, "rejected": rejected})
            bar.update(len(rows))


def _check(trainer, dataset, keys: list[str], known: dict, folder) -> None:
    """Raise UserError where cached figures differ from what the reference gives now, on a few pairs."""
    cached = [i for i, key in enumerate(keys) if key in known]
    # Spread over the split.
    sample = cached[:: max(1, len(cached) // CHECKED)][:CHECKED]
    if not sample:
        return
    # In nats: sums of log-probabilities are compared here, without beta.
    tolerance = STEP0_TOLERANCE["float32" if trainer.args.precision == "fp32" else "16-bit"]
    for i, now in zip(sample, trainer.reference_logps(dataset, sample), strict=True):
        before = (known[keys[i]]["chosen"], known[keys[i]]["rejected"])
        difference = max(abs(a - b) for a, b in zip(before, now, strict=True))
        # Written so that NaN fails too.
        if not difference <= tolerance:
            raise UserError(
                f"{folder}: the cached reference log-probabilities do not match this model ({before[0]:.3f} cached,"
                f" {now[0]:.3f} now); delete the folder, or train with --no_reference_cache"
            )
