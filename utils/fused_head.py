"""The output layer of a language model and the log-probability of each target token, in one pass over the vocabulary.

TRL's own kernel does this under Triton. On a CPU its fallback goes over tiles of hundreds of megabytes a dozen times,
and the backward computes all logits again. Here a tile stays in the processor's cache, and the gradient with respect
to the hidden state comes with the forward: d log p(y) / dh = W[y] - sum_v p(v) W[v] is a running softmax-weighted mean,
as in attention (Milakov & Gimelshein 2018, arXiv 1805.02867, for the running normaliser).
"""

import math

import torch

TOKENS, VOCABULARY = 2048, 2048


class TargetLogps(torch.autograd.Function):
    """Log-probability of each target under softmax(transform(hidden @ weight.T + bias)), float32, in nats.

    transform(x) = softcap * tanh(scale * x / softcap) / temperature; without a softcap scale * x / temperature. `also`
    names what else is wanted, without gradients: "entropy" of the distribution in nats, "log_sum_sq_probs",
    "mean_logits", and "is_top1", whether the target is the first of the likeliest tokens.

    Shapes: hidden (tokens, width), weight (vocabulary, width), bias (vocabulary,) or None, targets (tokens,); every
    result is (tokens,), None where not asked for. Only `hidden` gets a gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, scale, also):
        ctx.set_materialize_grads(False)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        slope = torch.zeros(hidden.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        parts = [
            _forward(
                hidden[start : start + TOKENS].to(dtype).float(), weight, bias, targets[start : start + TOKENS], temperature,
                softcap, scale, also, dtype, None if slope is None else slope[start : start + TOKENS],
            )
            for start in range(0, len(hidden), TOKENS)
        ] or [tuple(torch.zeros(0) if k in (0, *_places(also)) else None for k in range(5))]  # fmt: skip
        found = tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(slope)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        return found

    @staticmethod
    def backward(ctx, grad, *_):
        (slope,) = ctx.saved_tensors
        if slope is None or grad is None:
            return (None,) * 8
        return ((grad.float()[:, None] * slope).to(ctx.dtype), *(None,) * 7)


ALSO = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _places(also) -> list[int]:
    return [1 + k for k, name in enumerate(ALSO) if name in also]


def _forward(hidden, weight, bias, targets, temperature, softcap, scale, also, dtype, slope):
    n, vocabulary = len(hidden), len(weight)
    highest, sums, target = torch.full((n, 1), -math.inf), torch.zeros(n, 1), torch.empty(n, 1)
    total, weighted, squares = torch.zeros(n), torch.zeros(n, 1), torch.zeros(n, 1)
    first = torch.zeros(n, dtype=torch.bool)
    at_target = torch.ones(n, 1)
    # Fresh memory costs more than the arithmetic on it: every tile goes through the same two buffers.
    tile = (n, min(VOCABULARY, vocabulary))
    logits, spare = torch.empty(tile), torch.empty(tile)
    for start in range(0, vocabulary, VOCABULARY):
        rows = weight[start : start + VOCABULARY].to(dtype)
        # A logit rounded to 16 bits is wrong by up to 0.06: the largest error of a 16-bit log-probability.
        z = torch.mm(hidden, rows.float().t(), out=logits[:, : len(rows)])
        if bias is not None:
            z = z.add_(bias[start : start + VOCABULARY].to(dtype))
        z, curve = _transform(z, temperature, softcap, scale, slope is not None)
        before, highest = highest, torch.maximum(highest, z.amax(1, keepdim=True))
        here = ((targets >= start) & (targets < start + len(rows))).nonzero()[:, 0]
        column = targets[here] - start
        target[here, 0] = z[here, column]
        if curve is not None:
            at_target[here, 0] = curve[here, column]
        if "is_top1" in also:
            first[here] = (z[here].argmax(1) == column) & (target[here, 0] > before[here, 0])
        rescale = torch.exp(before - highest)
        if "mean_logits" in also:
            total += z.sum(1)
        e = torch.sub(z, highest, out=spare[:, : len(rows)]).exp_()
        sums.mul_(rescale).add_(e.sum(1, keepdim=True))
        if "entropy" in also:
            weighted.mul_(rescale).add_(torch.linalg.vecdot(e, z)[:, None])
        if "log_sum_sq_probs" in also:
            squares.mul_(rescale * rescale).add_(torch.linalg.vecdot(e, e)[:, None])
        if slope is not None:
            slope.mul_(rescale)
            e = e if curve is None else e.mul_(curve)
            # In 16 bits the products are summed tile by tile in float32.
            slope.addmm_(e, rows) if rows.dtype == torch.float32 else slope.add_(e.to(rows.dtype) @ rows)
    log_z = highest + torch.log(sums)
    if slope is not None:
        slope.div_(-sums).add_(weight[targets].to(dtype).float() * at_target).mul_(scale / temperature)
    return (
        (target - log_z)[:, 0],
        (log_z - weighted / sums)[:, 0] if "entropy" in also else None,
        (torch.log(squares) - 2 * torch.log(sums))[:, 0] if "log_sum_sq_probs" in also else None,
        total / vocabulary if "mean_logits" in also else None,
        first & (target >= highest)[:, 0] if "is_top1" in also else None,
    )


def _transform(z, temperature: float, softcap: float | None, scale: float, slopes: bool):
    """(logits, their derivative by the capped value where that is not 1). Changes `z`."""
    if scale != 1:
        z = z.mul_(scale)
    if softcap is None:
        return (z.div_(temperature) if temperature != 1 else z), None
    t = z.div_(softcap).tanh_()
    curve = torch.addcmul(torch.ones(()), t, t, value=-1) if slopes else None
    return t.mul_(softcap / temperature), curve


class _Head:
    """What stands where TRL's trainers call their kernel: ours on a CPU, theirs elsewhere."""

    def __init__(self, theirs):
        self.theirs = theirs

    def apply(self, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0, outputs=ALSO):
        trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        if hidden.device.type != "cpu" or trained:
            return self.theirs.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )  # fmt: skip
        return TargetLogps.apply(hidden, weight, bias, targets, temperature, softcap, scale, tuple(outputs))


def install() -> None:
    """Let TRL's fused LM head compute with this module on a CPU, at response positions alone, once.

    TRL keeps all positions off Triton for the sake of compilers that need fixed shapes (Neuron); on a CPU the skipped
    half of the vocabulary-wide work is free speed, and no position's value changes.
    """
    import trl.trainer.utils as theirs

    if not isinstance(theirs._ChunkedLogProbFunction, _Head):
        theirs._use_triton = lambda device: device.type != "neuron"
        theirs._ChunkedLogProbFunction = _Head(theirs._ChunkedLogProbFunction)
