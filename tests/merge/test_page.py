"""report.html: what it says, that nothing can be smuggled in, and how a real browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from report_sample import ALPHAS, HOSTILE, contrast, of_hex, sample

from sst_merge.cli import main
from sst_merge.outline import outline
from sst_merge.page import render_page
from sst_merge.rendering import render_markdown


def page_of(report: dict[str, Any]) -> str:
    return render_page(f"Merge report: {report['merge_method']}", outline(report))


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(sample())


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of every kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text.setdefault(tag, []).append("")
        self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open][-1] += data


# What the page is made of ---------------------------------------------------------------------------------------------


def test_page_needs_nothing_else_and_its_policy_allows_nothing_else(page):
    elements = Elements(page)
    assert not {tag for tag, _ in elements.tags} & {"link", "img", "iframe", "object", "base", "image", "form"}
    for _, attributes in elements.tags:
        assert "src" not in attributes and attributes.get("href", "#").startswith("#")
        assert all(match == "#" for match in re.findall(r"url\((.)", attributes.get("style") or ""))
    assert "://" not in page and "@import" not in page
    (policy,) = (a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = b64encode(sha256(elements.text["script"][0].encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_names_are_text_wherever_they_appear(page):
    elements = Elements(page)
    counts = Counter(tag for tag, _ in elements.tags)
    assert counts["script"] == 1 and counts["img"] == 0
    assert not [key for _, attributes in elements.tags for key in attributes if key.startswith("on")]
    assert f"Merge report: {HOSTILE}" in elements.text["h1"] and f"Merge report: {HOSTILE}" in elements.text["title"]
    for tag, count in (("dd", 3), ("li", 3), ("td", len(ALPHAS))):
        assert elements.text[tag].count(HOSTILE) == count, tag
    assert elements.text["td"].count(f"model.layers.2.{HOSTILE}") == 1
    assert elements.text["text"].count(HOSTILE) == 4  # a column of every heat map


def test_markdown_starts_no_element_and_ends_no_cell():
    text = render_markdown("t", outline(sample()))
    outside_code = re.sub(r"`[^`]*`", "", text)
    assert "<" not in outside_code
    tables = [line for line in text.splitlines() if line.startswith("| model.layers")]
    assert len(tables) == 6
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables}) == 1


def test_ids_are_unique_and_every_reference_has_one(page):
    ids = Counter(a["id"] for _, a in Elements(page).tags if "id" in a)
    assert max(ids.values()) == 1
    references = {a["href"][1:] for _, a in Elements(page).tags if "href" in a}
    references |= {x for _, a in Elements(page).tags for x in re.findall(r"url\(#(.*?)\)", a.get("clip-path") or "")}
    assert len(references) > 20 and references <= set(ids)


def test_the_same_report_gives_the_same_page(page):
    assert page_of(sample()) == page


def test_sections_without_numbers_are_left_out():
    least = {
        "merge_method": "ties",
        "modules": [{"module": "a", "shape": [2, 3]}],
        "strengths": [{"alpha": 1.0}],
    }
    titles = [section.title for section in outline(least)]
    assert titles == ["Summary", "Strengths", "Modules", "Not covered by curvature"]
    assert Elements(page_of(least)).text["td"] == ["1", "a", "2 × 3"]
    titles = [section.title for section in outline(sample())]
    assert titles[:6] == ["Summary", "Warnings", "Held out", "Strengths", "Tuning", "Directions"]


def test_summary_begins_with_what_was_measured():
    report = sample()
    facts = outline(report)[0].facts
    assert list(facts.items())[:6] == [
        ("measured at α 0.5", "KL 0.275 ± 0.1, change of log p(refusal) 4.25 nats per sequence"),
        ("measured at α 1", "KL 1.1 ± 0.1, change of log p(refusal) 8 nats per sequence"),
        ("measured at α 1.5", "KL 2.475 ± 0.1, change of log p(refusal) 11.25 nats per sequence"),
        ("warnings", "1, below"),
        ("share of the kept cost that is damping", 0.875),
        ("held-out gain per cost of what is kept", 0.5),
    ]
    report |= {"warnings": [], "held_out": []}
    facts = outline(report)[0].facts
    assert list(facts)[:2] == ["measured", "warnings"]
    assert facts["measured"].startswith("nothing") and facts["warnings"] == "none"


def test_figures_of_a_tuned_merge_are_said_to_be_selected():
    report = sample()
    for tuned, expected in ((True, {"Held out", "Tuning"}), (False, set())):
        if not tuned:
            del report["tuning"]
        assert {s.title for s in outline(report) if any("selected" in text for text in s.text)} == expected


def long_report(count: int) -> dict[str, Any]:
    """A sample with so many candidates, worst first."""
    report = sample()
    (row,) = report["tuning"]["candidates"][:1]
    report["tuning"]["candidates"] = [{**row, "objective": float(count - i)} for i in range(count)]
    return report


@pytest.mark.parametrize(("count", "at_end"), [(20, False), (21, True)])
def test_long_table_comes_last_in_markdown(count, at_end):
    text = render_markdown("t", outline(long_report(count)))
    head = "| damping | k | alpha | objective | kl | refusal_loss |"
    assert text.count(head) == 1 and (text.index(head) > text.index("## Versions")) == at_end
    assert text.count("\n| 0.1 | 0.05 | ") == count
    assert (f"The table of {count} rows is at the end." in text) == at_end


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the one that $CHROMIUM names, as .ci/run does, or one that is installed."""
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("no Chromium is installed; install one, or name it in $CHROMIUM")
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, tmp_path) -> Iterator[Any]:
    """Opens a page at a width and colour scheme; it must load nothing else and leave the console empty."""
    complaints: list[str] = []
    tabs = []

    def open_(page: str | Path, width: int = 360, scheme: str = "light") -> Any:
        if isinstance(page, str):
            path = tmp_path / "page.html"
            path.write_text(page, encoding="utf-8")
        else:
            path = page
        tab = browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
        tabs.append(tab)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: None if request.url == path.as_uri() else complaints.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield open_
    for tab in tabs:
        tab.close()
    assert complaints == []


def column(tab: Any, table: Any, name: str) -> tuple[Any, list[str]]:
    """The head of a column and its cells' texts, top to bottom."""
    heads = table.locator("th")
    index = heads.all_inner_texts().index(name)
    return heads.nth(index), [row.locator("td").nth(index).inner_text() for row in table.locator("tbody tr").all()]


def test_click_on_a_head_sorts_and_again_reverses(page, visit):
    report = sample()
    tab = visit(page, 1280)
    table = tab.locator("#modules table")
    energies = {row["module"]: row.get("kept_energy") for row in report["modules"]}
    rising = sorted((name for name, x in energies.items() if x is not None), key=energies.get)
    without = {name for name, x in energies.items() if x is None}
    assert rising[0] == report["modules"][4]["module"] and len(rising) == 5 and len(without) == 2
    head, _ = column(tab, table, "kept energy")
    for order, direction in ((rising, "ascending"), (rising[::-1], "descending"), (rising, "ascending")):
        head.locator("button").click()
        names = column(tab, table, "module")[1]
        assert names[:5] == order and set(names[5:]) == without  # what is not there is last either way
        assert table.locator("th[aria-sort]").count() == 1 and head.get_attribute("aria-sort") == direction


def test_keyboard_sorts_names_by_their_numbers(page, visit):
    tab = visit(page, 1280)
    table = tab.locator("#modules table")
    head, _ = column(tab, table, "module")
    head.locator("button").focus()
    tab.keyboard.press("Enter")
    names = column(tab, table, "module")[1]
    assert names[0] == "lm_head"
    assert [name.split(".")[2] for name in names[1:]] == ["2"] * 3 + ["10"] * 3
    tab.keyboard.press("Tab")
    tab.keyboard.press("Space")
    assert column(tab, table, "shape")[0].get_attribute("aria-sort") == "ascending"
    assert head.get_attribute("aria-sort") is None


@pytest.mark.parametrize(("count", "folded"), [(20, False), (21, True)])
def test_long_table_is_folded_and_sorts_when_open(visit, count, folded):
    tab = visit(page_of(long_report(count)), 1280)
    table = tab.locator("#tuning table")
    assert table.is_visible() != folded
    if folded:
        tab.get_by_text(f"Table of {count} rows").click()
    assert table.is_visible()
    head, objectives = column(tab, table, "objective")
    assert objectives == [str(count - i) for i in range(count)]
    head.locator("button").click()
    assert column(tab, table, "objective")[1] == objectives[::-1]


def test_edge_of_a_table_is_shaded_while_there_is_more_beyond_it(page, visit):
    for width, shaded in ((360, (True, False)), (1280, (False, False))):
        box = visit(page, width).locator("#held-out .table")
        assert box.evaluate("x => x.scrollWidth > x.clientWidth") == shaded[0]
        for end, expected in zip((0, 9999), shaded, strict=True):
            box.evaluate("(x, end) => { x.scrollLeft = end; }", end)
            image = imread(BytesIO(box.screenshot()))[:, :, :3]
            corner = image[-4, -3]  # in the right border's column, below the last row's text
            assert (corner.max() < 0.9) == expected, (width, end, corner)


@pytest.mark.parametrize("width", [360, 1280])
def test_only_boxes_scroll_sideways_and_figures_can_be_seen(page, visit, width):
    tab = visit(page, width)
    assert tab.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") <= [width, width]
    assert tab.evaluate("[...document.querySelectorAll('body *')].filter(x => !x.closest('.scroll') && "
                        "x.getBoundingClientRect().right > innerWidth + 0.5).length") == 0  # fmt: skip
    boxes = tab.locator(".scroll.table")
    assert boxes.count() == 4
    if width == 360:
        assert boxes.last.evaluate("x => x.scrollWidth > x.clientWidth && getComputedStyle(x).overflowX") == "auto"
    shown = [svg for svg in tab.locator("svg").all() if svg.is_visible()]
    assert len(shown) == 3 + 2 + 4 + 1
    for svg in shown:
        box = svg.bounding_box()
        assert box["width"] >= 300 and box["height"] >= 100
    smallest = "Math.min(...[...x.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize)))"
    assert min(svg.evaluate(f"x => x.getScreenCTM().a * {smallest}") for svg in shown) >= 9  # CSS pixels


def test_wide_heat_map_scrolls_in_its_box(visit):
    report = sample()
    report["modules"] = [
        {"module": f"model.layers.0.mlp.experts.{i}.w1", "shape": [2, 2], "kept_energy": i / 24} for i in range(24)
    ]
    tab = visit(page_of(report))
    box = tab.locator("#modules figure .scroll")
    assert box.evaluate("x => x.scrollWidth > 2 * x.clientWidth")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_one_heat_map_at_a_time(page, visit):
    tab = visit(page)
    figures = tab.locator("#modules figure")
    for i, title in enumerate(figure.locator("h3").text_content() for figure in figures.all()):
        tab.locator("#modules select").select_option(title)
        assert [figure.is_visible() for figure in figures.all()] == [j == i for j in range(4)]


TEXTS = """() => [...document.querySelectorAll("body *")].filter((x) =>
    x.checkVisibility() && [...x.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
).map((x) => {
  const painted = x instanceof SVGElement ? "fill" : "color";
  let paper = x;
  while (paper.parentElement && getComputedStyle(paper).backgroundColor === "rgba(0, 0, 0, 0)")
    paper = paper.parentElement;
  return [x.textContent, x.tagName, getComputedStyle(x)[painted], getComputedStyle(paper).backgroundColor];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(page, visit, scheme):
    tab = visit(page, scheme=scheme)
    seen = Counter()
    paper = of_hex({"light": "#ffffff", "dark": "#14171a"}[scheme])
    for text, tag, ink, ground in tab.evaluate(TEXTS):
        ink, ground = (tuple(float(x) for x in re.findall(r"[\d.]+", color)) for color in (ink, ground))
        if tag == "text" and ink in ((0, 0, 0), (255, 255, 255)):
            continue  # a number on a heat map's cell
        seen[tag] += 1
        assert contrast(ink, ground) >= 4.5, (text, ink, ground)
        assert tag == "text" or ground == paper or tag == "BUTTON"
    assert {"text", "TD", "BUTTON", "DD", "FIGCAPTION", "LI", "A", "H1", "SUMMARY"} <= seen.keys()


def test_no_script_but_the_pages_own_runs(page, browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    tab = browser.new_page()
    tab.goto(path.as_uri())
    assert tab.evaluate("window.hacked") is None
    tab.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 2'}))")
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<button onclick=\"hacked = 3\">x</button>')")
    tab.locator("body > button").click()
    assert tab.evaluate("window.hacked") is None
    tab.close()


def test_page_of_a_merge(visit, setup, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(setup.config("sst", alpha=[0.5, 1.0])))
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    tab = visit(tmp_path / "out/report.html")
    assert tab.locator("h1").inner_text() == "Merge report: sst"
    facts = tab.locator("#summary dl > div").all_inner_texts()
    for fact, row in zip(facts, report["held_out"], strict=False):
        assert fact.startswith(f"measured at α {row['alpha']:g}\nKL {row['measured_kl']:.4g} ± "), fact
    assert facts[2].startswith("warnings\n")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    table = tab.locator("#modules table")
    assert column(tab, table, "module")[1] == [row["module"] for row in report["modules"]]
    energies = [row.get("kept_energy") for row in report["modules"]]
    assert column(tab, table, "kept energy")[1] == ["–" if x is None else f"{x:.4g}" for x in energies]
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert {"spectrum", "gain_cost", "ray_held", "damping_share", "kept_energy"} <= names
    for svg in tab.locator("svg:visible").all():
        assert svg.bounding_box()["height"] > 100
    assert tab.locator("svg").count() == len(names)
