"""The driver under bad notebooks, bad parameters, failures, time limits, two drivers at once, Ctrl-C and kill -9."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from sparsedarts.core import ParameterError, RunError, UnknownName
from sparsedarts.reporting.kernels import locked
from sparsedarts.reporting.runs import find_runs, make_plan, reproduce

HEAD = 'preset = "smoke"\nseeds = [0, 1, 2]  # random seeds\nrun_dir = ""\nworkers = 1\npause = 0.0  # seconds that a trial takes\ndivisor = 1'
TRIALS = """import os, time, torch
from sparsedarts.reporting.trials import Trials

def trial(method, seed, checkpoint):
    open(os.path.join(os.path.dirname(checkpoint), "started.log"), "a").write(f"{method} {seed} {os.getpid()}\\n")
    time.sleep(pause)
    return dict(accuracy=60 + 2 * (method == "union") + float(torch.rand(1)) / 10 + 1 // divisor - 1)

trials = Trials(run_dir)
results = trials.map(trial, [dict(method=m, seed=s) for m in ("ramp", "union") for s in seeds], workers=workers)"""
CLAIMS = """from sparsedarts.files import write_results
from sparsedarts.reporting.claims import Claim, PairedDifference, verdicts
judged = verdicts([Claim("c", "union is better", rule=PairedDifference("union", "ramp"))], trials.table())
write_results(run_dir, paper="toy", parameters=dict(seeds=seeds), metrics=dict(mean=float(trials.table().accuracy.mean())), claims=judged, seconds=trials.seconds)
judged"""


def write_notebook(root, name, *cells, tags=1):
    made = [nbformat.v4.new_markdown_cell(f"# Toy {name}\n\n> A toy.")] + [nbformat.v4.new_code_cell(c) for c in (HEAD, *cells)]
    for cell in made[1:1 + tags]: cell.metadata["tags"] = ["parameters"]
    (root / "nbs/papers").mkdir(parents=True, exist_ok=True)
    (root / "settings.ini").touch()
    nbformat.write(nbformat.v4.new_notebook(cells=made), root / f"nbs/papers/{name}.ipynb")


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError): return False


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition(): return True
        time.sleep(0.05)
    return False


def children(pid):
    "All descendants of a process."
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try: parents.setdefault(int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]), []).append(int(entry.name))
        except (OSError, ProcessLookupError): continue
    found, queue = [], [pid]
    while queue:
        for child in parents.get(queue.pop(), []): found.append(child), queue.append(child)
    return found


def cmdline(pid):
    try: return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError: return []


def start_driver(root, *words, workers="2"):
    return subprocess.Popen([sys.executable, "-m", "sparsedarts", "reproduce", *words, "--workers", workers, "--root", str(root), "--no-report"],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background job has it ignored


def started(root): return [line.rsplit(" ", 1)[0] for log in root.glob("reports/runs/*/trials/started.log") for line in log.read_text().splitlines()]
def finished_trials(root): return sorted(p.name for p in root.glob("reports/runs/*/trials/*.json"))


def what_counts(root):
    "Parameters, metrics and claims of the only run."
    [path] = root.glob("reports/runs/*/results.json")
    record = json.loads(path.read_text())
    return {k: record[k] for k in ("parameters", "metrics", "claims")}


def quiet(line): pass


@pytest.mark.parametrize("tags, count", [(0, "has 0 cells"), (2, "has 2 cells")])
def test_a_notebook_without_exactly_one_parameters_cell_is_refused(tmp_path, tags, count):
    write_notebook(tmp_path, "toy", "divisor = 2", tags=tags)
    with pytest.raises(RunError, match=f"toy.ipynb {count} tagged 'parameters' and must have exactly one"): reproduce("toy", root=tmp_path, echo=quiet)
    assert not (tmp_path / "reports").exists(), "nothing is written for a refused run"


@pytest.mark.parametrize("given, kind, message", [
    (dict(divsor=2), UnknownName, "unknown parameter of toy 'divsor'; did you mean 'divisor'"), (dict(divisor="2"), ParameterError, "divisor must be a whole number like 1, got '2'"),
    (dict(seeds=3), ParameterError, "seeds must be a list"), (dict(divisor=True), ParameterError, "got True"), (dict(preset="large"), UnknownName, "unknown preset of toy 'large'")])
def test_wrong_parameters_are_refused_before_anything_starts(tmp_path, given, kind, message):
    write_notebook(tmp_path, "toy", "1")
    with pytest.raises(kind, match=message): reproduce("toy", root=tmp_path, echo=quiet, **given)
    assert not (tmp_path / "reports").exists()


def test_runs_caching_failure_and_repair(tmp_path):
    "A finished run is found again, a failed one is kept and reported without stopping the other, and a repaired one runs."
    write_notebook(tmp_path, "toy", TRIALS, CLAIMS)
    write_notebook(tmp_path, "other", CLAIMS)
    lines = []
    other, toy = reproduce(root=tmp_path, echo=lines.append, jobs=2, workers=1)
    assert (other.status, toy.status) == ("failed", "done") and "NameError: name 'trials' is not defined" in other.error
    assert (other.folder / "failed.ipynb").exists() and not list(tmp_path.rglob("*.part*"))
    assert any(line.startswith("[1/2] other smoke") and "FAILED" in line for line in lines) and any("claims 1 holds" in line for line in lines)
    before = (toy.folder / "run.json").read_text()
    [again] = reproduce("toy", root=tmp_path, echo=lines.append, workers=2)
    assert not again.fresh and (toy.folder / "run.json").read_text() == before and len(started(tmp_path)) == 6
    claims = again.results()["claims"]
    [forced] = reproduce("toy", root=tmp_path, echo=quiet, force=True, workers=1)
    assert forced.fresh and forced.folder == toy.folder and forced.results()["claims"] == claims
    assert len(started(tmp_path)) == 6, "forced: all trials again, in a new log"


def test_kill_9_and_rerun(tmp_path):
    "After SIGKILL: kernel and workers are gone, finished trials are not repeated, and the result is that of an undisturbed run."
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for root in (calm, rough): write_notebook(root, "toy", TRIALS, CLAIMS)
    [undisturbed] = reproduce("toy", root=calm, echo=quiet, workers=1)
    assert undisturbed.status == "done", undisturbed.error
    kept = []
    for goal in (0, 3):
        driver = start_driver(rough, "toy", "-p", "pause=0.6")
        assert wait_for(lambda: len(started(rough)) > 0 and len(finished_trials(rough)) >= goal), driver.stdout.read() if driver.poll() is not None else "no progress"
        family = children(driver.pid)
        assert len(family) >= 3, "kernel and two workers"
        sockets = {Path(word).parent for pid in family for word in cmdline(pid) if word.endswith("/k.json")}
        assert len(sockets) == 1 and next(iter(sockets)).is_dir()
        driver.kill(), driver.wait(), driver.stdout.close()
        assert find_runs(rough)[0].status in ("stopped", "done")
        assert wait_for(lambda: not next(iter(sockets)).exists(), 5), "its sockets are removed"
        assert wait_for(lambda: not any(alive(pid) for pid in family), 5), f"processes survive their killed driver: {[p for p in family if alive(p)]}"
        kept = finished_trials(rough)  # a worker may finish its trial before it notices
    driver = start_driver(rough, "toy", "-p", "pause=0.6")
    output = driver.communicate(timeout=60)[0]
    assert driver.returncode == 0, output
    assert what_counts(rough) == what_counts(calm)
    assert set(kept) <= set(finished_trials(rough))
    assert len(kept) == 6 or f"{len(kept)} of 6 trials are there already" in next(rough.glob("reports/runs/*/notebook.ipynb")).read_text()
    log = started(rough)
    assert all(log.count(name) >= 1 for name in ("ramp 0", "union 2")) and len(log) <= 6 + 2 * 2, f"at most the two that ran at each of two kills are repeated: {log}"


def test_ctrl_c_stops_everything_and_the_same_command_continues(tmp_path):
    write_notebook(tmp_path, "toy", TRIALS, CLAIMS)
    driver = start_driver(tmp_path, "toy", "-p", "pause=3")
    assert wait_for(lambda: len(finished_trials(tmp_path)) >= 1)
    family = children(driver.pid)
    driver.send_signal(signal.SIGINT)
    output = driver.communicate(timeout=30)[0]
    assert driver.returncode == 130 and "interrupted; the same command continues" in output and "Traceback" not in output, output
    assert wait_for(lambda: not any(alive(pid) for pid in family), 5)
    [run] = find_runs(tmp_path)
    assert run.status == "stopped" and not (run.folder / "failed.ipynb").exists()


def test_two_drivers_do_not_collide(tmp_path):
    write_notebook(tmp_path, "toy", TRIALS, CLAIMS)
    folder = make_plan("toy", "smoke", {}, 1, tmp_path).run.folder
    folder.mkdir(parents=True)
    with locked(folder / ".lock", "held by this test"):
        [run] = reproduce("toy", root=tmp_path, echo=quiet)
    assert run.status == "failed" and f"is being worked on by another process (pid {os.getpid()})" in run.error
    assert [p.name for p in folder.iterdir()] == [".lock"], "the other's folder is not touched"


def test_a_full_disk_is_a_failed_run_and_leaves_no_half_files(tmp_path):
    "Folders that cannot be written stand for the full disk; the real one, a small tmpfs, is tested where mounting is allowed."
    write_notebook(tmp_path, "toy", TRIALS, CLAIMS)
    (tmp_path / "reports").write_text("a file where the folder should be")
    [run] = reproduce("toy", root=tmp_path, echo=quiet)
    assert run.status == "failed" and "NotADirectoryError" in run.error


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_tmpfs(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("no tmpfs can be mounted here")
    try:
        write_notebook(disk, "toy", TRIALS, CLAIMS)
        (disk / "filler").write_bytes(b"x" * 40_000)
        [run] = reproduce("toy", root=disk, echo=quiet, seeds=(0,))
        assert run.status == "failed" and "No space left on device" in run.error
        assert not list(disk.rglob(".*.part")) and not list(disk.rglob("results.json")) and not list(disk.rglob("notebook.ipynb"))
        (disk / "filler").unlink()
    finally: subprocess.run(["umount", disk], check=True)
