"""The held-out pairs of an evaluation: read, tokenised as training does it, and their length bias."""

from pathlib import Path

from utils.comparison import Comparison
from utils.errors import UserError
from utils.length_bias import split_bias
from utils.preferences import PreferenceData, load_pairs, tokenize


def held_out_pairs(comparison: Comparison, tokenizer) -> tuple[PreferenceData, object]:
    """The split to evaluate on: (pairs, their token ids). What was left out is counted in `pairs.dropped`."""
    args = comparison.args
    data = _load(comparison, args.split, args.limit)
    if not data.pairs:
        raise UserError(f"{args.dataset_name} split {args.split}: no pair is left; dropped: {dict(data.dropped)}")
    ids, _ = tokenize(data, tokenizer, args.max_length, args.max_prompt_length, desc=args.split)
    return data, ids


def _load(comparison: Comparison, split: str, limit: int | None) -> PreferenceData:
    args, trained = comparison.args, comparison.trained
    source = {
        "name": args.dataset_name,
        "config": args.dataset_config,
        "revision": args.dataset_revision,
        "split": split,
    }
    return load_pairs(
        [source],
        drop_ties=bool(trained.get("drop_ties")),
        min_score_margin=trained.get("min_score_margin"),
        keep_duplicate_prompts=bool(trained.get("keep_duplicate_prompts", True)),
        plain_as_chat=args.prompt_format == "chat",
        limit=limit,
    )


def length_bias_of_splits(comparison: Comparison, data: PreferenceData, tokenizer, others: list[str]) -> dict:
    """Length bias of the evaluated split and of other splits of the dataset: `{split: split_bias}`.

    Args:
        others: names of further splits. The train split of the run that trained the tuned model comes by itself.
    """
    args, trained = comparison.args, comparison.trained
    own = trained and trained.get("dataset_name") == args.dataset_name and not Path(args.dataset_name).is_file()
    found = {args.split: split_bias(data.pairs, tokenizer, args.seed)}
    for name in [*others, *([trained["dataset_train_split"]] if own else [])]:
        if name not in found:
            found[name] = split_bias(_load(comparison, name, args.limit).pairs, tokenizer, args.seed)
    return found
