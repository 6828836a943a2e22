"""Batches by token budget."""

import random

import pytest

from preflab.models.batching import token_batches


@pytest.mark.parametrize("budget", [1, 17, 100, 1000])
@pytest.mark.parametrize("most", [None, 1, 3])
def test_batches_respect_the_budget(budget, most):
    rng = random.Random(budget)
    lengths = [rng.randint(1, 60) for _ in range(200)]
    batches = token_batches(lengths, budget, most)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
        assert len(batch) <= (most or 200)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_batches_fill_the_budget():
    assert token_batches([2, 5, 4, 5, 1], 10) == [[1, 3], [2, 0], [4]]
    assert token_batches([1, 1, 1, 1], 3) == [[0, 1, 2], [3]]
    assert token_batches([50, 1], 10) == [[0], [1]]
    assert token_batches([0, 0], 2) == [[0, 1]] and token_batches([], 5) == []
