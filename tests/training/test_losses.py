"""The trainer against stock TRL: same rows, same order, every loss, step by step."""

import pytest
from conftest import make_pairs
from stock_trl import assert_equal, ours, stock
from trl import DPOTrainer

from preflab.training.loss_names import TRL_LOSSES


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_losses_match_stock_trl(loss_type, tiny, tmp_path):
    rows = make_pairs(24)
    assert_equal(ours(tiny, loss_type, tmp_path, rows), stock(tiny, loss_type, tmp_path, rows))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_losses_match_stock_trl_for_20_steps(loss_type, tiny, tmp_path):
    rows, longer = make_pairs(24), {"max_steps": 20, "learning_rate": 1e-3}
    own_steps = ours(tiny, loss_type, tmp_path, rows, **longer)
    assert len(own_steps) == 20
    assert_equal(own_steps, stock(tiny, loss_type, tmp_path, rows, **longer))


def test_gemma2_matches_stock_trl(tiny_gemma2, tmp_path):
    rows = make_pairs(24)
    assert_equal(ours(tiny_gemma2, "sigmoid", tmp_path, rows), stock(tiny_gemma2, "sigmoid", tmp_path, rows))


def test_loss_list_is_trls():
    """TRL names its losses in the error that an unknown one raises."""
    import inspect
    import re

    source = inspect.getsource(DPOTrainer._compute_loss)
    named = set(re.findall(r'loss_type == "(\w+)"', source))
    assert named == set(TRL_LOSSES)
