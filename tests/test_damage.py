"""Files that a disk, a kill or a hand has changed: noticed, named, and never in the way of the others."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparsedarts as sd
from sparsedarts import files
from sparsedarts.core import CheckpointError, DataError, StorageError

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "reports" / "samples" / "darts_on_digits-laptop"


# runs: one bad run is one bad card

@pytest.fixture
def clone(tmp_path):
    "A clone with one good run, and room for a bad one beside it."
    for name in ("settings.ini",): shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "nbs" / "papers").mkdir(parents=True)
    for name in ("good", "bad"): shutil.copytree(SAMPLE, tmp_path / "reports" / "runs" / f"darts_on_digits-{name}")
    return tmp_path


def command(*words):
    from typer.testing import CliRunner
    from sparsedarts.cli import app
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0 and (done.exception is None or isinstance(done.exception, SystemExit)), (done.output, done.exception)
    return done.stdout


RESULTS, RUN = json.loads((SAMPLE / "results.json").read_text()), json.loads((SAMPLE / "run.json").read_text())
for one in (RESULTS, RUN): one.pop("checksum", None)
CLAIM = RESULTS["claims"][0]
WRONG = {
    "a list": ("run.json", []), "null": ("run.json", None), "a text": ("run.json", "done"), "nothing": ("run.json", {}),
    "another status": ("run.json", RUN | {"status": "good"}), "text seconds": ("run.json", RUN | {"seconds": "7.6"}),
    "a number for a paper": ("run.json", RUN | {"paper": 5}), "parameters in a list": ("run.json", RUN | {"parameters": ["seeds"]}),
    "one seed": ("run.json", RUN | {"parameters": {"seeds": 3}}), "null started": ("run.json", RUN | {"started": None}),
    "null claims": ("results.json", RESULTS | {"claims": None}), "claims that are texts": ("results.json", RESULTS | {"claims": ["holds"]}),
    "an unknown verdict": ("results.json", RESULTS | {"claims": [CLAIM | {"verdict": "perhaps"}]}),
    "a claim without a text": ("results.json", RESULTS | {"claims": [CLAIM | {"ours": {"mean": 1.0}}]}),
    "a control of null": ("results.json", RESULTS | {"claims": [CLAIM | {"controls": [None]}]}),
    "text seconds of results": ("results.json", RESULTS | {"seconds": "12"}), "a figure that is a number": ("results.json", RESULTS | {"figures": [5]}),
    "a figure elsewhere": ("results.json", RESULTS | {"figures": ["../../x.png"]}), "an absolute figure": ("results.json", RESULTS | {"figures": ["/etc/x.png"]}),
    "metrics in a list": ("results.json", RESULTS | {"metrics": [1]}), "packages in a list": ("results.json", RESULTS | {"environment": {"packages": ["torch"]}}),
    "a commit that is a number": ("results.json", RESULTS | {"environment": {"git": 5}}), "text results": ("results.json", "[]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_one_bad_run_is_one_bad_card(clone, kind):
    name, value = WRONG[kind]
    (clone / "reports" / "runs" / "darts_on_digits-bad" / name).write_text(json.dumps(value))
    rows = json.loads(command("status", "--json", "--root", clone))
    states = {row["folder"].rsplit("/", 1)[-1]: (row["status"], row["error"]) for row in rows}
    assert states["darts_on_digits-good"] == ("done", "") and states["darts_on_digits-bad"][0] == "damaged"
    assert f"darts_on_digits-bad/{name}" in states["darts_on_digits-bad"][1] or "is not a file inside" in states["darts_on_digits-bad"][1]
    command("list", "--root", clone)
    command("report", "--root", clone)
    index = (clone / "reports" / "index.html").read_text()
    assert "1 finished, 1 damaged" in index and "are damaged" in index


def test_files_that_are_no_json_are_bad_cards_too(clone):
    bad = clone / "reports" / "runs" / "darts_on_digits-bad"
    for content in (b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"seconds": 1e999}', bytes(4096)):
        for name in ("run.json", "results.json"):
            for other in ("run.json", "results.json"): shutil.copy(SAMPLE / other, bad / other)
            (bad / name).write_bytes(content)
            states = {row["folder"].rsplit("-", 1)[-1]: row["status"] for row in json.loads(command("status", "--json", "--root", clone))}
            assert states == {"good": "done", "bad": "damaged"}, (content[:20], name)


def test_a_damaged_progress_or_picture_is_no_obstacle(clone):
    bad = clone / "reports" / "runs" / "darts_on_digits-bad"
    (bad / "run.json").write_text(json.dumps(RUN | {"status": "running"}))
    for content in ("[]", '{"done": 3}', '{"done": "3", "total": null, "doing": 5}'):
        (bad / "progress.json").write_text(content)
        assert "stopped" in command("status", "--root", clone)
    for picture in (SAMPLE / "figure.png").read_bytes()[:3000], b"no picture":
        (bad / "figure.png").write_bytes(picture)
        command("report", "--root", clone)


# samples: the old one or the new one

def sample_files(clone): return {path.name: path.read_bytes() for path in (clone / "reports" / "samples" / "darts_on_digits-laptop").iterdir()}


def keep(clone):
    from sparsedarts.reporting.pages import keep_sample
    return keep_sample(clone / "reports" / "runs" / "darts_on_digits-good", clone)


def changed_run(clone):
    "The good run with another number, so that its sample differs from the one before."
    run = clone / "reports" / "runs" / "darts_on_digits-good"
    files.write_json(run / "results.json", RESULTS | {"seconds": RESULTS["seconds"] + 1})
    return run


@pytest.mark.parametrize("kind", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_the_old_sample(clone, monkeypatch, kind):
    keep(clone)
    before, real = sample_files(clone), getattr(os, kind)
    changed_run(clone)
    for allowed in range(5):
        left = [allowed]
        def full(*args, **options):
            left[0] -= 1
            if left[0] < 0: raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)
        with monkeypatch.context() as patch:
            patch.setattr(os, kind, full)
            try: keep(clone)
            except StorageError as error: assert "No space left" in str(error)
            else: break
        assert sample_files(clone) == before and os.listdir(clone / "reports" / "samples") == ["darts_on_digits-laptop"]


KILLED = """
import os, signal, sys
from pathlib import Path
import os, shutil
real, left = {module}.{name}, [int(sys.argv[2])]
def mortal(*args, **options):
    left[0] -= 1
    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
from sparsedarts.reporting.pages import keep_sample
import sparsedarts.files as files, shutil, ctypes
{module}.{name} = mortal
{more}
keep_sample(Path(sys.argv[1]) / "reports/runs/darts_on_digits-good", sys.argv[1])
"""


@pytest.mark.parametrize("module, name, count, more", [("os", "replace", 1, ""), ("os", "replace", 3, ""), ("shutil", "rmtree", 0, ""),
                                                       ("os", "rename", 1, "files._exchange = lambda one, two: False")])
def test_a_kill_leaves_the_old_sample_or_the_new(clone, module, name, count, more):
    keep(clone)
    before, run = sample_files(clone), changed_run(clone)
    code = KILLED.format(module=module, name=name, more=more)
    done = subprocess.run([sys.executable, "-c", code, str(clone), str(count)], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    files.clear_abandoned(clone / "reports" / "samples")
    after = sample_files(clone)
    assert after == before or (after["results.json"] == (run / "results.json").read_bytes() and set(after) == set(before))
    assert os.listdir(clone / "reports" / "samples") == ["darts_on_digits-laptop"], "what the dead process left is gone"
    keep(clone)
    assert sample_files(clone)["results.json"] == (run / "results.json").read_bytes()
