"""The report in a real browser: opened from disk without a network, on a desktop and on a phone, light and dark."""

import json
import re
import shutil

import pytest
from example_runs import ATTACK, EXAMPLE, write_run

DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The report of two runs, one with hostile answers, with a picture and a comparison."""
    from preflab.reporting import page, published, view
    from preflab.reporting.artifacts import read_all
    from preflab.reporting.compare import compare
    from preflab.reporting.lineage import lineage

    root = tmp_path_factory.mktemp("report")
    for name in ("first", "second <run>"):
        results = write_run(root, name)
        shutil.copy(EXAMPLE / "battle.png", results)
    path = root / "out" / "first" / "battle_rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:3]:
        row["answer_a"]["text"] = f"{ATTACK} and the word xylophone"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = sorted(read_all(root / "ck", root / "out"), key=lambda run: run.name)
    rows = published.read_comparison("configs/published/comparison.yaml")
    content = view.report_view(runs, lineage(runs), rows, 100, "Report", "m")
    content.comparison = view.comparison_view("first", [runs[1].name], compare(runs[1:], runs[0], 42))
    file = root / "report.html"
    file.write_text(page.html(content, 100), encoding="utf-8")
    return file


@pytest.fixture
def reading(browser, page_file):
    """reading(anchor, **browser options) opens the page; a test fails on any request, blocked script or page error."""
    contexts, problems = [], []

    def opening(anchor: str = "", **options):
        context = browser.new_context(**(options or DESKTOP))
        context.set_offline(True)
        context.set_default_timeout(5000)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
        tab.goto(page_file.as_uri() + anchor)
        return tab

    yield opening
    for context in contexts:
        context.close()
    assert problems == []


def shown_pages(tab) -> list[str]:
    return tab.eval_on_selector_all(".page", "all => all.filter((p) => p.offsetParent !== null).map((p) => p.id)")


def test_one_page_at_a_time(reading):
    tab = reading()
    assert shown_pages(tab) == ["all"] and tab.inner_text("h2:visible") == "All runs"
    tab.click("nav >> text=Comparison")
    assert shown_pages(tab) == ["comparison"] and "Holm" in tab.inner_text("#comparison")
    tab.click("nav >> text=second <run>")
    assert tab.inner_text("h2:visible") == "second <run>"
    assert tab.inner_text("nav a[aria-current=page]") == "second <run>"
    tab.go_back()
    assert shown_pages(tab) == ["comparison"]
    tab.click("nav >> text=All runs")
    tab.click(".card >> text=first")
    assert tab.inner_text("h2:visible") == "first"


def test_address_of_a_stage_opens_its_run(reading):
    tab = reading("#run0-first-2")
    assert shown_pages(tab) == ["run0-first"]
    box = tab.locator("#run0-first-2").bounding_box()
    assert 0 <= box["y"] < 900, "the stage is in view"
    assert shown_pages(reading("#nowhere")) == ["all"] and shown_pages(reading("#%E0%A4%A")) == ["all"]


def test_search_finds_prompts_and_answers(reading):
    tab = reading("#run0-first")
    visible = lambda: tab.locator("#run0-first .pair:visible").count()  # noqa: E731
    total = int(re.search(r"in (\d+)$", tab.inner_text("#run0-first output"))[1])
    assert visible() == 20 and total > 100
    tab.click("#run0-first .more")
    assert visible() == 40
    tab.fill("#run0-first [type=search]", "XYLOPHONE word")
    assert visible() == 3 and "3 found" in tab.inner_text("#run0-first output")
    assert "<script>window.hacked=1</script>" in tab.locator("#run0-first .pair:visible").first.inner_text()
    tab.fill("#run0-first [type=search]", "zzqqxx")
    assert visible() == 0
    tab.fill("#run0-first [type=search]", "")
    tab.select_option("#run0-first select", "judge: tie")
    found = int(re.search(r"of (\d+) found", tab.inner_text("#run0-first output"))[1])
    rows = [json.loads(line) for line in (EXAMPLE / "battle_rows.jsonl").read_text().splitlines()]
    assert found == sum(row["consistent"] == 0.5 for row in rows[:100])


def test_hostile_answers_do_nothing(reading):
    tab = reading("#run0-first")
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator(".pair img, .pair script, .pair [onerror]").count() == 0


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_screen(reading, options, scheme):
    for anchor in ("", "#comparison", "#run0-first"):
        tab = reading(anchor, **options, color_scheme=scheme)
        width, window = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= window, f"{anchor}: the page is wider than the screen"
        # Colours follow the scheme: dark text on light ground, and the reverse.
        ground, text = tab.evaluate(
            "['backgroundColor', 'color'].map((k) => getComputedStyle(document.body)[k].match(/\\d+/g).map(Number))"
        )
        assert (sum(ground) > sum(text)) == (scheme == "light")
        assert tab.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 100)")
    if options is PHONE:
        # Names of rows stay in view while a table scrolls, and are wide enough to be read.
        widths = tab.eval_on_selector_all("#run0-first tbody th[scope=row]", "all => all.map((th) => th.offsetWidth)")
        assert min(widths) > 60


def test_without_script_everything_is_shown(reading):
    tab = reading("", java_script_enabled=False, **DESKTOP)
    assert tab.locator(".page").count() == 4
    assert all(tab.locator(".page").nth(k).is_visible() for k in range(4))
    assert not tab.locator(".search").first.is_visible()


def test_keyboard_and_headings(reading):
    tab = reading()
    tab.focus("nav a >> nth=2")
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.activeElement.tagName === 'H2'")
    assert tab.inner_text(":focus") == "first"
    # Headings inside answers are the models' own.
    own = "all => all.filter((h) => !h.closest('.text')).map((h) => +h.tagName[1])"
    levels = tab.eval_on_selector_all("h1, h2, h3, h4", own)
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = tab.eval_on_selector_all("[id]", "all => all.map((e) => e.id)")
    assert len(ids) == len(set(ids))
