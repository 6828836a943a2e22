"""Batches by token budget: rows of similar length together, so that little is padding."""

import torch


def token_batches(lengths: list[int], budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Split rows into batches of at most `budget` padded tokens and `max_rows` rows, longest first.

    Longest first, so that a batch too large for the memory fails at once. A row longer than the budget is a batch
    of one row. The batches depend on the lengths only, so all processes of a launch compute the same ones.

    Args:
        lengths: number of tokens of each row, shape (n,).

    Returns:
        Indices into `lengths`, per batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches, start = [], 0
    while start < len(order):
        # The first row of a batch is its longest, so every row is padded to its length.
        rows = max(1, budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + (min(rows, max_rows) if max_rows else rows)])
        start += len(batches[-1])
    return batches


def pad_right(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the right with `pad`.

    Returns:
        (input_ids, attention_mask), each of shape (len(rows), longest row).
    """
    # The mask comes from the lengths, not from the ids: `pad` may be the end-of-text token, which rows also contain.
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
        mask[k, : len(row)] = 1
    return ids.to(device), mask.to(device)
