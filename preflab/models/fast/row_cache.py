"""Faster generation: rows of different lengths decoded together without padding, in a preallocated key-value cache.

Speed: transformers' batches are padded to the longest prompt, and every new token copies the whole padded cache and
repeats it for grouped-query attention. Here the tokens of a step are one row without padding: the last token of every
answer, then the prompts that join. Each answer has a span of the cache for its longest possible length, and attention
reads the part that is filled.

Results: equal to those of a single row up to rounding; nothing depends on the other rows.

Switch: architectures outside shared_prompt.KNOWN are answered by transformers' `generate` (preflab.models.generation).
"""

from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from preflab.models.fast.shared_prompt import causal_attention, unsupported_reason
from preflab.models.logprobs import without_adapter_shell

NAME = "rows_of_a_step"
# A row joins its neighbours' call if the padding that it brings is below this number of tokens: the cost of a call.
CALL_TOKENS = 128


def supports(model) -> bool:
    """Whether the rows of this model can be decoded without padding."""
    # As in a packed row; with longrope, too, the rotary embedding of all rows depends on the longest.
    rope = str(getattr(without_adapter_shell(model).config, "rope_parameters", None))
    return unsupported_reason(model) is None and "longrope" not in rope


def rounded(tokens: int) -> int:
    """`tokens` rounded up by at most a quarter, so that many rows have spans of equal size."""
    step = max(16, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // step) * step


class Spans:
    """Divides `size` tokens of memory into spans, the lowest free one first."""

    def __init__(self, size: int):
        self.free = [(0, size)]

    def take(self, tokens: int) -> int | None:
        """The start of a new span, None if no free part is large enough."""
        for k, (start, size) in enumerate(self.free):
            if size >= tokens:
                self.free[k : k + 1] = [(start + tokens, size - tokens)] if size > tokens else []
                return start
        return None

    def give_back(self, start: int, tokens: int) -> None:
        """Free a span, and join it with free neighbours."""
        joined = []
        for low, size in sorted([*self.free, (start, tokens)]):
            if joined and sum(joined[-1]) == low:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((low, size))
        self.free = joined


class RowCache:
    """Keys and values of all rows, one tensor of shape (heads, tokens, dim) each per layer.

    It takes the place of transformers' cache: attention layers call `update`.

    Attributes:
        spans: which part belongs to which row.
        write: where the tokens of the current step are stored, shape (tokens,).
    """

    def __init__(self, tokens: int):
        self.tokens, self.spans, self.layers, self.write = tokens, Spans(tokens), {}, None

    def update(self, key, value, layer: int, *_args, **_kwargs):
        """Store the keys and values of a step, shape (1, heads, tokens, dim), and return them."""
        if layer not in self.layers:
            # Allocated at the first step, when shapes and precision are known; on a CPU, zeros that are never written
            # take no memory. Zeros, because masked values are multiplied by 0, and memory may contain NaN.
            self.layers[layer] = [x.new_zeros((x.shape[1], self.tokens, x.shape[3])) for x in (key, value)]
        for stored, new in zip(self.layers[layer], (key, value), strict=True):
            stored.index_copy_(1, self.write, new[0])
        return key, value

    def get_seq_length(self, *_args) -> int:
        """Not meaningful for rows of different lengths; positions are always given."""
        return 0


class Step:
    """The layout of one forward pass: `len(rows)` last tokens, then whole prompts of the given sizes.

    Args:
        rows: (start of the span, tokens stored, the new one included) of every decoded row, by start.
        prompts: (start of the span, tokens) of every prompt.
    """

    def __init__(self, cache: RowCache, rows: list[tuple[int, int]], prompts: list[tuple[int, int]], device):
        self.cache, self.rows, self.prompts, self.device = cache, rows, prompts, device
        # The places of the cache, and the positions, of all tokens of the step.
        write = [start + stored - 1 for start, stored in rows]
        positions = [stored - 1 for _, stored in rows]
        for start, size in prompts:
            write += range(start, start + size)
            positions += range(size)
        cache.write = torch.tensor(write, device=device)
        self.positions = torch.tensor([positions], device=device)
        self.strided, self._groups = strided(device), {}

    def groups(self, window: int | None, dtype) -> list:
        """How the decoded rows are read under a sliding window (None: without), the same in all layers."""
        if window not in self._groups:
            make = _views if self.strided else _gathers
            self._groups[window] = make(self.rows, window, self.cache.tokens, dtype, self.device)
        return self._groups[window]


def strided(device) -> bool:
    """Whether rows are read where they are, in several calls, or copied for few calls, which launch fewer kernels."""
    return device.type == "cpu"


def _mask(filled: list[tuple[int, int]], low: int, width: int, dtype, device):
    """Additive mask of shape (rows, 1, 1, width) for columns low, low + 1, ...; None if every row fills all of them.

    Args:
        filled: first and one past the last visible column of every row.
    """
    if all(first <= low and last >= low + width for first, last in filled):
        return None
    first, last = torch.tensor(filled, device=device).t()[:, :, None]
    columns = torch.arange(low, low + width, device=device)
    hidden = (columns < first) | (columns >= last)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None, None]


def _visible(stored: int, window: int | None) -> tuple[int, int]:
    return (max(0, stored - window) if window else 0), stored


def _views(rows, window, tokens, dtype, device) -> list:
    """Groups of neighbours, read without copying: (slice of rows, start, distance of the spans, width, mask) each.

    Spans of equal size at equal distances are one strided tensor. Rows are grouped while padding is cheaper than
    another call.
    """
    spans, groups, k = [_visible(stored, window) for _, stored in rows], [], 0
    while k < len(rows):
        (low, high), used, distance, end = spans[k], spans[k][1] - spans[k][0], 0, k + 1
        while end < len(rows):
            apart = rows[end][0] - rows[end - 1][0]
            wider = min(low, spans[end][0]), max(high, spans[end][1])
            used += spans[end][1] - spans[end][0]
            padding = (wider[1] - wider[0]) * (end + 1 - k) - used
            # Spans at other distances; too much padding; or columns of the last row beyond the end of the memory.
            if apart <= 0 or distance not in (0, apart) or padding > CALL_TOKENS * (end - k):
                break
            if rows[end][0] + wider[1] > tokens:
                break
            (low, high), distance, end = wider, apart, end + 1
        mask = _mask(spans[k:end], low, high - low, dtype, device)
        groups.append((slice(k, end), rows[k][0] + low, distance, high - low, mask))
        k = end
    return groups


def _gathers(rows, window, tokens, dtype, device) -> list:
    """Groups of similar length, copied together in one call: (indices of rows, places (rows, width), mask) each.

    Few calls matter more on a GPU than copies. A group's padded tokens are at most twice its tokens.
    """
    spans = [_visible(stored, window) for _, stored in rows]
    order = sorted(range(len(rows)), key=lambda k: spans[k][0] - spans[k][1])
    groups, first = [], 0
    while first < len(order):
        width, used, end = spans[order[first]][1] - spans[order[first]][0], 0, first
        while end < len(order):
            used += spans[order[end]][1] - spans[order[end]][0]
            if width * (end + 1 - first) > 2 * used:
                break
            end += 1
        chosen = order[first:end]
        starts = torch.tensor([rows[k][0] + spans[k][0] for k in chosen], device=device)
        sizes = [spans[k][1] - spans[k][0] for k in chosen]
        columns = torch.arange(width, device=device)
        # Columns beyond a row read its last token, and are masked.
        places = starts[:, None] + torch.minimum(columns, torch.tensor(sizes, device=device)[:, None] - 1)
        mask = _mask([(0, size) for size in sizes], 0, width, dtype, device)
        groups.append((torch.tensor(chosen, device=device), places, mask))
        first = end
    return groups


def _attention(module, query, key, value, attention_mask, step: Step | None = None, **kwargs):
    """transformers' attention interface for the tokens of a `Step`.

    Args:
        query: (1, heads, tokens, dim); key, value: (1, key heads, tokens, dim), already in the cache.

    Returns:
        (output, None), output of shape (1, tokens, heads, dim).
    """
    scaling, softcap, window = (kwargs.get(name) for name in ("scaling", "softcap", "sliding_window"))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    n, heads, parts = len(step.rows), key.shape[1], []
    if n:
        # Grouped-query attention: the query heads of a key head take the place of query positions.
        last = query[0, :, :n].unflatten(0, (heads, -1)).permute(2, 0, 1, 3)  # (rows, key heads, group, dim)
        parts.append(_decode(last, *step.cache.layers[module.layer_idx], step, scaling, softcap, window))
    start = n
    for _, size in step.prompts:
        q, k, v = (x[:, :, start : start + size] for x in (query, key, value))
        parts.append(causal_attention(q, k, v, scaling, softcap, window, 0.0)[0].transpose(0, 1))
        start += size
    return torch.cat(parts)[None], None


def _decode(query, keys, values, step: Step, scaling: float, softcap: float | None, window: int | None):
    """Attention of one new token per row over its span: query (rows, key heads, group, dim) to (rows, heads, dim)."""
    out = torch.empty_like(query, dtype=values.dtype, memory_format=torch.contiguous_format)
    for group in step.groups(window, query.dtype):
        if step.strided:
            rows, start, distance, width, mask = group
            shape = (rows.stop - rows.start, keys.shape[0], width)
            k, v = (
                x.as_strided(
                    (*shape, x.shape[2]), (distance * x.shape[2], x.stride(0), x.shape[2], 1), start * x.shape[2]
                )
                for x in (keys, values)
            )
        else:
            rows, places, mask = group
            k, v = (x[:, places].transpose(0, 1) for x in (keys, values))
        q = query[rows]
        if softcap is None:
            out[rows] = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        else:
            scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
            weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32)
            out[rows] = weights.to(q.dtype) @ v
    return out.flatten(1, 2)


AttentionInterface.register(NAME, _attention)


@contextmanager
def attention_of_rows(model):
    """Let the model's layers attend as a `Step` says."""
    # The layers read the name of their attention from this config at every call.
    config = without_adapter_shell(model).base_model.config
    configured, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = configured


def next_logits(model, ids: torch.Tensor, step: Step) -> torch.Tensor:
    """Logits of the token after each row's last token and after each prompt: shape (rows + prompts, vocabulary).

    Args:
        ids: the tokens of the step, shape (tokens,).
    """
    ends, last = list(range(len(step.rows))), len(step.rows)
    for _, size in step.prompts:
        last += size
        ends.append(last - 1)
    base = without_adapter_shell(model)
    # transformers passes a 4-D mask on unchanged; the attention above uses only the step.
    no_mask = torch.zeros((1, 1, 1, 1), device=ids.device)
    with attention_of_rows(model):
        out = base(
            input_ids=ids[None],
            position_ids=step.positions,
            attention_mask=no_mask,
            past_key_values=step.cache,
            use_cache=True,
            logits_to_keep=torch.tensor(ends, device=ids.device),
            step=step,
        )
    return out.logits[0]
