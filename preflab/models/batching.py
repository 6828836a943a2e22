"""Batches by token budget: rows of like length together, so that little is padded."""


def token_batches(lengths: list[int], budget: int, most: int | None = None) -> list[list[int]]:
    """Indices in batches of at most `budget` padded tokens and `most` rows, longest first.

    Longest first, so that running out of memory happens at once. A row above the budget is a batch of its own. The
    cut depends on the lengths alone, so every process of a launch finds the same batches.

    Args:
        lengths: tokens of each row, shape (n,).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches, start = [], 0
    while start < len(order):
        rows = max(1, budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + (min(rows, most) if most else rows)])
        start += len(batches[-1])
    return batches


def pad_right(rows: list[list[int]], pad: int, device):
    """(input_ids, attention_mask) of token ids, each (len(rows), longest), padded on the right with `pad`."""
    import torch

    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
        mask[k, : len(row)] = 1
    return ids.to(device), mask.to(device)
