"""Which figures of each stage a card shows, base beside tuned."""

from dataclasses import dataclass

from preflab.reporting.artifacts import Artifact
from preflab.reporting.stages import lc_name, task_label

MARK = "†"


@dataclass(frozen=True)
class Figure:
    """A line of a stage's table.

    Attributes:
        label: with its unit.
        base, tuned, change, p: keys of the metrics below the summary, None where a figure has none of them.
        scale, digits: how it is shown.
        judged: whether a judge's verdicts decide it.
        index: name in the model index, "" for figures that are not listed there.
    """

    label: str
    tuned: tuple
    base: tuple | None = None
    change: tuple | None = None
    p: tuple | None = None
    scale: float = 1
    digits: int = 1
    judged: bool = False
    index: str = ""


def _m(name: str | None) -> tuple | None:
    return name and ("metrics", name)


def _sides(label: str, stem: str, scale: float, digits: int) -> Figure:
    names = (f"{stem}_{side}" for side in ("tuned", "base", "difference"))
    return Figure(label, *map(_m, names), _m(f"p_{stem}_difference"), scale, digits, index=f"{stem}_tuned")


def _rewards(accuracy: str, margin: str) -> list[Figure]:
    p = {"reward_accuracy": "p_reward_accuracy_is_half", "win_rate_ties_half": "p_win_rate_is_half"}[accuracy]
    return [
        Figure("reward accuracy, % (ties half)", _m(accuracy), p=_m(p), scale=100, index=accuracy),
        _sides("likelier answer is chosen, %", "likelihood_ranking", 100, 1),
        Figure("reward margin, beta × nats", _m(margin), p=_m(f"p_{margin}_is_0"), digits=3, index=margin),
        _sides("log-prob of chosen, nats", "logps_chosen", 1, 2),
        _sides("log-prob of rejected, nats", "logps_rejected", 1, 2),
    ]


def _perplexity(stem: str, label: str) -> Figure:
    names = (f"{stem}_ppl_{side}" for side in ("tuned", "base", "difference"))
    return Figure(label, *map(_m, names), _m(f"p_{stem}_nll_difference"), 1, 3, index=f"{stem}_ppl_tuned")


FIGURES = {
    "train": [
        *_rewards("reward_accuracy", "reward_margin"),
        Figure("bag-of-words and length baseline, %", _m("surface_classifier_accuracy"), scale=100),
    ],
    "sft": [_perplexity("heldout", "perplexity per token")],
    "merge": [
        Figure("adapter and merged folder prefer the same answer, %", _m("same_preference"), scale=100),
        Figure("merged - adapter, nats per answer", _m("mean_difference"), digits=5),
    ],
    "win_rate": _rewards("win_rate_ties_half", "avg_margin"),
    "perplexity": [
        _perplexity("response_chosen", "perplexity of chosen answers"),
        _perplexity("response_rejected", "perplexity of rejected answers"),
        _perplexity("text", "perplexity of plain text"),
        Figure("KL(tuned ‖ base) on chosen answers, nats per token", _m("kl_chosen"), digits=4, index="kl_chosen"),
    ],
    "battle": [
        Figure("wins, % (ties half)", _m("win_rate"), p=_m("p_win_rate_is_half"), scale=100, judged=True,
               index="win_rate"),
        Figure("the same under the control `longer`, %", _m("longer_win_rate"), scale=100),
        Figure("the same under the control `random`, %", _m("random_win_rate"), scale=100),
        Figure("verdict changes with the order of the answers, %", _m("flip_rate"), scale=100),
    ],
}  # fmt: skip


def figures_of(artifact: Artifact) -> list[Figure]:
    """The figures of a summary that it really has, in the order of the card."""
    if artifact.stage == "alpacaeval":
        wanted = _alpacaeval(artifact)
    elif artifact.stage == "lm_eval":
        wanted = _lm_eval(artifact)
    elif artifact.stage == "human_eval":
        wanted = [
            Figure(f"people: {match['a']} wins against {match['b']}, % (ties half)",
                   ("matches", k, "metrics", "win_rate"), p=("matches", k, "metrics", "p_win_rate_is_half"), scale=100)
            for k, match in enumerate(artifact.summary.get("matches") or [])
        ]  # fmt: skip
    else:
        wanted = FIGURES.get(artifact.stage, [])
    return [figure for figure in wanted if metric_at(artifact.summary, figure.tuned) is not None]


def _alpacaeval(artifact: Artifact) -> list[Figure]:
    figures = []
    for name, label in (
        (lc_name(artifact.metrics), "length-controlled win rate, %"),
        ("win_rate", "win rate, %"),
        ("avg_length", "answer length, characters"),
        ("longer_win_rate", "win rate under the control `longer`, %"),
        ("random_win_rate", "win rate under the control `random`, %"),
    ):
        keys = (f"{side}_{name}" for side in ("tuned", "base", "difference"))
        judged = name.endswith("winrate") or name == "win_rate"
        digits = 0 if name == "avg_length" else 1
        index = f"tuned_{name}" if judged else ""
        figures.append(Figure(label, *map(_m, keys), _m(f"p_difference_{name}"), 1, digits, judged, index))
    return figures


def _lm_eval(artifact: Artifact) -> list[Figure]:
    figures = []
    for k, row in enumerate(artifact.summary.get("rows") or []):
        if not row.get("top"):
            continue
        keys = (("rows", k, key) for key in ("tuned", "base", "difference", "p_holm"))
        figures.append(Figure(task_label(row), *keys, 1, 4, index=f"{row['task']}/{row['metric']},{row['filter']}"))
    return figures


def metric_at(summary: dict, keys: tuple | None) -> dict | None:
    """The metric under `keys`, None where there is none, or no value."""
    value = summary
    for key in keys or ("",):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value if isinstance(value, dict) and value.get("value") is not None else None
