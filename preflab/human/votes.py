"""Votes of the human-evaluation page: read, checked against the study's key, and unblinded."""

import json
from pathlib import Path

from preflab.human.page import CHOICES, FORMAT, SKIPS, checksum
from utils.errors import UserError

# Steps of preference for the left answer.
STEPS = {"left_much": 2, "left": 1, "tie": 0, "both_bad": 0, "right": -1, "right_much": -2}
FIELDS = {
    "id": str, "choice": str | None, "left_acceptable": bool | None, "right_acceptable": bool | None,
    "skip": str | None, "comment": str, "ms": int,
}  # fmt: skip


def read_votes(paths: list[str]) -> dict[str, dict]:
    """`{file: export}` of one study. UserError names a file that is damaged, edited, empty or of another study.

    Two files of one annotator are refused: which of them counts is for a person to say.
    """
    found, annotators = {}, {}
    for path in paths:
        export = _read(path)
        _check_form(path, export)
        name = " ".join(export["annotator"].split()).casefold()
        if name in annotators:
            raise UserError(
                f"{path}: annotator {export['annotator']!r} is that of {annotators[name]} too; give one file an"
                " annotator, the later one if the other is an earlier export"
            )
        annotators[name] = path
        first = next(iter(found.values()), export)
        if export["study"] != first["study"]:
            raise UserError(f"{path}: of another dump (study {export['study']!r}) than {paths[0]}; score them apart")
        found[path] = export
    return found


def _read(path: str):
    try:
        # An editor may have put a byte order mark in front of votes that were copied into it.
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give what the page's export button saved") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); ask the annotator to export the votes again") from None


def _check_form(path: str, export) -> None:
    keys = {"format": str, "study": str, "annotator": str, "items": int, "votes": list, "checksum": str}
    if not isinstance(export, dict) or export.get("format") != FORMAT:
        raise UserError(f"{path}: no votes file; give what the page's export button saved")
    for key, kind in keys.items():
        if not isinstance(export.get(key), kind) or isinstance(export.get(key), bool):
            raise UserError(f"{path}: {key!r} is missing or of a wrong type; export the votes again")
    if not export["annotator"].strip():
        raise UserError(f"{path}: the annotator has no name; export the votes again under one")
    for number, vote in enumerate(export["votes"], 1):
        wrong = not isinstance(vote, dict) or set(vote) != set(FIELDS)
        if wrong or not all(isinstance(vote[key], kind) for key, kind in FIELDS.items()):
            raise UserError(f"{path} vote {number}: malformed (a vote has {', '.join(FIELDS)}); export the votes again")
        if vote["choice"] not in (None, *CHOICES) or vote["skip"] not in (None, *SKIPS):
            raise UserError(f"{path} vote {number}: unknown choice or reason; export the votes again")
        if vote["choice"] and vote["skip"]:
            raise UserError(f"{path} vote {number}: both judged and skipped; export the votes again")
    if checksum(export["study"], export["annotator"], export["votes"]) != export["checksum"]:
        raise UserError(f"{path}: edited after its export (the checksum differs); give the file that the page saved")
    if not any(vote["choice"] for vote in export["votes"]):
        raise UserError(f"{path}: {export['annotator']} has judged no pair; leave the file out")


def unblind(exports: dict[str, dict], key: dict, about: dict) -> list[dict]:
    """One row a vote: who, which prompt, which models, and how far `a` was preferred to `b`.

    Returns:
        Rows of `{annotator, id, prompt, category, a, b, a_is_left, preference, outcome, both_bad, a_acceptable,
        b_acceptable, skip, comment, seconds, repeat_of}`. preference: steps for `a` from -2 to 2 (both bad: 0);
        outcome: 1 win, 0 loss, 0.5 tie or both bad; both None where the pair was skipped or only marked.

    Raises UserError, naming the file, for a vote on no pair of the key, or two votes on one.
    """
    items = {item["id"]: item for item in key["items"]}
    rank = {name: k for k, name in enumerate(key["models"])}
    rows = []
    for path, export in exports.items():
        seen = set()
        if export["items"] != len(items):
            raise UserError(
                f"{path}: of a page with {export['items']} pairs, the key has {len(items)}: of another dump; give --key"
            )
        for vote in export["votes"]:
            if vote["id"] not in items:
                raise UserError(
                    f"{path}: vote on {vote['id']!r}, no pair of this study: of another dump; leave the file out"
                )
            if vote["id"] in seen:
                raise UserError(f"{path}: two votes on {vote['id']!r}; export the votes again")
            seen.add(vote["id"])
            rows.append({"annotator": export["annotator"], **_row(vote, items[vote["id"]], rank, about)})
    return rows


def _row(vote: dict, item: dict, rank: dict, about: dict) -> dict:
    # As battles have it: the later model against the earlier, tuned against base.
    a, b = sorted((item["left"], item["right"]), key=rank.get, reverse=True)
    a_is_left = item["left"] == a
    preference = outcome = None
    if vote["choice"]:
        preference = STEPS[vote["choice"]] * (1 if a_is_left else -1)
        outcome = 0.5 + 0.5 * ((preference > 0) - (preference < 0))
    sides = ("left", "right") if a_is_left else ("right", "left")
    return {
        "id": item["id"],
        "prompt": item["prompt"],
        "category": about["prompts"][item["prompt"]]["category"],
        "a": a,
        "b": b,
        "a_is_left": a_is_left,
        "preference": preference,
        "outcome": outcome,
        "both_bad": vote["choice"] == "both_bad",
        **{f"{one}_acceptable": vote[f"{side}_acceptable"] for one, side in zip("ab", sides, strict=True)},
        "skip": vote["skip"],
        "comment": vote["comment"],
        "seconds": round(vote["ms"] / 1000, 1),
        "repeat_of": item["repeat_of"],
    }
