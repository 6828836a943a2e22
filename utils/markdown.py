"""Text from outside (names of models, data sets and runs) inside Markdown: shown as text, never read as markup."""

import re

# What starts an HTML tag or entity, and what Markdown reads inside a line. An underscore inside a word is left alone.
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=#?\w+;)")
# Control characters but line breaks and tabs, which terminals obey, and direction overrides, which reorder text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def visible(text: str) -> str:
    """`text` on one line, with control characters (line breaks, terminal escapes, text direction) as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def plain(text: str) -> str:
    """`text` of any number of lines with control characters and direction overrides as escapes, as a terminal may show.

    Line breaks and tabs stay, and so do the invisible characters that scripts and emoji need.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def escaped(text: str) -> str:
    """`text` as Markdown that shows exactly `text`, on one line."""
    return _TAG.sub("&lt;", _ENTITY.sub("&amp;", _MARKUP.sub(r"\\\g<0>", visible(text))))


def sentence(text: str) -> str:
    """One of the project's own sentences, which may quote a name: its Markdown stays, but no HTML and no pictures."""
    return _without_tags(visible(text))


def without_html(text: str) -> str:
    """An answer's Markdown of any number of lines: HTML and pictures become text, code blocks stay as written."""
    # Not at the top: it takes 50 ms.
    from markdown_it import MarkdownIt

    # As `quoted` splits it: other characters break lines in some viewers too.
    lines = plain("\n".join(text.splitlines())).split("\n")
    # Without HTML, since the result has none: a tag must not hide the fences below it from this parser only.
    tokens = MarkdownIt("commonmark", {"html": False}).parse("\n".join(lines))
    # The lines between the fences; the first line may hold more than a language.
    code = {i for t in tokens if t.type == "fence" and t.level == 0 for i in range(t.map[0] + 1, t.map[1])}
    return "\n".join(line if i in code else _without_tags(line) for i, line in enumerate(lines))


def _without_tags(line: str) -> str:
    # The entity of the exclamation mark, since a backslash before it may itself be escaped.
    return _TAG.sub("&lt;", _ENTITY.sub("&amp;", line)).replace("![", "&#33;[")


def code_span(text: str) -> str:
    """`text` as code inside a line, between more backticks than it contains in a row."""
    text = visible(text)
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def code_block(text: str, language: str = "") -> str:
    """`text` as a code block that nothing in it can close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{plain(text)}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
