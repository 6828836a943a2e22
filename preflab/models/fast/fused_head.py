"""Faster output layer on a CPU: log-probabilities of target tokens in one pass over the vocabulary.

Speed: TRL has a Triton kernel for GPUs. Its CPU fallback passes over tiles of hundreds of megabytes a dozen
times, and its backward computes all logits again. Here a tile fits into the CPU's cache. If the output layer is
frozen, the gradient is computed in the forward pass: d log p(y) / dh = sum over v != y of p(v) (W[y] - W[v]), a
softmax-weighted mean, accumulated as in attention (running normaliser: Milakov & Gimelshein 2018, arXiv 1805.02867).

Results: equal to TRL's and to float64 autograd up to rounding. With 16-bit weights, logits are float32; rounded to 16
bits they would be off by up to 0.06, the largest error of a 16-bit log-probability.

Switch: there is no flag; without the call of `install`, TRL's fallback is used. On a GPU, TRL's kernel always is.
"""

import math

import torch
import trl.trainer.utils

# Size of a tile of logits: token positions and vocabulary entries.
# A tile has at most 2048 x 2048 float32 values, 16 MiB.
TOKENS, VOCABULARY = 2048, 2048
# Further results that TRL asks for, in the order in which TRL expects them.
EXTRA = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TargetLogps(torch.autograd.Function):
    """Log-probability of each target under softmax(transform(hidden @ weight.T + bias)), float32, in nats.

    transform(x) = softcap * tanh(scale * x / softcap) / temperature, or scale * x / temperature without a softcap.

    `extra` names further results, without gradients: "entropy" of the distribution in nats, "log_sum_sq_probs",
    "mean_logits", and "is_top1", whether the target is the first of the most likely tokens.

    Shapes: hidden (tokens, width), weight (vocabulary, width), bias (vocabulary,) or None, targets (tokens,). Every
    result is (tokens,), or None if not requested.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, scale, extra):
        # An unused result then has the gradient None instead of zeros, which the backward skips.
        ctx.set_materialize_grads(False)
        kind = hidden.device.type
        # The precision in which the model's own output layer would compute: autocast's, or that of its inputs.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        # Inputs are rounded to the layer's precision, as in the model's own head, and multiplied in float32.
        layer = _Layer(weight, bias, dtype, temperature, softcap, scale)
        # If only `hidden` needs a gradient, d log p / d hidden is accumulated now; a trained layer needs all logits
        # again in the backward.
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        slope = torch.zeros(hidden.shape, dtype=torch.float32) if frozen else None
        parts = [
            _forward(layer, hidden[cut].to(dtype).float(), targets[cut], extra, None if slope is None else slope[cut])
            for cut in _cuts(len(hidden))
        ]
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
        log_z, results = columns[0], tuple(columns[1:])
        # With the slope, (tokens, width), the backward needs neither logits nor weights.
        ctx.save_for_backward(slope, *((hidden, weight, bias, targets, log_z) if slope is None else ()))
        ctx.settings, ctx.dtype = (dtype, temperature, softcap, scale), hidden.dtype
        # The first result is the log-probability, the only one with a gradient.
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        return results

    @staticmethod
    def backward(ctx, grad, *_):
        slope, *saved = ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        grad = grad.float()[:, None]  # (tokens, 1)
        if slope is not None:
            return ((grad * slope).to(ctx.dtype), *(None,) * 7)
        hidden, weight, bias, targets, log_z = saved
        layer = _Layer(weight, bias, *ctx.settings)
        # Summed in float32 over the tiles, and rounded to the inputs' precision once, at the end.
        to_hidden = torch.zeros(hidden.shape, dtype=torch.float32)
        to_weight = torch.zeros(weight.shape, dtype=torch.float32)
        to_bias = torch.zeros(len(weight), dtype=torch.float32)
        for cut in _cuts(len(hidden)):
            inputs = hidden[cut].to(layer.dtype).float()
            for start, rows, z, curve in layer.tiles(inputs, slopes=True):
                tokens, column = _in_tile(targets[cut], start, len(rows))
                # d log p(y) / d logit(v) = [v = y] - p(v), times the incoming gradient.
                part = z.sub_(log_z[cut][:, None]).exp_().mul_(-grad[cut])
                part[tokens, column] += grad[cut][tokens, 0]
                # Chain rule through the logits' transform: the softcap's derivative, the scale and the temperature.
                part = (part if curve is None else part.mul_(curve)).mul_(layer.scale / layer.temperature)
                to_hidden[cut].addmm_(part, rows.float())
                to_weight[start : start + len(rows)].addmm_(part.t(), inputs)
                to_bias[start : start + len(rows)] += part.sum(0)
        to_bias = None if bias is None else to_bias.to(bias.dtype)
        return (to_hidden.to(ctx.dtype), to_weight.to(weight.dtype), to_bias, *(None,) * 5)


class _Layer:
    """The output layer: weight (vocabulary, width) and bias, rounded to `dtype`, and the transform of its logits."""

    def __init__(self, weight, bias, dtype, temperature, softcap, scale):
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.temperature, self.softcap, self.scale = temperature, softcap, scale

    def tiles(self, hidden, slopes: bool):
        """Compute the logits tile by tile of the vocabulary.

        All tiles use the same buffer: allocating memory costs more than the arithmetic.

        Args:
            hidden: (tokens, width), float32.
            slopes: whether to return the softcap's derivative.

        Yields:
            (start, rows, logits, slope): first vocabulary entry, its weight rows (tile, width), logits (tokens, tile),
            and the softcap's derivative (tokens, tile) or None.
        """
        buffer = torch.empty(len(hidden), min(VOCABULARY, len(self.weight)))
        for start in range(0, len(self.weight), VOCABULARY):
            rows = self.weight[start : start + VOCABULARY].to(self.dtype)
            # In float32 under autocast too, which does not apply to calls with out=.
            z = torch.mm(hidden, rows.float().t(), out=buffer[:, : len(rows)])
            if self.bias is not None:
                z = z.add_(self.bias[start : start + VOCABULARY].to(self.dtype))
            z, curve = z.mul_(self.scale) if self.scale != 1 else z, None
            if self.softcap is not None:
                z = z.div_(self.softcap).tanh_()
                # d tanh(x) / dx = 1 - tanh(x)^2
                curve = torch.addcmul(torch.ones(()), z, z, value=-1) if slopes else None
                z = z.mul_(self.softcap)
            yield start, rows, z.div_(self.temperature) if self.temperature != 1 else z, curve


def _cuts(tokens: int) -> list[slice]:
    """Slices of at most TOKENS positions; one empty slice for no tokens, so that results have a shape."""
    return [slice(start, start + TOKENS) for start in range(0, max(1, tokens), TOKENS)]


def _in_tile(targets, start: int, size: int):
    """(positions whose target is in the tile that starts at `start`, the targets' columns in the tile)."""
    tokens = ((targets >= start) & (targets < start + size)).nonzero()[:, 0]
    return tokens, targets[tokens] - start


def _row_products(a, b, buffer):
    """Scalar product of each row of `a` with that of `b`, shape (tokens, 1); a and b are (tokens, tile), as `buffer`.

    torch.linalg.vecdot would round both to 16 bits under autocast.
    """
    return torch.mul(a, b, out=buffer[:, : a.shape[1]]).sum(1, keepdim=True)


def _forward(layer: _Layer, hidden, targets, extra, slope):
    """Online softmax over the tiles of the vocabulary (Milakov & Gimelshein 2018).

    All sums are kept relative to the highest logit so far, and rescaled when a tile has a higher one.

    Args:
        hidden: (tokens, width), float32.
        slope: (tokens, width) zeros, filled with d log p(target) / d hidden, or None.

    Returns:
        (log of the normaliser, log-probability of the target, *EXTRA), each (tokens,) or None if not requested.
    """
    # Columns of shape (tokens, 1), so that they broadcast over a tile of shape (tokens, tile).
    n, vocabulary = len(hidden), len(layer.weight)
    highest, target, at_target = torch.full((n, 1), -math.inf), torch.empty(n, 1), torch.ones(n, 1)
    # Sums over v of e^z (without the target), e^z z and e^2z, all times e^-highest; and the sum of z.
    others, weighted, squares, total = (torch.zeros(n, 1) for _ in range(4))
    first = torch.zeros(n, dtype=torch.bool)
    spare = torch.empty(n, min(VOCABULARY, vocabulary))
    product = torch.empty_like(spare) if {"entropy", "log_sum_sq_probs"} & set(extra) else None
    for start, rows, z, curve in layer.tiles(hidden, slopes=slope is not None):
        tokens, column = _in_tile(targets, start, len(rows))
        before, highest = highest, torch.maximum(highest, z.amax(1, keepdim=True))
        target[tokens, 0] = z[tokens, column]
        if "is_top1" in extra:
            # argmax takes the first of equal logits in this tile; earlier tiles must be lower, later ones may be equal
            # (see the result below).
            first[tokens] = (z[tokens].argmax(1) == column) & (target[tokens, 0] > before[tokens, 0])
        if "mean_logits" in extra:
            total += z.sum(1, keepdim=True)
        # Moves the sums from the previous maximum to the new one; exp(-inf) = 0 in the first tile, where they are 0.
        rescale = torch.exp(before - highest)
        e = torch.sub(z, highest, out=spare[:, : len(rows)]).exp_()  # (tokens, tile)
        # These two sums include the target, so they come before its entry is set to 0.
        if "entropy" in extra:
            weighted.mul_(rescale).add_(_row_products(e, z, product))
        if "log_sum_sq_probs" in extra:
            # e^2z is relative to twice the maximum, so its factor is squared.
            squares.mul_(rescale.square()).add_(_row_products(e, e, product))
        # The target is summed separately: W[y] - p(y) W[y] would cancel catastrophically for a likely target.
        e[tokens, column] = 0
        others.mul_(rescale).add_(e.sum(1, keepdim=True))
        if slope is not None:
            if curve is not None:
                at_target[tokens, 0] = curve[tokens, column]
                e = e.mul_(curve)
            slope.mul_(rescale)
            # In 16 bits the product of each tile is rounded once, and the tiles are summed in float32.
            slope.addmm_(e, rows) if rows.dtype == torch.float32 else slope.add_(e.to(rows.dtype) @ rows)
    sums = others + torch.exp(target - highest)  # the normaliser times e^-highest
    log_z = highest + torch.log(sums)
    if slope is not None:
        # sum over v != y of p(v) (W[y] - W[v]): the accumulated -sum p(v) W[v], plus W[y] times the others' mass.
        own = layer.weight[targets].to(layer.dtype).float().mul_(others * at_target)
        slope.neg_().add_(own).mul_(layer.scale / layer.temperature / sums)
    return (
        log_z[:, 0],
        (target - log_z)[:, 0],
        # H = log Z - E[z]
        (log_z - weighted / sums)[:, 0] if "entropy" in extra else None,
        # log sum p^2 = log sum e^2z - 2 log sum e^z; the maximum cancels.
        (torch.log(squares) - 2 * torch.log(sums))[:, 0] if "log_sum_sq_probs" in extra else None,
        total[:, 0] / vocabulary if "mean_logits" in extra else None,
        first & (target >= highest)[:, 0] if "is_top1" in extra else None,
    )


class _Head:
    """Replaces TRL's kernel in its trainers: this module's on a CPU, TRL's on other devices."""

    def __init__(self, trl_head):
        self.trl_head = trl_head

    def apply(self, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0, outputs=EXTRA):
        """TRL's signature; `chunk_size` is not used on a CPU."""
        # On a GPU this is TRL's Triton kernel.
        if hidden.device.type != "cpu":
            return self.trl_head.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )  # fmt: skip
        return TargetLogps.apply(hidden, weight, bias, targets, temperature, softcap, scale, tuple(outputs))


def install() -> None:
    """Make TRL's fused LM head use this module on a CPU, at response positions only. A second call has no effect.

    Without Triton, TRL computes all positions, for compilers that need fixed shapes (Neuron). On a CPU, skipping the
    prompt positions saves time and changes no other position's value.
    """
    if not isinstance(trl.trainer.utils._ChunkedLogProbFunction, _Head):
        # In this module of TRL the function decides only whether positions with label -100 are skipped.
        trl.trainer.utils._use_triton = lambda device: device.type != "neuron"
        trl.trainer.utils._ChunkedLogProbFunction = _Head(trl.trainer.utils._ChunkedLogProbFunction)
