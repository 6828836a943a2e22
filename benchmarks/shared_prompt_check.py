"""Are shared prompts exact on this device? Log-probabilities and gradients against float64, ten architectures.

    python benchmarks/shared_prompt_check.py                  # CPU
    python benchmarks/shared_prompt_check.py --device cuda

Tiny random models of every architecture whose prompts are shared. Per architecture the loss of DPO on three pairs is
computed in float64 on the CPU, each answer alone with its prompt; then in float32 on the device, once padded and
once with shared prompts. Prints the largest errors of both, as JSON in the last line, and fails where the shared ones
are larger than rounding explains. The models and rows are also those of tests/models/test_shared_prompt.py.
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 120, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 8, "attn_logit_softcapping": 0.5, "attn_implementation": "eager"},
    "Gemma3Text": {"sliding_window": 8},
    "Qwen3": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Phi3": {"sliding_window": 8},
    "Olmo2": {},
    "SmolLM3": {},
}
BETA = 0.1
# Errors up to this are rounding in float32: nats, and shares of a gradient.
SMALL = 1e-4


@dataclass
class CheckArguments:
    """Keys of this benchmark."""

    device: str = option("cuda or cpu.", "cpu", choices=["cuda", "cpu"])


def tiny(kind: str, seed: int = 0, **extra):
    """A random model of an architecture, with windows and soft caps that matter at its size."""
    import torch
    import transformers

    config_class = getattr(transformers, f"{kind}Config")
    implementation = ARCHITECTURES[kind].get("attn_implementation", "sdpa")
    more = {k: v for k, v in ARCHITECTURES[kind].items() if k != "attn_implementation"}
    config = config_class(**{**SIZE, **more, **extra})
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    name = {"Gemma3Text": "Gemma3ForCausalLM"}.get(kind, f"{kind}ForCausalLM")
    model = getattr(transformers, name)(config).eval()
    for name, parameter in model.named_parameters():
        # Larger than the initialisation, so that attention is far from uniform.
        parameter.data.mul_(12 if "q_proj" in name or "k_proj" in name else 3)
    return model


def pairs(count: int = 3, seed: int = 1) -> list[dict]:
    """Random token ids: prompts of 3 to 29, answers of 1 to 24."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 120, (size,), generator=generator).tolist()

    return [{"prompt_ids": ids(3, 30), "chosen_ids": ids(1, 25), "rejected_ids": ids(1, 25)} for _ in range(count)]


def collated(rows: list[dict]) -> dict:
    """TRL's batch of pairs, chosen rows first."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=0)(rows)


def logps(model, batch: dict, packed: bool):
    """Log-probabilities of the answers' tokens, shape (2 × pairs, tokens); `packed`: with shared prompts."""
    from preflab.models.fast.shared_prompt import pack

    extra = pack(batch) if packed else {}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **extra}
    return model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs


def one_by_one(model, batch: dict):
    """Summed log-probabilities of the answers, each row computed alone and without padding. Shape (2 × pairs,)."""
    import torch

    sums = []
    for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        # The first token of the answer is predicted at the position before it.
        row, start = ids[None, : mask.sum()], int((mask.sum() - answer.sum()) - 1)
        row_logps = model(row, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, row[:, 1:, None])
        sums.append(row_logps[0, start:, 0].sum())
    return torch.stack(sums)


def gradients_of(sums, model) -> dict:
    """{parameter: gradient} of DPO's loss without a reference, given the summed log-probabilities; float64, CPU."""
    import torch

    chosen, rejected = sums.chunk(2)
    (-torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()).backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def errors_of(kind: str, device: str, checkpointing: bool = False) -> dict[str, dict[str, float]]:
    """Largest errors against float64 of an architecture: `{padded, shared: {log_probs, gradients}}`.

    Errors of log-probabilities are in nats, those of gradients shares of a parameter's largest gradient.
    """
    from preflab.models.fast.shared_prompt import attach
    from preflab.models.logprobs import attach_head

    # FlexAttention needs heads of at least 16 dimensions.
    exact, batch = tiny(kind, head_dim=16), collated(pairs())
    on_device, errors, results = {k: v.to(device) for k, v in batch.items()}, {}, {}
    for name in ("padded", "shared"):
        model = copy.deepcopy(exact).to(device)
        attach_head(model)
        if name == "shared":
            attach(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sums = logps(model, on_device, packed=name == "shared").sum(1)
        results[name] = sums.detach().double().cpu(), gradients_of(sums, model)
    sums = one_by_one(exact.double(), batch)
    gradients = gradients_of(sums, exact)
    for name, (summed, slopes) in results.items():
        shares = [((slopes[p] - slope).abs().max() / slope.abs().max()).item() for p, slope in gradients.items()]
        errors[name] = {"log_probs": (summed - sums.detach()).abs().max().item(), "gradients": max(shares)}
    return errors


def is_exact(errors: dict[str, dict[str, float]]) -> bool:
    """Whether rounding explains the errors of shared prompts: kernels round differently, so padding is the measure."""
    return all(errors["shared"][name] <= max(SMALL, 4 * errors["padded"][name]) for name in errors["shared"])


def main():
    _, args = start("shared_prompt_check", __doc__, CheckArguments, runs_bare=True)
    worst = {"log_probs": 0.0, "gradients": 0.0}
    for kind in ARCHITECTURES:
        errors = errors_of(kind, args.device)
        print(
            f"{kind:<11} log-probabilities {errors['shared']['log_probs']:.1e} nats (padded"
            f" {errors['padded']['log_probs']:.1e}), gradients {errors['shared']['gradients']:.1e}"
            f" (padded {errors['padded']['gradients']:.1e})"
        )
        if not is_exact(errors):
            raise UserError(f"{kind}: shared prompts are off by more than rounding explains")
        worst = {name: max(value, errors["shared"][name]) for name, value in worst.items()}
    print(json.dumps({f"largest error of {k.replace('_', '-')}": float(f"{v:.1e}") for k, v in worst.items()}))


if __name__ == "__main__":
    run(main)
