"""Text from outside on consoles and in Markdown pages: shown as text."""

import pytest
from markdown_it import MarkdownIt

from utils.markdown import code_block, escaped, plain, without_html
from utils.secrets_in_text import without_secret_flags, without_secrets
from utils.stage import print_main
from utils.tables import side_by_side

ANSWERS = [
    "<script>alert(1)</script>",
    "text <img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>\n\n</svg>",
    "<style>* { display: none }</style>",
    "<!-- a comment\n\nthat hides -->",
    "<div>\n```\n\n```\n<img src=x>\n```",
    "```html\n<b>\n```\n<img src=x>",
    "~~~\n<b>\n~~~ x\n<i>\n~~~\n<img src=x>",
    "- ```\n  <b>\n- <img src=x>",
    "    <img src=x>\n\nafter <img src=x>",
    "![pixel](https://example.org/pixel.png)",
    "\\![pixel](https://example.org/pixel.png)",
    "![pixel][r]\n\n[r]: https://example.org/pixel.png",
    "\\<img src=x>",
    "`<img src=x>` <img src=x>",
    "&lt;img src=x&gt; &#60;img src=x&#62;",
    "---\nlicense: mit\n---",
    "a\u2028<img src=x>\x85<b>\x0b<i>\x1c<s>",
    "<a href='javascript:alert(1)'>x</a>",
    "<?php ?> <![CDATA[ <b> ]]> </p>",
    "# heading\n\n> quote <b>\n\n1. <i>",
    "```\n<b>",
    "`````\n```\n<b>\n`````\n<img src=x>",
    "   ```\n   <b>\n   ```\n\t<img src=x>",
]


def live_html(markdown: str) -> list[str]:
    """What a viewer that renders HTML, and loads pictures, would not show as text."""
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown):
        inline = token.children or []
        found += [t.content for t in [token, *inline] if t.type in ("html_block", "html_inline", "image")]
    return found


@pytest.mark.parametrize("answer", ANSWERS)
def test_pages_of_answers_have_no_live_html(answer):
    page = side_by_side("T", [("Prompt 1", answer, {"base": answer, f"tuned {answer}": "fine"})])
    assert live_html(page) == [] and page.startswith("# T")
    assert without_html(without_html("plain *text* 1 < 2 & 3")) == "plain *text* 1 < 2 & 3"


def test_most_answers_are_live_html_by_themselves():
    assert sum(bool(live_html(answer)) for answer in ANSWERS) >= 14


def test_code_is_shown_as_written():
    text = "```html\n<b>&amp;</b>\n```"
    assert without_html(text) == text


ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\u202eabc\u2066\x00\x7f"


def test_terminal_escapes(capsys):
    print_main(f"a\tb\n{ESCAPES}")
    out = capsys.readouterr().out
    assert out.startswith("a\tb\n") and all(c.isprintable() or c in "\n\t" for c in out)
    assert plain("فارسی\u200cها 👩\u200d👩 a\xa0b") == "فارسی\u200cها 👩\u200d👩 a\xa0b"
    for text in (code_block(ESCAPES), escaped(ESCAPES), without_html(ESCAPES)):
        assert all(c.isprintable() or c == "\n" for c in text)


def test_error_lines_have_no_terminal_escapes(call, tmp_path):
    code, _, err = call("eval_win_rate", "--dataset_name", f"{tmp_path}/{ESCAPES[:9]}", "--base_model", "\x1b[31mred")
    assert code == 2 and "\x1b" not in err


def test_secrets_of_the_environment_and_by_form(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert without_secrets("x correct horse battery abc") == "x *** abc"
    assert without_secrets("hf_abcdefghijklmnopqrst sk-proj-abcdefghijklmnop ghp_abcdefghijklmnopqrst") == "*** *** ***"
    ordinary = "task-specific-rewards-of-risk-models hf_model"
    assert without_secrets(ordinary) == ordinary


def test_secret_flags_of_a_command():
    ordinary = ["x.py", "--eos_token", "<e>", "--category_key", "k", "--max_new_tokens", "3"]
    assert without_secret_flags(ordinary) == ordinary
    shown = without_secret_flags(["x.py", "--hub_token", "abc", "--hub-token=abc", "--api_key", "abc", "--seed", "1"])
    assert shown == ["x.py", "--hub_token", "***", "--hub-token=***", "--api_key", "***", "--seed", "1"]
