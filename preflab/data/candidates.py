"""Several answers to a prompt, with a score, rank or win probability per answer, out of a dataset."""

import math
from collections import Counter

from preflab.data.prompts import Prompt, distinct_prompts, prompts_summary
from preflab.data.schemas import LISTS, SCORED, schema_of
from utils.errors import UserError
from utils.parsing import parse_json

# Keys for several answers to one prompt and for a number per answer, as princeton-nlp and UCLA-AGI name them.
CANDIDATE_KEYS = ("all_generated_responses", "responses", "answers", "completions", "generations")
NUMBER_KEYS = {
    "scores": ("all_rm_scores", "rm_scores", "scores", "ratings", "rating"),
    "wins": ("win_probabilities", "win_probability"),
}


def load_candidates(sources: list[dict], limit: int | None = None) -> tuple[list[tuple[Prompt, list[str], dict]], dict]:
    """Read rows that hold several answers to a prompt, or one answer with a score (rows of one prompt form a list).

    Args:
        sources: as for `load_prompts`.
        limit: number of prompts.

    Returns:
        (candidates, summary): per prompt (prompt, answers, {"scores" or "wins": numbers} or {}); of rows with several
        answers, duplicate prompts are read once.

    Raises:
        UserError: a row without answers, or whose numbers do not match them; the message names row and key.
    """
    candidates: dict[str, tuple] = {}
    left_out, about = Counter(), []
    for prompt, row in distinct_prompts(sources, candidates, left_out, about, _add_answer):
        # Only here is it known that the rows of the last prompt have ended.
        if limit is not None and len(candidates) >= limit:
            break
        answers, numbers = _listed(row, prompt.source) or (None, None)
        if answers is None:
            answers = _candidate_answers(row, prompt.source)
            numbers = _candidate_numbers(row, len(answers), prompt.source)
        candidates[prompt.prompt_key] = (prompt, answers, numbers)
    return list(candidates.values()), prompts_summary(candidates, left_out, about, sources)


def _listed(row: dict, source: str) -> tuple[list[str], dict] | None:
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


def _add_answer(row: dict, source: str, entry: tuple) -> bool:
    """Add the answer of a row with one scored answer to its prompt's entry; False for rows of other layouts."""
    listed = _listed(row, source) if schema_of(row, SCORED) else None
    if listed:
        entry[1].extend(listed[0])
        entry[2]["scores"].extend(listed[1]["scores"])
    return listed is not None


def _candidate_answers(row: dict, source: str) -> list[str]:
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


def _candidate_numbers(row: dict, count: int, source: str) -> dict:
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
