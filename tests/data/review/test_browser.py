"""Promises in a real browser: a review by keyboard from the first record to the loaded export; nothing hostile runs, hides or
breaks out; what is typed survives kill -9 of the server, a stale window and a lost answer; it fits and can be read."""

import json
import os
import subprocess

import pytest

from srpo_jax.data.loaders import load_jsonl
from srpo_jax.data.review.session import LOG
from srpo_jax.files import read_jsonl
from tests.data.candidates import write_world
from tests.data.review.test_server import ROOT, Person, Served
from tests.evaluation.report.test_browser import TOO_FAINT

pytestmark = pytest.mark.slow
HOSTILE = (
    "</textarea><script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 2">',
    "safe\u202egnp.\u2066hidden\u2069 \u200bend \x07\x1b[31m",
    "javascript:window.hit=3 ']]>&lt;b&gt; ${window.hit=4} {{7*7}}",
    "x" * 300_000,
    "العربية then latin \U000e0041\U000e0042",
)


@pytest.fixture
def opened(browser):
    """Opens a link; fails if the page raises, breaks its content policy, or asks anybody else for anything."""
    contexts, faults = [], []

    def open_(link, width=1440, height=900, scheme="light", context=None):
        if context is None:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: faults.append(m.text) if "Content Security" in m.text else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        origin = link.split("/?")[0].rsplit("/", 1)[0]
        page.on("request", lambda r: None if r.url.startswith((origin, "blob:")) else faults.append(r.url))
        page.goto(link)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path / "world", 12)


@pytest.fixture
def serve(tmp_path):
    running = []

    def serve_(data, *people, **flags):
        running.append(Served(data, tmp_path / "review", *(people or ("--reviewer=anna",)), **flags))
        return running[-1]

    yield serve_
    for one in running:
        one.kill()


def press(page, *keys):
    """Presses keys as a person does: the next when the page has settled."""
    for key in keys:
        page.wait_for_timeout(350)  # a record that has just appeared takes no decision
        page.keyboard.press(key)
    page.wait_for_timeout(150)


def saved(page):
    """(Waiting for selectors: the page's policy forbids the evaluation of texts, as it should.)"""
    page.wait_for_selector("#saved:text-is('saved')")


def ready(page, index):
    page.wait_for_selector(f"html[data-ready='{index}']", state="attached")


def test_a_review_by_keyboard_end_to_end(world, serve, opened, tmp_path):
    served = serve(world)
    page = opened(served.links["anna"])
    source = load_jsonl(world)
    assert "token" not in page.url
    press(page, "a")  # refused: nobody has looked at the picture
    assert "picture" in page.inner_text("#toast")
    press(page, "i", "a")
    ready(page, 1)
    press(page, "2")
    page.keyboard.press("Control+A")
    page.keyboard.type("The user asks for help.")
    saved(page)
    page.keyboard.press("Escape")
    press(page, "i", "a")
    ready(page, 2)
    press(page, "n")
    page.keyboard.type("too dull")
    page.keyboard.press("Escape")
    press(page, "r")
    ready(page, 3)
    press(page, "s")
    ready(page, 4)
    press(page, "d")
    ready(page, 5)
    press(page, "u")
    ready(page, 4)
    assert page.inner_text("#row-4 .mark") == "draft "
    press(page, "d")
    ready(page, 5)
    page.fill("[id='steps.3']", "")
    press(page, "Escape", "i", "a")
    assert page.inner_text("[data-field='steps.3'] .problem") == "is empty"
    page.click("[data-field='steps.3'] .restore")
    page.keyboard.press("Control+Enter")
    ready(page, 6)
    press(page, "I")
    for index in (6, 7, 8, 9, 10, 11):
        ready(page, index)
        press(page, "a")
    ready(page, 3)  # what was skipped comes back at the end
    press(page, "a")
    page.wait_for_selector(".done")
    assert page.inner_text("#counts").startswith("12 of 12 done")
    served.kill()
    out = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([*served.process.args[:4], f"--export={out}"], check=True, stdout=subprocess.DEVNULL, env=env)
    got = {record.id: record for record in load_jsonl(out / "records.jsonl", check_images=True)}
    assert set(got) == {record.id for i, record in enumerate(source) if i not in (2, 4)}
    assert got[source[1].id].steps[1] == "The user asks for help."
    assert got[source[1].id].meta["review"]["status"] == "edited"
    assert got[source[5].id].meta["review"]["status"] == "accepted"
    audit = list(read_jsonl(out / "audit.jsonl"))
    assert [e["note"] for e in audit if e["record"] == source[2].id and e["event"] == "decision"] == ["too dull"]


def test_nothing_hostile_runs_hides_or_breaks_out(tmp_path, serve, opened):
    turn = iter(range(100))

    def hostile(line):
        text = HOSTILE[next(turn) % len(HOSTILE)]
        line["question"] = line["safe_reply"] = line["steps"][2] = text
        line["meta"] |= {
            "split": text[:500],
            text[:80]: text,
            "findings": [{"check": text[:500], "text": text, "field": text, "level": text}, text],
        }
        line["id"] += text[:60]
        line["twin"] = None

    served = serve(write_world(tmp_path / "world", 12, change=hostile))
    page = opened(served.links["anna"])
    for index, text in enumerate(HOSTILE):
        ready(page, index)
        page.click("#side details summary")
        assert page.evaluate("window.hit") is None
        assert page.locator("main script, main img:not(.shot img), main a, main iframe, main svg").count() == 0
        assert page.input_value("#question") == text.strip().replace("\r", "\n")
        shown = page.evaluate("document.body.innerText")
        assert not any(sign in shown for sign in "\u202e\u2066\u200b\x1b\U000e0041")
        assert page.evaluate("document.body.scrollHeight <= innerHeight + 1")
        press(page, "j")
    page.evaluate("go(2)")
    ready(page, 2)
    assert "U+202E" in page.inner_text("[data-field=question] .hidden-signs")
    page.click("[data-field=question] .hidden-signs button")
    saved(page)
    assert Person(served, "anna").view(2)["edits"]["question"] == "safegnp.hidden end [31m"


def test_typing_survives_kill_9_of_the_server_and_goes_on(world, serve, opened):
    served = serve(world)
    page = opened(served.links["anna"])
    page.fill("#question", "Saved before the kill.")
    saved(page)
    served.kill()
    page.focus("#question")
    page.keyboard.press("Control+End")
    page.keyboard.type(" Typed while it was dead.")
    page.wait_for_selector("#saved:has-text('does not answer')")
    again = serve(world, port=served.port)
    saved(page)
    assert Person(again, "anna").view(0)["edits"] == {"question": "Saved before the kill. Typed while it was dead."}
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.input_value("#question") == "Saved before the kill. Typed while it was dead."


def test_a_stale_window_keeps_and_shows_its_text(world, serve, opened):
    served = serve(world)
    first = opened(served.links["anna"])
    second = opened(served.links["anna"], context=first.context)
    first.fill("#question", "From the first window.")
    saved(first)
    second.fill("#question", "From the second window.")
    second.wait_for_selector(".panel.warn")
    assert second.input_value("#question") == "From the first window."
    assert "From the second window." in second.inner_text(".panel.warn")
    second.click(".panel.warn .use")
    saved(second)
    assert second.input_value("#question") == "From the second window."
    assert Person(served, "anna").view(0)["edits"] == {"question": "From the second window."}


def test_an_answer_that_is_lost_on_the_way_does_no_harm(world, serve, opened, tmp_path):
    page = opened(serve(world).links["anna"])
    lost = []

    def lose(route):
        if lost:
            route.continue_()
        else:
            lost.append(route.fetch())  # the server has done it, the page never hears
            route.abort()

    page.route("**/api/records/0", lambda route: lose(route) if route.request.method == "POST" else route.continue_())
    press(page, "r")
    ready(page, 1)
    assert [e["event"] for e in read_jsonl(tmp_path / "review" / LOG)] == ["decision"]


def test_two_people_in_one_browser_and_an_adjudicator(tmp_path, serve, opened):
    data = write_world(
        tmp_path / "world",
        4,
        change=lambda line: line.update(category="Political Controversies" if line["risky"] else None),
    )
    served = serve(data, "--reviewer=anna", "--reviewer=boris", "--adjudicator=chris")
    anna = opened(served.links["anna"])
    boris = opened(served.links["boris"], context=anna.context)
    anna.fill("#question", "Anna's question?")
    press(anna, "Escape", "i", "a")
    ready(anna, 1)
    assert "anna" not in boris.inner_text("main")
    boris.reload()
    boris.wait_for_selector("html[data-ready]", state="attached")
    assert "Anna" not in boris.inner_text("main")
    press(boris, "r")
    ready(boris, 1)
    chris = opened(served.links["chris"])
    assert chris.inner_text("#who") == "chris (adjudicator)"
    assert "anna: edited" in chris.inner_text("#record")
    chris.click(".use")
    saved(chris)
    press(chris, "i", "a")
    chris.wait_for_selector(".done")
    served.kill()
    rulings = [
        e for e in read_jsonl(tmp_path / "review" / LOG) if e["role"] == "adjudicator" and e["event"] == "decision"
    ]
    assert [(one["status"], one["edits"]) for one in rulings] == [("edited", {"question": "Anna's question?"})]


def test_an_unsafe_reply_that_is_kept_apart_is_on_the_page_when_it_was_opened(tmp_path, serve, opened):
    taken = []

    def take(line):
        if line["risky"]:
            taken.append({"id": line["id"], "unsafe_reply": line["unsafe_reply"]})
            line["unsafe_reply"] = None

    data = write_world(tmp_path / "world", 4, change=take)
    file = tmp_path / "apart.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in taken))
    served = serve(data, "--reviewer=anna", unsafe_replies=file)
    page = opened(served.links["anna"])
    words = taken[0]["unsafe_reply"]
    assert page.locator("#unsafe_reply").count() == 0 and words not in page.content()
    page.fill("#question", "What was typed before?")
    press(page, "Escape", "o")
    page.wait_for_selector("#unsafe_reply")
    assert page.input_value("#unsafe_reply") == words
    assert page.input_value("#question") == "What was typed before?"
    assert page.evaluate(TOO_FAINT) == []
    page.fill("#unsafe_reply", "Another direction.")
    saved(page)
    press(page, "Escape", "i", "a")
    ready(page, 1)
    assert page.locator("#unsafe_reply").count() == 1  # a harmless record has an empty field, as ever
    press(page, "j")
    ready(page, 2)
    assert page.evaluate(TOO_FAINT) == []  # the button, too
    if folder := os.environ.get("SRPO_JAX_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/review_apart.png", full_page=True)
    served.kill()
    out = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [*served.process.args[:4], f"--unsafe_replies={file}", f"--export={out}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    [line] = read_jsonl(out / "unsafe_replies.jsonl")
    assert (line["id"], line["unsafe_reply"]) == (taken[0]["id"], "Another direction.")


@pytest.mark.parametrize("width", [400, 900, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(world, serve, opened, width, scheme):
    page = opened(serve(world).links["anna"], width, 900, scheme)
    press(page, "i")
    page.fill("#question", "Something else?\u202e")
    saved(page)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_FAINT) == []
    if folder := os.environ.get("SRPO_JAX_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/review_{scheme}_{width}.png", full_page=True)
