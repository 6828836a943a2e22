"""Shared prompts: each pair is computed as one sequence [prompt | chosen | rejected], pairs back to back, no padding.

Stock DPO computes a pair's prompt twice and pads both answers to the longest of the batch. Here the rejected answer's
positions restart at the prompt's end and its attention skips the chosen answer (Wang & Hegde 2024, "Accelerating Direct
Preference Optimization with Prefix Sharing", arXiv 2410.20305), so that every hidden state is the one of the padded
computation. The rest of a forward does not notice: the backbone takes and returns what it always did, and only what
happens inside it is packed.
"""

import functools
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention

from preflab.models.logprobs import without_adapter_shell

# Architectures whose attention goes through transformers' attention interface with the masks handled here.
KNOWN = {
    "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "olmo2", "smollm3",
}  # fmt: skip
KEYS = ("packed_ids", "packed_positions", "packed_lengths", "unpack")


# -------------------------------------------------------------------------------------------------------------- layout


def pack(batch: dict, shared: list[int] | None = None) -> dict:
    """What the packed computation of a padded batch needs, beside the batch itself.

    Args:
        batch: TRL's collated tensors: input_ids, attention_mask, completion_mask, shape (2 × pairs, length),
            right-padded, the chosen rows first.
        shared: how many leading tokens the two rows of each pair share (default: those outside completion_mask).

    Returns:
        packed_ids and packed_positions, shape (1, tokens); packed_lengths, (prompt, chosen, rejected) of each pair;
        unpack, shape (2 × pairs, length): where each position of the padded batch lies in the packed row.
    """
    whole, length = batch["attention_mask"].sum(1).tolist(), batch["input_ids"].shape[1]
    pairs, device = len(whole) // 2, batch["input_ids"].device
    if shared is None:
        shared = (batch["attention_mask"].sum(1) - batch["completion_mask"].sum(1)).tolist()[:pairs]
    ids, positions, lengths, unpack, start = [], [], [], torch.zeros(2 * pairs, length, dtype=torch.long), 0
    for k in range(pairs):
        prompt, chosen, rejected = shared[k], whole[k] - shared[k], whole[pairs + k] - shared[k]
        ids += [batch["input_ids"][k, : prompt + chosen], batch["input_ids"][pairs + k, prompt : prompt + rejected]]
        positions += [torch.arange(prompt + chosen), torch.arange(prompt, prompt + rejected)]
        unpack[k, : prompt + chosen] = torch.arange(start, start + prompt + chosen)
        unpack[pairs + k, :prompt] = torch.arange(start, start + prompt)
        after = start + prompt + chosen
        unpack[pairs + k, prompt : prompt + rejected] = torch.arange(after, after + rejected)
        lengths.append((prompt, chosen, rejected))
        start = after + rejected
    return {
        "packed_ids": torch.cat(ids)[None],
        "packed_positions": torch.cat(positions)[None].to(device),
        "packed_lengths": tuple(lengths),
        "unpack": unpack.to(device),
    }


class PackingCollator:
    """TRL's collator, with what the packed computation of its batch needs added (`pack`)."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collator(examples)
        return {**batch, **pack(batch)}


def rebatch(batches: list[dict], budget: int, collator, accelerator) -> list[dict]:
    """The micro-batches of one optimiser step, cut anew: the same pairs in the same order, up to `budget` tokens each.

    Every process cuts at the same places, where the fullest of them reaches the budget. There are as many entries as
    before, so that gradients are synchronised as ever: those that are not needed come first and are empty.

    Returns:
        Batches with `loss_weight`: pairs in it over pairs in a configured one, so that the step's mean stays.
    """
    examples = [example for batch in batches for example in split(batch)]
    tokens = torch.tensor([sum(len(e[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for e in examples])
    if accelerator.num_processes > 1:
        shared = accelerator.gather(tokens.to(accelerator.device)[None])
        tokens = shared.max(0).values.cpu()
    cuts, filled = [0], 0
    for k, size in enumerate(tokens.tolist()):
        if filled and filled + size > budget:
            cuts.append(k)
            filled = 0
        filled += size
    usual = len(batches[0]["input_ids"]) // 2
    cuts.append(len(examples))
    parts = [examples[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    if len(parts) > len(batches):
        return batches
    empty = {"input_ids": torch.empty((0, 0), dtype=torch.long)}
    found = [{**collator(part), "loss_weight": len(part) / usual} for part in parts]
    return [dict(empty) for _ in range(len(batches) - len(parts))] + found


def split(batch: dict) -> list[dict]:
    """The examples of a collated batch, with what it holds of each pair beside the tokens."""
    pairs, found = len(batch["input_ids"]) // 2, []
    ids = batch["input_ids"].tolist()
    # What is told of a pair beside its tokens has one value for each.
    of_a_pair = {name: values.tolist() for name, values in batch.items() if getattr(values, "ndim", 0) == 1}
    whole, answer = batch["attention_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()
    for k in range(pairs):
        prompt = whole[k] - answer[k]
        example = {
            "prompt_ids": ids[k][:prompt],
            "chosen_ids": ids[k][prompt : whole[k]],
            "rejected_ids": ids[pairs + k][prompt : whole[pairs + k]],
        }
        example |= {name: values[k] for name, values in of_a_pair.items()}
        found.append(example)
    return found


def unsupported_reason(model, aux_loss: bool = False) -> str | None:
    """Why this model's pairs cannot be packed, None where they can."""
    config = without_adapter_shell(model).config
    if aux_loss:
        return "the router's auxiliary loss counts every token of the padded batch"
    if config.model_type not in KNOWN:
        return f"the attention of {config.model_type} is not known to be right when prompts are shared"
    if getattr(config, "rope_parameters", None) and "dynamic" in str(config.rope_parameters):
        return "its rotary embedding changes with the length of the row"
    if any(getattr(peft, "is_prompt_learning", False) for peft in getattr(model, "peft_config", {}).values()):
        return "prompt-learning adapters put tokens of their own in front"
    return None


# ----------------------------------------------------------------------------------------------------------- attention


def attach(model) -> None:
    """Make `model` (a transformers model, perhaps under an adapter) compute packed batches packed. Others as before."""
    backbone = without_adapter_shell(model).base_model
    if getattr(backbone, "_packs_pairs", False):
        return
    register(backbone.config)
    original = backbone.forward

    @functools.wraps(original)
    def forward(*args, packed_ids=None, packed_positions=None, packed_lengths=None, unpack=None, **kwargs):
        if packed_ids is None:
            return original(*args, **kwargs)
        # A mask of four dimensions is taken as it stands; the attention below looks at the lengths alone.
        no_mask = torch.zeros((1, 1, 1, 1), device=packed_ids.device)
        kwargs |= {"input_ids": packed_ids, "position_ids": packed_positions, "attention_mask": no_mask}
        output = original(
            **kwargs, packed_lengths=packed_lengths, **_block_masks(backbone.config, packed_lengths, packed_ids)
        )
        output.last_hidden_state = output.last_hidden_state[0][unpack]
        return output

    backbone.forward = forward
    backbone._packs_pairs = True


def attach_if_known(model) -> bool:
    """`attach` where pairs of this model can be packed; whether they can."""
    known = unsupported_reason(model) is None
    if known:
        attach(model)
    return known


def register(config) -> None:
    """Put packed attention in front of the attention that `config` names, which goes on to serve all other calls."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    usual = config._attn_implementation
    name = f"packed_{usual}"
    AttentionInterface.register(name, functools.partial(_attention, usual))
    if usual in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    config._attn_implementation = name


def _attention(usual, module, query, key, value, attention_mask, packed_lengths=None, packed_masks=None, **kwargs):
    """transformers' attention interface: (output of shape (batch, length, heads, dim), None)."""
    if packed_lengths is None:
        return _usual(usual, module)(module, query, key, value, attention_mask, **kwargs)
    settings = {name: kwargs.get(name) for name in ("scaling", "softcap", "sliding_window")}
    if settings["scaling"] is None:
        settings["scaling"] = query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        return _flex(query, key, value, packed_masks, **settings), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    settings["dropout"] = kwargs.get("dropout", 0.0)
    # Split once, not sliced pair by pair: the backward of each slice would fill a whole row with zeros.
    sizes = [size for prompt, chosen, rejected in packed_lengths for size in (prompt + chosen, rejected)]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    parts = []
    for k, (prompt, _, _) in enumerate(packed_lengths):
        # Prompt and chosen answer are an ordinary causal sequence; the rejected one looks back over the prompt alone.
        first, second = 2 * k, 2 * k + 1
        parts.append(_causal(queries[first], keys[first], values[first], **settings))
        seen = [torch.cat([x[first][:, :, :prompt], x[second]], dim=2) for x in (keys, values)]
        parts.append(_causal(queries[second], *seen, **settings))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _usual(name: str, module):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _causal(query, key, value, scaling, softcap, sliding_window, dropout):
    """Causal attention of the last queries of a sequence over all its keys, shape (1, heads, queries, dim)."""
    queries, keys = query.shape[2], key.shape[2]
    windowed = sliding_window is not None and keys > sliding_window
    if queries == keys and not windowed and softcap is None:
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    distance = torch.arange(keys - queries, keys, device=query.device)[:, None] - torch.arange(
        keys, device=query.device
    )
    allowed = distance >= 0
    if windowed:
        allowed &= distance < sliding_window
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scaling)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.dropout(weights, dropout, dropout > 0) @ value


# ----------------------------------------------------------------------------------------------------------------- GPU


def mask_rule(packed_lengths, device, sliding_window: int | None = None):
    """FlexAttention's mask function of a packed row: who sees whom, from each token's pair, part and position."""
    pair, part, position = [], [], []
    for k, (prompt, chosen, rejected) in enumerate(packed_lengths):
        pair += [k] * (prompt + chosen + rejected)
        part += [0] * prompt + [1] * chosen + [2] * rejected
        position += [*range(prompt + chosen), *range(prompt, prompt + rejected)]
    pair, part, position = (torch.tensor(x, device=device) for x in (pair, part, position))

    def rule(batch, head, q, k):
        allowed = (pair[q] == pair[k]) & (position[q] >= position[k]) & ((part[k] == 0) | (part[k] == part[q]))
        if sliding_window is not None:
            allowed = allowed & (position[q] - position[k] < sliding_window)
        return allowed

    return rule


def _block_masks(config, packed_lengths, packed_ids) -> dict:
    """On a GPU, FlexAttention's block masks of a row, made once for all layers: {sliding window or None: mask}."""
    if packed_ids.device.type != "cuda":
        return {}
    windows = {None, getattr(config, "sliding_window", None)}
    return {"packed_masks": {w: _block_mask(packed_lengths, packed_ids.device, w) for w in windows}}


# Policy and reference see the same rows one after the other.
@functools.lru_cache(maxsize=4)
def _block_mask(packed_lengths, device, window: int | None):
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = sum(map(sum, packed_lengths))
    return create_block_mask(mask_rule(packed_lengths, device, window), None, None, tokens, tokens, device=device)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    # With gradients and without, each window and precision is a variant; past the limit the slow path would take over.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=4)
def _softcaps(softcap: float, heads: int, device):
    # A plain number would be a scalar on the CPU to a kernel compiled for any shape, which it cannot read.
    return torch.full((heads,), softcap, device=device)


def _flex(query, key, value, masks, scaling, softcap, sliding_window):
    caps = None if softcap is None else _softcaps(softcap, query.shape[1], query.device)

    def capped(score, batch, head, q, k):
        return caps[head] * torch.tanh(score / caps[head])

    output = _compiled_flex()(
        query, key, value, score_mod=capped if softcap is not None else None, block_mask=masks[sliding_window],
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        # Rows below 128 tokens would get a kernel for generation, which is compiled anew for each length.
        kernel_options={"BACKEND": "TRITON"},
    )  # fmt: skip
    return output.transpose(1, 2)
