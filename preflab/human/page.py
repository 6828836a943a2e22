"""The annotation page of the blind human evaluation: one HTML file that opens from disk and asks no network.

The page holds what its reader may see and nothing else: prompts and answers in the order of display, under opaque ids.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from pathlib import Path

import nh3
from markdown_it import MarkdownIt

CHOICES = ("left_much", "left", "tie", "right", "right_much", "both_bad")
SKIPS = ("unclear_prompt", "not_my_field", "cannot_read", "upsetting", "other")
FORMAT = "preferencelab-votes-1"

TEMPLATE = Path(__file__).parent / "static"
EMPTY = "<p><em>(empty answer)</em></p>"
TAGS = "a blockquote br code del em h4 h5 h6 hr li ol p pre s strong table tbody td th thead tr ul"

# Raw HTML is shown as text; without images nothing is fetched; without references no line of an answer vanishes.
NESTING = 40
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": NESTING})
    .enable(["table", "strikethrough"])
    .disable(["image", "reference"])
)


def markdown(text: str) -> str:
    """Safe HTML of an answer: no script, style, image, relative link, id or class of its own."""
    text = _well_formed(text)
    if not any(c.isprintable() and not c.isspace() for c in text):
        return EMPTY
    tokens = _MARKDOWN.parse(text)
    if any(token.level >= NESTING - 1 for token in tokens):
        # The parser drops what is nested deeper.
        return _typed(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            # The page's own outline ends at h3, the heading of an answer.
            token.tag = f"h{min(int(token.tag[1]) + 3, 6)}"
        elif token.type == "fence" and " " in token.info.strip():
            # More than the name of a language is text that would vanish.
            token.content = f"{token.info}\n{token.content}"
    return nh3.clean(
        _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}),
        tags=set(TAGS.split()),
        attributes={"a": {"href"}, "ol": {"start"}, "*": set()},
        set_tag_attribute_values={"a": {"target": "_blank"}},
        link_rel="noopener noreferrer",
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
    )


def conversation(messages: list[dict]) -> str:
    """HTML of a prompt, `{"role", "content"}` per turn: one user turn alone, several under their roles.

    Answers of earlier turns are rendered as those to judge; what was asked stands as it was typed, since markup would
    hide parts of it (the stars of 2*3*4).
    """
    if len(messages) == 1 and messages[0]["role"] == "user":
        return _turn(messages[0])
    label = '<div class="turn"><p class="role">{}</p>\n{}</div>'
    return "\n".join(label.format(html.escape(m["role"].capitalize()), _turn(m)) for m in messages)


def _turn(message: dict) -> str:
    if message["role"] == "assistant":
        return markdown(message["content"])
    return _typed(message["content"])


def _typed(text: str) -> str:
    return f'<div class="typed" dir="auto">{html.escape(_well_formed(text))}</div>'


def build_page(study: str, title: str, items: list[dict]) -> str:
    """The self-contained page, the same text for the same arguments.

    Args:
        study: names the study in exports and in the browser's storage; another set of items needs another name.
        items: `{"id", "prompt", "left", "right"}` each, in the order of display; ids are opaque and occur once, the
            others are HTML of `conversation` and `markdown`.
    """
    ids = [item["id"] for item in items]
    if not items or len(set(ids)) < len(ids):
        raise ValueError("a page needs items, each under an id of its own")
    shown = [{key: item[key] for key in ("id", "prompt", "left", "right")} for item in items]
    style, script = ((TEMPLATE / f"human_eval.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    parts = {
        "title": html.escape(_well_formed(title)),
        "policy": f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src 'none'; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": _embedded({"format": FORMAT, "study": _well_formed(study), "items": shown}),
    }
    page = (TEMPLATE / "human_eval.html").read_text(encoding="utf-8")
    # One pass, so that a part that looks like a placeholder stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def checksum(study: str, annotator: str, votes: list[dict]) -> str:
    """CRC-32 of an export's votes, 8 hex digits: equal to the page's, so that damage and hand edits are noticed."""
    text = json.dumps([study, annotator, votes], ensure_ascii=False, separators=(",", ":"))
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def _well_formed(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which no UTF-8 file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _source(text: str) -> str:
    """The policy's source expression that admits exactly this inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(value) -> str:
    """JSON that ends no script element and no line, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)
