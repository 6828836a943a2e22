"""What a run prints about its rows: wrapped prompts, unused columns, thoughts, and the answers that are trained on."""

from collections import Counter

from preflab.data import prompt_format

# Columns that are named; the others are counted.
NAMED = 8


def unused_line(unused: dict) -> list[str]:
    """The columns and message keys that rows hold and nothing reads."""
    if not unused:
        return []
    names = [f"{name} ({count})" for name, count in sorted(unused.items(), key=lambda item: -item[1])]
    further = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"  unused    columns (rows): {', '.join(names[:NAMED])}{further}"]


def pair_lines(train: dict, counts: dict) -> list[str]:
    """Lines about the rows of a run on pairs.

    Args:
        train: the summary of the train split.
        counts: counts of `preferences.tokenize`.
    """
    lost = [
        f"{counts[key]} {name}"
        for key, name in (
            ("chosen_without_thoughts", "chosen answers"),
            ("rejected_without_thoughts", "rejected answers"),
            ("prompts_without_thoughts", "prompts"),
        )
        if counts.get(key)
    ]
    thoughts = [f"  thoughts  the chat template removes them from {', '.join(lost)}"] if lost else []
    return [
        f"  prompts   {prompt_format.sentence(Counter(train['prompts']))}",
        *thoughts,
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
        f"  answers   {trained} of {all_answers} trained on, {share:.1%} of all tokens"
        + (f" ({'; '.join(reasons)})" if reasons else "")
    ]
    if counts.get("answers_without_thoughts"):
        lost = counts["answers_without_thoughts"]
        lines.append(f"  thoughts  the chat template removes them from {lost} of {all_answers} answers")
    if counts.get("training_template"):
        lines.append("  template  TRL's training version of this chat template, which renders every turn as generated")
    return [*lines, *unused_line(train["unused"]), *_bad_rows_line(train)]


def _bad_rows_line(train: dict) -> list[str]:
    first = train.get("first_bad_row")
    return [f"  bad rows  {train['dropped'].get('bad_row', 0)} skipped; the first: {first}"] if first else []
