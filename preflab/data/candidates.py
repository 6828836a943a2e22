"""Several answers to a prompt, with a score, rank or win probability per answer, out of a dataset."""

from collections import Counter

from preflab.data.answer_lists import candidate_answers, candidate_numbers, listed
from preflab.data.prompts import Prompt, distinct_prompts, prompts_summary
from preflab.data.schemas import SCORED, schema_of


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
        answers, numbers = listed(row, prompt.source) or (None, None)
        if answers is None:
            answers = candidate_answers(row, prompt.source)
            numbers = candidate_numbers(row, len(answers), prompt.source)
        candidates[prompt.prompt_key] = (prompt, answers, numbers)
    return list(candidates.values()), prompts_summary(candidates, left_out, about, sources)


def _add_answer(row: dict, source: str, entry: tuple) -> bool:
    """Add the answer of a row with one scored answer to its prompt's entry; False for rows of other layouts."""
    scored = listed(row, source) if schema_of(row, SCORED) else None
    if scored:
        entry[1].extend(scored[0])
        entry[2]["scores"].extend(scored[1]["scores"])
    return scored is not None
