"""The command line as a user meets it: a process of its own, exit codes, help, JSON, errors without tracebacks."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]


def call(*words, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "sparsedarts", *words], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={k: v for k, v in os.environ.items() if k != "SPARSEDARTS_HOME"} | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"})


def test_help_of_everything_in_one_light_process():
    "Help texts come from one process that loads no torchvision, papermill or matplotlib."
    code = """
import sys
from typer.testing import CliRunner
from sparsedarts.cli import app
for words in ([], ["list"], ["reproduce"], ["status"], ["report"], ["cost"]):
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0 and "Usage:" in done.output and ("Examples:" in done.output or not words), done.output
heavy = {"torchvision", "papermill", "matplotlib", "seaborn", "nbconvert", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_list_is_json_and_nothing_else():
    done = call("list", "--json")
    assert done.returncode == 0 and done.stderr == "" and all({"name", "title", "presets"} <= set(p) for p in json.loads(done.stdout))


@pytest.mark.parametrize("words, code, message", [
    (["reproduce", "unionmusk"], 2, "error: unknown paper 'unionmusk'"), (["cost", "resnet", "--sparsity", "abc"], 2, "error: sparsity must be a number"),
    (["reproduc"], 2, "No such command"), (["list", "--root", "/nowhere"], 1, "error: no clone of sparsedarts in /nowhere"),
    (["report", "--root", "/nowhere"], 1, "error: no clone"), (["cost", "vgg", "--shape", "1,8,8"], 2, "needs images of at least 32x32")])
def test_wrong_commands_are_one_clear_message(words, code, message):
    done = call(*words)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_outside_of_a_clone(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import shutil, os; shutil.copytree(sys.argv[1] + '/sparsedarts', 'sparsedarts', ignore=shutil.ignore_patterns('__pycache__')); sys.path[0] = os.getcwd(); from sparsedarts.cli import app; app(['list'])"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=120, env={k: v for k, v in os.environ.items() if k not in ("SPARSEDARTS_HOME", "PYTHONPATH")})
    assert done.returncode == 1 and "error: no clone of sparsedarts at or above" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_cost_counts():
    done = call("cost", "resnet", "--depth", "32", "--classes", "100", "--width", "2", "--sparsity", "0.98", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["kept"] < 0.05 * answer["params"] and answer["kept_macs"] < answer["macs"]


def test_reproduce_reports_and_exits_with_1_on_failure(tmp_path):
    (tmp_path / "nbs/papers").mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    cells = [nbformat.v4.new_markdown_cell("# Toy"), nbformat.v4.new_code_cell('preset = "smoke"\nseeds = [0]\nrun_dir = ""\nworkers = 1', metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs/papers/toy.ipynb")
    done = call("reproduce", "toy", cwd=tmp_path)
    assert done.returncode == 1 and "1 run: 0 done, 1 failed" in done.stdout and "ZeroDivisionError: division by zero" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith(f"report: {tmp_path / 'reports/index.html'}") and (tmp_path / "reports/index.html").exists()


def test_a_broken_paper_does_not_hide_the_others(tmp_path):
    (tmp_path / "nbs/papers").mkdir(parents=True)
    (tmp_path / "nbs/papers/broken.ipynb").write_text("{")
    shutil.copy(ROOT / "nbs/papers/unionmask.ipynb", tmp_path / "nbs/papers")
    done = call("list", "--root", str(tmp_path))
    assert done.returncode == 0 and "Union Mask" in done.stdout and "broken cannot be run" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert call("reproduce", "broken", "--root", str(tmp_path)).returncode in (1, 2)
