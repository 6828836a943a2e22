"""The annotation page of the blind human evaluation: one HTML file that opens from disk and needs no network.

It contains only what annotators may see: prompts and answers in display order, under opaque ids.
"""

import html
import json
import re
import zlib
from pathlib import Path

import nh3
from markdown_it import MarkdownIt

from preflab.data.messages import well_formed
from preflab.human.latex import keep_latex
from utils.tables import CUT_OFF_TEXT
from utils.web_page import content_policy

CHOICES = ("left_much", "left", "tie", "right", "right_much", "both_bad")
SKIPS = ("unclear_prompt", "not_my_field", "cannot_read", "upsetting", "other")
# Written into every export by human_eval.js; `votes` accepts no other.
FORMAT = "preferencelab-votes-1"

TEMPLATE = Path(__file__).parent / "static"
EMPTY = "<p><em>(empty answer)</em></p>"
# Below an answer that reached the token limit. Answers cannot imitate it, since their own HTML has no classes.
CUT_OFF = f'<p class="cut">[{CUT_OFF_TEXT}]</p>'
# Tags that Markdown can produce; all others are removed by nh3, together with every attribute not named below.
TAGS = "a blockquote br code del em h4 h5 h6 hr li ol p pre s strong table tbody td th thead tr ul"

# Raw HTML is shown as text. No images: nothing may be fetched. No references: their lines would disappear.
NESTING = 40
_MARKDOWN = keep_latex(
    MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": NESTING})
    .enable(["table", "strikethrough"])
    .disable(["image", "reference"])
)


def markdown(text: str) -> str:
    """Safe HTML of an answer's Markdown: no scripts, styles, images, relative links, ids or classes."""
    text = well_formed(text)
    # Also text of invisible characters only: annotators would take an empty box for an error of the page.
    if not any(c.isprintable() and not c.isspace() for c in text):
        return EMPTY
    tokens = _MARKDOWN.parse(text)
    if any(token.level >= NESTING - 1 for token in tokens):
        # The parser drops deeper nesting, so show the source instead.
        return typed(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            # The page uses h1 to h3, so an answer's headings start at h4.
            token.tag = f"h{min(int(token.tag[1]) + 3, 6)}"
        elif token.type == "fence" and " " in token.info.strip():
            # More than a language name is text of the answer, which the renderer would drop.
            token.content = f"{token.info}\n{token.content}"
    # The second barrier: answers are untrusted text, and a script could read the study or the votes.
    return nh3.clean(
        _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}),
        tags=set(TAGS.split()),
        attributes={"a": {"href"}, "ol": {"start"}, "*": set()},
        set_tag_attribute_values={"a": {"target": "_blank"}},
        link_rel="noopener noreferrer",
        url_schemes={"http", "https", "mailto"},
        # Relative links would point to the annotator's own disk.
        url_relative="deny",
    )


def answer(text: str, cut_off: bool) -> str:
    """HTML of an answer to judge: its Markdown, with a mark where generation ended at the token limit."""
    return markdown(text) + (CUT_OFF if cut_off else "")


def conversation(messages: list[dict]) -> str:
    """HTML of a prompt, `{"role", "content"}` per turn: a single user turn alone, several turns under their roles.

    Assistant turns are rendered as Markdown, like the answers to judge. Other turns are shown as typed, because
    Markdown would hide parts of them (the stars in 2*3*4).
    """
    if len(messages) == 1 and messages[0]["role"] == "user":
        return _turn(messages[0])
    label = '<div class="turn"><p class="role">{}</p>\n{}</div>'
    return "\n".join(label.format(html.escape(m["role"].capitalize()), _turn(m)) for m in messages)


def _turn(message: dict) -> str:
    if message["role"] == "assistant":
        return markdown(message["content"])
    return typed(message["content"])


def typed(text: str) -> str:
    """HTML of a text as it was typed, without Markdown."""
    return f'<div class="typed" dir="auto">{html.escape(well_formed(text))}</div>'


def build_page(study: str, title: str, items: list[dict]) -> str:
    """The self-contained page; deterministic.

    Args:
        study: id of the study in exports and in the browser's storage; each set of items needs its own.
        items: `{"id", "prompt", "left", "right"}` each, in display order; ids are opaque and unique, the other values
            are HTML from `conversation` and `answer`.
    """
    # Votes are stored by id, so a duplicate would overwrite one vote with another.
    ids = [item["id"] for item in items]
    if not items or len(set(ids)) < len(ids):
        raise ValueError("a page needs at least one item, and each item a unique id")
    shown = [{key: item[key] for key in ("id", "prompt", "left", "right")} for item in items]
    style, script = ((TEMPLATE / f"human_eval.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    parts = {
        "title": html.escape(well_formed(title)),
        # Nothing may be fetched, and only this script and style run, identified by their hashes.
        "policy": content_policy(script, style),
        "style": style,
        "script": script,
        "data": _embedded({"format": FORMAT, "study": well_formed(study), "items": shown}),
    }
    page = (TEMPLATE / "human_eval.html").read_text(encoding="utf-8")
    # One pass, so that a placeholder inside an answer is not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


def checksum(study: str, annotator: str, votes: list[dict]) -> str:
    """CRC-32 of an export's votes as 8 hex digits, equal to the page's: detects damage and manual edits."""
    # The same text as JSON.stringify in the page: no spaces, characters beyond ASCII not escaped.
    text = json.dumps([study, annotator, votes], ensure_ascii=False, separators=(",", ":"))
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def _embedded(value) -> str:
    """JSON that is safe inside a script element: its strings cannot close the element or end a line."""
    text = json.dumps(value, ensure_ascii=False)
    # `</script>` inside an answer would end the element; U+2028 and U+2029 end a line in older JavaScript.
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
