"""Check that a merged model equals base and adapter: compare their log-probabilities of held-out answers."""

import numpy as np
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from preflab.evaluation.reward_table import SIDES
from preflab.models.fast import fused_lora, shared_prompt
from preflab.models.logprobs import attach_head, pair_batches, token_logps
from preflab.models.merging import tolerance
from utils.artifacts import metric
from utils.progress import progress
from utils.stage import Report, fits_terminal
from utils.stats import bootstrap, share
from utils.tables import cell
from utils.tables import render as table

# Pairs per forward pass.
BATCH = 4


def response_logps(model, tokenizer, ids, share_prompts: bool, desc: str, indices=None, save=None) -> np.ndarray:
    """Summed log-probabilities of (chosen, rejected), shape (pairs, 2), in nats.

    Args:
        ids: rows with prompt_ids, chosen_ids and rejected_ids.
        share_prompts: compute each prompt once, if the architecture allows it.
        desc: label of the progress bar.
        indices: rows to score (default: all); the others are 0 in the result.
        save: is called with (row, [chosen, rejected]) as soon as a row is scored.
    """
    indices = range(len(ids)) if indices is None else indices
    attach_head(model)
    fused_lora.attach(model)
    logps = np.zeros((len(ids), 2))
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    if share_prompts and shared_prompt.attach_if_known(model):
        collator = shared_prompt.PackingCollator(collator)
    with torch.inference_mode(), progress(len(indices), desc, "pair") as bar:
        for rows, batch in pair_batches(ids, collator, BATCH, indices):
            on_device = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
            sums = token_logps(model, **on_device).sum(1)  # (2 × pairs,): chosen rows first, then rejected
            # `rows` are indices into `ids`: batches come longest first.
            logps[rows] = torch.stack(sums.chunk(2), 1).cpu().numpy()
            for row in rows if save else ():
                save(row, logps[row].tolist())
            bar.update(len(rows))
    return logps


def metrics_of(adapter: np.ndarray, merged: np.ndarray, ids, dtype: str, seed: int) -> dict:
    """Differences between the two models, in nats and as a share of what rounding explains.

    Args:
        adapter, merged: from `response_logps`, shape (pairs, 2).
        ids: the rows that were scored.
        seed: of the bootstrap.
    """
    # Shape (pairs, 2), as the log-probabilities.
    tokens = np.array([[len(row[f"{side}_ids"]) for side in SIDES] for row in ids])
    difference = np.abs(merged - adapter)
    # A tie under both models counts as the same preference.
    same_preference = np.sign(merged[:, 0] - merged[:, 1]) == np.sign(adapter[:, 0] - adapter[:, 1])
    return {
        "largest_difference": metric(float(difference.max()), n=difference.size),
        # Above 1 means a difference that rounding does not explain (`is_same_model`).
        "largest_share_of_allowed": metric(
            float((difference / tolerance(adapter, tokens, dtype)).max()), n=difference.size
        ),
        # Mean of both answers per pair, because a pair is the unit that is resampled.
        "mean_difference": bootstrap((merged - adapter).mean(1), seed),
        "logps_adapter": bootstrap(adapter.mean(1), seed),
        "logps_merged": bootstrap(merged.mean(1), seed),
        "same_preference": share(same_preference, seed),
    }


def rows_of(pairs: list, adapter: np.ndarray, merged: np.ndarray) -> list[dict]:
    """One row per pair for the artifact: its source and both models' log-probabilities."""
    return [
        {
            "row": i,
            "where": pair.source,
            "adapter": dict(zip(SIDES, adapter_logps, strict=True)),
            "merged": dict(zip(SIDES, merged_logps, strict=True)),
        }
        for i, (pair, adapter_logps, merged_logps) in enumerate(
            zip(pairs, adapter.tolist(), merged.tolist(), strict=True)
        )
    ]


def is_same_model(metrics: dict) -> bool:
    """Whether every difference is within the tolerance."""
    return metrics["largest_share_of_allowed"]["value"] <= 1


def verdict_of(metrics: dict, dtype: str) -> str:
    """The check's result in one sentence."""
    largest, share = metrics["largest_difference"], metrics["largest_share_of_allowed"]["value"]
    return (
        f"The merged folder is {'the same' if is_same_model(metrics) else 'another'} model: the largest difference of"
        f" {largest['n']} log-probabilities is {largest['value']:.2g} nats, {share:.0%} of what {dtype} allows."
    )


@fits_terminal
def render(metrics: dict, title: str, dtype: str, note: str | None = None) -> Report:
    """The table of both models' log-probabilities, with the verdict.

    Args:
        note: where the pairs are from, if they were not held out.
    """
    lines = [
        (
            f"on {metrics['logps_adapter']['n']} {'pairs' if note else 'held-out pairs'}",
            "adapter on base",
            "merged",
            "merged - adapter",
        ),
        (
            "log-prob per answer, nats",
            cell(metrics["logps_adapter"], 1, 2),
            cell(metrics["logps_merged"], 1, 2),
            cell(metrics["mean_difference"], 1, 5),
        ),
        ("same answer preferred, %", "100 by definition", cell(metrics["same_preference"], 100), ""),
    ]
    verdict = verdict_of(metrics, dtype)
    return Report("\n\n".join([table(title, lines), *([note] if note else []), verdict]), verdict)
