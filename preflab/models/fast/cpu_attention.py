"""Faster backward of causal attention on a CPU in bfloat16: products over blocks of queries, batched over key heads.

Speed: PyTorch's kernel for CPUs computes the backward as many small products in float32. Here a block of queries of all
heads that share their keys is one batched bfloat16 product, and keys behind the block are left out. The forward is
PyTorch's.

Results: PyTorch's up to bfloat16 rounding. Scores and gradients of the weights are computed as differences from their
centre, a column of each product: they are rounded to bfloat16 after the difference, so the rounding is relative to the
distance from the centre and not to the score. Softmax and sums over blocks are float32.

Switch: no flag; `shared_prompt` uses it where `fits` says so.
"""

import math

import torch

# Queries per block. Smaller blocks leave out more keys behind the block, larger ones make fewer calls.
QUERIES = 128


def fits(query, dropout: float) -> bool:
    """Whether this module computes the attention of these queries: in bfloat16, on a CPU, with gradients."""
    kernel = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    bfloat16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return kernel and bfloat16 and query.requires_grad and not dropout


class CausalAttention(torch.autograd.Function):
    """Causal attention of the last `queries` positions of a sequence over all its keys.

    Shapes: query (1, heads, queries, dim); key and value (1, key heads, keys, dim), keys >= queries; `scaling` is a
    number. The result has the shape of `query`.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        group, (queries, keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
        mask = None
        if queries < keys:
            # Added to the scores; the kernel takes the queries' precision only.
            mask = query.new_zeros(queries, keys).masked_fill_(~visible(queries, keys), -math.inf)
        output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1),
            is_causal=mask is None, attn_mask=mask, scale=scaling,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, output, normaliser)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, normaliser = ctx.saved_tensors
        (_, heads, queries, dim), (key_heads, keys) = query.shape, key.shape[1:3]
        shape = (key_heads, heads // key_heads, queries)
        # Dao et al. 2022, arXiv 2205.14135, B.4: the softmax's derivative subtracts the mean gradient of the weights.
        mean = (gradient.float() * output.float()).sum(-1)
        # A weight is exp(scaling x score - normaliser); scores are centred between their maximum and their mean.
        seen = torch.arange(keys - queries + 1, keys + 1, dtype=torch.float32)
        centre = normaliser - 0.5 * seen.log()
        rows = with_centre(query.reshape(*shape, dim), centre.view(*shape, 1) / ctx.scaling)
        slopes = with_centre(gradient.reshape(*shape, dim), mean.view(*shape, 1))
        ones = key.new_ones(key_heads, keys, 2)
        key, value = (torch.cat([x[0], ones], dim=2).transpose(1, 2).contiguous() for x in (key, value))
        own_key = key[:, :dim].transpose(1, 2)
        remainder = (centre - normaliser).view(*shape, 1)
        to_query = torch.empty(*shape, dim, dtype=query.dtype)
        to_key, to_value = torch.zeros(2, key_heads, keys, dim)
        for start in range(0, queries, QUERIES):
            end = min(start + QUERIES, queries)
            last = keys - queries + end
            block_rows, block_slopes = (x[:, :, start:end].flatten(1, 2) for x in (rows, slopes))
            weights = (block_rows @ key[:, :, :last]).float().mul_(ctx.scaling)
            weights = weights.add_(remainder[:, :, start:end].flatten(1, 2)).exp_()
            # Keys behind a query; those before the block are visible to all of its queries.
            weights.unflatten(1, (-1, end - start))[..., start - end :].mul_(visible(end - start, end - start))
            slope = (block_slopes @ value[:, :, :last]).float().mul_(weights).mul_(ctx.scaling).to(query.dtype)
            to_value[:, :last] += weights.to(query.dtype).transpose(1, 2) @ block_slopes[..., :dim]
            to_query[:, :, start:end] = (slope @ own_key[:, :last]).unflatten(1, (-1, end - start))
            to_key[:, :last] += slope.transpose(1, 2) @ block_rows[..., :dim]
        return to_query.view(query.shape), to_key.to(query.dtype)[None], to_value.to(query.dtype)[None], None


def visible(queries: int, keys: int):
    """Whether query i, at position keys - queries + i, sees key k. Shape (queries, keys)."""
    return torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)


def with_centre(rows, centre):
    """`rows` with two more columns, minus the centre in two parts of bfloat16, which keep 16 of its bits.

    Shapes: rows (..., dim), centre (..., 1) float32; returns (..., dim + 2).
    """
    high = centre.to(rows.dtype)
    return torch.cat([rows, -high, -(centre - high.float()).to(rows.dtype)], dim=-1)
