"""Parts of the trainer mixin: shares of the processes, and progress as plain lines in a log."""

from types import SimpleNamespace

import pytest
from conftest import train_args

import utils.progress
from preflab.training.resumable import ResumableMixin, TrainingProgress


@pytest.mark.parametrize(("count", "shares"), [(5, [[0, 2, 4], [1, 3, 4]]), (4, [[0, 2], [1, 3]]), (0, [[], []])])
def test_processes_share_indices_equally(count, shares):
    """Every process runs equally many forwards; the last index is repeated where the numbers do not divide."""
    for rank, expected in enumerate(shares):
        trainer = ResumableMixin()
        trainer.accelerator = SimpleNamespace(num_processes=2, process_index=rank)
        assert trainer.share(list(range(count))) == expected


@pytest.fixture
def every_update(monkeypatch):
    """Print a line at every update instead of every half minute."""
    usual = utils.progress.LineProgress
    monkeypatch.setattr(
        utils.progress, "LineProgress", lambda *args, **kwargs: usual(*args, **{**kwargs, "seconds": 0.0})
    )


def test_log_gets_plain_lines(every_update, capsys):
    shown, state = TrainingProgress(), SimpleNamespace(max_steps=4, global_step=0)
    shown.on_train_begin(None, state, None)
    # A run resumed at step 2 takes its third step.
    state.global_step = 3
    shown.on_step_end(None, state, None)
    shown.on_log(None, state, None, logs={"loss": 0.6931, "rewards/accuracies_ties_half": 0.5, "grad_norm": 1.0})
    state.global_step = 4
    shown.on_step_end(None, state, None)
    shown.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
    shown.on_evaluate(None, state, None)
    shown.on_train_end(None, state, None)
    err = capsys.readouterr().err
    assert "training: 3/4 steps (75%)" in err and "training: 4/4 steps (100%)" in err
    assert "loss 0.693, accuracy 0.500" in err and "grad_norm" not in err and "\r" not in err
    assert "evaluating: 1/2 batch" in err


@pytest.mark.parametrize("disabled", ["true", "false"])
def test_run_writes_no_carriage_returns(disabled, every_update, train, tiny, prefs, tmp_path):
    evaluations = ("--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2", "--disable_tqdm", disabled)
    code, out, err = train(*train_args(tiny, prefs, tmp_path), *evaluations)
    assert code == 0 and "\r" not in out + err, err
    assert ("training: 2/2 steps" in err) == (disabled == "false")
