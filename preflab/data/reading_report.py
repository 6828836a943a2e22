"""What a run prints about its rows: wrapped prompts, unused columns, thoughts, and the answers that are trained on."""

from collections import Counter

from preflab.data import prompt_format

# What an item of a split can be, in the plural: keys of a split's summary.
UNITS = ("pairs", "thumbs", "conversations")
# Columns that are named; the others are counted.
NAMED = 8


def unit_of(split: dict) -> str:
    """What an item of a split is, in the plural, from its summary."""
    return next(unit for unit in UNITS if unit in split)


def unused_line(unused: dict) -> list[str]:
    """The columns and message keys that rows hold and nothing reads."""
    if not unused:
        return []
    names = [f"{name} ({count})" for name, count in sorted(unused.items(), key=lambda item: -item[1])]
    further = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"  unused    columns (rows): {', '.join(names[:NAMED])}{further}"]


def template_lines(counts: dict) -> list[str]:
    """What rows hold and the chat template leaves out, and texts that look rendered already."""
    lost = []
    for key, count in sorted(counts.items()):
        owner, _, part = key.partition("_without_")
        if part and count:
            of = {"chosen": "chosen answers", "rejected": "rejected answers"}.get(owner, owner)
            lost.append(f"{part.replace('_', ' ')} of {count} {of}")
    lines = [f"  removed   by the chat template: {', '.join(lost)}"] if lost else []
    if counts.get("rows_with_markers"):
        lines.append(
            f"  markers   {counts['rows_with_markers']} rows spell out turn markers such as <|im_start|> in their text:"
            " is it already rendered?"
        )
    return lines


def pair_lines(train: dict, counts: dict) -> list[str]:
    """Lines about the rows of a run on pairs.

    Args:
        train: the summary of the train split.
        counts: counts of `preferences.tokenize`.
    """
    return [
        f"  prompts   {prompt_format.sentence(Counter(train['prompts']))}",
        *template_lines(counts),
        *unused_line(train["unused"]),
        *_bad_rows_line(train),
    ]


def conversation_lines(train: dict, counts: dict, share: float) -> list[str]:
    """Lines about the rows of a run on conversations.

    Args:
        counts: counts of `conversations.tokenize`.
        share: share of the tokens that are trained on.
    """
    all_answers, trained, excluded = (counts.get(key, 0) for key in ("answers", "answers_trained", "answers_weight_0"))
    rewritten = all_answers - trained - excluded
    reasons = [
        *([f"{excluded} have weight 0"] if excluded else []),
        *([f"{rewritten} earlier ones are rendered differently once turns follow"] if rewritten else []),
    ]
    lines = [
        f"  prompts   {prompt_format.sentence(Counter(train['prompts']))}",
        f"  answers   {trained} of {all_answers} trained on, {share:.1%} of all tokens"
        + (f" ({'; '.join(reasons)})" if reasons else ""),
    ]
    lines += template_lines(counts)
    if counts.get("training_template"):
        lines.append("  template  TRL's training version of this chat template, which renders every turn as generated")
    return [*lines, *unused_line(train["unused"]), *_bad_rows_line(train)]


def _bad_rows_line(train: dict) -> list[str]:
    first = train.get("first_bad_row")
    return [f"  bad rows  {train['dropped'].get('bad_row', 0)} skipped; the first: {first}"] if first else []
