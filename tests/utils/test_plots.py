"""Every picture of the project with ordinary and extreme inputs: nothing overlaps, is cut off or hidden.

`utils.plots.save` calls the check of tests/pictures.py for every figure (conftest.py), so a test only has to draw.
"""

import numpy as np
import pytest
from pictures import problems_of

from utils import plots
from utils.stats import share

LONG = "organisation-with-a-long-name/a-model-with-a-very-long-name-v2.1-instruct-dpo-lora-r64"
TITLES = ["run", f"a-run-name-that-is-long-too: /home/someone/checkpoints/{LONG} against {LONG}"]


def metric_of(value, low=None, high=None, n=9, stderr=0.1):
    return {"value": value, "stderr": stderr, "ci95": None if low is None else [low, high], "n": n}


# --------------------------------------------------------------------------------------------------- the check itself


def figure_with(draw):
    fig, (ax,) = plots.figure(1, 1, "t")
    ax.set(title="panel", xlabel="x", ylabel="y")
    draw(ax)
    return fig


@pytest.mark.parametrize(
    ("problem", "draw"),
    [
        ("overlaps", lambda ax: ax.set_xticks([0.1, 0.15], ["a long label", "another label"])),
        ("cut off", lambda ax: ax.annotate("far away", (0.9, 0.5), xycoords="figure fraction", xytext=(0, 0),
                                           textcoords="offset points", in_layout=False, fontsize=40)),
        ("covers data", lambda ax: (ax.plot([0, 1], [0, 1], "o", label="points"), ax.legend(loc="upper right"))),
        ("no y label", lambda ax: ax.set(ylabel="")),
        ("limits", lambda ax: ax.set(xlabel="score (%)", xlim=(0, 120))),
        ("values", lambda ax: (ax.errorbar([95], [0.5], xerr=[[10], [10]]), ax.set(xlabel="score (%)", xlim=(0, 100)))),
    ],
)  # fmt: skip
def test_check_finds_each_problem(problem, draw):
    import matplotlib.pyplot as plt

    fig = figure_with(draw)
    fig.canvas.draw()
    problems = problems_of(fig)
    plt.close(fig)
    assert any(problem in text for text in problems), problems


def test_save_puts_the_legend_above_and_thins_ticks(tmp_path):
    def draw(ax):
        ax.plot([0, 1], [1000000.5, 1000000.9], label="a curve with a long name")
        ax.plot([0, 1], [1000000.9, 1000000.5], label="another curve with a long name")
        ax.set_xticks(np.linspace(0, 1, 3))
        ax.legend()

    plots.save(figure_with(draw), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_shorten_keeps_both_ends():
    assert plots.shorten("short") == "short"
    assert plots.shorten(LONG).startswith("organisat") and plots.shorten(LONG).endswith("dpo-lora-r64")
    assert len(plots.shorten(LONG)) == 28


# --------------------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("kind", ["usual", "huge", "one section", "equal"])
def test_perplexity(kind, tmp_path):
    from preflab.evaluation.perplexity_report import SECTIONS, draw

    rng, n = np.random.default_rng(0), 2 if kind == "one section" else 60
    size = {"usual": 0.1, "huge": 40.0, "one section": 1e-5, "equal": 0.0}[kind]
    rows = [
        {f"{k}_response_{side}{end}": v for side in ("chosen", "rejected")
         for k, end, v in (("tokens", "", int(rng.integers(3, 3000))), ("nll", "_difference", size * rng.normal()))}
        for _ in range(n)
    ]  # fmt: skip
    names = ["text"] if kind == "one section" else list(SECTIONS)
    metrics = {}
    for k, name in enumerate(names):
        value = 1e9 if kind == "huge" and k == 2 else 20.0 + k
        for side in ("base", "tuned"):
            metrics[f"{name}_ppl_{side}"] = metric_of(value, None if n < 3 else 0.6 * value, 1.9 * value)
    text = [{"tokens": 128, "nll_difference": size * float(rng.normal())} for _ in range(n)]
    draw(tmp_path / "p.png", metrics, [] if kind == "one section" else rows, text, TITLES[kind == "huge"])
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize("kind", ["usual", "all right", "tiny", "one pair", "zero", "far"])
def test_win_rate(kind, tmp_path):
    from preflab.evaluation.reward_slices import calibration_bins
    from preflab.evaluation.win_rate_report import draw

    rng, n = np.random.default_rng(0), 1 if kind == "one pair" else 100
    margin = {
        "usual": rng.normal(0.1, 0.5, n), "all right": abs(rng.normal(2, 1, n)) + 0.01,
        "tiny": 1e-6 * rng.normal(size=n),
        "one pair": np.array([0.3]), "zero": np.zeros(n), "far": rng.normal(0, 1, n) * 300,
    }[kind]  # fmt: skip
    rows = [
        {"margin": float(m), "tokens_chosen": int(rng.integers(1, 2000)), "tokens_rejected": int(rng.integers(1, 2000)),
         "ref_chosen": float(rng.normal()), "ref_rejected": float(rng.normal())}
        for m in margin
    ]  # fmt: skip
    draw(tmp_path / "w.png", rows, calibration_bins(margin, 42), TITLES[kind == "far"])
    assert (tmp_path / "w.png").exists()


def battle(models: int, categories: int, judge: str) -> dict:
    names = ["base", "tuned", *(f"{LONG}-{k}" for k in range(models - 2))]
    rate = share([1] * 10)
    judges = {
        name: {"win_rate": rate, "win_rate_style_controlled": metric_of(None)} for name in (judge, "longer", "random")
    }
    matches = [
        {"a": a, "b": b, "judges": judges, "categories": {f"a category {k} {'x' * k}": {"n": 3, "win_rate": rate}
                                                          for k in range(categories)}}
        for k, b in enumerate(names) for a in names[k + 1 :]
    ]  # fmt: skip
    answers = {n: {"tokens": metric_of(150.0), "truncated_share": metric_of(0.35)} for n in names}
    return {"matches": matches, "answers": answers}


@pytest.mark.parametrize(("models", "categories"), [(2, 0), (2, 10), (5, 24)])
def test_battle(models, categories, tmp_path):
    from preflab.judging.battle_report import battle_figure

    battle_figure(tmp_path / "b.png", battle(models, categories, f"hf:{LONG}"), TITLES[models > 2])
    nobody = battle(2, 0, "hf:x")
    nobody["matches"][0]["judges"] = {"hf:x": {"prompts": 3}}
    battle_figure(tmp_path / "none.png", nobody, "no verdict")


@pytest.mark.parametrize("published", [0, 6, 16])
def test_alpacaeval(published, tmp_path):
    from preflab.alpacaeval.report import draw

    metrics = {}
    for side, value in (("base", 0.0), ("tuned", 100.0)):
        for key in ("win_rate", "longer_win_rate", "random_win_rate", "length_controlled_minimal_winrate"):
            metrics[f"{side}_{key}"] = {**share([value / 100] * 40, scale=100), "value": value}
        metrics[f"{side}_avg_length"] = metric_of(2000)
    metrics["tuned_length_controlled_minimal_winrate"] = metric_of(None)
    rows = {f"{LONG}-{k}": {"win_rate": 50.0 + 0.1 * k, "avg_length": 1900 + k} for k in range(published)}
    draw(tmp_path / "a.png", metrics, rows, TITLES[published > 0])
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("tasks", [1, 3, 40])
def test_lm_eval(tasks, tmp_path):
    from types import SimpleNamespace

    from preflab.harness.report import draw

    rows = []
    for k in range(tasks):
        base, tuned = (0.0, 1.0) if k % 3 == 0 else (0.97, 0.98)
        row = {
            "task": f"leaderboard_{'very_' * (k % 7)}long_task_{k}",
            "metric": "acc_norm",
            "filter": "none",
            "shots": 5,
        }
        references = {LONG: {"value": 0.99, "other_setting": "another"}, "short": {"value": 0.2, "other_setting": None}}
        rows.append({**row, "top": True, "n": 24 if k % 2 else 0, "references": references if k % 2 else {},
                     "base": metric_of(base, stderr=0.0 if k % 3 == 0 else 0.05),
                     "tuned": metric_of(tuned, stderr=0.03),
                     "difference": metric_of(tuned - base, -0.138, 1.0), "significant": k == 0})  # fmt: skip
    draw(tmp_path / "l.png", SimpleNamespace(rows=rows, title=TITLES[tasks > 1], alone=False))
    draw(tmp_path / "alone.png", SimpleNamespace(rows=rows, title=TITLES[tasks > 1], alone=True))
    draw(tmp_path / "none.png", SimpleNamespace(rows=[], title="no shares", alone=False))


def test_human(tmp_path):
    from preflab.human.report import VOTES, draw

    def match(a, b, categories):
        votes = {f"votes_{step}": metric_of(k + 1) for k, step in enumerate(VOTES)}
        rates = {"win_rate": share([1] * 8), "win_rate_style_controlled": metric_of(float("nan"))}
        groups = {f"category {k}": {"n": 2, "win_rate": share([0.5, 1])} for k in range(categories)}
        return {"a": a, "b": b, "metrics": {**votes, **rates, "votes": metric_of(21)}, "categories": groups}

    annotators = {f"annotator-with-a-long-name-{k}": {"win_rate": share([0] * 4)} for k in range(14)}
    one = {"matches": [match("tuned", "base", 0)], "annotators": {"ann": {"win_rate": share([1, 0])}}}
    draw(tmp_path / "one.png", one, "one pairing")
    many = [match("tuned", "base", 20), *(match(f"{LONG}-{k}", "base", 0) for k in range(9))]
    draw(tmp_path / "many.png", {"matches": many, "annotators": annotators}, TITLES[1])
    draw(tmp_path / "none.png", {"matches": [], "annotators": {}}, "nobody voted")


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e6])
def test_pairs(scale, tmp_path):
    from preflab.pairs.report import pairs_figure

    rng = np.random.default_rng(0)
    rows = [
        {"score_chosen": scale * rng.normal(), "score_rejected": -scale, "win_chosen": 1.0, "win_rejected": 0.0,
         "chosen": [{"content": "x" * int(rng.integers(1, 4000))}], "rejected": [{"content": "y"}]}
        for _ in range(30)
    ]  # fmt: skip
    pairs_figure(tmp_path / "p.png", rows, TITLES[scale > 1])
    assert (tmp_path / "p.png").exists()


# ------------------------------------------------------------------------------------------------------------ training

WARNING = "likelihood displacement: on the test split the log-probability of chosen answers changed by -12.34 nats and"
WARNING += " that of rejected ones by -23.45 nats: the margin grows by making both less likely"


def log_rows(steps: int, preference: bool, scale: float = 1.0) -> list[dict]:
    rng, rows = np.random.default_rng(0), []
    keys = ["rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"]
    for step in range(1, steps + 1):
        row = {"step": step * 1000, "loss": 0.7 * scale, "learning_rate": 2e-6 / step, "grad_norm": 30 * scale / step}
        row |= {"rewards/accuracies": float(rng.random()), "mean_token_accuracy": float(rng.random()), "entropy": 1.2}
        row |= {key: scale * float(rng.normal()) for key in keys} if preference else {}
        rows += [{**row, "split": "train"}, *([{**row, "split": "eval"}] if step % 10 == 0 else [])]
    return rows


@pytest.mark.parametrize(("steps", "scale", "warning"), [(1, 1.0, None), (60, 1.0, WARNING), (60, 1e5, None)])
def test_training_curves(steps, scale, warning, tmp_path):
    from preflab.training.curves import dpo_curves, sft_curves

    dpo_curves(tmp_path / "d.png", log_rows(steps, True, scale), TITLES[steps > 1], warning)
    sft_curves(tmp_path / "s.png", log_rows(steps, False, scale), TITLES[steps > 1], warning)
    assert (tmp_path / "d.png").exists() and (tmp_path / "s.png").exists()


# --------------------------------------------------------------------------------------------------------- benchmarks


def test_sppo_trait(tmp_path):
    from benchmarks import sppo_trait

    curves = {label: np.random.default_rng(0).random((3, 4, 12)) for label in sppo_trait.LABELS}
    sppo_trait.draw(tmp_path / "s.png", curves, TITLES[1])


def test_cost_growth(tmp_path):
    from benchmarks import cost_growth

    rows = [
        {"processes": p, "max_length": n, "pairs_per_second": 100 / n, "peak_memory_gib": n / 100}
        for p in (1, 2) for n in (64, 128, 256, 1024, 1100)
    ]  # fmt: skip
    cost_growth.draw(tmp_path / "c.png", rows, TITLES[1])
