"""How much do log-probabilities in 16 bits differ from float32, in this project and in stock TRL?

    python benchmarks/precision.py                                              # SmolLM2, 32 shipped pairs, bfloat16
    python benchmarks/precision.py --data HuggingFaceH4/ultrafeedback_binarized --split train_prefs

The same pairs are scored four times by 16-bit weights with a LoRA adapter whose B is not zero: in float32 arithmetic
(the baseline), as stock TRL computes a batch of --batch padded pairs under autocast, the same one pair at a time, and
as this project computes it. Prints the root mean square error of the policy's and the reference's summed
log-probabilities, of their ratio, and of the margin in the loss, in nats.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import option
from utils.errors import run
from utils.stage import start

# About the change of every entry of B in one Adam step at learning rate 1e-4.
ENTRY_OF_B = 1e-4


@dataclass
class PrecisionArguments:
    """Keys of this benchmark."""

    model: str = option("builtin:smollm2-135m-instruct, a hub id or a folder.", "builtin:smollm2-135m-instruct")
    data: str = option("Preference data in any format of the training script.", "data/quickstart_prefs")
    split: str = option("Split of --data.", "train")
    pairs: int = option("Pairs to score.", 32)
    batch: int = option("Pairs per batch.", 2)
    max_length: int = option("Longest sequence in tokens.", 512)
    dtype: str = option("Of weights and autocast.", "bfloat16", choices=["bfloat16", "float16"])
    device: str = option("cpu or cuda.", "cpu", choices=["cpu", "cuda"])
    json: str | None = option("Write the figures here.")


def model_with_adapter(args):
    """The model with TRL's head and a LoRA adapter; the same adapter at every call."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    from benchmarks.shapes import LINEAR
    from preflab.models.loading import load_model

    model = load_model(args.model, dtype=args.dtype).to(args.device).eval()
    add_fused_lm_head(model)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = (torch.randint(2, p.shape).mul(2).sub(1) * ENTRY_OF_B).to(p)
    return model


def score(model, rows, collator, batch: int):
    """(policy, reference) summed log-probabilities, each of shape (pairs, 2), float64 on the CPU."""
    import torch

    from preflab.models.logprobs import token_logps

    def summed():
        batches = []
        for first in range(0, len(rows), batch):
            inputs = collator([rows[i] for i in range(first, min(first + batch, len(rows)))])
            inputs = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in inputs.items()}
            batches.append(token_logps(model, **inputs).double().sum(1).view(2, -1).t().cpu())
        return torch.cat(batches)

    policy = summed()
    with model.disable_adapter():
        return policy, summed()


def errors(scores, exact) -> dict:
    """{figure: error of each answer or pair, nats} against the float32 scores `exact`."""
    (policy, reference), (exact_policy, exact_reference) = scores, exact
    ratio = (policy - reference) - (exact_policy - exact_reference)
    return {
        "policy": (policy - exact_policy).flatten(),
        "reference": (reference - exact_reference).flatten(),
        "log-ratio": ratio.flatten(),
        "margin": ratio[:, 0] - ratio[:, 1],
    }


def main():
    stage, args = start("precision", __doc__, PrecisionArguments)

    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from preflab.data.preferences import load_pairs, tokenize
    from preflab.models.fast import fused_head, fused_lora, shared_prompt
    from preflab.models.loading import load_tokenizer
    from utils.artifacts import write_json
    from utils.provenance import run_record
    from utils.tables import render

    tokenizer = load_tokenizer(args.model)
    data = load_pairs([{"name": args.data, "split": args.split}], keep_duplicate_prompts=True, limit=args.pairs)
    rows, _ = tokenize(data, tokenizer, args.max_length, args.max_length // 2)
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    scores = {}
    with torch.inference_mode():
        exact = score(model_with_adapter(args).float(), rows, collator, args.batch)
        model = model_with_adapter(args)
        with torch.autocast(args.device, getattr(torch, args.dtype)):
            scores["stock TRL"] = score(model, rows, collator, args.batch)
            scores["stock TRL, one pair at a time"] = score(model, rows, collator, 1)
            # These change the model in place, so the stock measurements come first.
            fused_head.install()
            fused_lora.attach(model)
            shared_prompt.attach(model)
            scores["this project"] = score(model, rows, shared_prompt.PackingCollator(collator), args.batch)
    differences = {way: errors(figures, exact) for way, figures in scores.items()}
    names = list(next(iter(differences.values())))
    rms = {way: {name: e[name].square().mean().sqrt().item() for name in names} for way, e in differences.items()}
    effect = (exact[0] - exact[1]).square().mean().sqrt().item()
    title = f"root mean square error against float32, nats, {len(rows)} pairs, {args.dtype}"
    print(render(title, [("", *names), *((way, *(f"{v:.3f}" for v in m.values())) for way, m in rms.items())]))
    print(f"the adapter changes a log-probability by {effect:.3f} nats (root mean square, float32)")
    if args.json:
        record = {"args": args.__dict__, "run": run_record(0, stage.seconds)}
        write_json(args.json, {"rms": rms, "adapter_moves": effect, **record})


if __name__ == "__main__":
    run(main)
