"""Scoring under base and tuned: equality with a slow loop for every batching, the cache, and an unused adapter."""

from types import SimpleNamespace

import pytest
import torch
from conftest import eval_args
from helpers import slow_logp

import preflab.evaluation.logprob_scoring
from preflab.evaluation.arguments import ComparisonArguments
from preflab.evaluation.comparison import resolve
from preflab.evaluation.held_out import held_out_pairs
from preflab.evaluation.logprob_scoring import Sequence, batches_of, score_sequences, shared_lengths, units_of
from preflab.evaluation.two_models import TwoModels
from preflab.models.loading import load_model
from utils.cache import ResultCache
from utils.cli import parse
from utils.errors import UserError


def compare(trained, out, *extra):
    (args,) = parse((ComparisonArguments,), eval_args(trained, out, *extra))
    return resolve(args)


def sequences_of(comparison):
    models = TwoModels(comparison)
    _, ids, _ = held_out_pairs(comparison, models.tokenizer)
    return models, [
        Sequence(row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"]), len(row["prompt_ids"]))
        for row in ids
        for side in ("chosen", "rejected")
    ]


def summed(index, scores):
    return {"base": float(scores.base.sum()), "tuned": float(scores.tuned.sum()), "kl": float(scores.kl.sum())}


def slow_figures(trained, tiny, sequences):
    """Base, tuned and KL of each sequence, one row at a time, with separately loaded models."""
    base = load_model(str(tiny)).eval()
    tuned = load_model(str(tiny), adapter=str(trained / "ck/r")).eval()
    scores = []
    with torch.no_grad():
        for s in sequences:
            logps = [slow_logp(m, s.ids[: s.start], s.ids[s.start :]) for m in (base, tuned)]
            b, t = (
                m(input_ids=torch.tensor([s.ids])).logits[0, s.start - 1 : -1].double().log_softmax(-1)
                for m in (base, tuned)
            )
            scores.append([*logps, float((t.exp() * (t - b)).sum())])
    return scores


@pytest.mark.parametrize("extra", [(), ("--batch_size", 1), ("--batch_tokens", 150), ("--batch_tokens", 100000)])
def test_batched_scores_match_slow_loop(trained, tiny, tmp_path, extra):
    models, sequences = sequences_of(compare(trained, tmp_path, *extra))
    rows, speed = score_sequences(models, sequences, summed, "test")
    assert speed["rows_kept_before"] == 0 and speed["tokens"] == sum(len(s.ids) for s in sequences)
    for row, wanted in zip(rows, slow_figures(trained, tiny, sequences), strict=True):
        assert [row["base"], row["tuned"], row["kl"]] == pytest.approx(wanted, abs=1e-4)
        assert abs(row["tuned"] - row["base"]) > 1e-3


def test_shared_starts_and_batches():
    a, b, c = [1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2]
    assert shared_lengths([a, b]) == [3] and shared_lengths([a, a]) == [4] and shared_lengths([a, c]) == [1]
    assert shared_lengths([a, b, a]) is None, "the last sequence has no neighbour"
    assert shared_lengths([a, b, a, [7, 8]]) is None, "the last pair has no common start"
    args = SimpleNamespace(batch_tokens=12, batch_size=None)
    rows = [a, b, a, a, a, c]
    # Tokens of each pair stored once: 6, 6, 6.
    units = units_of(rows, True)
    assert units == [((0, 1), 6), ((2, 3), 6), ((4, 5), 6)]
    assert units_of(rows, False) == [((i,), len(row)) for i, row in enumerate(rows)]
    assert batches_of(units, args) == [[0, 1, 2, 3], [4, 5]]
    for args.batch_size in (2, 1):
        assert batches_of(units, args) == [[0, 1], [2, 3], [4, 5]], "a pair is never split"
    assert batches_of([], args) == []


@pytest.mark.parametrize("switch", [True, False])
def test_no_shared_prompt_disables_packing(switch, trained, tmp_path, monkeypatch):
    models, sequences = sequences_of(compare(trained, tmp_path, *(() if switch else ("--no_shared_prompt",))))
    packed = []
    usual = preflab.evaluation.logprob_scoring.token_logps
    monkeypatch.setattr(
        preflab.evaluation.logprob_scoring,
        "token_logps",
        lambda *a, **k: packed.append("packed_ids" in k) or usual(*a, **k),
    )
    score_sequences(models, sequences, summed, "test")
    assert packed and set(packed) == {switch}


def test_order_does_not_change_scores(trained, tmp_path):
    models, sequences = sequences_of(compare(trained, tmp_path))
    there, _ = score_sequences(models, sequences, summed, "there")
    back, _ = score_sequences(models, sequences[::-1], summed, "back")
    for a, b in zip(there, back[::-1], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_rerun_scores_only_missing_sequences(trained, tmp_path, monkeypatch):
    comparison = compare(trained, tmp_path, "--batch_size", 1)
    models, sequences = sequences_of(comparison)
    first, _ = score_sequences(models, sequences, summed, "test")
    (cache,) = (tmp_path / ".cache").glob("test-*/rows-0.jsonl")
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:5]) + lines[5][:20])
    second, speed = score_sequences(sequences_of(comparison)[0], sequences, summed, "test")
    assert second == first and speed["rows_kept_before"] == 5
    monkeypatch.setattr(TwoModels, "load", lambda self: pytest.fail("nothing was left to score"))
    third, speed = score_sequences(sequences_of(comparison)[0], sequences, summed, "test")
    assert third == first and speed["tokens"] == 0


def test_cache_depends_on_weights_data_and_spans(trained, tmp_path):
    models, sequences = sequences_of(compare(trained, tmp_path))
    score_sequences(models, sequences[:2], summed, "test")
    score_sequences(models, sequences[:3], summed, "test")
    shorter = [Sequence(s.ids, s.start + 1, s.start + 1) for s in sequences[:2]]
    score_sequences(models, shorter, summed, "test")
    checkpoint = trained / "ck/r/checkpoint-2"
    (args,) = parse((ComparisonArguments,), ["--adapter_path", str(checkpoint), "--eval_out", str(tmp_path)])
    score_sequences(TwoModels(resolve(args)), sequences[:2], summed, "test")
    assert len(list((tmp_path / ".cache").glob("test-*"))) == 4


def test_zero_adapter_is_an_error(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    idle = tmp_path / "idle"
    idle.mkdir()
    for name in ("adapter_config.json",):
        (idle / name).write_text((trained / "ck/r" / name).read_text())
    weights = load_file(trained / "ck/r/adapter_model.safetensors")
    save_file({k: w * ("lora_A" in k) for k, w in weights.items()}, idle / "adapter_model.safetensors")
    (args,) = parse((ComparisonArguments,), ["--adapter_path", str(idle), "--eval_out", str(tmp_path / "out")])
    models, sequences = sequences_of(compare(trained, tmp_path / "other"))
    with pytest.raises(UserError, match="adapter"):
        score_sequences(TwoModels(resolve(args)), sequences, summed, "test")


def test_bfloat16_reports_batch_spread(trained, tmp_path):
    models, sequences = sequences_of(compare(trained, tmp_path, "--dtype", "bfloat16"))
    rows, speed = score_sequences(models, sequences, summed, "test")
    assert 0 <= speed["batch_spread_nats"] < 0.5
    exact, _ = score_sequences(*sequences_of(compare(trained, tmp_path)), summed, "test")
    errors = [abs(a["tuned"] - b["tuned"]) for a, b in zip(rows, exact, strict=True)]
    assert 1e-4 < max(errors) < 1


def test_cache_reads_other_process_counts(tmp_path):
    one = ResultCache(tmp_path, "x", {"a": 1})
    one.add("0", {"v": 1})
    (one.folder / "rows-1.jsonl").write_text('{"key": "1", "v": 2}\n{"key": "2", "v":')
    assert ResultCache(tmp_path, "x", {"a": 1}).read() == {"0": {"v": 1}, "1": {"v": 2}}


def test_late_process_sees_the_same_cache(tmp_path):
    """A process that opens the cache late sees the same missing items, also if others have finished some by then."""
    import os
    import subprocess

    from conftest import ROOT
    from helpers import ACCELERATE, CPU

    script = tmp_path / "race.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.distributed import join_processes\n"
        "from utils.cache import ResultCache\n"
        "state = join_processes()\n"
        "read = ResultCache.read\n"
        "def slow(self):\n"
        "    time.sleep(0.5 * state.process_index)\n"
        "    return read(self)\n"
        "ResultCache.read = slow\n"
        # Another identity on rank 1, as if only one process could reach the hub.
        f"cache = ResultCache({str(tmp_path)!r}, 'x', {{'revision': state.process_index}})\n"
        "todo = [i for i in range(6) if str(i) not in cache.finished]\n"
        "for i in cache.own_share(todo):\n"
        "    cache.add(str(i), {'by': state.process_index})\n"
        "items = cache.gather()\n"
        "assert {k: v['by'] for k, v in items.items()} == {str(i): i % 2 for i in range(6)}, items\n"
    )
    done = subprocess.run(
        [*ACCELERATE, "--config_file", str(CPU), str(script)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / ".cache").iterdir())) == 1
