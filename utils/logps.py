"""The one sequence log-probability: log pi(y|x), summed in float32 over response tokens.

Training (policy and reference), the preflight and every evaluation go through the same head: TRL's fused LM head,
which knows final-logit softcaps and logit scales and accumulates the log-sum-exp in float32. Padding is on the right
and masked, and positions outside the response add exactly 0, so neither padding nor batch size changes a sum beyond
rounding.
"""

from collections.abc import Iterator


def score_responses_only() -> None:
    """Make TRL's fused head skip prompt and padding positions on every device, not only where Triton runs.

    TRL keeps all positions off Triton for the sake of compilers that need fixed shapes (Neuron); on a CPU the skipped
    half of the vocabulary-wide work is free speed, and no position's value changes.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: device.type != "neuron"


def attach_head(model) -> None:
    """Give `model` (or the base under its adapter) the fused head, once."""
    from trl.trainer.utils import add_fused_lm_head

    score_responses_only()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "_has_logp_head", False):
        add_fused_lm_head(base)
        base._has_logp_head = True


def sequence_logps(model, input_ids, attention_mask, completion_mask):
    """Summed response log-probabilities. `model` carries the head (`attach_head`, or TRL's trainer gave it one).

    Args:
        input_ids, attention_mask, completion_mask: shape (batch, length), right-padded; completion_mask is 1 on the
            response's tokens, its end-of-turn token included.

    Returns:
        Shape (batch,), float32, in nats.
    """
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    out = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True)
    return sum_logps(out)


def sum_logps(output):
    """The sum over response tokens, float32, shape (batch,), of what the fused head returned."""
    return output.log_probs.float().sum(dim=1)


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
