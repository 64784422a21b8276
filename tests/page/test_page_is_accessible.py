"""axe-core finds nothing wrong in any view of the page: light and dark, wide and on a phone."""

import contextlib

import pytest

import node_packages
import web_driver
from fake_engine import FakeEngine
from live_server import LiveServer
from web_driver import Browser

MISSING = web_driver.why_missing() or node_packages.why_missing("axe-core")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=str(MISSING)),
]

LEAST_SCORE = 95
"""Least percentage of the rules that apply which must hold."""

PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
RUN = """
const { passes, violations } = await axe.run();
return { passes: passes.length, violations: violations.map(({ id, help, nodes }) =>
  `${id}: ${help}: ${nodes.map((node) => node.html).join(" ")}`) };
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as browser:
        yield browser


@pytest.fixture(scope="module")
def server():
    with LiveServer(FakeEngine(num_frames=3)) as server:
        yield server


@pytest.fixture(params=["light", "dark"])
def scheme(request, browser):
    feature = {"name": "prefers-color-scheme", "value": request.param}
    browser.devtools("Emulation.setEmulatedMedia", features=[feature])
    return request.param


@pytest.fixture(params=["wide", "phone"])
def width(request, browser):
    if request.param == "phone":
        browser.devtools("Emulation.setDeviceMetricsOverride", **PHONE)
    yield request.param
    browser.devtools("Emulation.clearDeviceMetricsOverride")


def assert_accessible(browser: Browser) -> None:
    found = browser.run(RUN)
    assert found["violations"] == []
    score = 100 * found["passes"] / (found["passes"] + len(found["violations"]))
    assert score >= LEAST_SCORE
    assert found["passes"] > 20  # it has looked at something


def load(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.run((node_packages.MODULES / "axe-core" / "axe.min.js").read_text())


def test_every_view(browser, server, scheme, width):
    load(browser, f"http://127.0.0.1:{server.port}/")
    background = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 300) == (scheme == "dark")
    browser.until("return document.querySelector('#voice').options.length")
    browser.click("#speak .main")
    browser.until("return document.querySelector('#note').textContent === 'Done.'")
    browser.run("for (const all of document.querySelectorAll('details')) all.open = true;")
    browser.click("[data-copy=python]")
    for tab in ("#tab-talk", "#tab-voices", "#tab-speak"):
        browser.click(tab)
        if tab == "#tab-talk":
            browser.type("#turn", "hello")
            browser.click("#talk .main")
            browser.until("return document.querySelectorAll('#turns li').length")
        assert_accessible(browser)


def test_the_description_of_the_api(browser, server, scheme, width):
    load(browser, f"http://127.0.0.1:{server.port}/docs")
    browser.until("return document.querySelectorAll('#routes details').length > 10")
    browser.run("for (const all of document.querySelectorAll('details')) all.open = true;")
    assert_accessible(browser)
