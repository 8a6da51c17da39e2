"""What the README tells people to type does what it says."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path):
    "The code block as it stands, but one epoch instead of thirty."
    code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "epochs=30" in code
    done = subprocess.run([sys.executable, "-c", code.replace("epochs=30", "epochs=1")], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "TrainResult" in done.stdout and "sparsity=0.98" in done.stdout and (tmp_path / "masks.safetensors").exists(), done.stdout


def test_the_search_example_runs(tmp_path):
    "The second code block, with one epoch of everything."
    _, code = re.findall(r"```python\n(.*?)```", README, re.S)
    code = re.sub(r"epochs=\d+", "epochs=1", code)
    done = subprocess.run([sys.executable, "-c", code + "print(done)"], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "Genotype(" in done.stdout and "TrainResult" in done.stdout and (tmp_path / "cell.svg").exists(), done.stdout


def test_commands_exist():
    "Every make target and subcommand that README and CONTRIBUTING name."
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"\bmake ([a-z]+)\b(?=[`\s])", texts)) & set(re.findall(r"(?:`|^)make ([a-z]+)", texts, re.M))
    assert {"reproduce", "test", "lab", "readme"} <= named <= targets, named - targets
    help_text = subprocess.run([sys.executable, "-m", "sparsedarts", "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT).stdout
    for command in set(re.findall(r"^sparsedarts ([a-z]+)", README, re.M)): assert re.search(rf"^\s+{command}\s", help_text, re.M), command


def test_local_links_resolve():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links), [link for link in links if not (ROOT / link).exists()]
