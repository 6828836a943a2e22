"""A blind study of answers: which pairs are asked, on which side each model stands, and the key that says so."""

import math
import random
import secrets
from pathlib import Path

from preflab.data.prompts import Prompt
from preflab.human.page import build_page, conversation, markdown
from preflab.judging.battles import pairings
from utils.artifacts import dumps, read_json, write_json, write_text
from utils.errors import UserError
from utils.provenance import sha256_of

# The tuned model's name in files that people inspect by hand.
SHOWN = {"base": "base", "tuned": "dpo"}
STEMS = ("manual_eval_candidates", "human_eval", "human_eval_key")


def candidates(prompts: list[Prompt], answers: dict[str, list[dict]]) -> list[dict]:
    """`{prompt, base, dpo, ...}` of every prompt: what each model answered."""
    names = {name: SHOWN.get(name, name) for name in answers}
    return [
        {"prompt": prompt.text, **{shown: answers[name][k]["text"] for name, shown in names.items()}}
        for k, prompt in enumerate(prompts)
    ]


def as_markdown(title: str, rows: list[dict]) -> str:
    """The candidates as a Markdown text to be read."""
    parts = [f"# {title}\n\nNot blind: every answer stands under its model's name.\n"]
    for k, row in enumerate(rows, 1):
        parts.append(f"---\n\n## {k}\n\n{quoted(row['prompt'])}")
        parts += [f"### {name}\n\n{quoted(text)}" for name, text in row.items() if name != "prompt"]
    return "\n".join(parts)


def quoted(text: str) -> str:
    """A text as a Markdown quotation: what it opens (a code fence, say) ends with it."""
    return "".join(f"> {line}\n" for line in text.splitlines() or ["(empty)"])


def plan(answers: dict[str, list[dict]], pairs_per_prompt: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Which two models meet on which prompt, every pairing as often as any other (give or take one).

    Args:
        answers: `{model: [{text, ...}]}`, a list entry a prompt.

    Returns:
        (asked, identical), each of `{prompt, a, b}`: pairs to ask, and pairs whose two answers are the same text.
    """
    met, count = pairings(list(answers), None), len(next(iter(answers.values())))
    if pairs_per_prompt > len(met):
        raise UserError(f"--pairs_per_prompt {pairs_per_prompt}: {len(answers)} models make only {len(met)} pairings")
    order = rng.sample(range(count), count)
    turns = [(prompt, met[(k * pairs_per_prompt + j) % len(met)]) for k, prompt in enumerate(order)
             for j in range(pairs_per_prompt)]  # fmt: skip
    asked, identical = [], []
    for prompt, (a, b) in sorted(turns):
        same = answers[a][prompt]["text"] == answers[b][prompt]["text"]
        (identical if same else asked).append({"prompt": prompt, "a": a, "b": b})
    return asked, identical


def lay_out(asked: list[dict], repeat_share: float, seed: int, salt: str = "") -> list[dict]:
    """The pairs in the order of the page: `{id, prompt, left, right, repeat_of}` each.

    Sides are balanced all along the page: of every two successive pairs of one pairing, one has its first model on the
    left and one on the right. `repeat_share` of the pairs is asked once more, sides swapped, half a page or more after
    the first time. Ids are hashes of seed and salt: who does not hold the key's salt learns nothing from them.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(asked)), len(asked))
    items, late, pending = [], [], {}
    for place, k in enumerate(order):
        pair = asked[k]
        met = (pair["a"], pair["b"])
        left_first = not pending.pop(met) if met in pending else pending.setdefault(met, rng.random() < 0.5)
        left, right = met if left_first else met[::-1]
        item = {"id": _opaque(seed, salt, k), "prompt": pair["prompt"], "left": left, "right": right, "repeat_of": None}
        items.append((place, item))
    half = len(asked) // 2
    for place in rng.sample(range(half), min(half, math.ceil(repeat_share * len(asked)))):
        first = items[place][1]
        again = {"id": _opaque(seed, salt, len(asked) + place), "prompt": first["prompt"]}
        again |= {"left": first["right"], "right": first["left"], "repeat_of": first["id"]}
        late.append((rng.randrange(place + half, len(asked)) + 0.5, again))
    return [item for _, item in sorted([*items, *late], key=lambda entry: (entry[0], entry[1]["id"]))]


def _opaque(seed: int, salt: str, number: int) -> str:
    return sha256_of(f"{seed} {number}", salt)[:12]


def page(key: dict, prompts: list[Prompt], answers: dict[str, list[dict]]) -> str:
    """The study's HTML page. It holds the key's ids in order, and nothing else of the key."""
    items = [
        {
            "id": item["id"],
            "prompt": conversation(prompts[item["prompt"]].messages),
            **{side: markdown(answers[item[side]][item["prompt"]]["text"]) for side in ("left", "right")},
        }
        for item in key["items"]
    ]
    return build_page(key["study"], "Which answer is better?", items)


def write_study(paths: dict[str, Path], prompts, answers, title: str, about: dict, settings: dict, overwrite: bool):
    """Candidates, what made them, page and key; the key of the same study is kept, so that its votes stay good.

    Args:
        paths: of `candidates`, `page` and `key`.
        settings: pairs_per_prompt, repeat_share, sides_seed (None: drawn, or the one that the key there has).

    Raises UserError where the key of another study stands in the place, unless `overwrite`.
    """
    rows = candidates(prompts, answers)
    content = dumps(rows) + "\n"
    before = read_json(paths["key"]) if paths["key"].exists() else {}
    salt, seed = before.get("salt", secrets.token_hex(16)), settings["sides_seed"]
    if seed is None:
        seed = before.get("sides_seed", secrets.randbits(62))
    asked, identical = plan(answers, settings["pairs_per_prompt"], random.Random(seed))
    if not asked:
        raise UserError("every pair of answers is the same text twice: there is nothing to ask")
    items = lay_out(asked, settings["repeat_share"], seed, salt)
    key = {
        # What identifies a study: these very texts, on these sides, under this salt.
        "study": sha256_of(salt, content, dumps(items))[:16],
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
    if before and before != key and not overwrite:
        raise UserError(
            f"{paths['key']} is the key of another study (other answers or settings): votes for it would be lost; name"
            " a folder for this one with --output_dir, or --overwrite it"
        )
    write_json(paths["key"], key)
    write_text(paths["candidates"], content)
    write_json(paths["candidates"].with_suffix(".about.json"), about)
    write_text(paths["candidates"].with_suffix(".md"), as_markdown(title, rows))
    write_text(paths["page"], page(key, prompts, answers))
    return key


def find_key(study: str, folders: list[str], named: str | None, votes: str) -> Path:
    """The key of a study: the one that is named, else that of the votes' study below or in `folders`."""
    if named:
        if _key(Path(named)).get("study") != study:
            raise UserError(f"--key {named}: not the key of the study of {votes}; give the key that its dump wrote")
        return Path(named)
    unread = []
    for folder in map(Path, folders):
        for place in sorted([*folder.glob(f"{STEMS[2]}*.json"), *folder.glob(f"*/{STEMS[2]}*.json")]):
            try:
                if _key(place)["study"] == study:
                    return place
            except UserError:
                # Another study's broken key is no reason not to score this one.
                unread.append(str(place))
    also = f" ({', '.join(unread)} cannot be read)" if unread else ""
    raise UserError(
        f"{votes}: no {STEMS[2]}.json below {' or '.join(map(str, folders))} belongs to its study {study!r}{also}; name"
        " it with --key"
    )


KEY_FIELDS = {"study", "models", "items", "identical", "candidates", "candidates_sha256", "limit"}


def _key(path: Path) -> dict:
    found = read_json(path)
    if not isinstance(found, dict) or not KEY_FIELDS <= set(found):
        raise UserError(f"{path}: no key of a study; give the {STEMS[2]}.json that the dump wrote")
    return found


def read_study(path: Path) -> tuple[dict, list[dict], dict]:
    """(key, candidates, what made them) of a study's key file; UserError where the candidates changed since."""
    key = _key(path)
    place = path.parent / key["candidates"]
    rows, about = read_json(place), read_json(place.with_suffix(".about.json"))
    if not {"prompts", "answers", "model", "run"} <= set(about):
        raise UserError(f"{place.with_suffix('.about.json')}: not what the dump wrote; restore the file")
    if sha256_of(place.read_text(encoding="utf-8")) != key["candidates_sha256"]:
        raise UserError(f"{place}: changed since its page was made, so its votes judge other texts; restore the file")
    return key, rows, about
