"""The end of a training run: table and verdict on held-out rows; without them, what the training log shows."""

from collections.abc import Callable

from preflab.training.log_keys import TIES_HALF
from utils.power import power_sentence
from utils.stage import Report, fits_terminal
from utils.stats import direction
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
KTO_FIGURES = (
    ("loss per answer", "loss", 1, 4),
    ("estimated KL, nats", "kl", 1, 3),
    ("reward of thumbs up, beta x nats", "rewards/chosen", 1, 4),
    ("reward of thumbs down, beta x nats", "rewards/rejected", 1, 4),
    ("log-prob of thumbs up, nats", "logps/chosen", 1, 2),
    ("log-prob of thumbs down, nats", "logps/rejected", 1, 2),
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


def run_report(
    figures: tuple,
    table_lines: Callable[[dict], list[tuple]],
    verdict_of: Callable[[dict], tuple[bool, str]],
    notes_of: Callable[[dict], list[str]] = lambda metrics: [],
    warning_of: Callable[[dict], str | None] = lambda metrics: None,
) -> Callable[..., Report]:
    """The `render` of a training stage, from its own parts.

    Args:
        figures: of `render_training`.
        table_lines, verdict_of, notes_of, warning_of: give the table, the verdict, the sentences below it ("" is left
            out) and a warning, from the metrics of held-out rows.
    """

    @fits_terminal
    def render(
        metrics: dict, title: str, log: list[dict] | None = None, samples: str | None = None, kept: int = 0
    ) -> Report:
        """The table with verdict, notes and warning below it; without held-out rows, that of the training log.

        Args:
            metrics: of held-out rows, empty without them.
            log: rows of train_log.jsonl.
            samples: the path of samples.md, if it was written.
            kept: train rows whose prompts are in the test split (--train_test_overlap keep).
        """
        if not metrics:
            return render_training(title, log or [], figures, samples)
        verdict, warning = with_kept_overlap(verdict_of(metrics)[1], kept), warning_of(metrics)
        parts = [render_table(title, table_lines(metrics)), verdict, *notes_of(metrics)]
        parts += [f"warning: {warning}"] if warning else []
        return Report("\n\n".join(filter(None, parts)), verdict, warning)

    return render


def accuracy_power(metrics: dict) -> str:
    """What these held-out pairs could have shown, where their reward accuracy is inconclusive; else ""."""
    accuracy = metrics["reward_accuracy"]
    decided = direction(accuracy, metrics["p_reward_accuracy_is_half"]["value"], 0.5)
    return "" if decided else power_sentence(accuracy)


def render_training(title: str, rows: list[dict], figures: tuple, samples: str | None) -> Report:
    """The table of a run without held-out rows.

    Args:
        rows: of train_log.jsonl.
        figures: DPO_FIGURES, KTO_FIGURES, REWARD_FIGURES or SFT_FIGURES.
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
