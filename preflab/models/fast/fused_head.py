"""The output layer of a language model and the log-probability of each target token, in one pass over the vocabulary.

TRL's own kernel does this under Triton. On a CPU its fallback goes over tiles of hundreds of megabytes a dozen times,
and the backward computes all logits again. Here a tile stays in the processor's cache, and where the layer itself is
not trained the gradient comes with the forward: d log p(y) / dh = sum over v other than y of p(v) (W[y] - W[v]), a
softmax-weighted mean that runs along as in attention (Milakov & Gimelshein 2018, arXiv 1805.02867, for the running
normaliser). Logits are float32 also for 16-bit weights: rounded to 16 bits they would be wrong by up to 0.06, the
largest error of a 16-bit log-probability.
"""

import math

import torch

TOKENS, VOCABULARY = 2048, 2048
ALSO = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TargetLogps(torch.autograd.Function):
    """Log-probability of each target under softmax(transform(hidden @ weight.T + bias)), float32, in nats.

    transform(x) = softcap * tanh(scale * x / softcap) / temperature; without a softcap scale * x / temperature. `also`
    names what else is wanted, without gradients: "entropy" of the distribution in nats, "log_sum_sq_probs",
    "mean_logits", and "is_top1", whether the target is the first of the likeliest tokens.

    Shapes: hidden (tokens, width), weight (vocabulary, width), bias (vocabulary,) or None, targets (tokens,); every
    result is (tokens,), None where not asked for.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, scale, also):
        ctx.set_materialize_grads(False)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        layer = _Layer(weight, bias, dtype, temperature, softcap, scale)
        # A layer that is trained needs every logit again in the backward; a frozen one only this mean.
        runs_along = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        slope = torch.zeros(hidden.shape, dtype=torch.float32) if runs_along else None
        parts = [
            _forward(layer, hidden[cut].to(dtype).float(), targets[cut], also, None if slope is None else slope[cut])
            for cut in _cuts(len(hidden))
        ]
        found = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
        log_z, found = found[0], tuple(found[1:])
        ctx.save_for_backward(slope, *((hidden, weight, bias, targets, log_z) if slope is None else ()))
        ctx.settings, ctx.dtype = (dtype, temperature, softcap, scale), hidden.dtype
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        return found

    @staticmethod
    def backward(ctx, grad, *_):
        slope, *saved = ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        grad = grad.float()[:, None]
        if slope is not None:
            return ((grad * slope).to(ctx.dtype), *(None,) * 7)
        hidden, weight, bias, targets, log_z = saved
        layer = _Layer(weight, bias, *ctx.settings)
        to_hidden = torch.zeros(hidden.shape, dtype=torch.float32)
        to_weight = torch.zeros(weight.shape, dtype=torch.float32)
        to_bias = torch.zeros(len(weight), dtype=torch.float32)
        for cut in _cuts(len(hidden)):
            inputs = hidden[cut].to(layer.dtype).float()
            for start, rows, z, curve in layer.tiles(inputs, slopes=True):
                here, column = _in_tile(targets[cut], start, len(rows))
                part = z.sub_(log_z[cut][:, None]).exp_().mul_(-grad[cut])
                part[here, column] += grad[cut][here, 0]
                part = (part if curve is None else part.mul_(curve)).mul_(layer.scale / layer.temperature)
                to_hidden[cut].addmm_(part, rows.float())
                to_weight[start : start + len(rows)].addmm_(part.t(), inputs)
                to_bias[start : start + len(rows)] += part.sum(0)
        to_bias = None if bias is None else to_bias.to(bias.dtype)
        return (to_hidden.to(ctx.dtype), to_weight.to(weight.dtype), to_bias, *(None,) * 5)


class _Layer:
    """The output layer: weight (vocabulary, width) and bias as rounded to `dtype`, and what its logits go through."""

    def __init__(self, weight, bias, dtype, temperature, softcap, scale):
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.temperature, self.softcap, self.scale = temperature, softcap, scale

    def tiles(self, hidden, slopes: bool):
        """(start, rows, logits, slope of the softcap or None) of one piece of the vocabulary after the other.

        Fresh memory costs more than the arithmetic on it: the logits of every piece come in the same buffer.
        """
        buffer = torch.empty(len(hidden), min(VOCABULARY, len(self.weight)))
        for start in range(0, len(self.weight), VOCABULARY):
            rows = self.weight[start : start + VOCABULARY].to(self.dtype)
            z = torch.mm(hidden, rows.float().t(), out=buffer[:, : len(rows)])
            if self.bias is not None:
                z = z.add_(self.bias[start : start + VOCABULARY].to(self.dtype))
            z, curve = z.mul_(self.scale) if self.scale != 1 else z, None
            if self.softcap is not None:
                z = z.div_(self.softcap).tanh_()
                curve = torch.addcmul(torch.ones(()), z, z, value=-1) if slopes else None
                z = z.mul_(self.softcap)
            yield start, rows, z.div_(self.temperature) if self.temperature != 1 else z, curve


def _cuts(tokens: int) -> list[slice]:
    return [slice(start, start + TOKENS) for start in range(0, max(1, tokens), TOKENS)]


def _in_tile(targets, start: int, size: int):
    """(rows whose target lies in the piece of the vocabulary from `start`, where in the piece it lies)."""
    here = ((targets >= start) & (targets < start + size)).nonzero()[:, 0]
    return here, targets[here] - start


def _forward(layer: _Layer, hidden, targets, also, slope):
    """(log of the normaliser, log-probability, what `also` names), each (tokens,); fills `slope` where it is given."""
    n, vocabulary = len(hidden), len(layer.weight)
    highest, target, at_target = torch.full((n, 1), -math.inf), torch.empty(n, 1), torch.ones(n, 1)
    others, weighted, squares, total = (torch.zeros(n, 1) for _ in range(4))
    first = torch.zeros(n, dtype=torch.bool)
    spare = torch.empty(n, min(VOCABULARY, vocabulary))
    for start, rows, z, curve in layer.tiles(hidden, slopes=slope is not None):
        here, column = _in_tile(targets, start, len(rows))
        before, highest = highest, torch.maximum(highest, z.amax(1, keepdim=True))
        target[here, 0] = z[here, column]
        if "is_top1" in also:
            first[here] = (z[here].argmax(1) == column) & (target[here, 0] > before[here, 0])
        if "mean_logits" in also:
            total += z.sum(1, keepdim=True)
        rescale = torch.exp(before - highest)
        e = torch.sub(z, highest, out=spare[:, : len(rows)]).exp_()
        if "entropy" in also:
            weighted.mul_(rescale).add_(torch.linalg.vecdot(e, z)[:, None])
        if "log_sum_sq_probs" in also:
            squares.mul_(rescale.square()).add_(torch.linalg.vecdot(e, e)[:, None])
        # The target is summed apart: W[y] less its own share of the mean would cancel where it is likely.
        e[here, column] = 0
        others.mul_(rescale).add_(e.sum(1, keepdim=True))
        if slope is not None:
            if curve is not None:
                at_target[here, 0] = curve[here, column]
                e = e.mul_(curve)
            slope.mul_(rescale)
            # In 16 bits each piece's product is rounded once, and the pieces are summed in float32.
            slope.addmm_(e, rows) if rows.dtype == torch.float32 else slope.add_(e.to(rows.dtype) @ rows)
    sums = others + torch.exp(target - highest)
    log_z = highest + torch.log(sums)
    if slope is not None:
        own = layer.weight[targets].to(layer.dtype).float().mul_(others * at_target)
        slope.neg_().add_(own).mul_(layer.scale / layer.temperature / sums)
    return (
        log_z[:, 0],
        (target - log_z)[:, 0],
        (log_z - weighted / sums)[:, 0] if "entropy" in also else None,
        (torch.log(squares) - 2 * torch.log(sums))[:, 0] if "log_sum_sq_probs" in also else None,
        total[:, 0] / vocabulary if "mean_logits" in also else None,
        first & (target >= highest)[:, 0] if "is_top1" in also else None,
    )


class _Head:
    """What stands where TRL's trainers call their kernel: ours on a CPU, theirs elsewhere."""

    def __init__(self, theirs):
        self.theirs = theirs

    def apply(self, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0, outputs=ALSO):
        if hidden.device.type != "cpu":
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
