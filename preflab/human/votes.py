"""Votes exported from the annotation page: read, checked against the study's key, and unblinded."""

import unicodedata
from pathlib import Path

from preflab.data.messages import well_formed
from preflab.human.page import CHOICES, FORMAT, SKIPS, checksum
from utils.artifacts import read_json
from utils.errors import UserError
from utils.parsing import parse_json
from utils.provenance import sha256_of_files, shorten_paths

# Preference of each choice, in steps for the left answer.
STEPS = {"left_much": 2, "left": 1, "tie": 0, "both_bad": 0, "right": -1, "right_much": -2}
# Exactly these fields, as human_eval.js writes them; ms: milliseconds in front of the pair.
FIELDS = {
    "id": str, "choice": str | None, "left_acceptable": bool | None, "right_acceptable": bool | None,
    "skip": str | None, "comment": str, "ms": int,
}  # fmt: skip


def read_votes(paths: list[str]) -> dict[str, dict]:
    """`{file: export}` of one study.

    Raises UserError, naming the file, where it is damaged, edited, without a judged pair, or of another study, and
    where two files are of one annotator: only the user knows which of them counts.
    """
    exports, annotators = {}, {}
    for path in paths:
        export = _read(path)
        _check_form(path, export)
        # Names are typed by hand: "Ada  Li" and "ada li" are one person, and an accent has two forms in Unicode.
        name = " ".join(unicodedata.normalize("NFKC", export["annotator"]).split()).casefold()
        if name in annotators:
            raise UserError(
                f"{path}: annotator {export['annotator']!r} also exported {annotators[name]}; give one file per"
                " annotator, the later export"
            )
        annotators[name] = path
        first = next(iter(exports.values()), export)
        if export["study"] != first["study"]:
            raise UserError(
                f"{path}: from another study ({export['study']!r}) than {paths[0]}; score each study separately"
            )
        exports[path] = export
    return exports


def _read(path: str):
    try:
        # Votes pasted into an editor may begin with a byte order mark.
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the file that the page's Export button saved") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); ask the annotator to export the votes again") from None


def _check_form(path: str, export) -> None:
    keys = {"format": str, "study": str, "annotator": str, "items": int, "votes": list, "checksum": str}
    if not isinstance(export, dict) or export.get("format") != FORMAT:
        raise UserError(f"{path}: not a votes file; give the file that the page's Export button saved")
    for key, kind in keys.items():
        if not isinstance(export.get(key), kind) or isinstance(export.get(key), bool):
            raise UserError(f"{path}: {key!r} is missing or has the wrong type; export the votes again")
    if not export["annotator"].strip():
        raise UserError(f"{path}: the annotator's name is empty; export the votes again with a name")
    for number, vote in enumerate(export["votes"], 1):
        wrong = not isinstance(vote, dict) or set(vote) != set(FIELDS)
        if wrong or not all(isinstance(vote[key], kind) for key, kind in FIELDS.items()):
            raise UserError(f"{path} vote {number}: malformed (a vote has {', '.join(FIELDS)}); export the votes again")
        if vote["choice"] not in (None, *CHOICES) or vote["skip"] not in (None, *SKIPS):
            raise UserError(f"{path} vote {number}: unknown choice or skip reason; export the votes again")
        if vote["choice"] and vote["skip"]:
            raise UserError(f"{path} vote {number}: has both a choice and a skip reason; export the votes again")
    # After the checks of form, because the checksum needs these keys.
    if checksum(export["study"], export["annotator"], export["votes"]) != export["checksum"]:
        raise UserError(f"{path}: edited after the export (the checksum differs); give the file that the page saved")
    # After the checksum, which is over the export as it is. Artifacts are UTF-8.
    export["annotator"] = well_formed(export["annotator"])
    for vote in export["votes"]:
        vote["comment"] = well_formed(vote["comment"])
    # An empty export would count as an annotator in every table.
    if not any(vote["choice"] for vote in export["votes"]):
        raise UserError(f"{path}: {export['annotator']} judged no pair; remove the file from --score")


def unblind(exports: dict[str, dict], key: dict, about: dict) -> list[dict]:
    """One row per vote: annotator, prompt, models, and how strongly `a` was preferred to `b`.

    Returns:
        Rows of `{annotator, id, prompt, category, a, b, a_is_left, preference, outcome, both_bad, a_acceptable,
        b_acceptable, skip, comment, seconds, repeat_of}`. preference: steps for `a` from -2 to 2 (both bad: 0);
        outcome: 1 win, 0 loss, 0.5 tie or both bad. Both are None where the pair has no choice.

    Raises:
        UserError: a vote on a pair that is not in the key, or two votes on one pair; it names the file.
    """
    items = {item["id"]: item for item in key["items"]}
    rank = {name: k for k, name in enumerate(key["models"])}
    rows = []
    for path, export in exports.items():
        seen = set()
        # Before single votes: a page of another size explains unknown ids better than the first of them.
        if export["items"] != len(items):
            raise UserError(
                f"{path}: from a page with {export['items']} pairs, but the key has {len(items)}; give the key of its"
                " study with --key"
            )
        for vote in export["votes"]:
            if vote["id"] not in items:
                raise UserError(
                    f"{path}: vote on {vote['id']!r}, which is not a pair of this study; remove the file from --score"
                )
            if vote["id"] in seen:
                raise UserError(f"{path}: two votes on {vote['id']!r}; export the votes again")
            seen.add(vote["id"])
            rows.append({"annotator": export["annotator"], **_row(vote, items[vote["id"]], rank, about)})
    return rows


def _row(vote: dict, item: dict, rank: dict, about: dict) -> dict:
    # As in battles, `a` is the model named later: tuned against base.
    a, b = sorted((item["left"], item["right"]), key=rank.get, reverse=True)
    a_is_left = item["left"] == a
    preference = outcome = None
    if vote["choice"]:
        # STEPS are for the left answer; the sign turns them to `a`.
        preference = STEPS[vote["choice"]] * (1 if a_is_left else -1)
        # 1, 0.5 or 0: the strength of a preference does not count in win rates.
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
        # `sides` is (side of a, side of b).
        **{f"{model}_acceptable": vote[f"{side}_acceptable"] for model, side in zip("ab", sides, strict=True)},
        "skip": vote["skip"],
        "comment": vote["comment"],
        "seconds": round(vote["ms"] / 1000, 1),
        "repeat_of": item["repeat_of"],
    }


def describe_files(exports: dict[str, dict]) -> dict[str, dict]:
    """`{file: {annotator, sha256}}`: the artifact's record of what was scored."""
    return {
        shorten_paths(path): {"annotator": export["annotator"], "sha256": sha256_of_files([path])}
        for path, export in exports.items()
    }


def ensure_no_votes_lost(path: Path, files: dict[str, dict], overwrite: bool) -> None:
    """Raise UserError where the existing summary at `path` counts annotators that `files` does not."""
    existing = read_json(path).get("votes", {}) if path.exists() and not overwrite else {}
    # By annotator, not by file name: a later export of the same person may have another name.
    given = {file["annotator"] for file in files.values()}
    missing = sorted({file["annotator"] for file in existing.values()} - given)
    if missing:
        raise UserError(
            f"{path}: also counts {', '.join(missing)}; give all votes files together, or choose another folder with"
            " --output_dir, or replace the score with --overwrite"
        )
