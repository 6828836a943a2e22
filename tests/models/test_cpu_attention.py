"""The backward of attention over blocks of queries, against float64 and PyTorch's."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from preflab.models.fast import cpu_attention
from preflab.models.fast.cpu_attention import CausalAttention, fits

# (queries, keys): a sequence, an answer behind a prompt, a single token; with blocks of 16 queries.
SIZES = [(40, 40), (16, 16), (21, 70), (1, 30), (1, 1)]


def problem(queries: int, keys: int, heads=6, key_heads=2, dim=8, seed=0):
    """Query, key, value and the gradient of the output, float32, with the memory layout of transformers' layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads))
    return [torch.randn(1, n, h, dim, generator=generator).transpose(1, 2) for n, h in shapes]


def by_pytorch(query, key, value, gradient, scaling):
    """Output and gradients of query, key and value, by PyTorch's attention with an explicit mask."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    queries, keys, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    k, v = (x.repeat_interleave(group, dim=1) for x in leaves[1:])
    output = scaled_dot_product_attention(leaves[0], k, v, attn_mask=mask, scale=scaling)
    return output.detach(), *torch.autograd.grad(output, leaves, gradient)


def by_blocks(query, key, value, gradient, scaling):
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output = CausalAttention.apply(*leaves, scaling)
    return output.detach(), *torch.autograd.grad(output, leaves, gradient)


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_error_is_near_that_of_pytorch(queries, keys, key_heads, spread, monkeypatch):
    """Against float64 on the same bfloat16 inputs; with the larger spread, scores that 16 bits round by up to 0.06."""
    monkeypatch.setattr(cpu_attention, "QUERIES", 16)
    tensors = problem(queries, keys, key_heads=key_heads)
    tensors = [(spread * x).bfloat16() for x in tensors[:2]] + [x.bfloat16() for x in tensors[2:]]
    exact = by_pytorch(*(x.double() for x in tensors), scaling=0.5)

    def errors(results):
        assert all(x.dtype == torch.bfloat16 and x.shape == y.shape for x, y in zip(results, exact, strict=True))
        # A single token's query and key have no gradient, so that the error is relative to at least 0.1 per element.
        sizes = [max(y.norm().item(), 0.1 * y.numel() ** 0.5) for y in exact]
        return [(x.double() - y).norm().item() / size for x, y, size in zip(results, exact, sizes, strict=True)]

    own, stock = errors(by_blocks(*tensors, scaling=0.5)), errors(by_pytorch(*tensors, scaling=0.5))
    # The output is PyTorch's. Gradients: bfloat16 has 8 bits, so that one rounding is an error of up to 0.004.
    assert own[0] == stock[0]
    for mine, theirs in zip(own[1:], stock[1:], strict=True):
        assert mine <= 2 * theirs + 0.004


def test_centre_keeps_sixteen_bits():
    centre = torch.linspace(-300, 300, 101)[:, None]
    columns = cpu_attention.with_centre(torch.zeros(101, 3, dtype=torch.bfloat16), centre).double()
    assert columns.shape == (101, 5)
    assert ((columns.sum(1, keepdim=True) + centre).abs() <= centre.abs() * 2**-16).all()


def test_what_it_computes():
    query = problem(4, 4)[0].requires_grad_()
    assert fits(query.bfloat16(), 0.0)
    assert not fits(query, 0.0) and not fits(query.bfloat16(), 0.1) and not fits(query.bfloat16().detach(), 0.0)
