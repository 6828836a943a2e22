"""Text from outside (names of models, data sets and runs) inside Markdown: shown as text, never read as markup."""

import re

# What starts an HTML tag or entity, and what Markdown reads inside a line. An underscore inside a word is left alone.
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def visible(text: str) -> str:
    """`text` on one line, with control characters (line breaks, terminal escapes, text direction) as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def escaped(text: str) -> str:
    """`text` as Markdown that shows exactly `text`, on one line."""
    return _TAG.sub("&lt;", _ENTITY.sub("&amp;", _MARKUP.sub(r"\\\g<0>", visible(text))))


def sentence(text: str) -> str:
    """One of the project's own sentences, which may quote a name: its Markdown stays, but no HTML and no pictures."""
    return _TAG.sub("&lt;", _ENTITY.sub("&amp;", visible(text).replace("![", "\\![")))


def code_span(text: str) -> str:
    """`text` as code inside a line, between more backticks than it contains in a row."""
    text = visible(text)
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def code_block(text: str, language: str = "") -> str:
    """`text` as a code block that nothing in it can close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
