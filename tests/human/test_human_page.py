"""The annotation page: its content, and its use in a real browser, opened from disk without a network."""

import json
import re
import statistics
import time
from pathlib import Path

import pytest
from helpers import elements

from preflab.human import page as human_page
from preflab.human.metrics import summarise
from preflab.human.page import CHOICES, SKIPS, answer, build_page, checksum, conversation, markdown
from preflab.human.study import lay_out
from preflab.human.votes import read_votes, unblind

ATTACKS = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<svg/onload=window.hacked=1><animate onbegin=window.hacked=1>",
    "<svg><script>window.hacked=1</script></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=1>",
    '<iframe srcdoc="<script>parent.hacked=1</script>"></iframe>',
    "<style>*{display:none}</style><link rel=stylesheet href=https://example.org/a.css>",
    "<body onload=window.hacked=1><base href=https://example.org>",
    "<details open ontoggle=window.hacked=1>x</details>",
    '<a href="javascript:window.hacked=1" onmouseover="window.hacked=1">x</a>',
    "[x](javascript:window.hacked=1)",
    "[x](JaVaScRiPt&colon;window.hacked=1)",
    "[x](\tjavascript:window.hacked=1)",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    "[x](vbscript:x) [y](file:///etc/passwd) [z](//example.org/share)",
    "<javascript:window.hacked=1>",
    "![x](https://example.org/pixel.png)",
    '![x](x"onerror="window.hacked=1)',
    '[x](https://example.org "onmouseover=window.hacked=1")',
    "[x]: javascript:window.hacked=1\n\n[x]",
    "```x onmouseover=window.hacked=1\n</code></pre><script>window.hacked=1</script>\n```",
    "`</code><script>window.hacked=1</script>`",
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "]]><script>window.hacked=1</script>",
    '" autofocus onfocus=window.hacked=1 x="',
    "<input name=choice value=left checked><form action=https://example.org><button id=help>",
    "|<img src=x onerror=window.hacked=1>|x|\n|-|-|\n|<script>window.hacked=1</script>|y|",
    "&lt;script&gt;window.hacked=1&lt;/script&gt;",
    "\u2028</script\n><script>window.hacked=1</script>",
]


def make_items(count: int, text: str = "Answer") -> list[dict]:
    """Items as preflab.human.study makes them."""
    user = [{"role": "user", "content": "A question?"}]
    return [
        {
            "id": f"k{i}",
            "prompt": conversation(user),
            "left": markdown(f"{text} A{i}"),
            "right": markdown(f"{text} B{i}"),
        }
        for i in range(count)
    ]


# ---- content


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_rendered_as_text(attack):
    for text in (attack, f"- {attack}", f"> {attack}", f"**{attack}**"):
        for shown in (markdown(text), conversation([{"role": "user", "content": text}])):
            for tag, attributes in elements(shown):
                assert tag in {*human_page.TAGS.split(), "div"}, shown
                assert set(attributes) <= {"href", "rel", "target", "start", "class", "dir"}, shown
                assert re.match("https?://|mailto:", attributes.get("href", "http://")), shown


def test_markdown_is_rendered():
    shown = markdown(
        "# Top\n\n###### Low\n\n3. a\n4. b\n\n|x|y|\n|-|-|\n|1|2|\n\n~~no~~ **yes**\nnext\n```py\na<b\n```"
    )
    assert "<h4>Top</h4>" in shown and "<h6>Low</h6>" in shown and '<ol start="3">' in shown
    assert "<th>x</th>" in shown and "<s>no</s> <strong>yes</strong><br>\nnext" in shown
    assert "<pre><code>a&lt;b\n</code></pre>" in shown
    link = markdown("[x](https://example.org/?a=1&b=2)")
    assert 'href="https://example.org/?a=1&amp;b=2"' in link
    assert 'target="_blank"' in link and 'rel="noopener noreferrer"' in link


def test_no_text_of_an_answer_is_lost():
    assert "(empty answer)" in markdown("") and markdown(" \n\u200b") == markdown("")
    assert "[k]: https://example.org" in markdown("[k]: https://example.org")
    assert "Here it is" in markdown("```Here it is\nx\n```")
    assert "&lt;b&gt;raw&lt;/b&gt;" in markdown("<b>raw</b>")
    for depth in (5, 18, 19, 39, 40, 41, 500):
        assert "deep" in markdown("> " * depth + "deep") and "deep" in markdown("- " * depth + "deep"), depth
    assert markdown("a \ud800 b") == "<p>a \ufffd b</p>\n"


@pytest.mark.parametrize(
    "formula",
    [
        r"\(a*b*c\)", r"\(x_i_ + \{y\}\)", "$$a*b*c$$", "$a_1_*b*$", r"\[ a \\ b \]", r"a \\ b",
        r"C:\\dir, 5\%, \{x\}",
        "$$\na*b*\n\n- c\n= d\n$$", "\\[\n# x\n+ y \\\\\n    z\n\\]",
        "\\begin{align*}\na &= b \\\\\n===\n\\end{align*}",
        "Sum: $$\na \\\\ b*c*\n$$", r"\(", r"\]", "$$", "$$ a", r"\begin{x} y", "$", "a\\",
    ],
)  # fmt: skip
def test_latex_is_shown_as_typed(formula):
    # A formula of several lines that starts inside a line is a paragraph, in which Markdown still finds lists.
    inside = ("See {} here",) if "\n" not in formula else ()
    for around in ("{}", *inside, "> {}", "- {}", "1. first\n\n   {}"):
        indent = {"> {}": "> ", "- {}": "  ", "1. first\n\n   {}": "   "}.get(around, "")
        source = around.replace("{}", formula.replace("\n", f"\n{indent}"))
        shown = re.sub(r"<[^>]+>", "", markdown(source)).replace("&amp;", "&").replace("&gt;", ">")
        assert "".join(formula.split()) in "".join(shown.split()), (source, markdown(source))


def test_markdown_beside_latex_is_rendered():
    assert "<em>b</em>" in markdown(r"\(a\) *b* \(c\)") and markdown(r"\*a\*") == "<p>*a*</p>\n"
    assert "<strong>big</strong>" in markdown("It costs $5, a **big** $10.") and "my_var" in markdown(r"my\_var")
    assert markdown("$$\na\n$$\n\n**b**") == "<p>$$<br>\na<br>\n$$</p>\n<p><strong>b</strong></p>\n"
    assert "&lt;b&gt;" in markdown("$$<b>$$") and "<b>" not in markdown("$$\n<b>\n$$")
    assert markdown("`\\(a*b*\\)`") == "<p><code>\\(a*b*\\)</code></p>\n"


def test_answer_cut_off_at_the_token_limit_is_marked():
    mark = '<p class="cut">[cut off at the token limit]</p>'
    assert answer("A list:\n- one", True).endswith(mark) and mark not in answer("A list:\n- one", False)
    # An answer's own text cannot look like the mark.
    assert '<p class="cut">' not in answer(mark, False)


def test_degenerate_answers_render_fast():
    start = time.perf_counter()
    for text in ("*a " * 5000, "[" * 5000, "`" * 5000, "<" * 5000, "> " * 5000, "a|" * 2500 + "\n" + "-|" * 2500,
                 "$ " * 5000, "\\(" * 5000, "$$a\n" * 5000, "\\begin{a}\n" * 3000, "\\[\n" * 5000):  # fmt: skip
        assert markdown(text)
    assert time.perf_counter() - start < 5


def test_prompt_is_shown_as_typed():
    alone = conversation([{"role": "user", "content": "What is 2*3*4?\n  # no heading <b>"}])
    assert alone == '<div class="typed" dir="auto">What is 2*3*4?\n  # no heading &lt;b&gt;</div>'
    turns = conversation(
        [
            {"role": "system", "content": "Be *brief*."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "*Hello*"},
            {"role": "user", "content": "And?"},
        ]
    )
    assert re.findall(r'class="role">(\w+)<', turns) == ["System", "User", "Assistant", "User"]
    assert "Be *brief*." in turns and "<em>Hello</em>" in turns


def test_page_is_self_contained():
    items = make_items(2)
    items[0]["left"] = "</script><!--<script>\u2028{{style}} &amp; \\"
    page = build_page("s", "A </title> & {{data}}", items)
    assert page == build_page("s", "A </title> & {{data}}", items)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    assert json.loads(data)["items"] == items and not set("<>&\u2028") & set(data)
    assert "<title>A &lt;/title&gt; &amp; {{data}}</title>" in page
    assert not re.search(r"""<link|\s(src|href|action)=|url\(|@import|fetch\(|XMLHttp|https?://""", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "base-uri 'none'" in policy


def test_items_need_unique_ids():
    for items in ([], make_items(1) * 2):
        with pytest.raises(ValueError, match=r"\bid\b"):
            build_page("s", "t", items)


def test_page_and_scorer_share_codes():
    page = build_page("s", "t", make_items(1))
    assert tuple(re.findall(r'name="choice" value="(\w+)"', page)) == CHOICES
    assert tuple(re.findall(r'data-skip="(\w+)"', page)) == SKIPS


# ---- in a browser


class Reader:
    """A browser profile without a network, with one built page."""

    def __init__(self, browser, file: Path, study: str, items: list[dict], **options):
        file.write_text(build_page(study, "Which answers are better?", items), encoding="utf-8")
        self.url, self.study = file.as_uri(), study
        self.foreign, self.blocked, self.errors = [], [], []
        self.touch = options.get("has_touch", False)
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(5000)
        self.context.set_offline(True)
        self.context.on("requestfinished", self._seen)
        self.context.on("requestfailed", self._seen)

    def _seen(self, request):
        if not request.url.startswith(("file:", "blob:")):
            (self.blocked if request.failure == "csp" else self.foreign).append(request.url)

    def open(self):
        """Open the page in a new tab, at its start screen."""
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(self.url)
        return self.page

    def start(self, name: str = "Ada"):
        """Open the page in a new tab and enter the annotator's name."""
        page = self.open()
        page.fill("#name", name)
        self.click("Start")
        return page

    def click(self, label: str):
        """Click the visible button or choice of that label, or tap it on a phone."""
        control = self.page.locator("button:visible, fieldset label:visible").filter(has_text=label).first
        control.tap() if self.touch else control.click()

    def keys(self, *keys: str):
        for key in keys:
            self.page.keyboard.press(key)

    def checked(self) -> dict:
        """The marked radio of each group, by name."""
        script = "[...document.querySelectorAll('[type=radio]:checked')].map((r) => [r.name, r.value])"
        return dict(self.page.evaluate(script))

    def export(self) -> dict:
        """The file that the Export button downloads, after checking its checksum against Python's."""
        with self.page.expect_download() as download:
            self.page.click("header >> text=Export")
        self.file_name = download.value.suggested_filename
        votes_file = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
        assert votes_file["checksum"] == checksum(self.study, votes_file["annotator"], votes_file["votes"])
        return votes_file


@pytest.fixture
def reader(browser, tmp_path):
    """reader(items or their number, **browser options) returns a Reader; a test fails on any request or page error."""
    readers = []

    def opening(items=3, study="study-1", **options):
        items = make_items(items) if isinstance(items, int) else items
        readers.append(Reader(browser, tmp_path / f"page{len(readers)}.html", study, items, **options))
        return readers[-1]

    yield opening
    for each in readers:
        each.context.close()
        assert each.foreign == [] and each.errors == []


def text(page, selector: str) -> str:
    return page.inner_text(selector)


def test_votes_by_keys(reader):
    r = reader(8)
    page = r.start()
    assert text(page, "h2:visible") == "Pair 1 of 8" and text(page, "#left") == "Answer A0"
    for key in "123450":
        r.keys(key, "Enter")
    r.keys("s", "2", "Enter", "3", "q", "l", "c")
    page.keyboard.type("1 q s e ? fine")
    r.keys("Escape", "q")
    votes = r.export()["votes"]
    assert [v["choice"] for v in votes] == [*CHOICES, None, "tie"]
    assert [v["skip"] for v in votes] == [None] * 6 + [SKIPS[1], None]
    assert votes[-1]["left_acceptable"] is None and votes[-1]["right_acceptable"] is False
    assert votes[-1]["comment"] == "1 q s e ? fine"


def test_votes_by_clicks(reader):
    r = reader(3)
    page = r.start()
    r.click("B much")
    page.click("section:has(> #left) >> label:has-text('Yes')")
    page.click("section:has(> #right) >> label:has-text('No')")
    assert r.checked() == {"choice": "right_much", "left_acceptable": "true", "right_acceptable": "false"}
    page.click("section:has(> #right) >> label:has-text('No')")
    assert r.checked() == {"choice": "right_much", "left_acceptable": "true"}
    r.click("Next")
    r.click("Both bad")
    r.click("Skip…")
    r.click("Upsetting")
    assert r.checked() == {} and text(page, "#reason") == "Skipped: Upsetting content"
    r.click("Next")
    r.click("Skip…")
    r.click("Other reason")
    r.click("Tie")
    assert text(page, "#reason") == "" and r.checked() == {"choice": "tie"}
    exported = r.export()
    assert {k: v for k, v in exported.items() if k not in ("votes", "exported_utc", "checksum")} == {
        "format": "preferencelab-votes-1",
        "study": "study-1",
        "annotator": "Ada",
        "items": 3,
    }
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+Z", exported["exported_utc"]) and r.file_name == "votes-Ada.json"
    first = exported["votes"][0]
    keys = ["id", "choice", "left_acceptable", "right_acceptable", "skip", "comment", "ms"]
    assert list(first) == keys and isinstance(first["ms"], int) and first["id"] == "k0"
    assert [(v["choice"], v["skip"]) for v in exported["votes"]] == [
        ("right_much", None),
        (None, "upsetting"),
        ("tie", None),
    ]


def test_skip_can_be_removed(reader):
    r = reader(1)
    page = r.start()
    r.keys("s")
    assert not page.is_visible("text=Do not skip this pair")
    r.keys("1", "s")
    r.click("Do not skip this pair")
    assert text(page, "#reason") == "" and r.export()["votes"] == []


def test_shortcuts_do_not_interfere(reader):
    r = reader(3)
    page = r.start()
    r.keys("Control+1", "Alt+2", "Meta+3", "Shift+Tab")
    assert r.checked() == {}
    # After a click, arrows move between pairs; by default they would move the radio and change the vote.
    r.click("A better")
    r.keys("ArrowRight")
    assert text(page, "h2:visible") == "Pair 2 of 3"
    r.keys("ArrowLeft")
    assert text(page, "h2:visible") == "Pair 1 of 3" and r.checked() == {"choice": "left"}
    # Reached by Tab, the radio group works as usual.
    page.focus("[value=left]")
    r.keys("Tab", "Shift+Tab", "ArrowRight")
    assert text(page, "h2:visible") == "Pair 1 of 3" and r.checked() == {"choice": "tie"}
    r.keys("Enter")
    assert text(page, "h2:visible") == "Pair 2 of 3"
    r.click("Help")
    r.keys("1", "Escape", "Enter")
    assert text(page, "h2:visible") == "Pair 3 of 3"
    page.fill("#comment", "x")
    r.keys("ArrowLeft", "Enter", "5")
    assert text(page, "h2:visible") == "Pair 3 of 3" and page.input_value("#comment") == "\n5x"


def test_shortcuts_can_be_turned_off(reader):
    r = reader(2)
    page = r.start()
    assert page.is_visible(".choices kbd")
    r.keys("?")
    page.get_by_role("switch", name="Single-key shortcuts").uncheck()
    page.click("dialog >> text=Close")
    r.keys("1", "Enter")
    page.focus("#position")
    r.keys("1", "e", "?", "Enter", "ArrowRight")
    assert r.checked() == {} and text(page, "h2:visible") == "Pair 1 of 2" and not page.is_visible(".choices kbd")
    page = r.start("Ada")
    r.keys("1")
    assert r.checked() == {}
    r.click("Help")
    page.get_by_role("switch").check()
    r.keys("Escape", "1")
    assert r.checked() == {"choice": "left_much"}


def test_vote_can_be_changed(reader):
    r = reader(3)
    page = r.start()
    assert page.is_disabled("#pair [data-do=back]")
    r.keys("1", "q", "Enter", "4", "ArrowLeft")
    assert r.checked() == {"choice": "left_much", "left_acceptable": "true"}
    r.keys("5", "q")
    assert [v["choice"] for v in r.export()["votes"]] == ["right_much", "right"]
    assert text(page, "#judged") == "2 of 3 judged"


def test_reopened_page_continues(reader):
    r = reader(4)
    page = r.start("  Ada   Lovelace ")
    r.keys("1", "Enter", "Enter", "s", "3")
    page.fill("#comment", "why")
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.type), dialog.accept()))
    with page.expect_event("close"):
        page.close(run_before_unload=True)
    assert dialogs == []
    page = r.open()
    assert page.input_value("#name") == "Ada Lovelace"
    r.click("Start")
    assert text(page, "h2:visible") == "Pair 2 of 4" and text(page, "#judged") == "1 of 4 judged, 1 skipped"
    r.keys("Enter")
    assert page.input_value("#comment") == "why" and text(page, "#reason") == "Skipped: Unreadable"
    page.reload()
    r.click("Start")
    r.keys("2", "Enter", "Enter", "3", "Enter")
    assert text(page, "h2:visible") == "All pairs are done"
    page.reload()
    r.click("Start")
    assert text(page, "h2:visible") == "All pairs are done"
    r.keys("ArrowLeft")
    assert text(page, "h2:visible") == "Pair 1 of 4"


def test_annotators_and_studies_are_separate(reader):
    r = reader(2)
    r.start("Ada")
    r.keys("1", "Enter", "2")
    page = r.start("Bob")
    assert text(page, "#judged") == "0 of 2 judged"
    r.keys("5")
    exported = r.export()
    assert exported["annotator"] == "Bob" and [v["choice"] for v in exported["votes"]] == ["right_much"]
    r.url = reader(2, study="study-2").url
    assert text(r.start("Ada"), "#judged") == "0 of 2 judged"
    r.study = "study-2"
    assert r.export()["votes"] == []


def test_two_tabs_lose_no_vote(reader):
    r = reader(3)
    first = r.start()
    second = r.start()
    r.page = first
    r.keys("1")
    second.wait_for_function("document.getElementById('judged').textContent === '1 of 3 judged'")
    r.page = second
    r.keys("Enter", "2")
    assert [v["choice"] for v in r.export()["votes"]] == ["left_much", "left"]


def test_name_is_required(reader):
    r = reader(1)
    page = r.open()
    assert "1 pair." in text(page, "#start")
    r.click("Start")
    page.fill("#name", "   ")
    r.click("Start")
    assert page.is_visible("#start") and not page.is_visible("#pair")


AWKWARD = [
    'quotes " and \\ and / and <b>&amp;',
    "lines\n\n\tand a tab",
    "emoji \U0001f469\u200d\U0001f680 é e\u0301 \u2028 \u2029 \u00a0 ﷽ \ufeff!",
    "controls \x01\x08\x0b\x0c\x1f\x7f\x85!",
]


def test_checksum_equals_python(reader):
    r = reader(len(AWKWARD) + 1)
    page = r.start('Zoë "Z" \U0001f600/..\\x')
    for comment in AWKWARD:
        page.fill("#comment", comment)
        r.click("Next")
    half = "c => { c.value = 'half \\ud83d pair'; c.dispatchEvent(new Event('input', {bubbles: true})) }"
    page.eval_on_selector("#comment", half)
    exported = r.export()
    assert [v["comment"] for v in exported["votes"]] == [*AWKWARD, "half \ufffd pair"]
    assert r.file_name == "votes-Zoë-Z-..-x.json"
    exported["votes"][0]["comment"] += "."
    assert checksum(r.study, exported["annotator"], exported["votes"]) != exported["checksum"]
    assert checksum("s", "a", []) == "4725ba75"


def test_finish_screen(reader):
    r = reader(4)
    page = r.start()
    r.keys("1", "Enter", "s", "1", "Enter", "Enter", "2", "Enter")
    assert text(page, "h2:visible") == "Some pairs are still open"
    assert [text(page, f"#{k}-count") for k in ("judged", "skipped", "open")] == ["2", "1", "1"]
    r.click("Go to the first open pair")
    assert text(page, "h2:visible") == "Pair 3 of 4"
    r.keys("0", "Enter", "Enter")
    assert text(page, "h2:visible") == "All pairs are done" and not page.is_visible("text=first open pair")
    with page.expect_download():
        r.click("Export votes")
    assert "Exported votes-Ada.json" in text(page, "#status")
    r.click("Back to the last pair")
    assert text(page, "h2:visible") == "Pair 4 of 4"


def test_votes_can_be_copied(reader):
    r = reader(1)
    stub = "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async t => { window.copied = t }}})"
    page = r.start()
    r.keys("1")
    page.evaluate(stub.replace("{value", "{configurable: true, value"))
    r.click("Copy")
    page.wait_for_function("window.copied")
    assert json.loads(page.evaluate("window.copied"))["votes"][0]["choice"] == "left_much"
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    r.click("Copy")
    page.wait_for_selector("#copying[open]")
    shown = page.input_value("#export-text")
    assert json.loads(shown)["votes"][0]["choice"] == "left_much"
    assert page.evaluate("getSelection().toString()") == shown


def test_time_counts_while_pair_is_visible(reader):
    r = reader(2)
    page = r.context.new_page()
    r.page = page
    page.clock.install()
    page.goto(r.url)
    page.fill("#name", "Ada")
    page.clock.run_for(50000)
    r.click("Start")
    page.clock.run_for(3000)
    r.keys("1", "Enter")
    page.clock.run_for(2000)
    hide = "h => { Object.defineProperty(document, 'hidden', {value: h, configurable: true});"
    hide += " document.dispatchEvent(new Event('visibilitychange')) }"
    page.evaluate(hide, True)
    page.clock.run_for(60000)
    page.evaluate(hide, False)
    page.clock.run_for(2000)
    r.keys("2", "Enter")
    page.clock.run_for(40000)
    assert page.is_visible("#finish")
    r.keys("ArrowLeft")
    page.clock.run_for(1000)
    first, second = (vote["ms"] for vote in r.export()["votes"])
    assert 3000 <= first < 5000 and 5000 <= second < 8000


def test_page_works_without_storage(reader):
    r = reader(2)
    forbid = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    r.context.add_init_script(forbid)
    page = r.start()
    assert "only until this tab closes" in text(page, "[role=alert]")
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.type), dialog.dismiss()))
    r.keys("1")
    page.close(run_before_unload=True)
    page.wait_for_timeout(300)
    assert dialogs == ["beforeunload"] and r.export()["votes"][0]["choice"] == "left_much"
    with page.expect_event("close"):
        page.close(run_before_unload=True)
    assert dialogs == ["beforeunload"]


def test_full_storage_is_reported(reader):
    r = reader(2)
    page = r.start()
    assert not page.is_visible("[role=alert]")
    full = """() => { const keep = Storage.prototype.setItem;
        Storage.prototype.setItem = function (key, value) {
            if (value.length > 20) throw new DOMException('', 'QuotaExceededError');
            return keep.call(this, key, value); } }"""
    page.evaluate(full)
    r.keys("1")
    assert page.is_visible("[role=alert]")
    r.keys("?")
    page.click("#shortcuts")
    assert page.is_visible("[role=alert]"), "a saved setting must not clear the warning"


def test_browser_votes_are_scored(reader, tmp_path):
    """A SYNTHETIC annotator votes in a browser, on texts that name the models, and the export is scored."""
    pairs = [{"prompt": k, "a": "tuned", "b": "base"} for k in range(12)]
    items = lay_out(pairs, 0.2, 5, "salt")
    shown = [
        {"id": item["id"], "prompt": f"<p>{item['prompt']}</p>", "left": item["left"], "right": item["right"]}
        for item in items
    ]
    r = reader(shown)
    page = r.start("SYNTHETIC")
    for place in range(len(items)):
        if place == 5:
            page.reload()
            r.click("Start")
        assert text(page, "h2:visible") == f"Pair {place + 1} of {len(items)}"
        tuned_left = text(page, "#left") == "tuned"
        r.keys("1" if tuned_left else "5", "q" if tuned_left else "p", "l" if tuned_left else "a", "Enter")
    votes = tmp_path / "votes.json"
    votes.write_text(json.dumps(r.export()))
    key = {"study": r.study, "models": ["base", "tuned"], "items": items, "identical": []}
    answers = {name: [{"tokens": 1, "finish_reason": "stop"}] * 12 for name in key["models"]}
    about = {"prompts": [{"category": None}] * 12, "answers": answers}
    rows = unblind(read_votes([str(votes)]), key, about)
    candidates = [{"prompt": "p", "base": "base", "dpo": "tuned"}] * 12
    m = {name: metric["value"] for name, metric in summarise(rows, key, candidates, about, 0)["metrics"].items()}
    assert (m["win_rate"], m["votes_much_better"], m["self_consistency"]) == (1.0, 12, 1.0)
    assert (m["acceptable_a"], m["acceptable_b"], m["judged"]) == (1.0, 0.0, len(items))


def test_attacks_run_nothing(reader):
    items = []
    for i in range(0, len(ATTACKS), 6):
        attacks = ATTACKS[i : i + 6]
        turns = [{"role": "user", "content": t} for t in attacks] + [
            {"role": "assistant", "content": "\n\n".join(attacks)}
        ]
        items.append(
            {
                "id": f"k{i}",
                "prompt": conversation(turns),
                "left": "".join(map(markdown, attacks)),
                "right": markdown("\n\n".join(attacks)),
            }
        )
    r = reader(items)
    page = r.start("<img src=x onerror=window.hacked=1>")
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    for _ in items:
        for link in page.locator(".text a").all():
            link.hover()
            if not (link.get_attribute("href") or "").startswith("http"):
                link.click()
        r.keys("1", "Enter")
    assert page.is_visible("#finish") and dialogs == [] and r.blocked == []
    assert all(tab.evaluate("window.hacked") is None for tab in r.context.pages)
    assert len(r.export()["votes"]) == len(items)


def test_content_policy_blocks_injected_code(reader):
    r = reader(1)
    page = r.start()
    page.evaluate(
        """() => { document.getElementById('left').innerHTML = `<img src="https://example.org/x.png"
            onerror="window.hacked=1"><p style="position:fixed" id="styled" onclick="window.hacked=2">click</p>
            <style>h1 { display: none }</style>`;
            const script = document.createElement('script'); script.textContent = 'window.hacked = 3';
            document.body.append(script) }"""
    )
    page.click("#styled")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None and page.is_visible("h1")
    assert r.blocked == ["https://example.org/x.png"]
    assert page.eval_on_selector("#styled", "e => getComputedStyle(e).position") == "static"


def test_500_long_pairs_are_fast(reader):
    paragraph = "Some words of a long answer, with `code` and *emphasis*. " * 12
    r = reader(make_items(500, "\n\n".join([paragraph] * 8)))
    start = time.perf_counter()
    page = r.start()
    assert text(page, "h2:visible") == "Pair 1 of 500" and time.perf_counter() - start < 3
    vote = """() => { const start = performance.now();
        for (const key of ['2', 'q', 'Enter'])
            document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        document.body.getBoundingClientRect(); return performance.now() - start }"""
    steps = [page.evaluate(vote) for _ in range(60)]
    assert text(page, "#judged") == "60 of 500 judged" and statistics.median(steps) < 200, steps
    assert page.locator("body *").count() < 1000


def test_keyboard_alone_is_enough(reader):
    r = reader(2)
    page = r.open()
    r.keys("Tab", "Tab")
    assert page.evaluate("document.activeElement.id") == "name"
    page.keyboard.type("Ada")
    r.keys("Enter")
    assert page.evaluate("document.activeElement.id") == "position"
    reached = []
    while not reached or reached[-1] != "next" and len(reached) < 40:
        r.keys("Tab")
        reached.append(page.evaluate("(e => e.dataset.do ?? (e.name || e.id))(document.activeElement)"))
        outline = "getComputedStyle(document.activeElement.matches('fieldset input') ? "
        outline += "document.activeElement.nextElementSibling : document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid", reached
        if reached[-1] == "choice":
            r.keys("Space")
    assert {"left_acceptable", "right_acceptable", "comment", "choice", "skip"} <= set(reached), reached
    r.keys("Enter")
    assert text(page, "h2:visible") == "Pair 2 of 2"
    r.keys("s", "Tab", "Enter", "Enter")
    assert page.is_visible("#finish") and page.evaluate("document.activeElement.id") == "finish-title"
    with page.expect_download() as download:
        r.keys("Tab", "Enter")
    votes = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["votes"]
    assert [(v["choice"], v["skip"]) for v in votes] == [("left_much", None), (None, "not_my_field")]


def test_controls_have_accessible_names(reader):
    r = reader(2)
    page = r.open()
    for step in (lambda: None, lambda: (page.fill("#name", "Ada"), r.keys("Enter")), lambda: r.keys("s")):
        step()
        tree = page.locator("body").aria_snapshot()
        unnamed = re.findall(r"- (?:radio|button|textbox|checkbox|switch|progressbar|group)(?! \").*", tree)
        assert unnamed == [] and page.locator("h1").count() == 1, tree
    assert 'dialog "Why do you skip this pair?"' in tree
    r.keys("Escape")
    tree = page.locator("body").aria_snapshot()
    for part in ("banner", "main", 'group "Which answer is better?"', 'group "Answer A Acceptable?"', "status"):
        assert part in tree, tree
    for name in ("Prompt", "Answer A", "Answer B"):
        assert f'heading "{name}" [level=3]' in tree
    assert page.eval_on_selector("#status", "e => e.textContent") == "Pair 1 of 2"
    r.keys("1")
    assert text(page, "#status") == "Saved"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


CONTRASTS = """() => {
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (rgb) => { const [r, g, b] = rgb.slice(0, 3).map((v) => (v /= 255) <= .04045 ? v / 12.92
        : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
    const behind = (e) => { for (; e; e = e.parentElement) {
        const found = parse(getComputedStyle(e).backgroundColor); if (found[3] !== 0) return found; } };
    return [...document.querySelectorAll('body *')].filter((e) => e.getClientRects().length && !e.closest(':disabled')
        && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
            const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
            return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 80)] }) }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_light_and_dark(reader, scheme):
    items = make_items(2)
    items[0]["left"] = markdown("> quote\n\n[link](https://example.org) `code`\n\n|a|\n|-|\n|b|\n\n```\nblock\n```")
    r = reader(items, color_scheme=scheme)
    r.context.add_init_script("Storage.prototype.setItem = () => { throw 0 }")
    page = r.open()
    contrasts = page.evaluate(CONTRASTS)
    page.fill("#name", "Ada")
    r.keys("Enter", "1", "q")
    contrasts += page.evaluate(CONTRASTS)
    r.keys("s", "1")
    contrasts += page.evaluate(CONTRASTS)
    r.keys("?")
    contrasts += page.evaluate(CONTRASTS)
    assert len(contrasts) > 100 and min(contrasts)[0] >= 4.5, min(contrasts)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")


def test_both_sides_look_the_same(reader):
    r = reader(1)
    page = r.start()
    style = """id => { const e = document.getElementById(id), c = getComputedStyle(e);
        return [...c].filter(k => !/inset|origin|position/.test(k)).map(k => k + c[k]).join() }"""
    assert page.evaluate(style, "left") == page.evaluate(style, "right")
    left, right = (page.locator(f"section:has(> #{side})").bounding_box() for side in ("left", "right"))
    assert left["width"] == right["width"] and left["y"] == right["y"]


@pytest.mark.parametrize("width", [320, 390])
def test_page_fits_a_phone(reader, width):
    long = "x" * 400 + "\n\n```\n" + "y" * 400 + "\n```\n\n|" + "wide column|" * 30 + "\n|" + "-|" * 30
    items = make_items(3)
    items[0] |= {"prompt": conversation([{"role": "user", "content": long}]), "left": markdown(long)}
    phone = {"viewport": {"width": width, "height": 844}, "has_touch": True, "is_mobile": True}
    r = reader(items, **phone)
    page = r.open()

    def fits():
        assert page.evaluate("document.documentElement.scrollWidth") == width
        boxes = [(e.bounding_box(), e.evaluate("e => e.outerHTML")) for e in page.locator(touched).all()]
        visible = [(box, html) for box, html in boxes if box]
        assert visible and all(box["height"] >= 44 and box["width"] >= 44 for box, _ in visible), visible
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box, _ in visible), visible

    touched = "button:visible, [type=text]:visible, fieldset label:visible"
    fits()
    page.fill("#name", "Ada")
    r.click("Start")
    fits()
    assert not page.is_visible("kbd")
    left, right = (page.locator(f"section:has(> #{side})").bounding_box() for side in ("left", "right"))
    assert right["y"] > left["y"] + left["height"]
    bar = page.locator(".vote").bounding_box()
    assert round(bar["y"] + bar["height"]) == 844 and bar["height"] < 130
    r.click("B much")
    page.tap("section:has(> #left) >> label:has-text('Yes')")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    comment, bar = page.locator("#comment").bounding_box(), page.locator(".vote").bounding_box()
    assert comment["y"] + comment["height"] <= bar["y"]
    r.click("Next")
    assert page.evaluate("scrollY") == 0
    r.click("Skip…")
    fits()
    r.click("Outside my expertise")
    r.click("Next")
    r.click("Next")
    fits()
    assert text(page, "#judged-count") == "1" and text(page, "#skipped-count") == "1"


def test_labels_do_not_depend_on_the_layout(reader):
    """Answers are side by side on a desktop and stacked on a phone, so no label says left or right."""
    items = make_items(2)
    items[0] |= {"left": answer("one", True), "right": answer("two", False)}
    r = reader(items, viewport={"width": 390, "height": 844})
    page = r.open()
    shown = page.inner_text("body")
    page.fill("#name", "Ada")
    r.keys("Enter")
    assert page.locator(".cut:visible").count() == 1 and "cut off at the token limit" in text(page, "#left")
    r.keys("?")
    shown += page.inner_text("body")
    words = set(re.findall(r"\w+", shown.lower()))
    assert not {"left", "right", "upper", "lower"} & words and {"a", "b", "much"} <= words
    assert "cut off at the limit" in shown
    r.keys("Escape", "5")
    assert r.checked()["choice"] == "right_much"


def test_focus_is_not_hidden_by_bar(reader):
    r = reader(make_items(1, "\n\n".join(["[link](https://example.org) and more"] * 40)))
    page = r.start()
    for _ in range(60):
        r.keys("Tab")
        hidden = """() => { const e = document.activeElement, box = e.getBoundingClientRect();
            return !e.closest('.vote, .card > header, dialog') && e !== document.body
                && box.bottom > document.querySelector('.vote').getBoundingClientRect().top + 1 }"""
        assert not page.evaluate(hidden), page.evaluate("document.activeElement.outerHTML")
