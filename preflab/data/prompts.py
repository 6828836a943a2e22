"""Prompts, and given answers to them, in the formats that the field uses."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from preflab.data.columns import rename_columns
from preflab.data.messages import check_messages, check_unicode, from_json_text, role_of, transcript, up_to_last
from preflab.data.pair_rows import to_pair
from preflab.data.prompt_format import AS_CHAT
from preflab.data.row_fields import (
    Fields,
    Parsed,
    complete_messages,
    ensure_no_pictures,
    prompt_turns,
    read_options,
    read_prompt,
)
from preflab.data.rows import read_rows
from preflab.data.schemas import PAIRS, schema_of
from preflab.data.sources import folded, read_source
from utils.cache import cache_key
from utils.errors import UserError

# Columns of a given answer.
ANSWERS = ("output", "answer", "response")
# Keys under which a row may hold its prompt.
PROMPT_KEYS = (
    "messages", "prompt", "instruction", "question", "turns", "query", "conversations", "conversation", "context",
    "trajectory", "input", "history", "post",
)  # fmt: skip


@dataclass
class Prompt:
    """A conversation that ends with a user turn.

    Attributes:
        messages: the conversation.
        source: file and row, for error messages.
        uid: the prompt's id in its data set, if it has one.
        category: its category, if the data names one.
    """

    messages: list[dict]
    source: str
    uid: str | None = None
    category: str | None = None

    @property
    def key(self) -> str:
        """Equal for equal conversations."""
        return cache_key(self.messages)

    @property
    def prompt_key(self) -> str:
        """The conversation without case and spacing: equal for prompts that count as duplicates."""
        return folded(transcript(self.messages))

    @property
    def text(self) -> str:
        """The conversation as a judge reads it: a single question as plain text, several turns with their roles."""
        # The judge prompts have one field for the question, so several turns need their roles inside it.
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in self.messages)


def load_prompts(sources: list[dict], category_key: str = "category", limit: int | None = None) -> tuple[list, dict]:
    """Read the prompts of preference pairs, or of rows with one of PROMPT_KEYS.

    Args:
        sources: as for `read_source`.
        category_key: the key that holds a row's category.
        limit: number of prompts.

    Returns:
        (prompts, summary): duplicates (`Prompt.prompt_key`) are read once, since statistics over prompts take them as
        independent; the summary counts the rows that were left out, by reason.

    Raises:
        UserError: a row without a prompt, named by source, or no prompt at all.
    """
    prompts: dict[str, Prompt] = {}
    left_out, about = Counter(), []
    for prompt, row in distinct_prompts(sources, prompts, left_out, about):
        prompt.category = None if row.get(category_key) is None else str(row[category_key])
        check_unicode([prompt.category or "", prompt.uid or ""], prompt.source)
        prompts[prompt.prompt_key] = prompt
        # The limit counts distinct, usable prompts. Rows behind it are not validated.
        if limit is not None and len(prompts) >= limit:
            break
    return list(prompts.values()), prompts_summary(prompts, left_out, about, sources)


def distinct_prompts(
    sources: list[dict],
    known: dict,
    left_out: Counter,
    about: list[dict],
    add: Callable[[dict, str, object], bool] | None = None,
) -> Iterator[tuple[Prompt, dict]]:
    """(prompt, row) of every row whose prompt is not in `known`; counts the others in `left_out`.

    Args:
        known: by `Prompt.prompt_key`.
        about: filled with what identifies each source.
        add: called with a row of a known prompt, its source and the prompt's entry; whether it uses the row.
    """
    data = [read_source(source) for source in sources]
    about += [identity for _, identity in data]
    for origin, source, row in ((s, *row) for s, (rows, _) in zip(sources, data, strict=True) for row in rows):
        try:
            messages = prompt_messages(row, source)
        except UserError:
            if not origin.get("skip_bad"):
                raise
            messages = "bad_row"
        prompt = None if isinstance(messages, str) else Prompt(messages, source, _uid(row))
        if prompt is None:
            left_out[messages] += 1
        elif prompt.prompt_key in known:
            if add is None or not add(row, source, known[prompt.prompt_key]):
                left_out["duplicate_prompt"] += 1
        else:
            # The caller adds the prompt to `known` before it asks for the next row; otherwise duplicates would pass.
            yield prompt, row


def prompts_summary(prompts: dict, left_out: Counter, about: list[dict], sources: list[dict]) -> dict:
    """Counts and provenance for an artifact. Raises UserError if there is no prompt."""
    if not prompts:
        raise UserError(f"{sources[0]['name']}: no prompt is left; left out: {dict(left_out)}")
    return {"prompts": len(prompts), "left_out": dict(left_out), "sources": about}


def _uid(row: dict) -> str | None:
    # alpaca_eval has no ids, Arena-Hard calls them uid, MT-Bench question_id (an integer).
    uid = row["uid"] if row.get("uid") is not None else row.get("question_id")
    return None if uid is None else str(uid)


def prompt_messages(row, source: str, keys: tuple[str, ...] = PROMPT_KEYS) -> list[dict] | str:
    """The row's messages up to the last user turn, or the reason to leave the row out.

    Args:
        keys: columns that may hold the prompt, in order of preference.

    Raises:
        UserError: a row without a prompt, or with one of another type.
    """
    fields = Fields(row, source, "a prompt")
    # Preference rows have several formats, so they share the parser of the training data.
    if schema_of(row, PAIRS) and row.get("chosen", "") is not None and row.get("rejected", "") is not None:
        pair = to_pair(row, source, prompt_format=AS_CHAT)
        if isinstance(pair, str):
            return pair
        messages = pair.messages
    else:
        key = next((k for k in keys if row.get(k) is not None), None)
        if key is None:
            raise UserError(
                f"{source}: no prompt (keys: {', '.join(map(str, row))}); a row has one of {', '.join(PROMPT_KEYS)};"
                " name another column with --columns prompt=NAME"
            )
        ensure_no_pictures(fields)
        parsed = Parsed(options=read_options(fields))
        # `messages` may end with an answer; it is cut off below.
        value = from_json_text(fields.take(key))
        if isinstance(value, str):
            read_prompt(fields, parsed, (key,))
            value = parsed.prompt
        else:
            read_prompt(fields, parsed, ())
        messages = complete_messages(_read_prompt(value, source, key), parsed, source)
    messages = up_to_last(messages, "user")
    if not messages or not messages[-1]["content"].strip():
        return "empty_prompt"
    check_unicode([m["content"] for m in messages], source)
    return messages


def _read_prompt(value, source: str, key: str) -> list[dict]:
    """The messages of a prompt given as text, as messages, or as a list of user turns."""
    if isinstance(value, str):
        return prompt_turns(value, source, key)
    turns = [t if isinstance(t, dict) else {"content": t} for t in value] if isinstance(value, list) else value
    messages = check_messages(turns, source, key, default_role="user")
    # MT-Bench's turns: the second question assumes an answer to the first, so only the first is a prompt here.
    only_questions = all(m["role"] == "user" for m in messages)
    return messages[:1] if only_questions else messages


def prompt_columns(columns: list[str] | None) -> list[str]:
    """The entries of --columns for a prompt set: without those for the answers, which are in another file."""
    return [entry for entry in columns or [] if str(entry).partition("=")[0] not in ANSWERS]


def load_answers(
    name: str, prompts: list[Prompt], columns: list[str] | None = None
) -> tuple[str, list[str | None], dict]:
    """Read given answers to `prompts`: alpaca_eval's outputs, Arena-Hard's model_answer, or rows of prompt and answer.

    Answers are matched by uid if both sides have one, otherwise by the prompt's text.

    Args:
        columns: of the prompt set and of the answers. Columns of the prompt may have their usual names here.

    Returns:
        (model's name, an answer or None per prompt, what identifies the data).

    Raises:
        UserError: a row without an answer or with a second answer to a prompt, named by source, or no answer to any of
            the prompts.
    """
    rows, about = read_rows(name, "test")
    rows = rename_columns(rows, columns, name, required=ANSWERS)
    by_uid, by_text, model = {}, {}, None
    # Ids are compared with those of the prompts only: another set's ids, e.g. row numbers, fall back to the text.
    uids, keys = {p.uid for p in prompts} - {None}, {p.key for p in prompts}
    for source, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{source}: expected an object with an answer, not {type(row).__name__}")
        answer = _answer(row)
        # An empty answer is an answer: models do give them, and a judge can compare them.
        if not isinstance(answer, str):
            raise UserError(
                f"{source}: no answer; a row has output, answer or response, or messages that end with an answer"
            )
        check_unicode([answer], source)
        # alpaca_eval, Arena-Hard and MT-Bench name the model differently; the first row that names it decides.
        model = model or row.get("generator") or row.get("model") or row.get("model_id")
        if _uid(row) in uids:
            _ensure_first(by_uid, _uid(row), source)
            by_uid[_uid(row)] = answer, source
            continue
        question = _question(row)
        # A row of answers by id only has no prompt at all, which is not an error where another row matches.
        messages = prompt_messages(question, source) if any(question.get(k) for k in PROMPT_KEYS) else None
        # Answers to prompts of another set may repeat, as in files of several turns.
        if isinstance(messages, list) and (key := cache_key(messages)) in keys:
            _ensure_first(by_text, key, source)
            by_text[key] = answer, source
    answers = [(by_uid.get(p.uid) or by_text.get(p.key) or (None,))[0] for p in prompts]
    if not any(answer is not None for answer in answers):
        raise UserError(f"{name}: has answers to none of the {len(prompts)} prompts; is it from another prompt set?")
    return str(model or "opponent"), answers, {**about, **({"columns": columns} if columns else {})}


def _ensure_first(answers: dict, key, source: str) -> None:
    """Raise UserError where `answers`, {key: (answer, source)}, already has an answer to this prompt."""
    if key in answers:
        raise UserError(f"{source}: another answer to the prompt of {answers[key][1]}; remove one of the two rows")


def _question(row: dict) -> dict:
    """The row without its answer, to be read as a row of the prompt set."""
    question = {k: v for k, v in row.items() if k not in ANSWERS}
    messages = question.get("messages")
    # Not left to the parser, which cuts it off too: an answer of Arena-Hard is not text.
    if isinstance(messages, list) and messages and role_of(messages[-1]) == "assistant":
        question["messages"] = messages[:-1]
    return question


def _answer(row: dict):
    """The row's answer in any known format, None if it has none."""
    for key in ANSWERS:
        if row.get(key) is not None:
            return row[key]
    try:
        # MT-Bench and the first Arena-Hard: choices[0].turns[0], as text or as {"content": text}.
        if isinstance(row.get("choices"), list):
            content = row["choices"][0]["turns"][0]
            return content["content"] if isinstance(content, dict) else content
        # Today's Arena-Hard: the last message, its content as text or as {"answer": text}.
        if isinstance(row.get("messages"), list) and row["messages"][-1]["role"] == "assistant":
            content = row["messages"][-1]["content"]
            return content.get("answer") if isinstance(content, dict) else content
    # A nested value of another shape is not a known format; the caller reports it with the row.
    except (TypeError, KeyError, IndexError):
        pass
    return None
