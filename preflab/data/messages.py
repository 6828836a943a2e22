"""Chat messages as all data files share them: roles, transcripts, and text that can be encoded.

A message is `{"role": "system" | "user" | "assistant", "content": text}`. Rows may also write it as ShareGPT does,
`{"from": "human" | "gpt", "value": text}`.
"""

import re

from utils.errors import UserError

ROLES = ("system", "user", "assistant")
# ShareGPT's names of the same roles.
ALIASES = {"human": "user", "gpt": "assistant"}


def role_of(message, default: str | None = None) -> str | None:
    """The role of a message under its common name; None if it has no known role.

    Args:
        default: the role of a message that names none.
    """
    if not isinstance(message, dict):
        return None
    role = message.get("role", message.get("from", default))
    role = ALIASES.get(role, role) if isinstance(role, str) else None
    return role if role in ROLES else None


def check_messages(turns, source: str, key: str, default_role: str | None = None) -> list[dict]:
    """Validate a list of chat turns and return it as messages with `role` and `content` only.

    Args:
        turns: the value of a row, of any type.
        source: file and row, for error messages.
        key: the row's key that holds the turns, for error messages.
        default_role: the role of turns that name none.

    Raises:
        UserError: not a list, a turn without role and content, an unknown role, content that is not text.
    """
    if not isinstance(turns, list):
        raise UserError(f"{source}: key {key!r} must be a list of messages, not {type(turns).__name__}")
    messages = []
    for i, turn in enumerate(turns):
        place = f"{source}: key {key!r}, message {i}"
        if not isinstance(turn, dict) or not ({"role", "from"} & set(turn) or default_role):
            raise UserError(f"{place}: expected {{'role': ..., 'content': ...}}")
        role, content = role_of(turn, default_role), turn.get("content", turn.get("value"))
        if role is None:
            name = turn.get("role", turn.get("from"))
            raise UserError(f"{place}: unknown role {name!r}; use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{place}: content must be text, not {type(content).__name__}")
        # Other keys (names, weights, tool calls) are dropped: messages are compared and hashed, and must not differ by
        # them.
        messages.append({"role": role, "content": content})
    return messages


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
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def check_unicode(texts: list[str], source: str) -> None:
    """Raise UserError, naming `source`, for text that UTF-8 cannot encode (a lone surrogate from a cut emoji)."""
    try:
        # A lone surrogate passes through JSON, but fails later in tokenizers, hashes and artifact files without naming
        # the row.
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source}: text is not valid Unicode ({error.reason}); fix or remove this row") from None
