"""Chat messages as all data files share them: roles, transcripts, and text that can be encoded.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": text}`, and may have the keys that chat
templates read (TEMPLATE_KEYS). Rows may also write it as ShareGPT does, `{"from": "human" | "gpt", "value": text}`,
with content as a list of text parts, or a list of messages as JSON text.

What a row gives its chat template beside the messages (`tools`, `chat_template_kwargs`) is stored on the first message,
under OPTIONS: so it is part of every comparison, hash and cache key of the conversation.
"""

import json
import re
from collections import Counter

from utils.errors import UserError
from utils.parsing import parse_json

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's and other names of the same roles.
ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}
# Keys of a message, beside role and content, that chat templates read.
TEMPLATE_KEYS = (
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_plan",
    "tool_responses",
)
# Thoughts under a key of the message.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys of a first message that the renderer passes to the template as arguments.
OPTIONS = ("tools", "chat_template_kwargs")
# An assistant's message with "weight": 0 is read, but not trained on.
WEIGHT = "weight"
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURES = ("image", "image_url", "input_image", "video", "audio", "input_audio")


def role_of(message, default: str | None = None) -> str | None:
    """The role of a message under its common name; None if it has no known role.

    Args:
        default: the role of a message that names none.
    """
    if not isinstance(message, dict):
        return None
    # One of the two may be null, where rows of both forms are in one table.
    role = next((message[key] for key in ("role", "from") if message.get(key) is not None), default)
    role = ALIASES.get(role, role) if isinstance(role, str) else None
    return role if role in ROLES else None


def check_messages(
    turns, source: str, key: str, default_role: str | None = None, unused: Counter | None = None
) -> list[dict]:
    """Validate a list of chat turns and return it as messages: role, content, and what templates read.

    Args:
        turns: the value of a row, of any type.
        source: file and row, for error messages.
        key: the row's key that holds the turns, for error messages.
        default_role: the role of turns that name none.
        unused: counts the keys of messages that are not used.

    Raises:
        UserError: not a list, a turn without role and content, an unknown role, content that is not text.
    """
    if not isinstance(turns, list):
        raise UserError(f"{source}: key {key!r} must be a list of messages, not {type(turns).__name__}")
    return [_message(turn, f"{source}: key {key!r}, message {i}", default_role, unused) for i, turn in enumerate(turns)]


def _message(turn, place: str, default_role: str | None, unused: Counter | None) -> dict:
    if not isinstance(turn, dict) or not ({"role", "from"} & set(turn) or default_role):
        raise UserError(f"{place}: expected {{'role': ..., 'content': ...}}")
    role, content = role_of(turn, default_role), turn.get("content")
    content = turn.get("value") if content is None else content
    if turn.get("from") == "function_call":
        # LlamaFactory's name of an assistant's turn that is a call, as JSON text.
        return {"role": "assistant", "content": "", "tool_calls": [_function_call(content, place)]}
    if role is None:
        name = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
        raise UserError(f"{place}: unknown role {name!r}; use one of {', '.join(ROLES)}")
    if content is None and any(turn.get(k) for k in ("tool_calls", *THOUGHT_KEYS)):
        content = ""
    message = {"role": role, "content": _content_text(content, place)}
    if len(turn) == 2:
        return message
    # Messages are compared and hashed, and must not differ by keys that no template reads.
    for name, value in turn.items():
        if value is None or name in ("role", "content", "from", "value"):
            continue
        if name in TEMPLATE_KEYS or (name == "name" and role == "tool"):
            message[name] = without_nulls(value)
        elif name == WEIGHT:
            # Every other weight trains as usual, so only 0 is recorded.
            message.update({WEIGHT: 0} if value == 0 else {})
        elif unused is not None:
            unused[f"messages: {name}"] += 1
    return message


def _content_text(content, place: str) -> str:
    """The text of a message's content: a string, or a list of text parts (joined, as chat templates do)."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) and part.get("type") for part in content):
        for part in content:
            if part["type"] in PICTURES:
                raise UserError(f"{place}: content holds {part['type']!r}; only text is supported")
        texts = [part.get("text") if part["type"] in TEXT_PARTS else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    problem = "is null" if content is None else f"must be text or a list of text parts, not {type(content).__name__}"
    raise UserError(f"{place}: content {problem}")


def _function_call(text, place: str) -> dict:
    try:
        call = parse_json(text)
        return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{place}: a function_call must be JSON with 'name' and 'arguments'") from None


def without_nulls(value):
    """`value` without the keys that hold null: parquet files give every struct the keys of all (as TRL's own)."""
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return value


def from_json_text(value):
    """The list of messages (or the message) that a JSON text holds; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{") or not re.search('"(role|from)"', value):
        return value
    try:
        parsed = parse_json(value)
    except ValueError:
        return value
    first = parsed[0] if isinstance(parsed, list) and parsed else parsed
    return parsed if isinstance(first, dict) and {"role", "from"} & set(first) else value


def with_options(messages: list[dict], options: dict) -> list[dict]:
    """`messages` whose first one carries what the row gives its chat template, if it gives anything."""
    options = {key: options[key] for key in OPTIONS if options.get(key)}
    return [{**messages[0], **options}, *messages[1:]] if options and messages else messages


def extras(message: dict) -> dict:
    """What a message has beside role and content."""
    return {k: v for k, v in message.items() if k not in ("role", "content")} if len(message) > 2 else {}


def up_to_last(messages: list[dict], role: str) -> list[dict]:
    """`messages` up to the last one of `role`; empty if there is none."""
    while messages and messages[-1]["role"] != role:
        messages = messages[:-1]
    return messages


def read_transcript(text: str, source: str, key: str) -> list[dict]:
    """Messages of an Anthropic transcript, `\\n\\nHuman: ... \\n\\nAssistant: ...`.

    Raises:
        UserError: text before the first `\\n\\nHuman:`.
    """
    # The capturing group keeps the speakers: parts are [text before, speaker, content, speaker, content, ...].
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip():
        raise UserError(f"{source}: key {key!r}: the transcript must start with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]


def transcript(messages: list[dict]) -> str:
    """The messages as one text, `role: content` on a line each: equal texts for equal conversations."""
    return "\n".join(f"{m['role']}: {m['content']}{_extras_text(m)}" for m in messages)


def _extras_text(message: dict) -> str:
    # Conversations that differ in their tools or tool calls only are different ones.
    return f" {json.dumps(extras(message), sort_keys=True)}" if len(message) > 2 else ""


def well_formed(text: str) -> str:
    """`text` with U+FFFD in place of lone surrogates, which UTF-8 cannot encode."""
    # UTF-16 joins a valid pair of surrogates into its character; "replace" leaves U+FFFD for a lone one.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_unicode(texts: list[str], source: str) -> None:
    """Raise UserError, naming `source`, for text that UTF-8 cannot encode (a lone surrogate from a cut emoji)."""
    try:
        # A lone surrogate passes through JSON, but fails later in tokenizers, hashes and artifact files without naming
        # the row.
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source}: text is not valid Unicode ({error.reason}); fix or remove this row") from None
