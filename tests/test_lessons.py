"""The lessons about differentiable search: replayed logs, steps by hand, numbers in prose, and what is committed."""
import ast
import copy
import json
import math
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from papermill.exceptions import PapermillExecutionError

import sparsedarts as sd
from sparsedarts.core import DataError
from sparsedarts.space.cells import derived_size
from sparsedarts.space.genotypes import random_genotype
from sparsedarts.strategy.bilevel import Search
from sparsedarts.strategy.search import seeded_supernet

TOUR = Path(__file__).resolve().parents[1] / "nbs/tour"
FIRST, SECOND, THIRD = (TOUR / f"{name}.ipynb" for name in ("from_a_mixed_edge_to_a_supernet", "bilevel_optimisation_by_hand", "when_a_search_collapses"))
LESSONS = (FIRST, SECOND, THIRD)


def sources(path, kind="code"): return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def definitions(path):
    "The functions, classes and constants of a lesson, and nothing that computes."
    kept = []
    for source in sources(path):
        for node in ast.parse(source).body:
            names = [name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)] if isinstance(node, ast.Assign) else []
            plain = bool(names) and all(name.isupper() for name in names)
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) or plain: kept.append(node)
    names, literal = {}, nbformat.read(path, 4)
    exec(next(c.source for c in literal.cells if "parameters" in c.metadata.get("tags", [])), names)
    for node in kept:
        try: exec(compile(ast.Module([node], []), str(path), "exec"), names)
        except NameError: continue  # a constant that needs something computed
    return names


def run_made_up(eigenvalues, skips=None, **changes):
    epochs = 2 * len(eigenvalues)
    return dict(space="s1", dataset="cifar10", drop_path_prob=0.0, weight_decay=3e-4, seed=1, ev_epochs=list(range(0, epochs, 2)), dominant_ev=eigenvalues,
                skips_in_normal_by_epoch=skips or [min(8, e // 3) for e in range(epochs)], search_valid_error_by_epoch=[30 - 0.4 * e for e in range(epochs)]) | changes


CALM, RISING = [0.2] * 25, [0.1] * 10 + [0.2 + 0.05 * k for k in range(15)]
GOOD = {"source": "made up", "runs": [run_made_up(CALM), run_made_up(RISING, seed=2), run_made_up(CALM, weight_decay=8.1e-3, skips=[1] * 50), run_made_up(CALM, space="s3", dropped="ignored")]}


def write(path, record):
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


@pytest.fixture(scope="module")
def third(): return definitions(THIRD)


def test_logs_are_read_and_replayed(third, tmp_path):
    runs, source = third["read_logs"](write(tmp_path / "logs.json", GOOD))
    assert source == "made up" and len(runs) == 4
    means = [sum(RISING[k:k + 5]) / 5 for k in range(21)]
    told = next(k for k in range(8, 25) if means[k - 4] > 1.3 * means[k - 8] and 2 * k - 12 >= 10)
    assert [third["replay"](r) for r in runs] == [(None, None), (2 * told - 12, 2 * told), (None, None), (None, None)]
    third["runs"] = runs
    row = third["sweep"]("s1").iloc[0]
    assert row["weight decay"] == "0.0003" and row["runs"] == 2 and row["kept epochs"] == f"end, {2 * told - 12}"
    assert math.isclose(row["eigenvalue, last 5"], (0.2 + sum(RISING[-5:]) / 5) / 2) and row["skips, last"] == 8 and row["skips, first epoch"] == 0
    saved = third["saved"]("s1")
    assert len(saved) == 1 and saved["skips at the end"].iloc[0] == 8 and saved["epochs not run"].iloc[0] == 49 - 2 * told and third["saved"]("s3").empty


def without(name): return {"runs": [{k: v for k, v in run_made_up(CALM).items() if k != name}]}


@pytest.mark.parametrize("record, message", [
    ("{not json", "is not JSON"),
    ([], "needs a list 'runs'"),
    ({"runs": []}, "needs a list 'runs' with at least one run"),
    ({"runs": [3]}, "run 0 of .* is int; every run is an object"),
    (without("dominant_ev"), "run 0 of .* has no dominant_ev; it has space"),
    ({"runs": [run_made_up(CALM), run_made_up(CALM, weight_decay="a lot")]}, "run 1 of .*: weight_decay must be a finite number, got 'a lot'"),
    ({"runs": [run_made_up(CALM, space=1)]}, "space must be text, got 1"),
    ({"runs": [run_made_up([0.1, math.nan])]}, "dominant_ev must be a list of finite numbers"),
    ({"runs": [run_made_up(CALM, dominant_ev=[0.2] * 24)]}, "ev_epochs has 25 entries, dominant_ev has 24"),
    ({"runs": [run_made_up(CALM, search_valid_error_by_epoch=[1.0])]}, "they belong together"),
    ({"runs": [run_made_up(CALM, ev_epochs=[0] * 25)]}, "ev_epochs must rise"),
    ({"runs": [run_made_up(CALM, ev_epochs=list(range(40, 65)))]}, "whole numbers from 0 to 49"),
])
def test_malformed_logs_are_refused(third, tmp_path, record, message):
    with pytest.raises(DataError, match=message): third["read_logs"](write(tmp_path / "logs.json", record))


def replay_part(logs, tmp_path):
    "The third lesson up to its own searches, run by papermill with a file of logs."
    notebook = nbformat.read(THIRD, 4)
    end = next(k for k, cell in enumerate(notebook.cells) if "# Our own search" in cell.source)
    notebook.cells = notebook.cells[:end]
    nbformat.write(notebook, tmp_path / "part.ipynb")
    made = papermill.execute_notebook(tmp_path / "part.ipynb", tmp_path / "out.ipynb", {"logs": str(logs)}, progress_bar=False, kernel_name="python3")
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs), sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_lesson_draws_supplied_logs_and_refuses_broken_ones(tmp_path):
    text, pictures = replay_part(write(tmp_path / "logs.json", GOOD), tmp_path)
    assert "4 runs, source: made up" in text and "the rule stops 1 of 4 runs" in text and pictures == 4
    with pytest.raises(PapermillExecutionError, match="has no skips_in_normal_by_epoch"):
        replay_part(write(tmp_path / "broken.json", without("skips_in_normal_by_epoch")), tmp_path)


def test_without_logs_the_lesson_says_so():
    [cell] = [c for c in nbformat.read(THIRD, 4).cells if "def read_logs" in c.source]
    assert "no file of published runs was given" in cell.outputs[0].text


def test_quoted_numbers_and_prose_agree(third):
    quoted, across, prose = third["QUOTED"], third["ACROSS"], "\n".join(sources(THIRD, "markdown"))
    strict, loose = quoted["0.0003"], quoted["0.0081"]
    assert "the eigenvalue has risen from 0.19 to 0.67" in prose and (round(strict[0], 2), round(strict[1], 2)) == (0.19, 0.67)
    assert "With 27 times the decay" in prose and math.isclose(float("0.0081") / float("0.0003"), 27) and "seven skips of eight" in prose and strict[4] == 7 and loose[4] == 2
    assert "lowest at 9e-4" in prose and min(quoted, key=lambda decay: quoted[decay][5]) == "0.0009"
    assert f"is {across['Spearman of error and skips']}, and {across['without drop path']} in the 15" in prose
    assert f"{across['Pearson of eigenvalue and skips']} (Pearson) and {across['Spearman of eigenvalue and skips']} (Spearman)" in prose
    v1, v2 = (derived_size(sd.genotype(name)) for name in ("DARTS_V1", "DARTS_V2"))
    assert f"counts {v1 / 1e6:.2f} M" in prose and f"counts {v2 / 1e6:.2f} M" in prose


def test_numbers_of_the_first_lesson():
    names, prose = definitions(FIRST), "\n".join(sources(FIRST, "markdown"))
    for space in ("darts", "s1", "s3"):
        assert names["supernet_size"](space, 6, 5, 7, 2) == sum(p.numel() for p in seeded_supernet(space, channels=6, layers=5, classes=7, in_channels=2).parameters())
    assert "8 \\cdot 14 \\cdot 8 = 896" in prose and 8 * 14 * 8 == 896 and f"{(180 * 49**4) ** 2:.0e}" == "1e+18" and "$10^{18}$" in prose
    assert round(math.log(7), 1) == 1.9 and round(math.log(63), 1) == 4.1 and "\\ln 7 \\approx 1.9$ and $\\ln 63 \\approx 4.1" in prose
    macs = [int(n.replace("_", "")) for n in re.findall(r"\.macs == ([\d_]+)", "\n".join(sources(FIRST)))]
    assert len(macs) == 2 and "about seven times the multiplications" in prose and 6.5 < macs[0] / macs[1] < 7.5


def test_a_restricted_supernet_is_a_cell():
    keep_only, net = definitions(FIRST)["keep_only"], seeded_supernet("s3", nodes=3, channels=4, layers=3, in_channels=1)
    cell = random_genotype(torch.Generator().manual_seed(1), "s3", 3)
    for kind, table in keep_only(cell, net, True).items():
        assert table.sum() == 6 and all(table[k].sum() <= 1 for k in range(9)) and (table[:, 0] == 0).all()
        assert torch.equal(keep_only(cell, net, False)[kind], table * net.weights()[kind])


def test_pencil_and_paper():
    names = definitions(SECOND)
    for xi, k in ((0.05, 1), (0.2, 3), (0.5, 2)):
        assert math.isclose(names["descend"](xi, k, steps=2000)[-1, 0], 2 / (2 - (1 - 2 * xi) ** k), rel_tol=1e-6)
        assert math.isclose(names["unrolled_slope"](0.3, -0.7, xi, k), names["unrolled_by_autograd"](0.3, -0.7, xi, k), rel_tol=1e-9)


def test_a_step_by_hand_with_other_settings():
    "Another space, a clip that bites, other decays and moments: still the package's step."
    names, data = definitions(SECOND), sd.load_data("digits")
    settings = dict(order="second", epochs=2, batch_size=32, lr=0.05, momentum=0.5, weight_decay=0.02, clip=0.1, arch_lr=0.03, arch_betas=(0.8, 0.9), arch_weight_decay=0.1,
                    epsilon=0.05, seed=3, device="cpu", progress=False)
    net = seeded_supernet("s2", 1, channels=4, layers=3, nodes=1, in_channels=1).double()
    theirs, ours, memory = Search(copy.deepcopy(net), data, **settings), Search(copy.deepcopy(net), data, **settings), {}
    ours.supernet.train()
    for _ in range(2):
        theirs.step()
        batch, arch_batch = (names["as_type"](next(stream), torch.float64) for stream in (ours.batches, ours.arch_batches))
        happened = names["step_by_hand"](ours.supernet, batch, arch_batch, memory, ours.settings, theirs.optimizer.param_groups[0]["lr"])
        assert happened["length of g"] > 0.1, "clipped"
    wanted, got = theirs.supernet.state_dict(), ours.supernet.state_dict()
    assert wanted.keys() == got.keys()
    for name in wanted: torch.testing.assert_close(got[name].double(), wanted[name].double(), rtol=0, atol=1e-11)


def test_pruning_rule_of_the_third_lesson(third):
    "Removals under the rule end with two edges of one operation at every node, whatever is picked."
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask, events = torch.ones(14, 2, dtype=torch.bool), 0
        while third["redundant"](mask):
            allowed = third["removable"](mask)
            assert (allowed <= mask).all()
            mask.view(-1)[int(torch.rand(28, generator=generator).masked_fill(~allowed.flatten(), -1).argmax())] = False
            events += 1
        per_edge = mask.sum(1)
        assert events == 20 and per_edge.max() == 1 and [int(per_edge[a:b].sum()) for a, b in ((0, 2), (2, 5), (5, 9), (9, 14))] == [2] * 4


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_what_is_committed(path):
    notebook, text = nbformat.read(path, 4), path.read_text()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert "widgets" not in notebook.metadata and path.stat().st_size < 400_000
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3 and not any(output.output_type == "error" for output in outputs)
    prose = "\n".join(sources(path, "markdown"))
    assert "# Exercises" in prose and len(re.findall(r"^\d+\. ", prose, re.M)) >= 6 and "PLACEHOLDER" not in text
    for target in re.findall(r"\]\(([\w/.]+\.ipynb)\)", prose): assert (path.parent / target).exists(), target
