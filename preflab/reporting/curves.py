"""The training curves of several runs in one picture."""

from preflab.training.curves import smooth
from preflab.training.log_keys import PAIR_MEAN, TIES_HALF
from utils.plots import empty_panel, figure, save, shorten

# Panels of preference runs, SFT runs and reward models: (title, key of train_log.jsonl, unit, scale).
PREFERENCE = (
    ("Loss", "loss", "loss per pair", 1),
    ("Reward accuracy", TIES_HALF, "accuracy (%, ties half)", 100),
    ("Reward margin", "rewards/margins", "margin (beta × nats)", 1),
    ("Log-probability of chosen", "logps/chosen", "log-probability (nats)", 1),
)
SFT = (
    ("SFT: loss", "loss", "loss (nats per token)", 1),
    ("SFT: token ranked first", "mean_token_accuracy", "accuracy (%)", 100),
)
REWARDS = (
    ("Reward model: loss", "loss", "loss (nats per pair)", 1),
    ("Reward model: accuracy", "accuracy", "chosen ranked higher (%)", 100),
)
# Okabe and Ito's palette, distinguishable with colour-vision deficiency.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d1f")
MOST_RUNS = len(COLOURS)


def draw(path, logs: dict[str, tuple[str, list[dict]]], title: str) -> None:
    """Draw running means over the steps of every run, with dots at the evaluations.

    Args:
        logs: `{run: (kind, rows of train_log.jsonl)}`, kind train, sft or reward_model; at most MOST_RUNS are drawn.
        title: of the picture.
    """
    logs = dict(list(logs.items())[:MOST_RUNS])
    kinds = {kind for kind, _ in logs.values()}
    panels = [("train", *panel) for panel in PREFERENCE if "train" in kinds]
    panels += [("sft", *panel) for panel in SFT if "sft" in kinds]
    panels += [("reward_model", *panel) for panel in REWARDS if "reward_model" in kinds]
    fig, axes = figure(-(-len(panels) // 2), 2, title)
    for ax, (kind, name, key, unit, scale) in zip(axes, panels, strict=True):
        drawn = False
        for colour, (run, (of_kind, rows)) in zip(COLOURS, logs.items(), strict=False):
            if of_kind == kind:
                drawn |= _curve(ax, rows, key, scale, colour, shorten(run))
        ax.set(xlabel="optimizer step", ylabel=unit, title=name)
        if drawn:
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend()
        else:
            empty_panel(ax, "not logged")
    save(fig, path)


def _curve(ax, rows: list[dict], key: str, scale: float, colour: str, label: str) -> bool:
    """Draw one run's metric; whether it has any."""
    train = [(r["step"], scale * r[key]) for r in rows if r.get("split") == "train" and r.get(key) is not None]
    evaluated = [(r["step"], r.get(key + PAIR_MEAN, r.get(key))) for r in rows if r.get("split") == "eval"]
    evaluated = [(step, scale * value) for step, value in evaluated if value is not None]
    if train:
        steps, values = zip(*train, strict=True)
        ax.plot(steps, smooth(list(values)), color=colour, lw=1.6, label=label)
    if evaluated:
        ax.plot(*zip(*evaluated, strict=True), "o", color=colour, mec="black", ms=5, label=None if train else label)
    return bool(train or evaluated)
