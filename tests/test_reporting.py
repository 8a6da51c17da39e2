"""From a notebook to the pages, and the state of what is committed: samples, sweep files, the README's table."""
import re
from pathlib import Path

import pytest
from demo import demo_report

from sparsedarts.files import read_results
from sparsedarts.reporting.notebooks import find_paper, papers, studies
from sparsedarts.reporting.pages import fill_readme
from sparsedarts.reporting.rendering import check_page

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = sorted((ROOT / "reports" / "samples").glob("*/"))


def test_every_page_of_a_report_is_sound():
    root = demo_report()
    pages = [*(root / "reports/pages").glob("*.html"), *(root / "reports/samples").glob("*/report.html"), root / "reports/index.html"]
    assert len(pages) == 4
    for page in pages: assert check_page(page.read_text(), page.parent, failed="failing" in page.name or page.name == "index.html") == [], page


def test_a_page_shows_what_the_run_measured():
    root = demo_report()
    [page] = [p.read_text() for p in (root / "reports/pages").glob("toy-*.html")]
    assert page.count("<math ") >= 5 and "$HOME" in page, "formulas are converted, code is not"
    assert "An interactive widget stands here" in page and "Masks of stem.conv.weight over 4 steps" in page, "the static figure stands beside the widget"
    assert page.count("<img ") == 3 and not re.search(r'src="https?:|<script', page)
    assert "70.49 - 67.53 = +2.96 points" in page and "✓ holds" in page and "(n=4)" in page and "not tested at this scale" in page
    assert str(root) not in page, "no path of this machine in a report"


def test_the_index_shows_failures_and_verdicts():
    index = (demo_report() / "reports/index.html").read_text()
    assert "This run failed." in index and "KeyError" in index and "A paper whose notebook fails" in index
    assert "3 runs: 2 finished, 1 failed" in index and "(committed sample)" in index and index.count("Thumbnail: ") == 2
    assert "Paper: <strong>70.49 - 67.53 = +2.96 points</strong>; ours: <strong>+" in index and '<span class="badge holds">1 holds</span>' in index


def test_results_hold_everything_the_report_says():
    root = demo_report()
    record = read_results(next((root / "reports/runs").glob("toy-*")))
    assert len(record["trials"]) == 24 and [c["verdict"] for c in record["claims"]] == ["holds", "not tested at this scale"]
    assert record["claims"][0]["controls"][0]["name"] == "random union" and record["environment"]["packages"]["torch"]


@pytest.mark.parametrize("name", papers(ROOT))
def test_presets_of_every_paper(name):
    paper = find_paper(name, ROOT)
    assert "smoke" in paper.presets and paper.title and paper.subtitle
    for preset in paper.presets: paper.preset(preset)
    assert all(p.help for p in paper.parameters.values()), f"say what they mean: {[n for n, p in paper.parameters.items() if not p.help]}"


@pytest.mark.parametrize("folder", SAMPLES, ids=lambda p: p.name)
def test_committed_samples_are_sound(folder):
    record = read_results(folder)
    assert record["paper"] in papers(ROOT) | studies(ROOT) and record["claims"]
    problems = [p for p in check_page((folder / "report.html").read_text(), folder) if "index.html" not in p]
    assert problems == [], "apart from the index, which each clone makes itself"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 1_500_000


def test_the_readme_shows_the_committed_samples():
    readme = ROOT / "README.md"
    assert SAMPLES and readme.read_text().count("**holds**") + readme.read_text().count("**inconclusive**") + readme.read_text().count("**contradicted**") > 0
    assert fill_readme(readme, ROOT, check=True), "run: sparsedarts report --readme README.md"
