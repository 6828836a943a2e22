"""The held-out pairs of an evaluation: reading, tokenisation as in training, and length bias."""

from dataclasses import replace

from preflab.data.length_bias import split_bias
from preflab.data.preferences import PreferenceData, load_pairs, tokenize
from preflab.data.prompt_format import AS_CHAT, PromptFormat
from preflab.evaluation.comparison import Comparison, held_out_sources
from preflab.evaluation.trained_prompts import REASON, without_trained
from utils.errors import UserError, is_main_process
from utils.provenance import ROOT


def held_out_pairs(comparison: Comparison, tokenizer) -> tuple[PreferenceData, object, dict]:
    """Load and tokenise the pairs to evaluate on.

    The filters of the training run apply only to data that the run held out itself, so that its own metrics are
    reproduced; of other data, only pairs whose prompt was trained on are left out.

    Returns:
        (pairs, token ids, truncation): `pairs.dropped` counts the rows left out, `truncation` the truncated parts.

    Raises:
        UserError: no pair is left.
    """
    args, trained = comparison.args, comparison.trained
    sources, own = held_out_sources(args, trained)
    # {} makes every filter below take its neutral value.
    trained = trained if own else {}
    data = load_pairs(
        sources,
        drop_ties=bool(trained.get("drop_ties")),
        min_score_margin=trained.get("min_score_margin"),
        # Training drops duplicate prompts by default; other data keep them.
        keep_duplicate_prompts=bool(trained.get("keep_duplicate_prompts", True)),
        prompt_format=PromptFormat.of(args.prompt_format, tokenizer),
        limit=args.limit,
    )
    if not data.pairs:
        named = ", ".join(f"{s['name']} split {s['split']}" for s in sources)
        raise UserError(f"{named}: no pair is left; dropped: {dict(data.dropped)}")
    check = without_trained(comparison, data.pairs, own, "pairs")
    data.pairs, data.trained_on, data.not_held_out = check.items, check.note, check.not_held_out
    if check.dropped:
        data.dropped[REASON] += check.dropped
    ids, truncation = tokenize(data, tokenizer, args.max_length, args.max_prompt_length, desc="held-out")
    return data, ids, truncation


SHIPPED_PAIRS = "data/quickstart_prefs"


def shipped_pairs(tokenizer, max_length: int, max_prompt_length: int, limit: int | None) -> tuple:
    """The test pairs that come with this project, for checks that any text can serve. Returns (pairs, token ids).

    A model without a chat template gets the last user turn as plain text.
    """
    source = {"name": str(ROOT / SHIPPED_PAIRS), "split": "test", "config": None, "revision": None}
    data = load_pairs([source], keep_duplicate_prompts=True, limit=limit)
    if not tokenizer.chat_template:
        data.pairs = [replace(pair, messages=None, text=f"{pair.messages[-1]['content']}\n") for pair in data.pairs]
    return data, tokenize(data, tokenizer, max_length, max_prompt_length, desc="shipped pairs")[0]


def left_out(data: PreferenceData, truncation: dict) -> str:
    """One line: how many rows were evaluated, dropped and truncated."""
    dropped = ", ".join(f"{reason} {n}" for reason, n in data.dropped.items()) or "nothing"
    parts = ", ".join(f"{truncation.get(f'truncated_{p}', 0)} {p}" for p in ("prompt", "chosen", "rejected"))
    counts = f"{len(data.pairs)} of {data.rows} rows evaluated; left out: {dropped}; truncated to --max_length: {parts}"
    return f"{counts}\n{data.trained_on}" if data.trained_on else counts


def length_bias(comparison: Comparison, tokenizer, further_splits: list[str]) -> dict:
    """Length bias per split: `{split: split_bias}` on rank 0, `{}` on other ranks.

    Counted over the rows of the dataset without the run's filters; only pairs that cannot be compared (empty or
    identical answers, invalid turns) are left out. The evaluated splits come first, then `further_splits` of the same
    dataset, then the train split of the run that trained the tuned model, if it can still be read.

    Raises:
        UserError: one of the evaluated or further splits cannot be read.
    """
    if not is_main_process():
        return {}
    args, trained = comparison.args, comparison.trained
    sources, own = held_out_sources(args, trained)
    requested = [*sources, *({**sources[0], "split": split} for split in further_splits)]
    optional = []
    # A mixture has no single train split to name.
    if own and not trained.get("datasets"):
        keys = {"name": "dataset_name", "config": "dataset_config", "revision": "dataset_revision"}
        optional = [{k: trained.get(v) for k, v in keys.items()} | {"split": trained["dataset_train_split"]}]
    biases = {}
    for source in [*requested, *optional]:
        # Splits of another dataset carry its name, so that equal split names do not collide.
        name = source["split"] if source["name"] == sources[0]["name"] else f"{source['name']} {source['split']}"
        if name in biases:
            continue
        try:
            data = load_pairs([source], keep_duplicate_prompts=True, prompt_format=AS_CHAT, limit=args.limit)
        except UserError:
            # The train split may have been moved since the run.
            if source in requested:
                raise
            continue
        if data.pairs:
            biases[name] = {**split_bias(data.pairs, tokenizer, args.seed), "left_out": dict(data.dropped)}
    return biases
