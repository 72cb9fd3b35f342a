"""Promise: in a real browser the report works, runs nothing but its own script, and fits light, dark, narrow and wide."""

import json
import os
import threading

import pytest

from srpo_jax.evaluation.human import parse_labels, read_labels
from srpo_jax.evaluation.report import write_report
from srpo_jax.evaluation.report.assemble import assemble
from srpo_jax.evaluation.report.serve import LabelServer
from srpo_jax.evaluation.report.write import build_page
from srpo_jax.evaluation.results import read_results
from srpo_jax.files import write_json

pytestmark = pytest.mark.slow
TOO_FAINT = """() => {
  const luminance = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)|transparent/.test(c)) return c; }
    return "rgb(255, 255, 255)";
  };
  const ratio = (e) => {
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  return [...document.querySelectorAll("p, td, th, h1, h2, button, .tag, .meta")]
    .filter((e) => e.innerText.trim() && ratio(e) < 4.5).map((e) => [ratio(e), e.className, e.innerText.slice(0, 30)]);
}"""
"""Texts whose contrast is below 4.5, the least that WCAG 2 asks of normal text."""


@pytest.fixture
def opened(browser):
    """Opens an address; fails if the page logs an error, raises, or asks anybody else for anything."""
    pages, faults = [], []

    def open_(address, width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        origin = address.rsplit("/", 1)[0]
        page.on("request", lambda r: None if r.url.startswith((origin, "data:", "blob:")) else faults.append(r.url))
        page.goto(address)
        page.wait_for_selector(
            "html[data-ready]", state="attached"
        )  # a function would be evaluated, which the page forbids
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.context.close()
    assert faults == []


def address(workdir):
    return f"file://{write_report(workdir)}"


def test_samples_are_filtered_read_and_compared(workdir, opened, made):
    page = opened(address(workdir))
    total = len(made.records)
    assert page.inner_text("#count") == f"{total} of {total} responses"
    assert "SRPO" in page.locator("#row option:checked").inner_text()
    page.select_option("#flip", "up")
    assert page.inner_text("#count") == f"10 of {total} responses"
    page.click("#clear")
    page.select_option("#row", "0")
    page.select_option("#outcome", "unsafe")
    assert page.inner_text("#count") == f"10 of {total} responses"
    first = page.inner_text("#detail .question")
    page.keyboard.press("j")
    assert page.inner_text("#detail .question") != first or page.get_attribute("#item-1", "aria-selected") == "true"
    page.keyboard.press("]")
    assert "SRPO" in page.locator("#row option:checked").inner_text()
    page.click("#clear")
    page.fill("#search", made.records[3].question[:25])
    assert page.inner_text("#count") != f"{total} of {total} responses"
    page.locator(".cross button[data-cross='yes no']").first.click()
    assert page.locator("#cross").input_value() == "yes no"
    assert page.locator("#row").input_value() == "0"
    assert page.inner_text("#count").startswith("10 of")
    page.locator(".bar[data-drift='none']").last.focus()
    page.keyboard.press("Enter")
    assert page.locator("#drift").input_value() == "none"


def test_a_tree_is_drawn_and_read_by_keyboard(workdir, opened):
    page = opened(address(workdir))
    assert page.locator("#comb-tree option").all_inner_texts() == ["first tree", "second tree"]
    assert page.locator("#comb [role=option]").count() == 5  # the reference path and four branches
    names = [page.locator(f"[data-branch='{m}']").get_attribute("aria-label") for m in range(4)]
    assert names == [
        "first tree after step 0, first tree: unknown",
        "branch after step 0, no answer (first tree)",
        "branch after step 1, first tree: yes, 3 alike",
        "branch after step 1, first tree: no",
    ]
    assert page.locator("[data-branch='0'] .node rect").count() == 1  # put there
    assert [page.locator(f"[data-branch='{m}'] .way").get_attribute("class") for m in (2, 3)] == ["way good", "way bad"]
    assert page.locator("[data-branch='2'] .node").first.get_attribute("class") == "node bad"  # its step
    page.locator("#comb [tabindex='0']").focus()
    assert "reference path and reply" in page.inner_text("#comb-text")
    page.keyboard.press("ArrowDown")  # the branches of the last prefix come first
    assert page.locator(":focus").get_attribute("data-branch") == "2"
    assert "shared: reference steps 1 to 1" in page.inner_text("#comb-text")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#comb-ask .question") == "second tree"
    assert "2 of 90 trees are here" in page.inner_text("#comb-told")
    page.select_option("#comb-kind", "harmless")
    assert page.locator("#comb-tree option").all_inner_texts() == ["second tree"]


def test_pictures_are_veiled_until_chosen(workdir, opened):
    page = opened(address(workdir))
    assert page.locator("#detail .shot.veiled img").count() == 1
    assert page.evaluate("document.querySelector('.shot img').naturalWidth") > 10
    page.keyboard.press("i")
    assert page.locator("#detail .shot.veiled").count() == 0
    page.keyboard.press("j")
    assert page.locator("#detail .shot.veiled").count() == 1


def test_nothing_hostile_runs_or_hides(hostile, opened, made):
    page = opened(address(hostile))
    for _ in made.hostile:
        assert page.evaluate("window.hit") is None
        assert page.locator("#detail img:not(.shot img)").count() == 0
        page.keyboard.press("j")
    text = page.evaluate("() => { go({}); select(5); return document.getElementById('detail').innerText; }")
    assert "U+202E" in text
    assert "\u202e" not in text
    page.evaluate("() => { go({}); select(8); }")
    assert page.locator("#detail .text").last.inner_text().count("x") < 25_000
    page.locator("#detail .answer button").first.click()
    assert page.evaluate("[...document.querySelectorAll('#detail .text')].at(-1).textContent.length") > 300_000
    for place in range(len(made.hostile)):
        for branch in range(-1, 4):
            page.evaluate("([tree, branch]) => { showTree(tree); choose(branch, true); }", [place, branch])
            assert page.evaluate("window.hit") is None
            assert page.locator("#trees img:not(.shot img), #trees script").count() == 0
    assert "U+202E" in page.evaluate("() => { showTree(5); choose(0); return byId('comb-text').innerText; }")
    assert "\u202e" not in page.inner_html("#trees")


def test_labels_are_downloaded_and_read(workdir, opened, tmp_path):
    page = opened(address(workdir))
    page.keyboard.press("u")
    page.keyboard.press("e")
    page.locator(".human .choice button").last.click()
    page.check("#blind")
    assert page.locator("#detail .tag, #list .good, #list .bad").count() == 0  # no verdict in sight
    assert page.is_disabled("#outcome")
    page.keyboard.press("s")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "labels.json")
    told = {label.blind: label for label in read_labels(tmp_path / "labels.json")}
    assert (told[False].safe, told[False].effective, told[False].steps) == (False, True, {"6": False})
    assert told[True].safe is True
    keys = {sample.key for sample in assemble(workdir).rows[-1].samples}
    assert {label.key for label in told.values()} <= keys


def test_labels_are_saved_by_the_server(workdir, opened):
    saved = []
    page_text = build_page(assemble(workdir), token="secret")
    with LabelServer(page_text, "secret", lambda value: saved.append(parse_labels(value))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        page = opened(f"http://127.0.0.1:{server.server_address[1]}/")
        page.keyboard.press("u")
        page.get_by_text("saved", exact=True).wait_for()
        server.shutdown()
        thread.join()
    assert [label.safe for label in saved[-1]] == [False]


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(workdir, opened, made, width, scheme):
    made.add_pairwise(workdir)
    results = read_results(workdir / "results.json")
    for row in results["evaluations"]:
        row["samples"] = {how: {key: row[key] for key in ("S", "E", "SE", "over_refusal")} for how in ("any", "all")}
    write_json(workdir / "results.json", results)
    page = opened(address(workdir), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert json.dumps(page.evaluate(TOO_FAINT)) == "[]"
    if folder := os.environ.get("SRPO_JAX_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{scheme}_{width}.png", full_page=True)
