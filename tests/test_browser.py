"""The report in a real browser at laptop and phone width: nothing wider than the window, all figures drawn, formulas drawn."""
import html
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from demo import demo_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
const frame = document.querySelector('iframe'), page = frame.contentDocument, root = page.documentElement, width = frame.contentWindow.innerWidth;
page.querySelectorAll('details').forEach(d => d.open = true);
const boxed = e => { for (let p = e.parentElement; p && p !== page.body; p = p.parentElement) if (['auto', 'scroll', 'hidden'].includes(frame.contentWindow.getComputedStyle(p).overflowX)) return true; return false; };
const wide = [...page.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > width + 1 && !boxed(e)).map(e => e.tagName + '.' + e.className);
const images = [...page.querySelectorAll('img')];
const formulas = [...page.querySelectorAll('math')].filter(m => m.getBoundingClientRect().width > 2).length;
document.title = JSON.stringify({width, scroll: root.scrollWidth, wide: wide.slice(0, 5), images: images.length, drawn: images.filter(i => i.naturalWidth > 20).length, formulas, math: page.querySelectorAll('math').length});
"""


def measure(page, width, folder):
    "Load the page in a frame of this width and read its measurements out of the title."
    outer = folder / f"outer-{page.stem}-{width}.html"
    outer.write_text(f'<!doctype html><title>x</title><body style="margin:0"><iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page.read_text(), quote=True)}" onload="setTimeout(() => {{ {html.escape(MEASURE, quote=True)} }}, 50)"></iframe>')
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=8000", "--window-size=1400,1000", "--dump-dom", outer.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, f"the browser measured nothing: {done.stderr[-500:]}"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        warnings.warn("NO BROWSER FOUND: the report was not opened at phone and laptop width (apt install --no-install-recommends chromium)", stacklevel=1)
        pytest.skip("no browser found: the report was NOT opened at phone and laptop width")
    return tmp_path_factory.mktemp("browser")


def sound(seen, width):
    assert seen["width"] == width
    assert seen["scroll"] <= width and not seen["wide"], f"wider than {width} px: {seen}"
    assert seen["drawn"] == seen["images"] and seen["formulas"] == seen["math"], seen


@pytest.mark.parametrize("width", (390, 1280))
def test_pages_fit_the_window(browser, width):
    reports = demo_report() / "reports"
    [run] = (reports / "pages").glob("toy-*.html")
    [failed] = (reports / "pages").glob("failing-*.html")
    pages = {page: measure(page, width, browser) for page in (reports / "index.html", run, failed)}
    for seen in pages.values(): sound(seen, width)
    assert pages[run]["images"] == 3 and pages[run]["math"] >= 5 and pages[reports / "index.html"]["images"] == 2


@pytest.mark.parametrize("page", sorted((ROOT / "reports/samples").glob("*/report.html")), ids=lambda p: p.parent.name)
def test_committed_samples_fit_a_phone(browser, page):
    sound(measure(page, 390, browser), 390)


def test_an_overflow_is_seen(browser):
    page = browser / "wide.html"
    page.write_text("<!doctype html><title>w</title><body><p>fine</p><div style='width:2000px'>too wide</div><div style='overflow-x:auto'><div style='width:2000px'>boxed</div></div>")
    seen = measure(page, 390, browser)
    assert seen["scroll"] >= 2000 and seen["wide"] == ["DIV."]
