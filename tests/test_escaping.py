"""What runs write down reaches pages as text, whatever it says."""
import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from sparsedarts.reporting.claims import claims_html
from sparsedarts.reporting.pages import write_report
from sparsedarts.reporting.rendering import Formulas, mathml, notebook_html, page_html, protect_formulas, restore_formulas

ROOT = Path(__file__).resolve().parents[1]
TRAPS = ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "</table></main><h1>x", "&lt;b&gt; & ]]>",
         "{0}{x!r}%s", "javascript:alert(1)"]


class Reader(HTMLParser):
    "Elements, attributes that act, links and text of a page."
    def __init__(self, page):
        super().__init__()
        self.tags, self.acting, self.links, self.text = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.acting += [value for key, value in attributes if key.startswith("on")]
        self.links += [value for key, value in attributes if key in ("href", "src")]

    def handle_data(self, data): self.text += data


def harmless(page):
    "Nothing that the pages themselves do not contain."
    seen = Reader(page)
    assert "script" not in seen.tags and all("alert" not in (value or "") for value in seen.acting)
    assert not any((link or "").lower().startswith("javascript") or link == "x" for link in seen.links)
    return seen.text


def spoiled(value, trap):
    "Every text in a value that people may have written, replaced."
    kept = ("verdict", "git", "status", "preset", "format", "checksum", "id")
    if isinstance(value, dict): return {k: v if k in kept else spoiled(v, trap) for k, v in value.items()}
    if isinstance(value, list): return [spoiled(item, trap) for item in value]
    return f"{value}{trap}" if isinstance(value, str) else value


@pytest.fixture
def clone(tmp_path):
    "A clone with one finished run, made from a committed sample."
    for name in ("nbs", "reports/sweeps"): shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "reports/samples/unionmask-laptop", tmp_path / "reports/runs/a")
    (tmp_path / "reports/runs/a/report.html").unlink()
    return tmp_path


@pytest.mark.parametrize("trap", TRAPS)
def test_claims_and_cards(clone, trap):
    run = clone / "reports/runs/a"
    results = json.loads((run / "results.json").read_text())
    claims = spoiled(copy.deepcopy(results["claims"]), trap)
    page = page_html(f"title {trap}", claims_html(claims, f"note {trap}"))
    assert harmless(page).count(trap) > len(claims)
    results |= dict(claims=claims, environment=spoiled(results.get("environment") or {}, trap))
    results.pop("checksum", None)
    (run / "results.json").write_text(json.dumps(results))
    record = json.loads((run / "run.json").read_text())
    record.pop("checksum", None)
    (run / "run.json").write_text(json.dumps(record | dict(status="failed", error=f"it said {trap}")))
    index = write_report(clone).read_text()
    assert f"it said {trap}" in harmless(index)
    for path in (clone / "reports/pages").glob("*.html"): harmless(path.read_text())


def test_names_of_run_folders(clone):
    names = ["b'onclick='alert(1)", "c\"><script>alert(1)<", "d & e #1?x=%41", "e\u00e4\u4e2d"]
    for name in names: shutil.copytree(clone / "reports/runs/a", clone / "reports/runs" / name)
    index = write_report(clone)
    harmless(index.read_text())
    from urllib.parse import unquote
    linked = {unquote(link) for link in Reader(index.read_text()).links if link.startswith("pages/")}
    assert linked == {f"pages/{name}.html" for name in (*names, "a")} and all((index.parent / link).is_file() for link in linked)


def test_a_plain_text_in_a_page_is_text():
    assert "&lt;script&gt;" in page_html("t", "<script>alert(1)</script>")
    assert Reader(page_html("</title><script>", "x")).tags.count("script") == 0


@pytest.mark.parametrize("tex", [r"\text{<script>alert(1)</script>}", r"\mathrm{<img src=x onerror=alert(1)>}", r"\href{javascript:alert(1)}{x}", "a < b & c",
                                 r"x</math><script>alert(1)</script>", r"\text{]]>}", r"\text{<!--}", r"\text{&lt;script&gt;}", r"\text{<style>*{}}"])
def test_formulas(tex):
    for block in (False, True): harmless(page_html("t", mathml(tex, block)))
    page = notebook_html(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# A ${tex}$ b\n\nText ${tex}$.")]), ROOT, ROOT)
    assert not re.search(r"<script|<img|<style", page)


def test_words_that_look_like_a_formulas_place():
    formulas = Formulas()
    text = protect_formulas("qformula99q and $x$ and qformula0q", formulas)
    page = restore_formulas(f"<p>{text}</p>", formulas)
    assert "qformula99q" in page and "qformula0q" in page and page.count("<math") == 1
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("qformula99q $x$"), nbformat.v4.new_code_cell("text = 'qformula99q'")])
    one, two = (notebook_html(notebook, ROOT, ROOT) for _ in range(2))
    assert one == two and one.count("qformula99q") == 2 and formulas.word not in page
