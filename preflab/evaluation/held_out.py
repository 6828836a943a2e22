"""The held-out pairs of an evaluation: read, tokenised as training does it, and their length bias."""

from preflab.data.length_bias import split_bias
from preflab.data.preferences import PreferenceData, load_pairs, tokenize
from preflab.evaluation.comparison import Comparison, held_out_sources
from utils.errors import UserError


def held_out_pairs(comparison: Comparison, tokenizer) -> tuple[PreferenceData, object, dict]:
    """The pairs to evaluate on: (pairs, their token ids, how many were cut). What was left out is in `pairs.dropped`.

    The run's own filters apply to the data it held out itself, so that its figures come out again, and to no others.
    """
    args, trained = comparison.args, comparison.trained
    sources, own = held_out_sources(args, trained)
    trained = trained if own else {}
    data = load_pairs(
        sources,
        drop_ties=bool(trained.get("drop_ties")),
        min_score_margin=trained.get("min_score_margin"),
        keep_duplicate_prompts=bool(trained.get("keep_duplicate_prompts", True)),
        plain_as_chat=args.prompt_format == "chat",
        limit=args.limit,
    )
    if not data.pairs:
        named = ", ".join(f"{s['name']} split {s['split']}" for s in sources)
        raise UserError(f"{named}: no pair is left; dropped: {dict(data.dropped)}")
    ids, cut = tokenize(data, tokenizer, args.max_length, args.max_prompt_length, desc="held-out")
    return data, ids, cut


def left_out(data: PreferenceData, cut: dict) -> str:
    """What the filters left out and what was cut, in one line."""
    dropped = ", ".join(f"{reason} {n}" for reason, n in data.dropped.items()) or "nothing"
    parts = ", ".join(f"{cut.get(f'truncated_{p}', 0)} {p}" for p in ("prompt", "chosen", "rejected"))
    return f"{len(data.pairs)} of {data.rows} rows evaluated; left out: {dropped}; cut to fit --max_length: {parts}"


def length_bias(comparison: Comparison, tokenizer, others: list[str]) -> dict:
    """Length bias of the evaluated split and of further ones: `{split: split_bias}`.

    Counted over the rows as the dataset has them, without the run's filters: only pairs that cannot be compared
    (empty or identical answers, broken turns) are left out.

    Args:
        others: names of further splits of the evaluated dataset. The train split of the run that trained the tuned
            model comes by itself, where it can still be read.
    """
    args = comparison.args
    sources, own = held_out_sources(args, comparison.trained)
    wanted = [(source, True) for source in sources]
    wanted += [({**sources[0], "split": split}, True) for split in others]
    if own and not comparison.trained.get("datasets"):
        trained = comparison.trained
        keys = {"name": "dataset_name", "config": "dataset_config", "revision": "dataset_revision"}
        wanted.append(({k: trained.get(v) for k, v in keys.items()} | {"split": trained["dataset_train_split"]}, False))
    found = {}
    for source, must in wanted:
        name = source["split"] if source["name"] == sources[0]["name"] else f"{source['name']} {source['split']}"
        if name in found:
            continue
        try:
            data = load_pairs([source], keep_duplicate_prompts=True, plain_as_chat=True, limit=args.limit)
        except UserError:
            if must:
                raise
            continue
        if data.pairs:
            found[name] = {**split_bias(data.pairs, tokenizer, args.seed), "left_out": dict(data.dropped)}
    return found
