"""Votes of a chat: appended to a file, and turned into the preference pairs beside it."""

from itertools import combinations
from pathlib import Path

from preflab.data.messages import check_messages
from preflab.judging.vote_pairs import LEAST_AGREEMENT, Judgement, check_pairs_file, preference_pairs, sentence
from utils.artifacts import RowFile, check_writable, write_rows
from utils.errors import UserError, at_end
from utils.locks import hold, let_go


def votes_path(pairs: Path) -> Path:
    """The votes file of a file of pairs: NAME_votes.jsonl beside NAME.jsonl."""
    return pairs.with_name(f"{pairs.stem}_votes.jsonl")


def read_votes(path: Path) -> list[dict]:
    """The rows of a votes file. Raises UserError, naming file and line, for one that is not a vote."""
    if not path.is_file():
        raise UserError(f"{path}: no such votes file; chat.py writes one beside its pairs, as NAME_votes.jsonl")
    rows = RowFile(path).read()
    for number, row in enumerate(rows, 1):
        _check(row, f"{path} line {number}")
    return rows


def _check(row, source: str) -> None:
    valid = (
        isinstance(row, dict)
        and isinstance(row.get("annotator"), str)
        and isinstance(row.get("both_bad"), bool)
        and isinstance(row.get("answers"), dict)
        and len(row["answers"]) > 1
        and all(isinstance(text, str) for text in row["answers"].values())
        and row.get("winner") in (None, *row["answers"])
        and not (row["winner"] and row["both_bad"])
    )
    if not valid:
        raise UserError(f"{source}: not a vote of chat.py (annotator, prompt, answers, winner, both_bad)")
    check_messages(row.get("prompt"), source, "prompt")


def judgements(rows: list[dict]) -> list[Judgement]:
    """Every two answers of each vote: the winner against each other one; all of them alike without a winner."""
    judged = []
    for row in rows:
        for a, b in combinations(row["answers"], 2):
            if row["winner"] in (None, a, b):
                outcome = {a: 1.0, b: 0.0}.get(row["winner"], 0.5)
                answers = (row["answers"][a], row["answers"][b])
                judged.append(Judgement(row["annotator"], row["prompt"], answers, (a, b), outcome, row["both_bad"]))
    return judged


class VotesFile:
    """The votes of one chat and of those before it, with the pairs out of all of them.

    Args:
        pairs: the file of pairs; votes go beside it.
        run: the run's name, recorded with each vote.

    Raises:
        UserError: an existing votes file is damaged, or `pairs` exists without one and would be overwritten.
    """

    def __init__(self, pairs: Path, annotator: str, least: float = LEAST_AGREEMENT, run: str = ""):
        check_pairs_file(pairs)
        self.pairs, self.file = pairs, RowFile(votes_path(pairs))
        self.annotator, self.least, self.run = annotator, least, run
        self.counts, self.given, self.held = {}, 0, False
        if self.file.path.exists():
            read_votes(self.file.path)
        elif pairs.exists():
            raise UserError(f"--pairs {pairs}: exists, but not with votes of chat.py beside it; choose another name")
        check_writable(pairs.parent, "--pairs")

    def add(self, prompt: list[dict], answers: dict[str, str], winner: str | None, both_bad: bool = False) -> None:
        """Append a vote, and write the pairs of all votes.

        Args:
            answers: `{model: text}`. winner: the preferred model, None for a tie or where both are bad.

        Raises:
            UserError: another chat votes into this file.
        """
        if not self.held:
            path = self.file.path.with_name(f".{self.file.path.stem}.lock")
            lock = hold(path, str(self.file.path), "choose another file with --pairs, and join them with --score")
            at_end(lambda: let_go(lock))
            self.held = True
        vote = {"annotator": self.annotator, "prompt": prompt, "answers": answers, "winner": winner}
        self.file.append({**vote, "both_bad": both_bad, "run": self.run})
        self.given += 1
        rows, self.counts = preference_pairs(judgements(self.file.read()), self.least)
        # Also without rows: a vote may have changed the only one.
        if rows or self.pairs.exists():
            write_rows(self.pairs, rows)

    def closing(self) -> str:
        """What the votes of this chat became; "" without any."""
        return f"\n{sentence(self.counts, self.pairs, self.least)}\nvotes: {self.file.path}\n" if self.given else ""


def score(files: list[str], pairs: Path, least: float, overwrite: bool) -> str:
    """Write the pairs out of several votes files; the text to print.

    Raises:
        UserError: a file is missing, damaged or given twice, `pairs` exists, or no pair is left.
    """
    if len({Path(file).resolve() for file in files}) < len(files):
        raise UserError("--score: a file is given twice")
    check_pairs_file(pairs)
    if pairs.exists() and not overwrite:
        raise UserError(f"--pairs {pairs}: exists; choose another name, or --overwrite it")
    check_writable(pairs.parent, "--pairs")
    rows, counts = preference_pairs(judgements([row for file in files for row in read_votes(Path(file))]), least)
    text = sentence(counts, pairs, least)
    if not rows:
        raise UserError(f"--score: {text}")
    write_rows(pairs, rows)
    return text
