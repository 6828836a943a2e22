"""The frozen reference's log-probabilities, computed once and cached: runs with other losses or betas share them.

Only pairs that the run reaches are computed: before training the train pairs of its steps, in their order; the test
pairs before the first evaluation. A pair's entry is keyed by its token ids, which depend on tokenizer, template and
truncation; the folder by the reference's weights and precision. Evaluations use the same kind of cache (utils.cache).
"""

import time

import numpy as np

from preflab.models.batching import token_batches
from preflab.training.plan import reached_rows
from preflab.training.run import TrainingRun
from preflab.training.run_folder import MANIFEST
from preflab.training.step0 import STEP0_TOLERANCE
from utils.artifacts import read_json
from utils.cache import ResultCache, cache_key
from utils.errors import UserError
from utils.progress import progress
from utils.stage import print_main

# Cached pairs per split that are computed again before the cache is used: one of so many, and at most so many.
ONE_OF, CHECKED = 20, 4
# Tokens per forward.
CPU_TOKENS, GPU_TOKENS = 4096, 32768
# Pairs between two lookups, so that the rows of large batches are sorted by length among those of a few steps only.
CHUNK = 1024


def prepare(training: TrainingRun, trainer, plan: dict) -> dict:
    """Give the trainer cached reference log-probabilities, where that is possible. Call before training.

    Args:
        plan: the plan of training (`preflab.training.plan.plan_training`).

    Returns:
        `{computed, read, seconds}`, which grow when the test pairs are added, or `{in_every_step_because}` where the
        reference cannot be cached. With a reference-free loss the train pairs have none; `in_every_step_because` is
        then `uncached_because`.
    """
    reason, free = trainer.uncached_reference_because, training.config.reference_free
    if reason is not None:
        return {"uncached_because" if free else "in_every_step_because": reason}
    finished = read_json(training.checkpoint / MANIFEST)["step"] if training.checkpoint else 0
    reference = ReferenceCache(trainer, training.config.eval_out, training.model_identity(trainer))
    trainer.reference = reference
    if free:
        print_main("reference: none in training with this loss; test pairs at the first evaluation")
        return reference.counts
    rows = reached_rows(trainer, plan, finished)
    reference.add("train_dataset", rows)
    counts = reference.counts
    training.end_phase("reference")
    later = ", test pairs at the first evaluation" if trainer.eval_dataset is not None else ""
    print_main(
        f"reference: {counts['computed']} pairs computed, {counts['read']} read, {counts['seconds']} s"
        f" ({len(rows)} of {len(trainer.train_dataset)} train pairs are reached{later})"
    )
    return counts


class ReferenceCache:
    """The reference's log-probabilities of a trainer's rows: read from the disk where they are, else computed.

    No random number is drawn, so the order of training and its dropout are the same as without it.

    Attributes:
        counts: `{computed, read, seconds}` so far.
    """

    def __init__(self, trainer, eval_out: str, identity: dict):
        """Open the cache.

        Args:
            identity: what identifies the reference: weights, precision, quantisation, start adapter.
        """
        self.trainer, self.counts = trainer, {"computed": 0, "read": 0, "seconds": 0.0}
        self.cache = ResultCache(eval_out, "reference", {"kind": "summed response log-probabilities", **identity})
        # Equal on every process, so that all of them divide the same missing pairs.
        self.known = self.cache.finished

    def add(self, name: str, rows: list[int] | None = None) -> None:
        """Give rows of a dataset their reference log-probabilities. Collective: every process calls it.

        Args:
            name: the trainer's attribute, train_dataset or eval_dataset.
            rows: the rows (default: all), in the order in which they are computed; the others get NaN.

        Raises:
            UserError: cached figures do not match this reference.
        """
        started, dataset = time.monotonic(), getattr(self.trainer, name)
        rows = list(range(len(dataset))) if rows is None else rows
        keys = {
            i: cache_key(*(row[part] for part in self.trainer.KEYED))
            for i, row in zip(rows, dataset.select(rows), strict=True)
        }
        # The cache's identity does not include library versions and kernels, so some entries are computed again first.
        self._check(dataset, keys)
        # Pairs with equal token ids share a key and are computed once, where they are reached first.
        first: dict[str, int] = {}
        for i, key in keys.items():
            if key not in self.known:
                first.setdefault(key, i)
        missing = list(first.values())
        self._compute(dataset, keys, missing)
        # Each process has computed its own share only; this waits for all of them and reads their files.
        self.known = self.cache.gather()
        for name_of_value, column in self.trainer.REFERENCE_COLUMNS.items():
            values = [self.trainer.UNKNOWN] * len(dataset)
            for i, key in keys.items():
                values[i] = self.known[key][name_of_value]
            # For pairs the columns that TRL's own precomputation adds; it then skips the reference's forward.
            dataset = dataset.add_column(column, values)
        setattr(self.trainer, name, dataset)
        # TRL's flag: from here its loss reads the two columns instead of running the reference.
        self.trainer.precompute_ref_logps = True
        self.counts["computed"] += len(missing)
        self.counts["read"] += len(rows) - len(missing)
        self.counts["seconds"] = round(self.counts["seconds"] + time.monotonic() - started, 1)

    def add_missing(self, name: str) -> float:
        """`add` of a complete split that has no reference yet; the seconds it took."""
        started = time.monotonic()
        if not set(self.trainer.REFERENCE_COLUMNS.values()) <= set(getattr(self.trainer, name).column_names):
            self.add(name)
        return time.monotonic() - started

    def _compute(self, dataset, keys: dict[int, str], missing: list[int]) -> None:
        """Score the `missing` rows, shared out over the processes, and add them to the cache."""
        trainer, cache = self.trainer, self.cache
        budget = CPU_TOKENS if trainer.accelerator.device.type == "cpu" else GPU_TOKENS
        with progress(-(-len(missing) // cache.state.num_processes), "reference", "pair") as bar:
            # Chunk by chunk, so that an interrupted pass has the pairs of the first steps.
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                # Tokens of the packed pair, its prompt counted once; the budget is in the same unit.
                parts = [part for part in trainer.KEYED if part.endswith("_ids")]
                lengths = [sum(len(row[part]) for part in parts) for row in dataset.select(chunk)]
                for batch in cache.own_share(token_batches(lengths, budget)):
                    rows = [chunk[k] for k in batch]
                    for i, values in zip(rows, trainer.reference_logps(dataset, rows), strict=True):
                        # Saved after every batch, so that an interrupted command continues where it stopped.
                        cache.add(keys[i], values)
                    bar.update(len(rows))

    def _check(self, dataset, keys: dict[int, str]) -> None:
        """Raise UserError where cached figures differ from what the reference gives now, on a few pairs."""
        cached = [i for i, key in keys.items() if key in self.known]
        if not cached:
            return
        count = min(CHECKED, -(-len(cached) // ONE_OF))
        # Spread over the rows.
        sample = cached[:: len(cached) // count][:count]
        # In nats: sums of log-probabilities are compared here, without beta.
        tolerance = STEP0_TOLERANCE["float32" if self.trainer.args.precision == "fp32" else "16-bit"]
        for i, now in zip(sample, self.trainer.reference_logps(dataset, sample), strict=True):
            before, now = (np.hstack([values[name] for name in now]) for values in (self.known[keys[i]], now))
            difference = np.abs(before - now).max()
            # Written so that NaN fails too.
            if not difference <= tolerance:
                raise UserError(
                    f"{self.cache.folder}: the cached reference log-probabilities do not match this model"
                    f" ({before[0]:.3f} cached, {now[0]:.3f} now); delete the folder, or train with"
                    " --no_reference_cache"
                )
