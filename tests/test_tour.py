"""Lessons and studies: found by name, runnable by papermill, and in step with the committed results that they quote."""
import ast
import json
import re
import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsedarts.cli import app
from sparsedarts.files import read_results
from sparsedarts.reporting.notebooks import find_paper, papers, parse_parameters, studies
from sparsedarts.reporting.pages import results_table
from sparsedarts.reporting.runs import make_plan

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "nbs/tour").glob("*.ipynb"))
LESSON = ROOT / "nbs/tour/what_is_a_weight_worth.ipynb"
SAMPLE = ROOT / "reports/samples/pruning_at_init-laptop"
METHODS = ("snip", "grasp", "synflow", "magnitude")


def cells(path, kind="code"): return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", [*LESSONS, *studies(ROOT).values()], ids=lambda p: p.stem)
def test_papermill_finds_the_parameters(path):
    tagged = [c for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell tagged 'parameters'"
    declared = parse_parameters("".join(tagged[0]["source"]), path.name)
    assert declared and all(p.help for p in declared.values()), f"say what they mean: {[n for n, p in declared.items() if not p.help]}"


def test_a_study_is_found_by_name_and_is_no_paper():
    assert "pruning_at_init" in studies(ROOT) and "pruning_at_init" not in papers(ROOT) and not set(studies(ROOT)) & set(papers(ROOT))
    study = find_paper("pruning_at_init", ROOT)
    assert study.kind == "study" and find_paper("unionmask", ROOT).kind == "paper" and study.title and study.subtitle
    plan = make_plan("pruning_at_init", "laptop", {}, 2, ROOT)
    assert plan.source == ROOT / "nbs/studies/pruning_at_init.ipynb" and plan.values["seeds"] == study.presets["laptop"]["seeds"]


@pytest.mark.parametrize("name", studies(ROOT))
def test_presets_of_every_study(name):
    study = find_paper(name, ROOT)
    assert "smoke" in study.presets and not study.presets["smoke"], "smoke is the notebook's own values"
    for preset in study.presets: study.preset(preset)


def test_the_list_shows_studies_apart():
    text = CliRunner().invoke(app, ["list", "--root", str(ROOT)]).stdout
    head, _, rest = text.partition("\nstudy ")
    assert "unionmask" in head and "pruning_at_init" not in head and "pruning_at_init" in rest and "'all' runs the papers only" in rest
    records = json.loads(CliRunner().invoke(app, ["list", "--json", "--root", str(ROOT)]).stdout)
    assert {r["name"]: r["kind"] for r in records}["pruning_at_init"] == "study"
    assert "pruning_at_init" not in results_table(ROOT), "the README's table is about papers"


def test_the_sample_was_made_with_the_preset():
    study, record = find_paper("pruning_at_init", ROOT), read_results(SAMPLE)
    wanted = {name: p.default for name, p in study.parameters.items()} | study.preset("laptop")
    differ = {name for name, value in wanted.items() if name not in ("run_dir", "workers") and record["parameters"][name] != value}
    assert not differ, f"the committed sample was made with other values of {differ}"
    assert not set(wanted["seeds"]) & set(range(5)), "seeds 0 to 4 were the pilots'"


def test_the_sample_is_complete_and_its_verdicts_follow_from_its_trials():
    record = read_results(SAMPLE)
    settings, claims = record["parameters"], {c["id"]: c for c in record["claims"]}
    rows = [t for t in record["trials"] if t["measure"] == "accuracy"]
    found = {(t["name"], t["sparsity"], t["seed"]): t for t in rows}
    assert len(found) == len(rows), "every trial once"
    for seed in settings["seeds"]:
        for sparsity in settings["sparsities"]:
            same = {found[name, sparsity, seed]["kept"] for m in METHODS for name in (m, f"{m} shuffled", f"{m} reinitialised")}
            same |= {found[name, sparsity, seed]["kept"] for name in ("random uniform", "random ERK", "gradual")}
            assert len(same) == 1, "equal numbers of weights"
            assert all(found[m, sparsity, seed]["emptied"] == found[f"{m} shuffled", sparsity, seed]["emptied"] for m in METHODS)
    pairs = {"{}-beats-random-{}": ("{}", "random uniform"), "{}-shuffled-{}": ("{} shuffled", "{}"), "{}-reinitialised-{}": ("{} reinitialised", "{}"), "{}-below-gradual-{}": ("gradual", "{}")}
    for m in METHODS:
        for sparsity in settings["sparsities"]:
            for claim, (of, minus) in pairs.items():
                told = claims[claim.format(m, f"{100 * sparsity:g}")]
                by_hand = [found[of.format(m), sparsity, s]["accuracy"] - found[minus.format(m), sparsity, s]["accuracy"] for s in settings["seeds"]]
                assert told["ours"]["mean"] == pytest.approx(statistics.fmean(by_hand), abs=1e-9) and told["ours"]["n"] == len(settings["seeds"])
                low, bound = told["ours"]["low"], -settings["margin"] if "gradual" not in claim and "random" not in claim else 0
                assert (told["verdict"] == "holds") == (low > bound), told["id"]


def test_the_lesson_says_what_the_sample_says():
    [source] = [c for c in cells(LESSON) if re.search(r"^TOLD = ", c, re.M)]
    told = ast.literal_eval(next(n.value for n in ast.parse(source).body if isinstance(n, ast.Assign) and n.targets[0].id == "TOLD"))
    verdicts = {c["id"]: c["verdict"] for c in read_results(SAMPLE)["claims"]}
    assert told and {i: verdicts.get(i) for i in told} == told
    prose = "\n".join(cells(LESSON, "markdown"))
    assert not re.search(r"\d+(\.\d+)? (points|% accuracy)", prose), "numbers about accuracy come from the sample, not from prose"


def test_the_lesson_teaches():
    prose = "\n".join(cells(LESSON, "markdown"))
    assert "# Exercises" in prose and len(re.findall(r"^\d+\. ", prose, re.M)) >= 4
    outputs = [o for c in json.loads(LESSON.read_text())["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5, "outputs are committed, so that it can be read without running"
