"""The end of a run without held-out rows: what its training log shows, and how to hold rows out."""

from preflab.training.log_keys import TIES_HALF
from utils.stage import Report
from utils.tables import number, paragraphs
from utils.tables import render as render_table

# Label, key of train_log.jsonl, scale, digits.
DPO_FIGURES = (
    ("loss per pair", "loss", 1, 4),
    ("reward accuracy, % (ties half)", TIES_HALF, 100, 1),
    ("reward margin, beta x nats", "rewards/margins", 1, 4),
    ("log-prob of chosen, nats", "logps/chosen", 1, 2),
    ("log-prob of rejected, nats", "logps/rejected", 1, 2),
)
REWARD_FIGURES = (
    ("loss per pair", "loss", 1, 4),
    ("chosen ranked higher, %", "accuracy", 100, 1),
    ("margin, chosen - rejected, log-odds", "margin", 1, 4),
    ("mean reward", "mean_reward", 1, 4),
)
SFT_FIGURES = (
    ("loss, nats per token", "loss", 1, 4),
    ("token ranked first, %", "mean_token_accuracy", 100, 1),
    ("entropy of the next token, nats", "entropy", 1, 3),
)
NO_HELD_OUT_ROWS = (
    "No claim: no test split, so these figures are of the rows trained on. --test_rows N holds rows out of the train"
    " split; --dataset_test_split NAME or --test_dataset_name names a test split."
)


def with_kept_overlap(verdict: str, kept: int) -> str:
    """A verdict on held-out rows, preceded by what is not held out.

    Args:
        kept: number of train rows whose prompts are in the test split.
    """
    if not kept:
        return verdict
    rows = "1 train row has a prompt" if kept == 1 else f"{kept} train rows have prompts"
    return f"PARTLY NOT HELD OUT: {rows} of the test split (--train_test_overlap keep). ({verdict})"


def first_and_last_tenth(rows: list[dict], key: str) -> tuple[float, float] | None:
    """Means of `key` over the first and the last tenth of the logged training steps; None where it was not logged."""
    values = [row[key] for row in rows if row["split"] == "train" and row.get(key) is not None]
    tenth = max(1, len(values) // 10)
    return (sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth) if values else None


def render_training(title: str, rows: list[dict], figures: tuple, samples: str | None) -> Report:
    """The table of a run without held-out rows.

    Args:
        rows: of train_log.jsonl.
        figures: DPO_FIGURES, REWARD_FIGURES or SFT_FIGURES.
        samples: the path of samples.md; None where none was written.
    """
    steps = sum(row["split"] == "train" for row in rows)
    tenth = max(1, steps // 10)
    many = f"{tenth} logged steps" if tenth > 1 else "step"
    lines = [(f"training, {steps} logged steps", f"first {many}", f"last {many}", "change")]
    for label, key, scale, digits in figures:
        means = first_and_last_tenth(rows, key)
        if means:
            first, last = (scale * mean for mean in means)
            lines.append((label, number(first, digits), number(last, digits), number(last - first, digits, "+")))
    parts = [render_table(title, lines), NO_HELD_OUT_ROWS]
    if samples:
        parts.append(f"Answers of base and tuned model to prompts of the train split: {samples}")
    return Report(paragraphs("\n\n".join(parts)), NO_HELD_OUT_ROWS)
