"""Rows with several answers to one prompt and a score, rank or win probability per answer."""

import math

from preflab.data.row_fields import PROMPTS, Fields, Parsed, ensure_no_pictures, read_options, read_prompt
from preflab.data.schemas import LISTS, SCORED, schema_of
from utils.errors import UserError
from utils.parsing import parse_json

# Keys for several answers to one prompt and for a number per answer, as princeton-nlp and UCLA-AGI name them.
CANDIDATE_KEYS = ("all_generated_responses", "responses", "answers", "completions", "generations")
NUMBER_KEYS = {
    "scores": ("all_rm_scores", "rm_scores", "scores", "ratings", "rating"),
    "wins": ("win_probabilities", "win_probability"),
}


def is_list_row(row) -> bool:
    """Whether a row holds a list of answers with a number for each."""
    if not isinstance(row, dict):
        return False
    numbers = any(row.get(key) is not None for keys in NUMBER_KEYS.values() for key in keys)
    return schema_of(row, LISTS) is not None or (numbers and any(row.get(key) is not None for key in CANDIDATE_KEYS))


def parse_list(fields: Fields) -> tuple[Parsed, list[str], list[float]] | str:
    """Read a row of several answers (`is_list_row`); a text is the reason to drop it.

    Empty answers and repetitions of an answer are removed, and counted among the unused columns.

    Returns:
        (parsed, answers, scores), both lists from the best to the worst answer, answers of equal score in the row's
        order; `parsed` has the best and the worst as chosen and rejected answer.

    Raises:
        UserError: answers and numbers do not fit together, or the row has no prompt; the message names row and key.
    """
    row, source = fields.row, fields.source
    fields.take(*CANDIDATE_KEYS)
    fields.take(*(key for keys in NUMBER_KEYS.values() for key in keys))
    answers, numbers = listed(row, source) or (None, None)
    if answers is None:
        answers = candidate_answers(row, source)
        numbers = candidate_numbers(row, len(answers), source)
    (scores,) = numbers.values()
    # The first of equal answers counts.
    first = {text: k for k, text in reversed(list(enumerate(answers))) if text.strip()}
    used = sorted(first.values(), key=lambda k: (-scores[k], k))
    for name, count in (
        ("empty answers", sum(not text.strip() for text in answers)),
        ("repeated answers", sum(bool(text.strip()) for text in answers) - len(first)),
    ):
        if count:
            fields.unused[name] += 1
    if len(used) < 2:
        return "fewer_than_two_answers"
    answers, scores = [answers[k] for k in used], [float(scores[k]) for k in used]
    if scores[0] == scores[-1]:
        return "no_preference"
    parsed = Parsed(answers=[answers[0], answers[-1]], options=read_options(fields))
    parsed.scores = {"score_chosen": scores[0], "score_rejected": scores[-1]}
    ensure_no_pictures(fields)
    read_prompt(fields, parsed, PROMPTS)
    if parsed.prompt is None:
        raise UserError(f"{source}: no known column holds the prompt; name it, e.g. --columns prompt=NAME")
    return parsed, answers, scores


def listed(row: dict, source: str) -> tuple[list[str], dict] | None:
    """(answers, {"scores": one per answer}) of a known ranked or scored layout, None for another one."""
    schema = schema_of(row, (*LISTS, *SCORED))
    if schema is None:
        return None
    column, text, score = schema.items
    try:
        items = row[column] if schema in LISTS else [row]
        answers = [text(item if schema in LISTS else row[column]) for item in items]
        scores = [score(item) for item in items]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: not a row of {schema.name}: {type(error).__name__} {error} in {column!r}") from None
    if not all(isinstance(answer, str) for answer in answers) or not all(map(_is_finite, scores)):
        raise UserError(f"{source}: {schema.name}: {column!r} must hold texts, each with a finite score")
    return answers, {"scores": scores}


def candidate_answers(row: dict, source: str) -> list[str]:
    """The answers of a row: a list under one of CANDIDATE_KEYS, or conversations generate_0, generate_1, ..."""
    key = next((k for k in CANDIDATE_KEYS if row.get(k) is not None), None)
    if key is not None:
        answers = _as_list(row[key])
    else:
        # UCLA-AGI's SPPO data: each column is a conversation that ends with one sampled answer.
        conversations = [row.get(f"generate_{k}") for k in range(100)]
        last_turns = [list(turns)[-1:] for turns in conversations if isinstance(turns, (list, tuple))]
        # None marks a conversation without text, which the check below reports.
        answers = [t[0].get("content") if t and isinstance(t[0], dict) else None for t in last_turns]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(
            f"{source}: no answers; a row holds a list of texts under one of {', '.join(CANDIDATE_KEYS)}, or"
            " conversations generate_0, generate_1, ..."
        )
    return answers


def candidate_numbers(row: dict, count: int, source: str) -> dict:
    """{"scores" or "wins": one number per answer}, or {} if the row has neither."""
    # Scores before wins: scores rank the answers, and the win probabilities follow from them.
    for kind, keys in NUMBER_KEYS.items():
        key = next((k for k in keys if row.get(k) is not None), None)
        if key is not None:
            numbers = _as_list(row[key])
            if len(numbers) != count or not all(_is_finite(x) for x in numbers):
                raise UserError(f"{source}: key {key!r} must hold one finite number for each of the {count} answers")
            return {kind: numbers}
    return {}


def _is_finite(value) -> bool:
    # NaN cannot be ranked: argmax would return it as the best answer.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_list(value) -> list:
    """A list, or the JSON text of one; [] for anything else."""
    try:
        # Some data sets on the hub store lists as JSON text.
        value = parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return []
    return list(value) if isinstance(value, (list, tuple)) else []
