"""An adapter merged into its base: written to disk, held against the adapter's own log-probabilities, and its card."""

import shutil
from pathlib import Path

from preflab.models.card import usage_snippet
from preflab.models.loading import BUILTIN_HUB_ID
from utils.artifacts import write_json
from utils.errors import UserError
from utils.progress import progress
from utils.tables import cell, render

# The file that marks a folder as one that this project merged, and says of what.
MARK = "merged_from.json"
# A large logit, whose rounding moves the log-probability of its token.
LOGIT = 32.0
# Sums of thousands of float32 products in another order.
FLOOR_NATS = 1e-3


def write_merged(folder: Path, model, tokenizer, about: dict) -> None:
    """Merge the adapter of `model` into its weights, and write the plain model with its tokenizer to `folder`.

    Args:
        folder: emptied before.
        about: what was merged, for the folder's mark.

    Raises:
        UserError: where weights come out that are no numbers.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{folder}: {error} Merge in float32, or look for a broken adapter") from None
    write_json(folder / MARK, about)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        # safetensors keeps its files from everybody else.
        path.chmod((folder / MARK).stat().st_mode)


def response_logps(model, tokenizer, ids, share_prompts: bool, desc: str):
    """Summed log-probabilities of (chosen, rejected), shape (pairs, 2), nats.

    Args:
        ids: rows with prompt_ids, chosen_ids and rejected_ids.
    """
    import numpy as np
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from preflab.models.fast import fused_lora, shared_prompt
    from preflab.models.logprobs import attach_head, pair_batches, token_logps

    attach_head(model)
    fused_lora.attach(model)
    found = np.zeros((len(ids), 2))
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    if share_prompts and shared_prompt.attach_if_known(model):
        collator = shared_prompt.PackingCollator(collator)
    with torch.inference_mode(), progress(len(ids), desc, "pair") as bar:
        for rows, batch in pair_batches(ids, collator, 4):
            on_device = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
            sums = token_logps(model, **on_device).sum(1)
            found[rows] = torch.stack(sums.chunk(2), 1).cpu().numpy()
            bar.update(len(rows))
    return found


def tolerance(logps, tokens, dtype: str):
    """By how much a merged log-probability may differ, nats.

    Two roundings of the sum, and of every token's logit, which add up like a random walk; and 0.001.

    Args:
        logps, tokens: of each answer, shape (pairs, 2).
    """
    import torch

    rounding = torch.finfo(getattr(torch, dtype)).eps / 2
    return FLOOR_NATS + 2 * rounding * (abs(logps) + LOGIT * tokens**0.5)


def conclude(metrics: dict, comparison, dtype: str) -> tuple[str, str, bool]:
    """(table with verdict, verdict, whether both are one model)."""
    same = metrics["largest_share_of_allowed"]["value"] <= 1
    largest = metrics["largest_difference"]
    figure = (
        f"the largest difference of {largest['n']} log-probabilities is {largest['value']:.2g} nats,"
        f" {metrics['largest_share_of_allowed']['value']:.0%} of what {dtype} allows"
    )
    verdict = f"{'The merged folder is the same model' if same else 'The merged folder is another model'}: {figure}."
    lines = [
        (f"on {metrics['logps_adapter']['n']} held-out pairs", "adapter on base", "merged", "merged - adapter"),
        (
            "log-prob of an answer, nats",
            cell(metrics["logps_adapter"], 1, 2),
            cell(metrics["logps_merged"], 1, 2),
            cell(metrics["mean_difference"], 1, 5),
        ),
        ("same answer preferred, %", "100 by definition", cell(metrics["same_preference"], 100), ""),
    ]
    title = f"{comparison.name}: {comparison.adapter} merged into {comparison.base}, {dtype}"
    return f"{render(title, lines)}\n\n{verdict}", verdict, same


def card(summary: dict, comparison, folder: str) -> str:
    """The merged folder's model card."""
    from huggingface_hub import ModelCardData

    base = comparison.base
    data = ModelCardData(
        base_model=BUILTIN_HUB_ID if base.startswith("builtin:") else base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merged", "preference-tuning"],
        model_name=comparison.name,
    )
    quantised = " The adapter was trained on a quantised base; here it sits on the full-precision original."
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {comparison.name}, merged",
        f"{base} with the LoRA adapter {comparison.adapter} merged into its weights ({summary['merged']['dtype']})."
        + (quantised if summary["merged"]["trained_on_quantised_base"] else ""),
        f"## Checked\n\n{summary['claim']}\n\n```\n{summary['text']}\n```",
        f"## Use\n\n```python\n{usage_snippet(folder, folder, False)}\n```",
        f"## Made by\n\n- commit `{summary['run']['git_commit']}`, {summary['run']['finished_utc']}",
    ]
    return "\n\n".join(lines) + "\n"
