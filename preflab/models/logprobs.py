"""Sequence log-probabilities, log pi(y|x), summed in float32 over the response tokens.

Training (policy and reference), the preflight and all evaluations use the same output head, so their figures agree:
TRL's fused LM head, which applies final-logit softcaps and logit scales and accumulates the log-sum-exp in float32. On
a CPU, preflab.models.fast.fused_head computes it faster. Rows are padded on the right; padding is masked, and positions
outside the response contribute exactly 0, so neither padding nor batch size changes a sum beyond rounding.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType, SimpleNamespace

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from trl.trainer.utils import add_fused_lm_head

from preflab.models.fast import fused_head
from utils.errors import UserError


def attach_head(model) -> None:
    """Attach the fused head to `model` (to the base model under an adapter). A second call has no effect."""
    fused_head.install()
    base = without_adapter_shell(model)
    # The mark keeps the forward from being wrapped twice.
    if not getattr(base, "_has_logp_head", False):
        add_fused_lm_head(base)
        apply_adapters_to_head(base)
        base._has_logp_head = True


def apply_adapters_to_head(base) -> None:
    """Make the fused head of a transformers model include adapters on its output layer.

    TRL's fused forward multiplies by `get_output_embeddings().weight`, which is the layer without its LoRA weights, and
    reads a bias that PEFT's wrapper of trained tokens does not have.
    """
    # Bound methods instead of closures over `base`: a deep copy of the model must call its own.
    base._fused_forward = base.forward

    @functools.wraps(type(base).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return self._fused_forward(*args, **kwargs)
        head = self.get_output_embeddings()
        if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            # An attribute of the object takes precedence over the method of its class until it is deleted.
            adapted = adapted_head(head)
            self.get_output_embeddings = lambda: adapted
        try:
            return self._fused_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            self.__dict__.pop("get_output_embeddings", None)

    base.forward = MethodType(forward, base)


def adapted_head(head) -> SimpleNamespace:
    """Weight (vocab, hidden) and bias of an output layer with its active adapters.

    Raises:
        UserError: dropout, which would need the layer's input.
    """
    if isinstance(head, TrainableTokensWrapper):
        # The bias is the layer's own; PEFT's wrapper gives access to the weight only.
        return SimpleNamespace(weight=head.weight, bias=head.token_adapter.get_base_layer().bias)
    if isinstance(head, AuxiliaryTrainingWrapper):
        return SimpleNamespace(weight=head.weight, bias=head.bias)
    layer = head.get_base_layer()
    if head.disable_adapters or head.merged:
        return SimpleNamespace(weight=layer.weight, bias=layer.bias)
    active = [name for name in head.active_adapters if name in getattr(head, "lora_A", {})]
    if head.training and any(getattr(head.lora_dropout[name], "p", 0) for name in active):
        raise UserError("--lora_dropout with LoRA on the output layer (lm_head) is not supported: set --lora_dropout 0")
    if type(head) is LoraLinear and not any(name in head.lora_variant or head.lora_bias[name] for name in active):
        weight = layer.weight
        for name in active:
            # Not in place: the layer's own weight must not change.
            weight = weight + head.get_delta_weight(name).to(weight.dtype)
        return SimpleNamespace(weight=weight, bias=layer.bias)
    # Other adapters (DoRA, a trained bias, ...) are still linear in their input: the unit vectors give the weight.
    units = torch.eye(layer.weight.shape[1], dtype=layer.weight.dtype, device=layer.weight.device)
    bias = head(torch.zeros_like(units[:1]))[0]
    return SimpleNamespace(weight=(head(units) - bias).t(), bias=bias)


def without_adapter_shell(model):
    """The transformers model inside a PEFT wrapper; adapter layers stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def token_logps(model, input_ids, attention_mask, completion_mask, **packed):
    """Log-probability of each response token, log pi(y_t | x, y_<t).

    Args:
        model: carries the fused head (`attach_head`, or attached by TRL's trainer).
        input_ids, attention_mask, completion_mask: shape (batch, length), right-padded; completion_mask is 1 on the
            response's tokens, including its end-of-turn token.
        packed: from `shared_prompt.pack`, for a model with shared prompts (`shared_prompt.attach`).

    Returns:
        Shape (batch, length - 1), float32, in nats: entry t belongs to token t + 1, and is 0 outside the response.
    """
    # -100 marks positions that the head skips; their log-probability is returned as 0.
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **packed}
    # No key-value cache is needed, since nothing is generated.
    out = model(**inputs, use_cache=False, fused_lm_head=True)
    return out.log_probs.float()


def sequence_logps(model, input_ids, attention_mask, completion_mask):
    """Summed response log-probabilities, shape (batch,), float32, in nats. Arguments as for `token_logps`."""
    return token_logps(model, input_ids, attention_mask, completion_mask).sum(dim=1)


def sum_logps(output):
    """Sum the log-probabilities that the fused head returned over the response: shape (batch,), float32, in nats."""
    return output.log_probs.float().sum(dim=1)


@contextmanager
def captured_hidden(model):
    """Collect the last layer's hidden states, shape (batch, length, hidden), of every forward pass of `model`.

    Yields:
        A list that receives one tensor per forward pass.
    """
    states = []
    # The model without its output layer; last_hidden_state is what the output layer would receive.
    backbone = without_adapter_shell(model).base_model
    hook = backbone.register_forward_hook(lambda _m, _a, out: states.append(out.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()


def head_logits(model, hidden):
    """Next-token logits, shape (n, vocab), float32, for last-layer hidden states of shape (n, hidden).

    Runs the model's own forward pass, so that softcap and logit scale are applied if the architecture has them: the
    input is a single dummy token, and a hook replaces its hidden state by `hidden` before the output layer.
    """
    base = without_adapter_shell(model)
    head = base.get_output_embeddings()
    # The hook replaces the dummy's input of the output layer, (1, 1, hidden), by one of shape (1, n, hidden).
    hook = head.register_forward_pre_hook(lambda _m, _a: (hidden[None].to(head.weight.dtype),))
    try:
        dummy = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
        return base(input_ids=dummy, use_cache=False).logits[0].float()
    finally:
        hook.remove()


def kl_divergence(policy, reference, policy_hidden, reference_hidden, chunk: int = 256):
    """KL(policy || reference) = sum_v pi(v) (log pi(v) - log pi_ref(v)), summed over the complete vocabulary, in nats.

    Args:
        policy, reference: functions that return a context manager with the model, `with policy() as model`.
        policy_hidden, reference_hidden: shape (n, hidden), last-layer states at the positions that predict the tokens.
        chunk: positions per step; full logits are needed for `chunk` positions only.

    Returns:
        Shape (n,), float32.
    """
    parts = []
    for p, r in zip(policy_hidden.split(chunk), reference_hidden.split(chunk), strict=True):
        # Entered one after the other: both may be the same model, with its adapter switched on and off.
        with policy() as model:
            log_p = head_logits(model, p).log_softmax(-1)
        with reference() as model:
            log_r = head_logits(model, r).log_softmax(-1)
        # log_p and log_r have shape (positions, vocab), at most `chunk` positions.
        parts.append((log_p.exp() * (log_p - log_r)).sum(-1))
    return torch.cat(parts)


def pair_batches(dataset, collator, batch_size: int, indices=None) -> Iterator[tuple[list[int], dict]]:
    """Batches of pairs, longest first, so that a batch too large for the memory fails at once.

    Args:
        dataset: rows with prompt_ids, chosen_ids and rejected_ids.
        collator: TRL's, or one with the same output.
        indices: rows to use (default: all).

    Yields:
        (rows, batch): indices into `dataset`, and the collated tensors (chosen rows first, then rejected).
    """
    indices = list(range(len(dataset))) if indices is None else list(indices)
    # An index may occur twice (ResumableMixin.share repeats the last one), but each row is read once.
    rows = {i: dataset[i] for i in set(indices)}
    length = {i: len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for i, r in rows.items()}
    indices.sort(key=lambda i: (-length[i], i))
    for start in range(0, len(indices), batch_size):
        selected = indices[start : start + batch_size]
        yield selected, collator([rows[i] for i in selected])
