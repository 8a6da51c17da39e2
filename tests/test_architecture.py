"""Imports run one way, importing does no work, prose names what exists."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparsedarts"
ORDER = ["core", "data", "sparse", "pruning", "nets", "space", "training", "strategy", "reporting", "commands", "training_commands", "cli"]
RANK = {"files": 0, "vision": 0, "plots": 0} | {part: i for i, part in enumerate(ORDER)}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py", "_modidx.py"))


def imported(path, root=ROOT):
    "Parts of our own package that a module imports, wherever in the file."
    here = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + 1] if node.level else ()
            names = [".".join([*base, *([node.module] if node.module else []), a.name]) for a in node.names]
        else: continue
        for full in names:
            parts = full.split(".")
            if parts[0] == "sparsedarts" and len(parts) > 1: yield parts[1]


def upward(path, root=ROOT):
    "What a module imports from its right."
    return [other for other in imported(path, root) if other not in ("__version__", "_modidx") and RANK[other] > RANK[path.relative_to(root / "sparsedarts").with_suffix("").parts[0]]]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    assert not upward(path), f"{path.name} imports {upward(path)}, to its right in {' -> '.join(ORDER)}"


def test_an_upward_import_is_seen(tmp_path):
    path = tmp_path / "sparsedarts" / "sparse" / "masks.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..reporting.runs import reproduce\nfrom ..core import Registry\n\ndef f():\n    import sparsedarts.cli\n    from .. import pruning\n")
    assert upward(path, tmp_path) == ["reporting", "cli", "pruning"]


def test_import_is_light_and_quiet():
    "`import sparsedarts` loads nothing heavy, and reaching for masks does not load torchvision, plots or papermill."
    code = ("import sys, sparsedarts as sd\n"
            "assert 'torch' not in sys.modules\n"
            "sd.Masks, sd.resnet, sd.prune, sd.train\n"
            "heavy = {'torchvision', 'papermill', 'seaborn', 'matplotlib', 'sklearn', 'pandas', 'IPython'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "missing = [n for n in sd.__all__ if not hasattr(sd, n)]\n"
            "assert not missing, missing\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stdout, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_is_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500, "over 500 lines: split the notebook"
    assert "import *" not in text and "__all__" in text
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def names_that_exist():
    "Every identifier in package, notebooks' code, tests and settings."
    code = [p.read_text() for p in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]]
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        code += ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    for other in ("Makefile", "pyproject.toml", "settings.ini", ".gitignore", ".pre-commit-config.yaml", "constraints.txt"):
        code.append((ROOT / other).read_text())
    code += [p.read_text() for p in (ROOT / "reports" / "sweeps").glob("*.toml")]
    return set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", "\n".join(code)))


def test_prose_names_what_exists():
    "A backticked name in a notebook's or README's prose is a name in the code, a file, a command, or an outside name seen in code."
    import builtins
    import torch
    known = names_that_exist() | set(dir(builtins)) | set(dir(torch)) | set(dir(torch.nn)) | set(dir(torch.Tensor))
    wrong = []
    texts = {p: "\n".join("".join(c["source"]) for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "markdown")
             for p in (ROOT / "nbs").rglob("*.ipynb")}
    for document in ("README.md", "CONTRIBUTING.md"): texts[ROOT / document] = (ROOT / document).read_text()
    for path, text in texts.items():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        for quoted in re.findall(r"`([^`\n]+)`", text):
            if (ROOT / quoted).exists() or (path.parent / quoted).exists(): continue
            if quoted.startswith(("--", "git ", "*.")): continue  # another program's options, git, file patterns
            for word in re.findall(r"[A-Za-z_][A-Za-z0-9_]{2,}", quoted):
                if word not in known and not (ROOT / word).exists(): wrong.append(f"{path.relative_to(ROOT)}: `{quoted}` ({word})")
    assert not wrong, "prose names what does not exist:\n" + "\n".join(wrong)
