"""The time estimate: phases by hand, and a measurement that leaves the trainer as it was."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import train_args
from stock_trl import trainer_of

from preflab.training import estimate
from preflab.training.estimate import Speed, Work, estimate_text, estimated_minutes, measure_speed, speed_of
from preflab.training.step0 import short_rows
from preflab.training.throughput import model_flops_utilisation

NO_EVALUATION = SimpleNamespace(eval_strategy="no", eval_steps=None, logging_steps=1)


def plan_of(rows_seen: int, steps: int = 30, epochs: float = 1.0, processes: int = 1) -> dict:
    return {"rows_seen": rows_seen, "steps": steps, "epochs": epochs, "batch": {"processes": processes}}


def test_minutes_by_hand():
    """60,000 tokens per epoch of 100 rows; two epochs by two processes at 1 ms per token: 60 s."""
    work = Work(60_000, {"reference": 30_000}, held_out_tokens=12_000, sampling_models=2)
    speed = Speed(step=1e-3, forward=5e-4, decode=0.25)
    estimate = estimated_minutes(work, speed, plan_of(200, processes=2), NO_EVALUATION, rows=100)
    # Reference 30,000 x 0.5 ms / 2 = 7.5 s; held-out 12,000 x 0.5 ms / 2 = 3 s; samples 2 x 64 x 0.25 s = 32 s.
    assert estimate["phases"] == {"reference": 0.12, "training": 1.0, "held-out rows": 0.05, "samples": 0.53}
    assert estimate["minutes"] == 1.7
    text = estimate_text({**estimate, "memory_gib": 3.1})
    assert "1.7 minutes" in text and "training 1.0" in text and "3.1 GiB" in text


def test_unknown_for_a_sharded_model():
    assert estimated_minutes(Work(1, {}, 1, 0), None, plan_of(1), NO_EVALUATION, 1) == {}
    assert "sharded" in estimate_text({"memory_gib": 1.0})


@pytest.mark.parametrize("schedule", [("steps", 2, 5), ("steps", 0.5, 4), ("steps", 2, 4), ("epoch", None, 8)])
def test_evaluations_are_counted_as_transformers_runs_them(schedule, train, tiny, prefs, tmp_path):
    strategy, interval, steps = schedule
    flags = ["--eval_strategy", strategy, "--max_steps", str(steps), "--limit", "16", "--sample_prompts", "0"]
    flags += ["--eval_steps", str(interval)] if interval else []
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *flags))
    assert code == 0, err
    (results,) = (tmp_path / "out").glob("*/preflight.json")
    log = [json.loads(line) for line in (results.parent / "train_log.jsonl").read_text().splitlines()]
    during = {row["step"] for row in log if row["split"] == "eval" and row["step"] < steps}
    flight = json.loads(results.read_text())
    evaluations = SimpleNamespace(eval_strategy=strategy, eval_steps=interval, logging_steps=1)
    work, speed = Work(0, {}, held_out_tokens=60, sampling_models=0), Speed(0, 1.0, 0)
    # One minute per evaluation.
    estimate = estimated_minutes(work, speed, flight["plan"], evaluations, rows=1)
    assert estimate["minutes"] == len(during) + 1
    assert flight["estimate"]["phases"]["training"] >= 0


def test_measurement_leaves_the_trainer_as_it_was(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, loss_type=["sigmoid"], gradient_checkpointing=True)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    state, training = torch.get_rng_state(), trainer.model.training
    rows = [100] * len(trainer.train_dataset)
    speed = measure_speed(trainer, rows)
    assert speed.step > speed.forward > 0 and speed.decode > 0
    assert torch.equal(state, torch.get_rng_state()) and trainer.model.training == training
    assert all(torch.equal(weights[name], p) and p.grad is None for name, p in trainer.model.named_parameters())
    assert not trainer._metrics["train"] and trainer._total_train_tokens == 0 and not trainer.precompute_ref_logps
    assert not trainer.model.is_gradient_checkpointing


def test_equal_runs_share_a_measured_speed_for_a_day(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFERENCELAB_CACHE", str(tmp_path / "cache"))
    trainer = trainer_of(tiny, tmp_path, loss_type=["sigmoid"])
    rows = [100] * len(trainer.train_dataset)
    own = speed_of(trainer, rows)
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: Speed(9, 9, 9))
    shared = speed_of(trainer, rows)
    assert (shared.step, shared.forward, shared.decode) == (own.step, own.forward, own.decode)
    assert not own.measured_utc and shared.measured_utc
    # Other rows, other settings, an older or a damaged file: measured again.
    assert speed_of(trainer, [200] * len(rows)).step == 9
    trainer.args.per_device_train_batch_size += 1
    assert speed_of(trainer, rows).step == 9
    trainer.args.per_device_train_batch_size -= 1
    files = sorted((tmp_path / "cache" / "speed").iterdir())
    assert len(files) == 3
    monkeypatch.setattr(estimate, "VALID_SECONDS", -1)
    assert speed_of(trainer, rows).step == 9
    monkeypatch.setattr(estimate, "VALID_SECONDS", 3600)
    for file in files:
        file.write_text("{}")
    assert speed_of(trainer, rows).step == 9


def test_short_rows_of_the_first_ones():
    assert short_rows([9, 3, 7, 3, 1], 2) == [1, 4]
    assert short_rows([5], 4) == [0]
    # Row 300 is the shortest, but not among the first 256.
    assert short_rows([9] * 300 + [1], 1) == [0]


def test_utilisation_is_none_where_it_says_nothing(monkeypatch):
    monkeypatch.setattr("preflab.training.throughput.matmul_rate", lambda dtype, device: 1e9)
    # 3e11 operations in 100 s by two processes of 1e9 per second: 3e11 / 2e11 = 1.5, so the rate was measured too low.
    assert model_flops_utilisation(3e11, 100, "float32", "cpu", 2) is None
    assert model_flops_utilisation(1e11, 100, "float32", "cpu", 2) == 0.5
    assert model_flops_utilisation(1e9, 10, "float32", "cpu", 2) is None
