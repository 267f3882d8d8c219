"""The page in a real browser makes no request, and does not scroll sideways at the width of a phone.

The tests need Chromium. CI installs it (scripts/ci-packages.sh) and fails without it; elsewhere they are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from posenc.report.write import write_report
from tests.report import results

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PHONE, DESK = 390, 1280
MEASURE = """
<iframe id="page" src="report.html" style="width:{width}px;height:800px;border:0"></iframe><pre id="found"></pre>
<script>
document.getElementById("page").onload = function () {{
  const view = this.contentWindow, page = view.document;
  const every = [...page.querySelectorAll("body *")].filter(e => !e.closest("svg"));
  const wide = every.filter(e => !e.closest(".scroll") && e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1)
    .map(e => e.outerHTML.slice(0, 90));
  const small = every.filter(e => e.childNodes.length === 1 && e.firstChild.nodeType === 3)
    .map(e => parseFloat(view.getComputedStyle(e).fontSize));
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, view: view.innerWidth, wide: wide,
    requests: view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    images: [...page.images].map(i => i.naturalWidth), charts: [...page.querySelectorAll("figure > svg")]
      .map(s => s.getBoundingClientRect().width), smallest: Math.min(...small)
  }});
}};
</script>
"""

pytestmark = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("CI"), reason="Chromium is not installed here; CI has it and must run this"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    html, _ = write_report([results.write_all(folder)], folder)
    return html


class Noting(SimpleHTTPRequestHandler):
    """Serves a folder and records the requested paths."""

    paths: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:
        self.paths.append(self.path)


def look(page: Path, width: int) -> dict[str, Any]:
    """Load the page in a frame of that width and measure it."""
    assert BROWSER is not None, "CI must have Chromium: scripts/ci-packages.sh installs it"
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(MEASURE.format(width=width), encoding="utf-8")
    Noting.paths.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Noting, directory=str(page.parent))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{frame.name}"
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
        command += ["--virtual-time-budget=5000", "--dump-dom", address]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    output = re.search(r'<pre id="found">(\{.*?\})</pre>', ran.stdout, re.DOTALL)
    assert output is not None, ran.stderr[-2000:]
    measured: dict[str, Any] = json.loads(unescape(output[1]))
    measured["requests"] += [
        path for path in Noting.paths if path not in (f"/{frame.name}", "/report.html", "/favicon.ico")
    ]
    return measured


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_fits_and_makes_no_request(width: int, page: Path):
    seen = look(page, width)
    assert seen["view"] == width
    assert seen["width"] <= width, seen["wide"]
    assert seen["requests"] == []
    assert len(seen["images"]) == len(results.STRATEGIES)
    assert all(size > 0 for size in seen["images"])
    assert len(seen["charts"]) == 3
    assert all(0.6 * PHONE < size <= width for size in seen["charts"])
    assert seen["smallest"] >= 10


def test_the_measurement_detects_a_page_that_is_too_wide_or_makes_requests(page: Path, tmp_path: Path):
    html = page.read_text(encoding="utf-8").replace("Content-Security-Policy", "x-none")
    spoilt = (
        '<img src="missing.png"><img src="http://127.0.0.1:9/outside.png"><div style="width:900px">wide</div></body>'
    )
    (tmp_path / "report.html").write_text(html.replace("</body>", spoilt), encoding="utf-8")
    seen = look(tmp_path / "report.html", PHONE)
    assert seen["width"] > PHONE
    for name in ("missing.png", "outside.png"):
        assert any(path.endswith(name) for path in seen["requests"])
