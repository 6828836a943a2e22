"""Preference pairs out of a study's votes."""

from pathlib import Path

from preflab.human.metrics import counted_votes
from preflab.human.study import COLUMN_OF
from preflab.judging.vote_pairs import Judgement, check_pairs_file, preference_pairs
from utils.artifacts import RowFile, check_writable
from utils.errors import UserError


def pairs_of_study(rows: list[dict], candidates: list[dict], about: dict, study: str, least: float):
    """(rows, counts) of `preference_pairs`; each row has its study and the prompt's category.

    Args:
        rows: from `preflab.human.votes.unblind`.
        candidates, about: from `preflab.human.study.read_study`.
        least: share of a pair's votes that must prefer the chosen answer.

    Raises:
        UserError: the study was made before prompts were recorded as messages.
    """
    if not all("messages" in prompt for prompt in about["prompts"]):
        raise UserError(
            "--pairs: the study's .about.json has no messages of its prompts (an earlier version wrote it); make the"
            " page again with the same command, which keeps the study and its votes valid"
        )
    judgements = []
    # Repeated pairs measure self-consistency; they are not further votes.
    for row in counted_votes(rows):
        if row["outcome"] is not None:
            answers = tuple(candidates[row["prompt"]][COLUMN_OF.get(row[k], row[k])] for k in "ab")
            prompt = about["prompts"][row["prompt"]]["messages"]
            models = (row["a"], row["b"])
            judgements.append(Judgement(row["annotator"], prompt, answers, models, row["outcome"], row["both_bad"]))
    pairs, counts = preference_pairs(judgements, least)
    return [{**pair, "study": study} for pair in pairs], counts


def ensure_own_file(path: Path, study: str, overwrite: bool) -> None:
    """Raise UserError where `path` cannot be written, or holds something other than pairs of this study."""
    check_pairs_file(path)
    check_writable(path.parent, "--pairs")
    if path.exists() and not overwrite and any(_study(row) != study for row in RowFile(path).read()):
        raise UserError(
            f"--pairs {path}: holds other rows than pairs of this study; choose another name, or --overwrite"
        )


def _study(row) -> str | None:
    return row.get("study") if isinstance(row, dict) else None
