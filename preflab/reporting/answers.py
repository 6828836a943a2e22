"""Answers of base and tuned side by side, from the files that hold them."""

from dataclasses import dataclass, field
from pathlib import Path

from preflab.reporting.artifacts import Artifact, RunArtifacts
from preflab.reporting.stages import title_of
from utils.artifacts import read_json
from utils.errors import UserError


@dataclass
class Answer:
    """One model's answer; `cut` where it reached the token limit."""

    model: str
    text: str
    tokens: int | None = None
    cut: bool = False


@dataclass
class SideBySide:
    """A prompt with the answers of several models.

    Attributes:
        source: the title of the stage that generated them.
        prompt: as text.
        category: of the prompt, "" without one.
        outcome: what the judge said, "" where nobody judged.
    """

    source: str
    prompt: str
    answers: list[Answer]
    category: str = ""
    outcome: str = ""


@dataclass
class Answers:
    """Entries to show; `total` by source counts those left out too; `problems` names files that cannot be read."""

    entries: list[SideBySide] = field(default_factory=list)
    total: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def answers_of(run: RunArtifacts, most: int) -> Answers:
    """At most `most` prompts of every stage of a run that generated answers."""
    result = Answers()
    readers = {"battle": _battle, "human_eval_dump": _candidates, "alpacaeval": _alpacaeval}
    for artifact in run.artifacts:
        if artifact.problem or artifact.stage not in readers:
            continue
        try:
            entries = readers[artifact.stage](artifact)
        except UserError as error:
            result.problems.append(str(error))
            continue
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            result.problems.append(f"{artifact.path}: its answers are not as the stage writes them ({error!r})")
            continue
        result.entries += entries[:most]
        if entries:
            result.total[title_of(artifact)] = len(entries)
    return result


def _battle(artifact: Artifact) -> list[SideBySide]:
    entries = []
    for row in artifact.rows:
        answers = [_answer(row[side], row[f"answer_{side}"]) for side in ("a", "b")]
        result = {1: row["a"], 0: row["b"]}.get(row["consistent"], "tie")
        outcome = "no verdict" if row["consistent"] is None else f"judge: {result}"
        category = row.get("category") or ""
        entries.append(SideBySide(title_of(artifact), row["text"], answers[::-1], category, outcome))
    return entries


def _answer(model: str, answer: dict) -> Answer:
    return Answer(str(model), str(answer["text"]), answer.get("tokens"), answer.get("finish_reason") == "length")


def _candidates(artifact: Artifact) -> list[SideBySide]:
    """manual_eval_candidates.json, whose .about.json is the artifact."""
    rows = read_json(artifact.path.with_name(artifact.path.name.replace(".about.json", ".json")))
    about, entries = artifact.summary, []
    for number, row in enumerate(rows):
        answers = []
        for model, counted in about["answers"].items():
            column = "dpo" if model == "tuned" else model
            answers.append(_answer(model, {"text": row[column], **counted[number]}))
        category = about["prompts"][number].get("category") or ""
        entries.append(SideBySide(title_of(artifact), str(row["prompt"]), answers, category))
    return entries


def _alpacaeval(artifact: Artifact) -> list[SideBySide]:
    """The model outputs of both sides, joined by their instruction."""
    sides = {}
    for side in ("base", "tuned"):
        path = Path(artifact.path).with_name(f"model_outputs_{side}.json")
        if path.exists():
            sides[side] = {row["instruction"]: row for row in read_json(path)}
    entries = []
    for instruction in next(iter(sides.values()), {}):
        answers = [
            _answer(side, {**rows[instruction], "text": rows[instruction]["output"]})
            for side, rows in sides.items()
            if instruction in rows
        ]
        category = next(iter(sides.values()))[instruction].get("category") or ""
        entries.append(SideBySide(title_of(artifact), str(instruction), answers, category))
    return entries
