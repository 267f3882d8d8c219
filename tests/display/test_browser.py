"""The page in a real browser, at the width of a desktop and of a phone, and with the keyboard only.

The tests need Chromium and chromedriver. CI installs both (scripts/ci-packages.sh) and fails without them; elsewhere
they are skipped.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
DESK, PHONE = (1280, 900), (390, 844)
MEASURE = """
const shown = e => e.getClientRects().length > 0;
const all = [...document.querySelectorAll("body *")].filter(shown);
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) {
  const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]
};
const contrast = e => { const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
  return (a + .05) / (b + .05); };
const texts = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
const fields = [...document.querySelectorAll("input, select, button")].filter(shown);
return {
  page: document.documentElement.scrollWidth, view: window.innerWidth,
  images: [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt.length]),
  unnamed: fields.filter(e => e.tagName !== "BUTTON" && !e.labels.length).map(e => e.id),
  lowest: Math.min(...fields.map(e => e.getBoundingClientRect().height)),
  contrast: Math.min(...texts.map(contrast)),
  smallest: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize))),
  requests: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
};
"""

pytestmark = pytest.mark.skipif(
    (BROWSER is None or DRIVER is None) and not os.environ.get("CI"),
    reason="Chromium and chromedriver are not installed here; CI has them and must run this",
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Return the address of a running ``posenc explore``."""
    command = [sys.executable, "-c", "import posenc.cli; posenc.cli.main()", "explore", "--no-browser"]
    command += ["--strategy", "self_extend", "--window", "256", "--prompt", "2048"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as ran:
        assert ran.stdout is not None
        assert select.select([ran.stdout], [], [], 60)[0], "posenc explore prints nothing"
        match = re.search(r"http://127\.0\.0\.1:\d+/", ran.stdout.readline())
        assert match is not None
        yield match[0]
        ran.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    assert BROWSER is not None, "CI must have both: scripts/ci-packages.sh installs them"
    assert DRIVER is not None, "CI must have both: scripts/ci-packages.sh installs them"
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(flag)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def resize(browser: Any, size: tuple[int, int]) -> None:
    """Set the width and height of the page, including those of a phone (a window cannot be that narrow)."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def wait(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(f"return {condition}"), condition)


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def tab_to(browser: Any, wanted: str) -> None:
    """Press Tab until the element with that id has the focus, and check that the focus is visible."""
    from selenium.webdriver.common.keys import Keys

    for _ in range(40):
        press(browser, Keys.TAB)
        focus = browser.execute_script(
            "const e = document.activeElement; return [e.id, getComputedStyle(e).outlineStyle, e.className]"
        )
        assert focus[1] == "solid", f"the focus on {focus} is not visible"
        if focus[0] == wanted:
            return
    raise AssertionError(f"the keyboard does not reach {wanted}")


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_fits_and_loads_only_its_own_files(browser: Any, address: str, size: tuple[int, int]) -> None:
    resize(browser, size)
    browser.get(address)
    wait(browser, "[...document.images].every(i => i.complete)")
    measures = browser.execute_script(MEASURE)
    assert measures["view"] == size[0]
    assert measures["page"] <= size[0]
    assert len(measures["images"]) == 2
    assert all(natural > 0 and 300 < width <= size[0] and text > 20 for natural, width, text in measures["images"])
    assert measures["unnamed"] == []
    assert measures["lowest"] >= 44
    assert measures["contrast"] >= 4.5
    assert measures["smallest"] >= 13
    assert sorted(measures["requests"]) == [f"{address}static/page.css", f"{address}static/page.js"]


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_can_be_used_with_the_keyboard_only(browser: Any, address: str, size: tuple[int, int]) -> None:
    resize(browser, size)
    browser.get(address)
    assert "leaves the window of 256" in browser.find_element("id", "summary").text
    tab_to(browser, "strategy")
    press(browser, "rer")  # the browser selects the option that begins like this
    wait(browser, "document.getElementById('parameters').dataset.strategy === 'rerope'")
    wait(browser, "document.getElementById('yaml')?.textContent === 'strategy: rerope\\n'")
    before = browser.execute_script("return document.images[0].src")
    tab_to(browser, "p-window_size")
    press(browser, "96")
    wait(browser, "document.getElementById('yaml').textContent.includes('window_size: 96')")
    assert "inside the window of 256 everywhere" in browser.find_element("id", "summary").text
    assert browser.execute_script("return document.images[0].src") != before
    assert "window_size=96" in browser.current_url
    tab_to(browser, "copy")
    press(browser, " ")
    wait(browser, "document.getElementById('copied').textContent !== ''")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_wrong_value_is_reported_and_nothing_is_lost(browser: Any, address: str) -> None:
    resize(browser, DESK)
    browser.get(f"{address}?strategy=self_extend&window=256&prompt=512&group=4")
    tab_to(browser, "p-group")
    press(browser, "\ue017", "0")  # Delete the selected 4
    wait(browser, "document.querySelector('[role=alert]')?.textContent.includes('self_extend.group')")
    assert browser.execute_script("return document.activeElement.id") == "p-group"
    press(browser, "\ue003", "8")  # Backspace
    wait(browser, "document.getElementById('yaml')?.textContent.includes('group: 8')")
