"""The one sequence log-probability: log pi(y|x), summed in float32 over response tokens.

Training (policy and reference), the preflight and every evaluation go through the same head: TRL's fused LM head,
which knows final-logit softcaps and logit scales and accumulates the log-sum-exp in float32; on a CPU its arithmetic is
that of preflab.models.fast.fused_head. Padding is on the right
and masked, and positions outside the response add exactly 0, so neither padding nor batch size changes a sum beyond
rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from preflab.models.fast import fused_head


def attach_head(model) -> None:
    """Give `model` (or the base under its adapter) the fused head, once."""
    from trl.trainer.utils import add_fused_lm_head

    fused_head.install()
    base = without_adapter_shell(model)
    if not getattr(base, "_has_logp_head", False):
        add_fused_lm_head(base)
        base._has_logp_head = True


def without_adapter_shell(model):
    """The transformers model itself, where PEFT has wrapped it; adapter layers stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def token_logps(model, input_ids, attention_mask, completion_mask, **packed):
    """Log-probability of each response token. `model` carries the head (`attach_head`, or TRL's trainer gave it one).

    Args:
        input_ids, attention_mask, completion_mask: shape (batch, length), right-padded; completion_mask is 1 on the
            response's tokens, its end-of-turn token included.
        packed: from `shared_prompt.pack`, where the model computes pairs packed (`shared_prompt.attach`).

    Returns:
        Shape (batch, length - 1), float32, in nats: entry t belongs to token t + 1, and is 0 outside the response.
    """
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **packed}
    out = model(**inputs, use_cache=False, fused_lm_head=True)
    return out.log_probs.float()


def sequence_logps(model, input_ids, attention_mask, completion_mask):
    """Summed response log-probabilities, shape (batch,), float32, in nats. Arguments as `token_logps`."""
    return token_logps(model, input_ids, attention_mask, completion_mask).sum(dim=1)


def sum_logps(output):
    """The sum over response tokens, float32, shape (batch,), of what the fused head returned."""
    return output.log_probs.float().sum(dim=1)


@contextmanager
def captured_hidden(model):
    """A list that gets the last layer's hidden states, shape (batch, length, hidden), of each forward of `model`."""
    found = []
    backbone = without_adapter_shell(model).base_model
    hook = backbone.register_forward_hook(lambda _m, _a, out: found.append(out.last_hidden_state))
    try:
        yield found
    finally:
        hook.remove()


def head_logits(model, hidden):
    """Next-token logits, shape (n, vocab), float32, of hidden states of the last layer, shape (n, hidden).

    The model's own forward does it, with softcap and logit scale where the architecture has them: one token is run,
    and its hidden state is exchanged for `hidden` where the output layer begins.
    """
    import torch

    base = without_adapter_shell(model)
    head = base.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _m, _a: (hidden[None].to(head.weight.dtype),))
    try:
        one = torch.zeros((1, 1), dtype=torch.long, device=hidden.device)
        return base(input_ids=one, use_cache=False).logits[0].float()
    finally:
        hook.remove()


def kl_divergence(policy, reference, policy_hidden, reference_hidden, chunk: int = 256):
    """KL(policy || reference) = sum_v pi(v) (log pi(v) - log pi_ref(v)), exact over the vocabulary, in nats.

    Args:
        policy, reference: contexts under which the model is the policy and the reference, `with policy() as model`.
        policy_hidden, reference_hidden: shape (n, hidden), hidden states at the positions that predict the tokens.

    Returns:
        Shape (n,), float32.
    """
    import torch

    parts = []
    for p, r in zip(policy_hidden.split(chunk), reference_hidden.split(chunk), strict=True):
        with policy() as model:
            log_p = head_logits(model, p).log_softmax(-1)
        with reference() as model:
            log_r = head_logits(model, r).log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_r)).sum(-1))
    return torch.cat(parts)


def pair_batches(dataset, collator, batch_size: int, indices=None) -> Iterator[tuple[list[int], dict]]:
    """Batches of pairs, longest first so that running out of memory happens at once.

    Args:
        dataset: rows with prompt_ids, chosen_ids and rejected_ids.
        indices: the rows to take (default: all).

    Yields:
        (rows, batch): indices into `dataset`, and TRL's collated tensors (chosen rows first, then rejected).
    """
    indices = list(range(len(dataset))) if indices is None else list(indices)
    rows = {i: dataset[i] for i in set(indices)}
    length = {i: len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for i, r in rows.items()}
    indices.sort(key=lambda i: (-length[i], i))
    for start in range(0, len(indices), batch_size):
        take = indices[start : start + batch_size]
        yield take, collator([rows[i] for i in take])
