"""A blind study of answers: the pairs to judge, the side of each model, and the key that unblinds the votes."""

import math
import random
import secrets
from pathlib import Path

from preflab.data.prompts import Prompt
from preflab.human.page import answer as answer_html
from preflab.human.page import build_page, conversation
from preflab.judging.battles import pairings
from utils.artifacts import dumps, read_json, write_json, write_text
from utils.errors import UserError
from utils.provenance import sha256_of
from utils.tables import answer_label, side_by_side

# Column of each model in the candidates' file; other models are columns of their own name.
COLUMN_OF = {"base": "base", "tuned": "dpo"}
# Column of the candidates' file that lists the columns whose answer was cut off at the token limit.
TRUNCATED = "truncated"
STEMS = ("manual_eval_candidates", "human_eval", "human_eval_key")
KEY_FIELDS = {"study", "models", "items", "identical", "candidates", "candidates_sha256", "limit"}


def candidates(prompts: list[Prompt], answers: dict[str, list[dict]]) -> list[dict]:
    """`{prompt, base, dpo, ..., truncated}` per prompt: each model's answer, and the columns of those cut off."""
    columns = {name: COLUMN_OF.get(name, name) for name in answers}
    return [
        {
            "prompt": prompt.text,
            **{column: answers[name][k]["text"] for name, column in columns.items()},
            TRUNCATED: [column for name, column in columns.items() if is_cut_off(answers[name][k])],
        }
        for k, prompt in enumerate(prompts)
    ]


def is_cut_off(answer: dict) -> bool:
    """Whether generation of an answer ended at the token limit; False where it is not known."""
    return answer.get("finish_reason") == "length"


def candidates_markdown(title: str, rows: list[dict]) -> str:
    """The candidates side by side, under the models' names."""
    entries = [
        (
            str(k),
            row["prompt"],
            {
                answer_label(name, name in row[TRUNCATED]): text
                for name, text in _without_marks(row).items()
                if name != "prompt"
            },
        )
        for k, row in enumerate(rows, 1)
    ]
    return side_by_side(title, entries, "Not blind: each answer is shown under its model's name.")


# ------------------------------------------------------------------------------------------------------------ layout


def plan(answers: dict[str, list[dict]], pairs_per_prompt: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Which two models meet on which prompt; the counts of the pairings differ by at most one.

    Args:
        answers: `{model: [{text, ...}]}`, one entry per prompt.

    Returns:
        (pairs, identical), each of `{prompt, a, b}`: pairs to judge, and pairs whose two answers are the same text.
    """
    matches, count = pairings(list(answers), None), len(next(iter(answers.values())))
    if pairs_per_prompt > len(matches):
        raise UserError(
            f"--pairs_per_prompt {pairs_per_prompt}: {len(answers)} models make only {len(matches)} pairings"
        )
    # A random permutation, so that the fixed cycle of pairings does not coincide with an order in the data.
    order = rng.sample(range(count), count)
    # Pairings are dealt out in turn over the shuffled prompts.
    planned = [(prompt, matches[(k * pairs_per_prompt + j) % len(matches)]) for k, prompt in enumerate(order)
               for j in range(pairs_per_prompt)]  # fmt: skip
    pairs, identical = [], []
    for prompt, (a, b) in sorted(planned):
        same = answers[a][prompt]["text"] == answers[b][prompt]["text"]
        (identical if same else pairs).append({"prompt": prompt, "a": a, "b": b})
    return pairs, identical


def lay_out(pairs: list[dict], repeat_share: float, seed: int, salt: str = "") -> list[dict]:
    """The pairs in the page's order: `{id, prompt, left, right, repeat_of}` each.

    Sides are balanced along the page: of every two successive pairs of one pairing, one shows its first model on the
    left and one on the right. `repeat_share` of the pairs is repeated with sides swapped, at least half a page after
    the first time. Ids are hashes of seed and salt, so that they reveal nothing without the key's salt.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(pairs)), len(pairs))
    # `pending` holds, per pairing, the side of the next pair: the opposite of the one before it.
    items, repeats, pending = [], [], {}
    for place, k in enumerate(order):
        pair = pairs[k]
        match = (pair["a"], pair["b"])
        # The first pair of every two draws a side and leaves it in `pending`; the second takes the opposite and removes
        # it.
        left_first = not pending.pop(match) if match in pending else pending.setdefault(match, rng.random() < 0.5)
        left, right = match if left_first else match[::-1]
        item = {"id": _opaque_id(seed, salt, k), "prompt": pair["prompt"]}
        # (position, item): repeats get positions between these, so one sort at the end orders the page.
        items.append((place, {**item, "left": left, "right": right, "repeat_of": None}))
    # Only pairs of the first half can be repeated half a page later.
    half = len(pairs) // 2
    for place in rng.sample(range(half), min(half, math.ceil(repeat_share * len(pairs)))):
        first = items[place][1]
        # A number above those of the pairs, so that the id is new; as a hash, it does not show which pairs are repeats.
        repeat = {"id": _opaque_id(seed, salt, len(pairs) + place), "prompt": first["prompt"]}
        repeat |= {"left": first["right"], "right": first["left"], "repeat_of": first["id"]}
        # + 0.5: behind the pair at the drawn position, never at the same sort key as a pair.
        repeats.append((rng.randrange(place + half, len(pairs)) + 0.5, repeat))
    # Two repeats may draw the same position; their ids decide.
    return [item for _, item in sorted([*items, *repeats], key=lambda entry: (entry[0], entry[1]["id"]))]


def _opaque_id(seed: int, salt: str, number: int) -> str:
    return sha256_of(f"{seed} {number}", salt)[:12]


def page(key: dict, prompts: list[Prompt], answers: dict[str, list[dict]]) -> str:
    """The study's HTML page: the key's ids in order with prompts and answers, and nothing else from the key."""

    def shown(answer: dict) -> str:
        return answer_html(answer["text"], is_cut_off(answer))

    items = [
        {
            "id": item["id"],
            "prompt": conversation(prompts[item["prompt"]].messages),
            **{side: shown(answers[item[side]][item["prompt"]]) for side in ("left", "right")},
        }
        for item in key["items"]
    ]
    return build_page(key["study"], "Which answer is better?", items)


# ------------------------------------------------------------------------------------------------------------- files


def write_study(paths: dict[str, Path], prompts, answers, title: str, about: dict, settings: dict, overwrite: bool):
    """Write candidates, page and key. The same study keeps its key, so that existing votes stay valid.

    Args:
        paths: of `candidates`, `page` and `key`.
        about: what made the answers, for the candidates' .about.json.
        settings: pairs_per_prompt, repeat_share, limit, sides_seed (None: that of an existing key, else drawn).

    Returns:
        The key.

    Raises:
        UserError: the key's path holds another study's key, unless `overwrite`; or no pair of answers differs.
    """
    rows = candidates(prompts, answers)
    content = dumps(rows) + "\n"
    existing = read_json(paths["key"]) if paths["key"].exists() else {}
    # From an existing key, so that a second call makes the same page. The salt keeps the ids secret even if
    # --sides_seed is known.
    salt, seed = existing.get("salt", secrets.token_hex(16)), settings["sides_seed"]
    if seed is None:
        seed = existing.get("sides_seed", secrets.randbits(62))
    pairs, identical = plan(answers, settings["pairs_per_prompt"], random.Random(seed))
    if not pairs:
        raise UserError("all pairs of answers are identical texts, so there is nothing to judge; check the models")
    items = lay_out(pairs, settings["repeat_share"], seed, salt)
    key = {
        # Texts, sides and salt identify a study, as they did before the candidates' file had the column TRUNCATED.
        "study": sha256_of(salt, dumps([_without_marks(row) for row in rows]) + "\n", dumps(items))[:16],
        "salt": salt,
        "sides_seed": seed,
        "repeat_share": settings["repeat_share"],
        "pairs_per_prompt": settings["pairs_per_prompt"],
        "limit": settings["limit"],
        "models": list(answers),
        "candidates": paths["candidates"].name,
        "candidates_sha256": sha256_of(content),
        "items": items,
        "identical": identical,
    }
    # Before anything is written: votes on the earlier page can be unblinded with the earlier key only.
    if existing and not _same_study(existing, key) and not overwrite:
        raise UserError(
            f"{paths['key']}: belongs to another study (other answers or settings), whose votes would be lost; choose"
            " another folder with --output_dir, or replace the study with --overwrite"
        )
    candidates_file = paths["candidates"]
    if existing and candidates_file.exists() and not overwrite:
        before = existing.get("candidates_sha256")
        if sha256_of(candidates_file.read_bytes()) not in (before, key["candidates_sha256"]):
            raise UserError(
                f"{candidates_file}: edited since the page was made from it; choose another folder with --output_dir,"
                " or replace it with --overwrite"
            )
    # The key first: a page without its key could be sent out, and its votes could never be unblinded.
    write_json(paths["key"], key)
    write_text(paths["candidates"], content)
    write_json(paths["candidates"].with_suffix(".about.json"), about)
    write_text(paths["candidates"].with_suffix(".md"), candidates_markdown(title, rows))
    write_text(paths["page"], page(key, prompts, answers))
    return key


def _without_marks(row: dict) -> dict:
    return {name: text for name, text in row.items() if name != TRUNCATED}


def _same_study(existing: dict, key: dict) -> bool:
    """Whether votes on the existing key's page are votes on this one: the texts are part of `study`."""
    return {**existing, "candidates_sha256": None} == {**key, "candidates_sha256": None}


def find_key(study: str, folders: list[str], key_file: str | None, votes_file: str) -> Path:
    """The key file of a study: `key_file` where given, else the one with the votes' study in or below `folders`."""
    if key_file:
        if _read_key(Path(key_file)).get("study") != study:
            raise UserError(f"--key {key_file}: not the key of {votes_file}; give the key written with its page")
        return Path(key_file)
    unreadable = []
    for folder in map(Path, folders):
        # The folder itself and one level below it: eval_out/<run_name>/human_eval_key.json.
        for path in sorted([*folder.glob(f"{STEMS[2]}*.json"), *folder.glob(f"*/{STEMS[2]}*.json")]):
            try:
                if _read_key(path)["study"] == study:
                    return path
            except UserError:
                # A broken key of another study must not prevent the scoring of this one.
                unreadable.append(str(path))
    also = f" ({', '.join(unreadable)} cannot be read)" if unreadable else ""
    raise UserError(
        f"{votes_file}: no {STEMS[2]}.json below {' or '.join(map(str, folders))} belongs to its study {study!r}{also};"
        " give the key with --key"
    )


def _read_key(path: Path) -> dict:
    key = read_json(path)
    if not isinstance(key, dict) or not KEY_FIELDS <= set(key):
        raise UserError(f"{path}: not the key of a study; give the {STEMS[2]}.json written with the page")
    return key


def read_study(path: Path) -> tuple[dict, list[dict], dict]:
    """(key, candidates, what made the answers) of a key file.

    Raises UserError where the candidates' file changed after the page was made.
    """
    key = _read_key(path)
    file = path.parent / key["candidates"]
    rows, about = read_json(file), read_json(file.with_suffix(".about.json"))
    if not {"prompts", "answers", "model", "run"} <= set(about):
        raise UserError(f"{file.with_suffix('.about.json')}: not written by human_eval.py; restore the file")
    # Style features and the list of strongest preferences are computed from these texts.
    if sha256_of(file.read_text(encoding="utf-8")) != key["candidates_sha256"]:
        raise UserError(f"{file}: changed after its page was made, so the votes judge other texts; restore the file")
    return key, rows, about
