"""What a preference run is made of, by the rows that its loss reads: pairs, ranked lists, or answers with thumbs."""

from collections.abc import Callable
from dataclasses import dataclass

from preflab.training import dpo_report, kto_report
from preflab.training.curves import dpo_curves, kto_curves
from preflab.training.dpo_trainer import ResumableDPOTrainer
from preflab.training.held_out import evaluate_pairs
from preflab.training.kto_trainer import ThumbsTrainer
from preflab.training.list_trainer import RankedListTrainer
from preflab.training.preflight import describe_pairs, describe_thumbs
from preflab.training.splits import load_pair_splits, load_thumb_splits
from preflab.training.thumb_metrics import evaluate_thumbs


@dataclass(frozen=True)
class Family:
    """The parts of a preference run that depend on its rows.

    Attributes:
        unit: what a row is, in the plural.
        load_splits, trainer, describe, evaluate: reading, training, preflight, and held-out metrics.
        render, curves: the report and the picture.
    """

    unit: str
    load_splits: Callable
    trainer: type
    describe: Callable
    evaluate: Callable
    render: Callable
    curves: Callable


_OF_PAIRS = (describe_pairs, evaluate_pairs, dpo_report.render, dpo_curves)
PAIRS = Family("pairs", load_pair_splits, ResumableDPOTrainer, *_OF_PAIRS)
LISTS = Family("lists", load_pair_splits, RankedListTrainer, *_OF_PAIRS)
THUMBS = Family(
    "thumbs", load_thumb_splits, ThumbsTrainer, describe_thumbs, evaluate_thumbs, kto_report.render, kto_curves
)


def family_of(config) -> Family:
    """The family of a run's losses."""
    return THUMBS if config.uses_thumbs else LISTS if config.uses_lists else PAIRS
