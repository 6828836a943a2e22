"""The training benchmark: its draws of rows, and the ratios of its report."""

import runpy

import pytest
from conftest import ROOT, assert_one_line

from benchmarks import timed_training, train_throughput
from benchmarks.child import figures_of_child
from utils.errors import UserError


def test_a_draw_depends_on_its_seed_only():
    draws = timed_training.drawn(100, 8, seed=3, draws=3)
    assert draws[1:] == timed_training.drawn(100, 8, seed=4, draws=2)
    assert all(len(set(draw)) == 8 and set(draw) <= set(range(100)) for draw in draws)
    assert draws[0] != draws[1]
    with pytest.raises(UserError, match="7 usable rows"):
        timed_training.drawn(7, 8, seed=0, draws=1)


def run_of(seconds: list[float], losses: list[float]) -> dict:
    """A run on two draws of 8 pairs: 100 tokens that are padded to 150, and 300 padded to 600."""
    tokens, padded = [100, 300], [150, 600]
    draws = [
        {"seed": k, "seconds": seconds[k], "processor_seconds": 2 * seconds[k],
         "step_seconds": [seconds[k]], "pairs": 8, "tokens": tokens[k],
         "padded_tokens": padded[k], "losses": [losses[k]]}
        for k in (0, 1)
    ]  # fmt: skip
    total = {name: sum(draw[name] for draw in draws) for name in timed_training.TOTALS}
    return {"draws": draws, **total, "parameters": 1000, "peak_memory_gib": {"cpu": 1.0}, "time_by_kind": None,
            "padded_because": None, "micro_batch_tokens": None}  # fmt: skip


def test_each_draw_has_its_ratio_and_its_padding(capsys):
    runs = {"stock": [run_of([4.0, 12.0], [0.5, 0.25])], "ours": [run_of([2.0, 3.0], [0.5, 0.75])]}
    result = train_throughput.compare(runs, rate=1e6, stage="dpo") | {"device": "cpu"}
    assert [draw["ratio"] for draw in result["draws"]] == [2.0, 4.0]
    assert [draw["padded_over_stored_once"] for draw in result["draws"]] == [1.5, 2.0]
    # 16 s over 5 s, 750 padded tokens over 400, 16 pairs in 5 s, 6 x 1000 x 400 operations in 5 s at 1e6 per second.
    assert result["ratio"] == pytest.approx(3.2) and result["padded_over_stored_once"] == pytest.approx(1.875)
    assert (result["ratio_min"], result["ratio_max"], result["max_loss_difference"]) == (2.0, 4.0, 0.5)
    assert result["processor_ratio"] == pytest.approx(3.2)
    assert result["ways"]["ours"]["pairs_per_second"] == pytest.approx(3.2)
    assert result["ways"]["ours"]["mfu"] == pytest.approx(0.48)
    train_throughput.print_result(result, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert "1.50" in lines[0] and "2.00" in lines[0] and "2.00" in lines[1] and "4.00" in lines[1]
    assert max(map(len, lines)) <= 100


def test_figures_of_a_child_process(capsys):
    printed = "print('{}'); print('a launcher'); print('{\"seconds\": 1.5}'); print('its end')"
    assert figures_of_child(["-c", printed], "the run") == {"seconds": 1.5}
    error = "import sys; print('{}'); print('error: --data x: no such file', file=sys.stderr); sys.exit(2)"
    with pytest.raises(UserError, match="^the run failed: --data x: no such file$"):
        figures_of_child(["-c", error], "the run")
    assert capsys.readouterr().err == ""
    # Of an error without a line for users, all of it is shown.
    with pytest.raises(UserError, match="^the run failed: KeyError: 'a'$"):
        figures_of_child(["-c", "{}['a']"], "the run")
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(UserError, match="^the run failed: it printed no figures$"):
        figures_of_child(["-c", "print(1)"], "the run")


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("ranked_lists.py --answers 2", "--answers 2"),
        ("ranked_lists.py --answers 1 4", "--answers 1 4"),
        ("ranked_lists.py --rounds 0", "--rounds 0"),
        ("ranked_lists.py --lists 1000", "--lists 1000"),
        ("train_throughput.py --lora_r -1", "--lora_r -1"),
    ],
)
def test_bad_values_are_one_line(command, named, capsys, monkeypatch):
    script, *flags = command.split()
    monkeypatch.setattr("sys.argv", [script, *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    assert end.value.code == 2
    assert_one_line(capsys.readouterr().err, named)
