"""LaTeX in Markdown: formulas stay as typed, because Markdown would remove their backslashes and read their stars.

The page has no formula renderer: it is one file without a network, and a renderer with its fonts is much larger.
"""

import re

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml

# Formulas inside a line: opening and closing delimiter, longest first.
INLINE = (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"))
# Formulas from the start of a line to the end of one. They may hold empty lines, and what Markdown takes for lists.
BLOCKS = (("$$", "$$"), ("\\[", "\\]"))
ENVIRONMENT = re.compile(r"\\begin\{(\w+\*?)\}")
# Characters that Markdown authors escape. A backslash before any other one is LaTeX (\\, \{, \,) or a path.
ESCAPABLE = set("*_`#~|<>+-.!\n")


def keep_latex(parser: MarkdownIt) -> MarkdownIt:
    """Make `parser` show formulas and LaTeX's escapes as typed. Returns `parser`."""
    parser.inline.ruler.before("escape", "latex", _inline)
    parser.block.ruler.before("fence", "latex_block", _block, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    parser.add_render_rule("latex", _render)
    parser.add_render_rule("latex_block", lambda *args: f"<p>{_render(*args)}</p>\n")
    return parser


def _render(self, tokens, index, options, env) -> str:
    return escapeHtml(tokens[index].content).replace("\n", "<br>\n")


def _inline(state, silent: bool) -> bool:
    """markdown-it's inline rule: a formula, or a backslash that is not a Markdown escape."""
    if state.src[state.pos] not in "\\$":
        return False
    end = _formula_end(state.src, state.pos)
    if end is None:
        following = state.src[state.pos + 1 : state.pos + 2]
        # A dollar that opens no formula, and a backslash that Markdown's own rule understands, are left to the parser.
        if state.src[state.pos] == "$" or not following or following in ESCAPABLE or following.isalnum():
            return False
        end = state.pos + 2
    if not silent:
        state.push("latex", "", 0).content = state.src[state.pos : end]
    state.pos = end
    return True


def _formula_end(text: str, start: int) -> int | None:
    """The end of the formula that starts at `start`, or None."""
    environment = ENVIRONMENT.match(text, start)
    if environment:
        close = f"\\end{{{environment[1]}}}"
        end = text.find(close, environment.end())
        return None if end < 0 else end + len(close)
    for opening, closing in INLINE:
        if text.startswith(opening, start):
            inside = start + len(opening)
            end = _closing_dollar(text, inside) if opening == "$" else text.find(closing, inside)
            # An empty formula is two dollars or brackets in a text.
            return end + len(closing) if end > inside else None
    return None


def _closing_dollar(text: str, inside: int) -> int:
    """The dollar that closes the formula opened before `inside`, or -1: pandoc's rule, which leaves prices alone."""
    if text[inside : inside + 1].isspace():
        return -1
    end = text.find("$", inside)
    # "$5 and $10": a closing dollar follows its formula directly, and no digit follows it.
    if end < 0 or text[end - 1].isspace() or text[end + 1 : end + 2].isdigit() or "\n" in text[inside:end]:
        return -1
    return end


def _block(state, start_line: int, end_line: int, silent: bool) -> bool:
    """markdown-it's block rule: a formula from the start of a line to the end of this or a later one."""
    start = state.bMarks[start_line] + state.tShift[start_line]
    environment = ENVIRONMENT.match(state.src, start)
    openings = [(environment[0], f"\\end{{{environment[1]}}}")] if environment else BLOCKS
    delimiters = next((pair for pair in openings if state.src.startswith(pair[0], start)), None)
    if delimiters is None or state.is_code_block(start_line):
        return False
    end = state.src.find(delimiters[1], start + len(delimiters[0]))
    if end < 0:
        return False
    last = start_line
    # The closing delimiter must be in this block: a quotation or list that ends earlier has less indentation.
    while last < end_line and state.eMarks[last] < end:
        last += 1
        if last < end_line and state.sCount[last] < state.blkIndent and not state.isEmpty(last):
            return False
    if last >= end_line or state.src[end + len(delimiters[1]) : state.eMarks[last]].strip():
        return False
    if not silent:
        token = state.push("latex_block", "", 0)
        token.content = state.getLines(start_line, last + 1, state.blkIndent, False).strip()
        token.map = [start_line, last + 1]
    state.line = last + 1
    return True
