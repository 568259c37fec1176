"""The live page in a browser: Debian's Chromium without a window, driven by Playwright."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest

from cosmos_ray.config import RunConfig
from cosmos_ray.folder import RunFolder
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.watch.app import Watch
from tests.test_watch import HOSTILE, filled, played, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 120_000  # generous: other tests run beside these
ENDED = re.compile("ERR_CONNECTION|ERR_INCOMPLETE")  #: what the browser says once the server has ended
SCHEMES = [(scheme, width) for scheme in ("light", "dark") for width in (1200, 400)]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """A fresh page. Ends the test with an error where its script failed, or asked another address than the page's own."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(WAIT_MS)
    made, errors, asked = context.new_page(), [], []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda message: errors.append(message.text) if message.type == "error" and not ENDED.search(message.text) else None)
    made.on("request", lambda request: asked.append(request.url))
    yield made
    context.close()
    assert not errors, errors
    assert asked and all(url.startswith(("http://127.0.0.1:", "data:")) for url in asked), asked


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with episodes of every kind, metrics and a death, whose lock this process holds."""
    config = RunConfig(root=str(tmp_path_factory.mktemp("runs")), name="small", refine_steps=40)
    folder = RunFolder(config)
    filled(folder.replay)
    for step in (10, 20):
        folder.record("refine", step=step, loss=1 / step, version=2)
    folder.record("death", who="rollout worker 2", why="its process died", then="another one starts")
    yield folder, config
    folder.close()


def watch_of(run) -> Watch:
    folder, config = run
    return Watch(str(folder.replay), folder.path, config)


def text(page, selector: str, words: str) -> None:
    """Wait until an element has these words."""
    page.locator(selector, has_text=words).first.wait_for()


def until(page, condition: str) -> None:
    """Wait until an expression of the page is true. Playwright's own way evaluates text in the page, which the page forbids."""
    end = time.monotonic() + WAIT_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        page.wait_for_timeout(50)


def test_a_live_run_grows_on_the_page(page, run):
    folder, _ = run
    with serving(watch_of(run)) as address:
        page.goto(address)
        text(page, "#now", "20 of 40")
        text(page, "#now", "rollout worker 2 died")
        text(page, "#connection", "live")
        folder.record("refine", step=30, loss=0.01, version=3)
        text(page, "#now", "30 of 40")
        page.click("#tab-episodes")
        page.locator(".thumb").first.wait_for()
        before = page.locator(".thumb").count()
        folder.store().commit(played(90), created=time.time())
        until(page, f"document.querySelectorAll('.thumb').length === {before + 1}")
        text(page, ".thumb >> nth=0", "seed 90")


def test_an_episode_plays_and_its_candidates_show(page, run):
    with serving(watch_of(run)) as address:
        page.goto(f"{address}/#episodes")
        page.select_option("select[aria-label=source]", "rollout")
        page.select_option("select[aria-label=version]", "2")
        until(page, "document.querySelectorAll('.thumb').length === 4")
        page.locator(".thumb").first.click()
        page.locator("#player .scrub").wait_for()
        page.keyboard.press(" ")
        until(page, "document.querySelector('#player input[type=range]').value === '12'")
        text(page, "#player", "2 candidates at step 10")
        text(page, "#player", "1 (chosen)")
        loaded = "[...document.querySelectorAll('#player .views img')].every((image) => image.complete && image.naturalWidth === 16)"
        until(page, loaded)
        assert "replay replay-episode" in page.locator("#player code").text_content()
        page.keyboard.press("Escape")
        until(page, "!document.getElementById('player').open")


def test_a_bin_of_the_value_lists_its_episodes(page, run):
    with serving(watch_of(run)) as address:
        page.goto(f"{address}/#value")
        page.select_option("select[aria-label=source]", "rollout")
        bin = page.locator("#value [aria-label^='values 80 % to 90 %']").first
        bin.focus()
        bin.press("Enter")
        page.locator("#episodes").wait_for()
        until(page, "document.querySelectorAll('.thumb').length === 2")


def test_a_pair_plays_side_by_side(page, run):
    with serving(watch_of(run)) as address:
        page.goto(f"{address}/#compare")
        page.locator("#compare button", has_text="only the second succeeded: 2").click()
        page.locator("#compare .thumb", has_text="seed 101").click()
        until(page, "document.querySelectorAll('#player .views').length === 2")
        text(page, "#player", "side by side")


def test_hostile_text_stays_text(page, tmp_path):
    folder = RunFolder(RunConfig(root=str(tmp_path), name="hostile"))
    episode = played(1, arm=HOSTILE)
    episode.instruction = HOSTILE
    folder.store().commit(episode)
    folder.record("death", who=HOSTILE, why=HOSTILE, then=HOSTILE)
    (folder.path / "evaluation.json").write_text(json.dumps({"arms": {HOSTILE: {"successes": 1, "episodes": 2, "low": 0, "high": 1}}}))
    with serving(Watch(str(folder.replay), folder.path, RunConfig(root=str(tmp_path), name="hostile"))) as address:
        page.goto(address)
        text(page, "#now", HOSTILE)
        page.click("#tab-episodes")
        page.locator(".thumb").first.click()
        text(page, "#player", HOSTILE)
        assert page.evaluate("document.querySelectorAll('img[src=x], script:not([src])').length") == 0
        assert "owned" not in page.title()
    folder.close()


def test_an_empty_store_and_one_with_quarantined_files(page, tmp_path):
    ReplayStore(tmp_path / "empty")
    with serving(Watch(str(tmp_path / "empty"))) as address:
        page.goto(address)
        text(page, "#now", "The store is empty")
        for tab, words in (("episodes", "No episode is like that"), ("value", "0 decisions"), ("compare", "Two evaluated arms are needed")):
            page.click(f"#tab-{tab}")
            text(page, f"#{tab}", words)
    store = filled(tmp_path / "store")
    (store.root / store.path(played(10).key.name)).write_bytes(b"torn")
    ReplayStore(store.root).refresh()
    with serving(Watch(str(store.root))) as address:
        page.goto(address)
        text(page, "#now", "quarantined files")
    text(page, "#connection", "not connected")  # the server has ended


def test_tabs_by_keyboard_and_names_for_a_screen_reader(page, run):
    with serving(watch_of(run)) as address:
        page.goto(address)
        page.focus("#tab-now")
        page.keyboard.press("ArrowRight")
        text(page, "#episodes", "16")
        assert page.evaluate("document.activeElement.id") == "tab-episodes"
        assert page.get_attribute("#tab-episodes", "aria-selected") == "true" and page.locator("#now").is_hidden()
        nameless = """[...document.querySelectorAll('button, select, input, img, svg[role=img]')].filter((e) => !(e.textContent.trim() ||
                      e.getAttribute('aria-label') || e.hasAttribute('alt'))).length"""
        for tab in ("now", "episodes", "value", "compare"):
            page.click(f"#tab-{tab}")
            page.locator(f"#{tab} > *").first.wait_for()
            assert page.evaluate(nameless) == 0, tab


@pytest.mark.parametrize("scheme, width", SCHEMES)
def test_no_view_is_wider_than_its_window(page, run, scheme, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    with serving(watch_of(run)) as address:
        page.goto(address)
        for tab in ("now", "value", "compare", "episodes"):
            page.click(f"#tab-{tab}")
            page.locator(f"#{tab} > *").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        page.locator(".thumb").first.click()
        page.locator("#player .scrub").wait_for()
        assert page.evaluate("document.getElementById('player').scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 29)"
        assert dark == (scheme == "dark")
