"""Faster preference pairs: each pair is one sequence [prompt | chosen | rejected], pairs back to back, no padding.

Ranked lists are [prompt | answer 1 | ... | answer N]; a pair is the case N = 2.

Speed: stock DPO computes a pair's prompt twice and pads both answers to the longest of the batch. Here the
prompt is computed once and nothing is padded.

Results: the rejected answer's positions restart at the prompt's end and its attention skips the chosen answer (Wang &
Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305), so every hidden state
equals that of the padded computation up to rounding. The packing is internal to the backbone: it takes and returns the
padded batch's tensors, so losses and trainers do not change.

Switch: `--no_shared_prompt` in training and evaluations. Architectures outside KNOWN are always computed padded.
"""

import functools
import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from preflab.models.fast import cpu_attention
from preflab.models.logprobs import without_adapter_shell

# Architectures whose attention uses transformers' attention interface and only the masks that this module handles.
KNOWN = {
    "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "olmo2", "smollm3",
}  # fmt: skip
# Keys that `pack` adds to a batch.
KEYS = ("packed_ids", "packed_positions", "packed_lengths", "unpack")


# -------------------------------------------------------------------------------------------------------------- layout


def pack(batch: dict, shared: list[int] | None = None, groups: list[list[int]] | None = None) -> dict:
    """Lay out a padded batch as one row without padding.

        pair 0                          pair 1
        [ prompt | chosen | rejected ]  [ prompt | chosen | rejected ]
          0 .. p   p .. c   p .. r        0 .. p   ...                    positions

    Args:
        batch: TRL's collated tensors: input_ids, attention_mask, completion_mask, shape (2 × pairs, length),
            right-padded, the chosen rows first.
        shared: number of leading tokens that the rows of each pair share (default: those outside completion_mask).
        groups: the rows of the batch that form each group (default: row k and row k + pairs form pair k). Each group
            has one prompt; its first answer takes the place of the chosen one.

    Returns:
        packed_ids and packed_positions, shape (1, tokens); packed_lengths, (prompt, chosen, rejected) of each pair, or
        (prompt, *answers); unpack, shape (rows, length): the column of the packed row for each position of the batch.
    """
    sizes, length = batch["attention_mask"].sum(1).tolist(), batch["input_ids"].shape[1]
    device = batch["input_ids"].device
    if groups is None:
        groups = [[k, len(sizes) // 2 + k] for k in range(len(sizes) // 2)]
    if shared is None:
        # From the first row of each group; the others have the same prompt.
        prompts = (batch["attention_mask"].sum(1) - batch["completion_mask"].sum(1)).tolist()
        shared = [prompts[rows[0]] for rows in groups]
    # Padding positions keep the value 0: they read the hidden state of column 0, which the masks then discard.
    ids, positions, lengths, unpack, start = [], [], [], torch.zeros(len(sizes), length, dtype=torch.long), 0
    for prompt, rows in zip(shared, groups, strict=True):
        answers, after = [sizes[row] - prompt for row in rows], start + prompt
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            # The prompt from the first row, from the others the answer alone. Its positions continue at the end of the
            # prompt, as in the padded batch.
            begin = 0 if i == 0 else prompt
            ids.append(batch["input_ids"][row, begin : prompt + answer])
            positions.append(torch.arange(begin, prompt + answer))
            # All rows of the group read the same prompt.
            unpack[row, :prompt] = torch.arange(start, start + prompt)
            unpack[row, prompt : prompt + answer] = torch.arange(after, after + answer)
            after += answer
        lengths.append((prompt, *answers))
        start = after
    return {
        "packed_ids": torch.cat(ids)[None],
        "packed_positions": torch.cat(positions)[None].to(device),
        # Tuples, since `_block_mask` caches by this value.
        "packed_lengths": tuple(lengths),
        "unpack": unpack.to(device),
    }


def pack_groups(batch: dict) -> dict:
    """`pack`, with the groups that the collator made where rows are not pairs."""
    return pack(batch, groups=batch.get("groups"))


def pack_sequences(batch: dict) -> dict:
    """Lay out single sequences as one row without padding; each is a pair with a prompt and an empty answer.

    Args:
        batch: tensors of TRL's collator for SFT: input_ids and attention_mask, shape (rows, length), right-padded, or
            a row that it concatenated already (padding_free), with cu_seq_lens_q, its sequences' starts and its end.

    Returns:
        As `pack`; unpack is None where the batch itself is the packed row.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    sizes = batch["cu_seq_lens_q"].diff() if mask is None else mask.sum(1)
    positions = torch.cat([torch.arange(size) for size in sizes.tolist()])[None].to(ids.device)
    lengths = tuple((size, 0) for size in sizes.tolist())
    if mask is None:
        return {"packed_ids": ids, "packed_positions": positions, "packed_lengths": lengths, "unpack": None}
    starts = sizes.cumsum(0) - sizes
    # Padding positions read column 0, as in `pack`.
    unpack = (starts[:, None] + torch.arange(ids.shape[1], device=ids.device)) * mask
    return {
        "packed_ids": ids[mask.bool()][None],
        "packed_positions": positions,
        "packed_lengths": lengths,
        "unpack": unpack,
    }


class PackingCollator:
    """TRL's collator, whose batches also have the packed layout.

    Args:
        layout: `pack_groups` for pairs and lists, `pack_sequences` for single sequences.
    """

    def __init__(self, collator, layout=pack_groups):
        self.collator, self.layout = collator, layout

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collator(examples)
        return {**batch, **self.layout(batch)}


def rebatch(batches: list[dict], budget: int, collator, accelerator, examples_of=None) -> list[dict]:
    """Divide the pairs of one optimizer step into new micro-batches of up to `budget` tokens, in the same order.

    All processes divide at the same places, where the largest of them reaches the budget. The number of entries does
    not change, so gradients are synchronised as before: entries that are not needed come first and are empty.

    Args:
        batches: the step's micro-batches as configured, from `collator`.
        budget: tokens of a packed row.
        examples_of: gives the examples of a batch (default: `split`, for pairs).

    Returns:
        Batches with `loss_weight`: their number of pairs over that of a configured batch, which keeps the step's mean.
        `batches` itself, if the budget would need more micro-batches than configured.
    """
    parts = [(examples_of or split)(batch) for batch in batches]
    configured, examples = len(parts[0]), [example for part in parts for example in part]
    tokens = torch.tensor([sum(len(ids) for name, ids in e.items() if name.endswith("_ids")) for e in examples])
    if accelerator.num_processes > 1:
        # (processes, examples): the k-th examples of all processes go into the same micro-batch.
        all_tokens = accelerator.gather(tokens.to(accelerator.device)[None])
        tokens = all_tokens.max(0).values.cpu()
    cuts, filled = [0], 0
    for k, size in enumerate(tokens.tolist()):
        # `filled` is the tokens since the last cut; a pair larger than the budget gets a micro-batch for itself.
        if filled and filled + size > budget:
            cuts.append(k)
            filled = 0
        filled += size
    cuts.append(len(examples))
    parts = [examples[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    # A small --micro_batch_tokens can lead here; the number of micro-batches may not grow.
    if len(parts) > len(batches):
        return batches
    # training_step recognises an empty micro-batch by its number of tokens.
    empty = {"input_ids": torch.empty((0, 0), dtype=torch.long)}
    new = [{**collator(part), "loss_weight": len(part) / configured} for part in parts]
    return [dict(empty) for _ in range(len(batches) - len(parts))] + new


def split(batch: dict) -> list[dict]:
    """The examples of a collated batch, with their other columns (e.g. reference log-probabilities)."""
    pairs, examples = len(batch["input_ids"]) // 2, []
    ids = batch["input_ids"].tolist()
    # 1-D tensors in the batch hold one value per pair.
    columns = {name: values.tolist() for name, values in batch.items() if getattr(values, "ndim", 0) == 1}
    # Tokens of each row without padding, and of its answer: shape (2 × pairs,) each.
    sizes, answers = batch["attention_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()
    for k in range(pairs):
        prompt = sizes[k] - answers[k]
        example = {
            "prompt_ids": ids[k][:prompt],
            "chosen_ids": ids[k][prompt : sizes[k]],
            "rejected_ids": ids[pairs + k][prompt : sizes[pairs + k]],
        }
        examples.append(example | {name: values[k] for name, values in columns.items()})
    return examples


def unsupported_reason(model, aux_loss: bool = False) -> str | None:
    """Why this model's pairs cannot be packed, or None if they can.

    Args:
        aux_loss: whether the model trains a mixture-of-experts router.
    """
    config = without_adapter_shell(model).config
    if aux_loss:
        return "the router's auxiliary loss is computed over all tokens of the padded batch"
    if config.model_type not in KNOWN:
        return f"shared prompts are not tested with the attention of {config.model_type}"
    if getattr(config, "rope_parameters", None) and "dynamic" in str(config.rope_parameters):
        return "its rotary embedding depends on the length of the row"
    if any(getattr(peft, "is_prompt_learning", False) for peft in getattr(model, "peft_config", {}).values()):
        return "prompt-learning adapters prepend virtual tokens"
    return None


# ----------------------------------------------------------------------------------------------------------- attention


class Layout:
    """A packed row, as the attention of every layer reads it.

    An object, since a compiled layer would be compiled again for every new tuple of lengths.

    Attributes:
        lengths: (prompt, *answers) of each pair or list.
        masks: on a GPU, FlexAttention's block masks: {sliding window or None: mask}; on a CPU empty.
    """

    def __init__(self, lengths: tuple, masks: dict):
        self.lengths, self.masks = lengths, masks


def attach(model) -> None:
    """Make `model` compute batches with a packed layout packed; other batches are computed as before.

    A second call has no effect.

    Args:
        model: a transformers model, with or without an adapter.
    """
    backbone = without_adapter_shell(model).base_model
    if getattr(backbone, "_packs_pairs", False):
        return
    # The layers read the name of their attention from this config at every call.
    register(backbone.config)
    original = backbone.forward

    @functools.wraps(original)
    def forward(*args, packed_ids=None, packed_positions=None, packed_lengths=None, unpack=None, **kwargs):
        if packed_ids is None:
            return original(*args, **kwargs)
        tokens = packed_ids.shape[1]
        missing = -tokens % getattr(backbone, "row_multiple", 1)
        if missing:
            # One more sequence, whose hidden states are not read.
            packed_ids = pad(packed_ids, (0, missing))
            positions = torch.arange(missing, device=packed_ids.device)[None]
            packed_positions = torch.cat([packed_positions, positions], dim=1)
            packed_lengths = (*packed_lengths, (missing, 0))
        # transformers passes a 4-D mask on unchanged; the attention below uses only the layout.
        no_mask = torch.zeros((1, 1, 1, 1), device=packed_ids.device)
        kwargs |= {"input_ids": packed_ids, "position_ids": packed_positions, "attention_mask": no_mask}
        layout = Layout(packed_lengths, _block_masks(backbone.config, packed_lengths, packed_ids))
        output = original(**kwargs, layout=layout)
        # (1, tokens, hidden) -> (rows of the padded batch, length, hidden), or the packed row itself
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden[:, :tokens] if unpack is None else hidden[0][unpack]
        return output

    backbone.forward = forward
    backbone._packs_pairs = True


def attach_if_known(model) -> bool:
    """`attach` if this model's pairs can be packed. Returns whether they can."""
    supported = unsupported_reason(model) is None
    if supported:
        attach(model)
    return supported


def register(config) -> None:
    """Register packed attention and set it in `config`; calls without a packed layout use the configured attention."""
    configured = config._attn_implementation
    name = f"packed_{configured}"
    AttentionInterface.register(name, functools.partial(_attention, configured))
    # Ordinary calls get the mask of the configured attention, which is looked up by the same name.
    if configured in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[configured])
    config._attn_implementation = name


def _attention(configured, module, query, key, value, attention_mask, layout: Layout | None = None, **kwargs):
    """transformers' attention interface, for packed rows.

    Args:
        configured: name of the attention for other calls.
        query: (1, heads, tokens, dim); key, value: (1, key heads, tokens, dim).
        layout: None for an ordinary call.

    Returns:
        (output, None), output of shape (1, tokens, heads, dim).
    """
    if layout is None:
        return _attention_function(configured, module)(module, query, key, value, attention_mask, **kwargs)
    # Query and key already have their rotary embeddings, from packed_positions.
    settings = {name: kwargs.get(name) for name in ("scaling", "softcap", "sliding_window")}
    if settings["scaling"] is None:
        settings["scaling"] = query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        return _flex(query, key, value, layout.masks, **settings), None
    settings["dropout"] = kwargs.get("dropout", 0.0)
    # One split instead of a slice per pair: the backward of every slice would allocate a full row of zeros.
    sizes = [size for prompt, first, *others in layout.lengths for size in (prompt + first, *others)]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    parts = []
    for prompt, *answers in layout.lengths:
        # Prompt and first answer are an ordinary causal sequence; every other answer attends to prompt and itself.
        first = len(parts)
        parts.append(causal_attention(queries[first], keys[first], values[first], **settings))
        for other in range(first + 1, first + len(answers)):
            visible = [torch.cat([x[first][:, :, :prompt], x[other]], dim=2) for x in (keys, values)]
            parts.append(causal_attention(queries[other], *visible, **settings))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attention_function(name: str, module):
    """transformers' attention of that name; each model file has its own eager attention."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def causal_attention(query, key, value, scaling, softcap, sliding_window, dropout):
    """Causal attention of the last `queries` positions of a sequence over all its keys.

    Shapes: query (1, heads, queries, dim), key and value (1, key heads, keys, dim); returns the shape of query.
    """
    queries, keys = query.shape[2], key.shape[2]
    windowed = sliding_window is not None and keys > sliding_window
    if not windowed and softcap is None and cpu_attention.fits(query, dropout):
        return cpu_attention.CausalAttention.apply(query, key, value, scaling)
    # Grouped-query attention: repeat each key head for its query heads.
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if queries == keys and not windowed and softcap is None:
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    # Query i is at position keys - queries + i: distance (queries, keys) is how far back a key is.
    # Prompt and answer are contiguous, so a distance between columns is a distance in position.
    positions = torch.arange(keys, device=query.device)
    distance = positions[keys - queries :, None] - positions
    allowed = distance >= 0
    if windowed:
        allowed &= distance < sliding_window
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scaling)
    # Gemma 2's softcap, which scaled_dot_product_attention does not have.
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    # Softmax in float32, as in transformers' eager attention.
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.dropout(weights, dropout, dropout > 0) @ value


# ----------------------------------------------------------------------------------------------------------------- GPU


def mask_rule(packed_lengths, device, sliding_window: int | None = None):
    """FlexAttention's mask function for a packed row: whether query token q may attend to key token k.

    A token attends to earlier positions of its own pair, in the prompt or in its own part.
    """
    # Per token: index of its pair or list; 0 in the prompt, k in answer k (1 chosen, 2 rejected); position.
    pair, part, position = [], [], []
    for k, (prompt, *answers) in enumerate(packed_lengths):
        pair += [k] * (prompt + sum(answers))
        part += [0] * prompt
        position += range(prompt)
        for number, answer in enumerate(answers, 1):
            part += [number] * answer
            position += range(prompt, prompt + answer)
    pair, part, position = (torch.tensor(x, device=device) for x in (pair, part, position))

    def rule(batch, head, q, k):
        allowed = (pair[q] == pair[k]) & (position[q] >= position[k]) & ((part[k] == 0) | (part[k] == part[q]))
        if sliding_window is not None:
            allowed = allowed & (position[q] - position[k] < sliding_window)
        return allowed

    return rule


def _block_masks(config, packed_lengths, packed_ids) -> dict:
    """On a GPU, FlexAttention's block masks of a row, computed once for all layers: {sliding window or None: mask}."""
    if packed_ids.device.type != "cuda":
        return {}
    # Gemma 2 and 3 have layers with a sliding window and layers without.
    windows = {None, getattr(config, "sliding_window", None)}
    return {w: _block_mask(packed_lengths, packed_ids.device, w) for w in windows}


# Policy and reference compute the same rows one after the other, so the last masks are reused.
@functools.lru_cache(maxsize=4)
def _block_mask(packed_lengths, device, window: int | None):
    tokens = sum(map(sum, packed_lengths))
    return create_block_mask(mask_rule(packed_lengths, device, window), None, None, tokens, tokens, device=device)


@functools.cache
def _compiled_flex():
    # Each combination of gradients, window and precision is compiled separately; beyond the limit, dynamo falls back to
    # the uncompiled function.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=4)
def _softcaps(softcap: float, heads: int, device):
    # A Python number would become a CPU scalar in a kernel compiled for dynamic shapes, which the GPU cannot read.
    return torch.full((heads,), softcap, device=device)


def _flex(query, key, value, masks, scaling, softcap, sliding_window):
    """FlexAttention of a packed row; shapes as in `_attention`, returns (1, tokens, heads, dim)."""
    caps = None if softcap is None else _softcaps(softcap, query.shape[1], query.device)

    def capped(score, batch, head, q, k):
        return caps[head] * torch.tanh(score / caps[head])

    output = _compiled_flex()(
        query, key, value, score_mod=capped if softcap is not None else None, block_mask=masks[sliding_window],
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        # Rows below 128 tokens would use the decoding kernel, which is recompiled for every length.
        kernel_options={"BACKEND": "TRITON"},
    )  # fmt: skip
    return output.transpose(1, 2)
