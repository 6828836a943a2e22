"""The columns of one row, whatever its layout: the prompt with its system text and history, scores, template arguments.

`Fields` remembers which columns were read, so that what is not used can be named.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

from preflab.data.files import BadRow
from preflab.data.messages import (
    OPTIONS,
    check_messages,
    from_json_text,
    read_transcript,
    role_of,
    with_options,
    without_nulls,
)
from utils.errors import UserError
from utils.parsing import parse_json

# Columns that hold a prompt, in order of preference.
PROMPTS = (
    "prompt", "instruction", "question", "query", "conversations", "messages", "context", "trajectory", "input",
    "history", "post",
)  # fmt: skip
# Text that belongs to the prompt beside its main column: joined behind it after an empty line.
JOINED = ("input", "context")
SYSTEM = ("system", "system_prompt")
# Text columns beside two texts without a prompt that cannot be the prompt.
METADATA = {
    "id", "source", "origin", "dataset", "subset", "category", "type", "language", "lang", "model", "generator",
    "license", "url", "split", "date", "timestamp", "hash", "label", "topic", "domain",
}  # fmt: skip
PICTURE_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
TRANSCRIPT = "\n\nHuman:"
# Arguments of the tokenizer's renderer that a row must not set: data do not replace a model's chat template.
RENDERER_ARGUMENTS = (
    "chat_template", "conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message",
)  # fmt: skip
# Estimated win probabilities of the two answers (SPPO): this project's names, and those of UCLA-AGI's data.
WIN_KEYS = {"win_chosen": ("win_chosen", "chosen_probs_win"), "win_rejected": ("win_rejected", "chosen_probs_lose")}
# Scores of the chosen and the rejected answer.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


class Fields:
    """The columns of one row, and which of them were read.

    Attributes:
        row: the row.
        source: file and row, for error messages.
        used: names of the columns that were read.
        unused: counts what rows hold and nothing reads, by column; shared by the rows of a split.
    """

    __slots__ = ("row", "source", "used", "unused")

    def __init__(self, row, source: str, content: str, unused: Counter | None = None):
        """Raises UserError for a line that is not JSON, and for JSON that is not an object.

        Args:
            content: what the object should hold, for the message.
        """
        if isinstance(row, BadRow):
            raise UserError(row.problem)
        if not isinstance(row, dict):
            raise UserError(f"{source}: expected an object with {content}, not {type(row).__name__}")
        self.row, self.source, self.used = row, source, set()
        self.unused = Counter() if unused is None else unused

    def take(self, *names: str):
        """The first value that is not null among these columns, None if there is none."""
        for name in names:
            value = self.row.get(name)
            if value is not None:
                self.used.add(name)
                return value
        return None

    def required(self, name: str):
        """The value of a column. Raises UserError where it is null."""
        value = self.take(name)
        if value is None:
            raise UserError(f"{self.source}: key {name!r} is null; fix the row, or pass --on_bad_row skip")
        return value

    def count_unused(self) -> None:
        """Count the columns that hold something and were not read."""
        for name, value in self.row.items():
            # `NAME (none)` only records that --columns switches NAME off.
            if name not in self.used and value is not None and value not in ("", []) and not name.endswith("(none)"):
                self.unused[name] += 1


@dataclass(slots=True)
class Parsed:
    """A row as its schema reads it.

    Attributes:
        prompt: text or turns; None where the answers hold it.
        before: turns in front of it (system, history).
        answers: the chosen and the rejected one, or an SFT row's only one: text, turns, or one turn each.
        options: what the row gives its chat template: tools, chat_template_kwargs.
        scores: score_chosen, score_rejected, win_chosen, win_rejected.
    """

    prompt: str | list | None = None
    before: list[dict] = field(default_factory=list)
    answers: list = field(default_factory=list)
    options: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)


def is_number(value) -> bool:
    try:
        float(value)
    # Overflow: an integer of more than 308 digits.
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def is_true(label) -> bool:
    """A label of KTO data, also as the text of a CSV file."""
    return str(label).strip().lower() in ("true", "1", "1.0")


def number(value, key: str, source: str) -> float | None:
    """A number, also as the text of a CSV file; None for null, NaN and an empty cell. Raises UserError."""
    if value is None or value == "":
        return None
    if not is_number(value):
        raise UserError(f"{source}: key {key!r} must be a number, not {str(value)[:60]!r}")
    # NaN is how data frames write a missing number; no filter could decide on it.
    return None if math.isnan(float(value)) else float(value)


def required_number(fields: Fields, name: str, flags: bool = False) -> float:
    """The number in a column. Raises UserError for null, NaN, an empty cell and other values.

    Args:
        flags: true and false, also as the text of a CSV file, are read as 1 and 0.
    """
    value = fields.required(name)
    flag = {"true": 1.0, "false": 0.0}.get(str(value).strip().lower()) if flags else None
    value = number(value, name, fields.source) if flag is None else flag
    if value is None:
        raise UserError(f"{fields.source}: key {name!r} holds no number; fix the row, or pass --on_bad_row skip")
    return value


def read_scores(fields: Fields) -> dict:
    """score_chosen and score_rejected, win_chosen and win_rejected, each a number or None."""
    row = fields.row
    names = next((pair for pair in SCORES if pair[0] in row or pair[1] in row), SCORES[0])
    # Scores of another type are an error, since the filters use them. Only SPPO's loss requires win probabilities.
    scores = {
        f"score_{side}": number(fields.take(name), name, fields.source)
        for side, name in zip(("chosen", "rejected"), names, strict=True)
    }
    values = {name: fields.take(*keys) for name, keys in WIN_KEYS.items()}
    # Not an error: DPO and the evaluations read the same files and ignore these keys.
    return scores | {k: float(v) if is_number(v) else None for k, v in values.items()}


def json_text(text: str, key: str, source: str):
    """The value of a cell that holds JSON as text. Raises UserError, naming row and key."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{source}: key {key!r} is not valid JSON ({error})") from None


def read_options(fields: Fields) -> dict:
    """What the row gives its chat template beside the messages, as TRL passes it."""
    options = {}
    for name in OPTIONS:
        value = fields.take(name)
        if isinstance(value, str):
            value = json_text(value, name, fields.source) if value.strip() else None
        if value:
            options[name] = without_nulls(value)
    arguments = options.get("chat_template_kwargs", {})
    if not isinstance(arguments, dict):
        raise UserError(
            f"{fields.source}: key 'chat_template_kwargs' must be an object, not {type(arguments).__name__}"
        )
    reserved = [name for name in RENDERER_ARGUMENTS if name in arguments]
    if reserved:
        raise UserError(f"{fields.source}: key 'chat_template_kwargs' must not set {reserved[0]!r}: remove it")
    return options


def ensure_no_pictures(fields: Fields) -> None:
    """Raise UserError for a row with pictures, video or sound."""
    for name in PICTURE_COLUMNS:
        if fields.row.get(name):
            raise UserError(f"{fields.source}: holds {name!r}; only text is supported")


def is_metadata(name: str) -> bool:
    name = name.lower()
    return name in METADATA or name.endswith(("_id", "_model", "_source")) or name.startswith(("model_", "id_"))


def read_prompt(fields: Fields, parsed: Parsed, names: tuple[str, ...]) -> None:
    """Set `parsed.prompt` and `parsed.before` from the prompt columns, `system` and `history`.

    Args:
        names: columns that may hold the prompt, in order of preference.
    """
    row, source = fields.row, fields.source
    # An empty text or list counts only where no other column holds more.
    name = next((n for n in names if row.get(n)), next((n for n in names if row.get(n) is not None), None))
    prompt = from_json_text(fields.take(name)) if name else None
    if isinstance(prompt, dict):
        prompt = _nested_prompt(prompt, parsed)
    if isinstance(prompt, str):
        joined = [row[k].strip() for k in JOINED if k != name and isinstance(row.get(k), str) and row[k].strip()]
        fields.used.update(k for k in JOINED if isinstance(row.get(k), str))
        prompt = "\n\n".join([prompt, *joined])
    elif isinstance(prompt, list) and name != "prompt":
        prompt = _without_answer(prompt, parsed, name, source)
    parsed.prompt = prompt
    # As for prompts: an empty text counts only where the other column holds no more.
    system = fields.take(*sorted(SYSTEM, key=lambda k: not row.get(k)))
    if isinstance(system, str) and system.strip():
        parsed.before.append({"role": "system", "content": system})
    elif system is not None and not isinstance(system, str):
        raise UserError(f"{source}: key 'system' must be text, not {type(system).__name__}")
    # Not where it is the prompt.
    if "history" not in fields.used and row.get("history"):
        parsed.before += read_history(fields.take("history"), source)


def _nested_prompt(prompt: dict, parsed: Parsed) -> str | list:
    """The prompt inside an object: OpenAI's `input`, WebGPT's `question`, the post of a summary."""
    if isinstance(prompt.get("messages"), list):
        parsed.options |= {"tools": without_nulls(prompt["tools"])} if prompt.get("tools") else {}
        return prompt["messages"]
    text = next((prompt[k] for k in ("full_text", "post", "article", "text") if prompt.get(k)), None)
    return [prompt] if text is None else text


def _without_answer(prompt: list, parsed: Parsed, name: str, source: str) -> list:
    """A prompt under `messages` or `conversations` without the answer that it may end with."""
    last = prompt[-1] if prompt else None
    if role_of(last) != "assistant":
        return prompt
    text = last.get("content", last.get("value"))
    if parsed.answers and text in (parsed.answers[0], _text_of(parsed.answers[0])):
        return prompt[:-1]
    raise UserError(f"{source}: key {name!r} ends with an answer that is not the chosen one; is it the prompt?")


def _text_of(answer):
    first = answer[0] if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict) else {}
    return first.get("content", first.get("value"))


def read_history(history, source: str) -> list[dict]:
    """Earlier turns: LlamaFactory's list of [question, answer], or messages; either also as JSON text."""
    turns = []
    if isinstance(history, str) and history.lstrip().startswith("["):
        history = json_text(history, "history", source)
    if isinstance(history, list) and history and isinstance(history[0], dict):
        return check_messages(history, source, "history")
    for entry in history if isinstance(history, list) else [history]:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not all(isinstance(t, str) for t in entry):
            raise UserError(f"{source}: key 'history' must be a list of [question, answer], or of messages")
        turns += [{"role": "user", "content": entry[0]}, {"role": "assistant", "content": entry[1]}]
    return turns


def complete_messages(messages: list[dict], parsed: Parsed, source: str) -> list[dict]:
    """`messages` with what their row holds beside them: earlier turns in front, template arguments on the first turn.

    A system turn that both have is taken once.

    Raises:
        UserError: the two system texts differ.
    """
    before = parsed.before
    if before and messages and before[0]["role"] == messages[0]["role"] == "system":
        if before[0]["content"].strip() != messages[0]["content"].strip():
            raise UserError(
                f"{source}: the column 'system' and the dialogue's own system turn differ; pass --columns system=none"
                " to keep the turn"
            )
        before = before[1:]
    return with_options([*before, *messages], parsed.options)


def prompt_turns(prompt: str | list, source: str, key: str) -> list[dict]:
    """A prompt's turns: a transcript is split, other text is one user turn. Raises UserError for other values."""
    if isinstance(prompt, str) and prompt.startswith(TRANSCRIPT):
        return read_transcript(prompt.rstrip().removesuffix("Assistant:").rstrip(), source, key)
    return check_messages(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}], source, key)
