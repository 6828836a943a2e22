"""Prompt sets and given answers, in the forms the field ships them."""

import math
from dataclasses import dataclass

from preflab.data.preferences import to_pair
from preflab.data.rows import read_rows
from utils.cache import cache_key
from utils.errors import UserError


@dataclass
class Prompt:
    """A conversation that ends with a user turn, where it came from, and its category where the data names one."""

    messages: list[dict]
    source: str
    uid: str | None = None
    category: str | None = None

    @property
    def key(self) -> str:
        """Equal for equal conversations."""
        return cache_key(self.messages)

    @property
    def text(self) -> str:
        """The conversation as a judge reads it: a single question as it stands, else turn by turn."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in self.messages)


def load_prompts(sources: list[dict], category_key: str = "category", limit: int | None = None) -> tuple[list, dict]:
    """The prompts of preference pairs, or of rows with `prompt`, `instruction`, `question`, `messages` or `turns`.

    Args:
        sources: `{"name", "split"}` each, with optional "config" and "revision".

    Returns:
        (prompts, summary): prompts that occur twice are taken once; what was left out is counted.
    """
    read = [read_rows(s["name"], s["split"], s.get("config"), s.get("revision")) for s in sources]
    found, left_out = {}, {}
    for where, row in (row for rows, _ in read for row in rows):
        messages = _conversation(row, where)
        if isinstance(messages, str):
            left_out[messages] = left_out.get(messages, 0) + 1
            continue
        category = row.get(category_key)
        prompt = Prompt(messages, where, _uid(row), None if category is None else str(category))
        if prompt.key in found:
            left_out["duplicate_prompt"] = left_out.get("duplicate_prompt", 0) + 1
        else:
            found[prompt.key] = prompt
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise UserError(f"{sources[0]['name']}: no prompt is left; left out: {left_out}")
    return list(found.values()), {"prompts": len(found), "left_out": left_out, "sources": [s for _, s in read]}


def _uid(row: dict) -> str | None:
    uid = row["uid"] if row.get("uid") is not None else row.get("question_id")
    return None if uid is None else str(uid)


def _conversation(row, where: str) -> list[dict] | str:
    """The row's messages up to a last user turn, or the reason to leave it out."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with a prompt, found {type(row).__name__}")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        pair = to_pair(row, where, plain_as_chat=True)
        if isinstance(pair, str):
            return pair
        messages = pair.messages
    else:
        keys = ("messages", "prompt", "instruction", "question", "turns")
        value = next((row[k] for k in keys if row.get(k) is not None), None)
        if value is None:
            raise UserError(f"{where}: no prompt (keys there: {', '.join(map(str, row))}); one of {', '.join(keys)}")
        messages = _messages(value, where)
        if isinstance(row.get("input"), str) and row["input"].strip() and isinstance(value, str):
            messages = [{"role": "user", "content": f"{value}\n\n{row['input']}"}]
    while messages and messages[-1]["role"] != "user":
        messages = messages[:-1]
    if not messages or not messages[-1]["content"].strip():
        return "empty_prompt"
    try:
        "".join(m["content"] for m in messages).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a prompt that is no valid Unicode ({error.reason}); mend or delete it") from None
    return messages


def _messages(value, where: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{where}: a prompt must be text or a list of turns, found {type(value).__name__}")
    turns = [{"role": "user", **t} if isinstance(t, dict) else {"role": "user", "content": t} for t in value]
    for turn in turns:
        if not isinstance(turn.get("content"), str) or turn["role"] not in ("system", "user", "assistant"):
            raise UserError(f"{where}: a turn needs a role (system, user or assistant) and content as text")
    # A list of plain questions is asked one by one elsewhere; here the first is the prompt.
    several = all(t["role"] == "user" for t in turns)
    return turns[:1] if several else [{"role": t["role"], "content": t["content"]} for t in turns]


def load_answers(name: str, prompts: list[Prompt]) -> tuple[str, list[str | None], dict]:
    """Given answers to `prompts`: alpaca_eval's outputs, Arena-Hard's model_answer, or rows of prompt and answer.

    They are matched by uid where both sides have one, else by the prompt's text.

    Returns:
        (model's name, an answer or None per prompt, source). Raises UserError where no prompt has an answer.
    """
    rows, source = read_rows(name, "test")
    by_uid, by_text, model = {}, {}, None
    wanted = {p.uid for p in prompts} - {None}
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with an answer, found {type(row).__name__}")
        answer = _answer(row)
        if not isinstance(answer, str):
            raise UserError(f"{where}: no answer there; one of output, answer, response, or messages that end with one")
        model = model or row.get("generator") or row.get("model") or row.get("model_id")
        if _uid(row) in wanted:
            by_uid[_uid(row)] = answer
            continue
        asked = {k: row[k] for k in ("instruction", "prompt", "question", "input") if isinstance(row.get(k), str)}
        if isinstance(row.get("messages"), list):
            asked = {"messages": row["messages"][:-1]}
        asked = _conversation(asked, where) if set(asked) - {"input"} else None
        if isinstance(asked, list):
            by_text[cache_key(asked)] = answer
    found = [by_uid.get(p.uid) if p.uid in by_uid else by_text.get(p.key) for p in prompts]
    if not any(answer is not None for answer in found):
        raise UserError(f"{name}: holds an answer to none of the {len(prompts)} prompts; is it of another prompt set?")
    return str(model or "opponent"), found, source


# Several answers to one prompt, with a number for each: the field's names (princeton-nlp's, UCLA-AGI's) and plain ones.
MANY_ANSWERS = ("all_generated_responses", "responses", "answers", "completions")
NUMBERS = {
    "scores": ("all_rm_scores", "rm_scores", "scores"),
    "wins": ("win_probabilities", "win_probability"),
}


def load_candidates(sources: list[dict], limit: int | None = None) -> tuple[list[tuple[Prompt, list[str], dict]], dict]:
    """Rows that hold several answers to a prompt, and perhaps a score or a win probability of each.

    Args:
        sources: as `load_prompts` takes them.

    Returns:
        (candidates, summary): (prompt, answers, {"scores" or "wins": numbers} or {}) a row; a prompt that occurs twice
        is taken once. Raises UserError, naming row and key, for a row without answers or with other than one number
        for each.
    """
    read = [read_rows(s["name"], s["split"], s.get("config"), s.get("revision")) for s in sources]
    found, left_out = {}, {}
    for where, row in (row for rows, _ in read for row in rows):
        messages = _conversation(row, where)
        prompt = None if isinstance(messages, str) else Prompt(messages, where, _uid(row))
        reason = messages if prompt is None else "duplicate_prompt" if prompt.key in found else None
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        answers = _several(row, where)
        numbers = {}
        for kind, keys in NUMBERS.items():
            key = next((k for k in keys if row.get(k) is not None), None)
            if key is not None and not numbers:
                numbers[kind] = _as_list(row[key])
                if len(numbers[kind]) != len(answers) or not all(
                    isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in numbers[kind]
                ):
                    raise UserError(
                        f"{where}: key {key!r} must hold one finite number for each of the {len(answers)} answers"
                    )
        found[prompt.key] = (prompt, answers, numbers)
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise UserError(f"{sources[0]['name']}: no prompt is left; left out: {left_out}")
    return list(found.values()), {"prompts": len(found), "left_out": left_out, "sources": [s for _, s in read]}


def _as_list(value) -> list:
    """A list, or the JSON text of one."""
    import json

    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return []
    return list(value) if isinstance(value, (list, tuple)) else []


def _several(row: dict, where: str) -> list[str]:
    key = next((k for k in MANY_ANSWERS if row.get(k) is not None), None)
    if key is not None:
        answers = _as_list(row[key])
    else:
        key, numbered = "generate_0", [f"generate_{k}" for k in range(100)]
        turns = [list(row[k])[-1:] for k in numbered if isinstance(row.get(k), (list, tuple))]
        answers = [t[0].get("content") if t and isinstance(t[0], dict) else None for t in turns]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(
            f"{where}: no answers there; a row holds a list of texts under one of {', '.join(MANY_ANSWERS)}, or"
            " conversations generate_0, generate_1, ..."
        )
    return answers


def _answer(row: dict):
    for key in ("output", "answer", "response"):
        if row.get(key) is not None:
            return row[key]
    try:
        if isinstance(row.get("choices"), list):
            content = row["choices"][0]["turns"][0]
            return content["content"] if isinstance(content, dict) else content
        if isinstance(row.get("messages"), list) and row["messages"][-1]["role"] == "assistant":
            content = row["messages"][-1]["content"]
            return content.get("answer") if isinstance(content, dict) else content
    except (TypeError, KeyError, IndexError):
        pass
    return None
