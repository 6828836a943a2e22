"""The page of `--help_all [WORD ...]`: every key by topic, or those that match the words; at most 100 columns."""

import re
import textwrap

from utils.errors import UserError
from utils.keys import Key
from utils.suggestions import SHORT_NAMES, meant_key
from utils.tables import WIDTH

# Column of the descriptions.
DESCRIPTION_AT = 40
# So few matches are shown with their complete descriptions.
FEW = 3
INDENT = "      "
HEAD = "Flags and YAML keys are the same; [x] is the default. A key without a type is a switch: --x, --no_x."
SCRIPT_TOPIC = "this script"


def all_keys_page(keys: dict[str, Key], dataclass_types: tuple, words: list[str]) -> str:
    """Every key with its default and the first sentence of its description, by topic.

    Topics come from the dataclasses' attribute `topics`, `{topic: regular expression of key names}`; a key that none
    names belongs to the script's own. Keys in their attribute `unsupported`, `{key: reason}`, come last, with reasons.

    Args:
        words: only keys whose name or description has all of them; few matches are described completely.

    Raises:
        UserError: no key matches.
    """
    topics = {topic: names for d in dataclass_types for topic, names in getattr(d, "topics", {}).items()}
    unsupported = {name: why for d in dataclass_types for name, why in getattr(d, "unsupported", {}).items()}
    matches = [key for key in keys.values() if all(_matches(key, word) for word in words)]
    if not matches:
        meant = meant_key("_".join(words), keys)
        raise UserError(
            f"--help_all {' '.join(words)}: no key has this in its name or description"
            + (f"; did you mean {meant}?" if meant else "")
        )
    by_topic: dict[str, list[Key]] = {topic: [] for topic in (SCRIPT_TOPIC, *topics)}
    for key in matches:
        if key.name not in unsupported:
            by_topic[_topic(key.name, topics)].append(key)
    describe = _complete if words and len(matches) <= FEW else _brief
    parts = [HEAD if words else f"{HEAD}\n--help_all WORD lists the keys about WORD, --help_all KEY describes one."]
    for topic, members in by_topic.items():
        if members:
            parts.append("\n".join([topic, *(describe(key) for key in members)]))
    refused = [_line(f"  --{key.name}", unsupported[key.name]) for key in matches if key.name in unsupported]
    if refused:
        parts.append("\n".join(["not supported, and why", *refused]))
    return "\n\n".join(parts)


def _matches(key: Key, word: str) -> bool:
    word = word.lower().lstrip("-").replace("-", "_")
    return word in key.name or word in key.help.lower() or key.name in SHORT_NAMES.get(word, ())


def _topic(name: str, topics: dict[str, str]) -> str:
    return next((topic for topic, names in topics.items() if re.fullmatch(names, name)), SCRIPT_TOPIC)


def _flag(key: Key) -> str:
    """`--key TYPE [default]`; long lists of choices are left to the complete description."""
    kind = "" if key.is_switch else f" {key.type_name}" if len(key.type_name) <= 30 else " NAME"
    default = f" [{key.default_text}]" if key.default_text and key.default is not False else ""
    return f"  --{key.name}{kind}{default}"


def _brief(key: Key) -> str:
    """One line, or two where the flag is long."""
    sentence = re.split(r"(?<=[a-z0-9)`'])\. ", key.help)[0].rstrip(".")
    sentence = re.sub(r"^Whether (or not )?to (\w)", lambda match: match[2].upper(), sentence)
    return _line(_flag(key), sentence)


def _line(flag: str, sentence: str) -> str:
    text = textwrap.shorten(sentence, WIDTH - DESCRIPTION_AT, placeholder=" ...")
    if len(flag) > DESCRIPTION_AT - 2:
        return f"{flag}\n{'':{DESCRIPTION_AT}}{text}".rstrip()
    return f"{flag:<{DESCRIPTION_AT}}{text}".rstrip()


def _complete(key: Key) -> str:
    """The flag, its choices and all of its description."""
    lines = [_flag(key)]
    if key.choices:
        lines += textwrap.wrap("one of " + ", ".join(key.choices), WIDTH - len(INDENT))
    lines += textwrap.wrap(key.help, WIDTH - len(INDENT))
    return f"\n{INDENT}".join(lines)
