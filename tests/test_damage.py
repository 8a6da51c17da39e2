"""Files that a disk, a kill or a hand has changed: noticed, named, and never in the way of the others."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


def killed(action, module, name, count):
    "Do something in a child process that kills itself instead of its next call of a function, after `count` of them."
    child = os.fork()
    if not child:
        try:
            real, left = getattr(module, name), [count]
            def mortal(*args, **options):
                left[0] -= 1
                if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)
            setattr(module, name, mortal)
            action()
        finally: os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("module, name, count, swap", [(os, "replace", 1, True), (os, "replace", 3, True), (shutil, "rmtree", 0, True), (os, "rename", 1, False)])
def test_a_kill_leaves_the_old_sample_or_the_new(clone, monkeypatch, module, name, count, swap):
    keep(clone)
    before, run = sample_files(clone), changed_run(clone)
    if not swap: monkeypatch.setattr(files, "_exchange", lambda one, two: False)
    killed(lambda: keep(clone), module, name, count)
    files.clear_abandoned(clone / "reports" / "samples")
    after = sample_files(clone)
    assert after == before or (after["results.json"] == (run / "results.json").read_bytes() and set(after) == set(before))
    assert os.listdir(clone / "reports" / "samples") == ["darts_on_digits-laptop"], "what the dead process left is gone"
    keep(clone)
    assert sample_files(clone)["results.json"] == (run / "results.json").read_bytes()


SEARCH = """
import os, signal, sys
real, count = os.replace, [0]
def mortal(source, target):
    if str(target).endswith(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
    return real(source, target)
os.replace = mortal
from sparsedarts.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("file", ["cell.svg"])
def test_a_killed_search_writes_the_same_files_when_it_goes_on(tmp_path, file):
    def words(out): return ["search", "random", "--channels", "2", "--cells", "3", "-o", "steps=1", "-o", "candidates=1", "--out", str(tmp_path / out)]
    done = subprocess.run([sys.executable, "-c", SEARCH, file, *words("killed")], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / file).exists()
    for out in ("killed", "calm"): command(*words(out))
    for name in ("cell.svg", "genotype.json"): assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(path.name for path in (tmp_path / "calm").iterdir())


# two processes at one file

def test_two_processes_with_one_checkpoint_both_live(tmp_path, monkeypatch):
    from sparsedarts.training.checkpoints import Checkpoint
    path, real = tmp_path / "run.pt", os.fsync
    def other(handle):
        "While the first process writes, a second one begins with the same file, reads it and writes it."
        monkeypatch.setattr(os, "fsync", real)
        child = os.fork()
        if not child:
            try:
                second = Checkpoint(path, dict(lr=0.1))
                assert second.load()["step"] == 1
                second.save(dict(step=3))
                os._exit(0)
            finally: os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        return real(handle)
    first = Checkpoint(path, dict(lr=0.1))
    first.save(dict(step=1))
    monkeypatch.setattr(os, "fsync", other)
    first.save(dict(step=2))
    assert first.load()["step"] == 2 and os.listdir(tmp_path) == ["run.pt"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    from sparsedarts.training.checkpoints import Checkpoint
    checkpoint = Checkpoint(tmp_path / "run.pt", {})
    checkpoint.save(dict(step=1))
    killed(lambda: checkpoint.save(dict(step=2)), os, "replace", 0)
    assert len(os.listdir(tmp_path)) == 2
    assert checkpoint.load()["step"] == 1 and os.listdir(tmp_path) == ["run.pt"]


# damage anywhere in a file: an error that names it, or the same content

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict): return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def written(folder):
    "One file of every kind, with what reads it."
    from sparsedarts.sparse.packed import load_packed, save_packed
    torch.manual_seed(0)
    state = dict(step=7, name="run", weights={f"layer{i}": torch.randn(40, 9) for i in range(4)}, rows=[dict(loss=0.5)])
    net = sd.sparsify(torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3), torch.nn.Linear(6, 4)), mode="hard")
    sd.prune(net, 0.5)
    torch.save(state, folder / "earlier.pt")
    results = files.write_results(folder, paper="toy", parameters=dict(seeds=[0, 1]), metrics=dict(accuracy=97.25), trials=[dict(seed=0, loss=1e-5)])
    def packed(path): return (found := load_packed(path)).state, dict(found.masks), found.modes
    return [(files.save_checkpoint(folder / "run.pt", state), files.load_checkpoint), (folder / "earlier.pt", files.load_checkpoint),
            (files.save_tensors(folder / "w.safetensors", state["weights"], {"note": "ours"}), files.load_tensors),
            (sd.masks_of(net).save(folder / "masks.safetensors"), lambda path: dict(sd.Masks.load(path))),
            (save_packed(net, folder / "packed.safetensors"), packed), (results, files.read_results),
            (files.write_json(folder / "run.json", dict(paper="toy", seconds=7.25)), files.read_json)]


class Kinds(list):
    def __repr__(self): return "the files"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return Kinds((path, read, path.read_bytes(), read(path)) for path, read in written(tmp_path_factory.mktemp("kinds")))


KINDS = ["checkpoint", "checkpoint of torch.save", "tensors", "masks", "packed", "results", "json"]


@pytest.mark.parametrize("kind", range(7), ids=KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), damage=st.sampled_from(["bit", "byte", "zeros", "cut", "append", "insert", "swap"]), amount=st.integers(0, 2**16))
def test_damage_is_noticed_or_harmless(kinds, kind, place, damage, amount):
    path, read, whole, content = kinds[kind]
    at = int(place * len(whole))
    changed = {"bit": whole[:at] + bytes([whole[at] ^ (1 << amount % 8)]) + whole[at + 1:], "byte": whole[:at] + bytes([amount % 256]) + whole[at + 1:],
               "zeros": (whole[:at] + bytes(amount % 4096) + whole[at + amount % 4096:])[:max(len(whole), at)], "cut": whole[:at],
               "append": whole + bytes([amount % 256]) * (1 + amount % 9), "insert": whole[:at] + b"\n" + whole[at:],
               "swap": whole[:at] + whole[at:at + 64][::-1] + whole[at + 64:]}[damage]
    path.write_bytes(changed)
    try: found = read(path)
    except (CheckpointError, DataError) as error: assert path.name in str(error)
    else:
        if path.suffix == ".json": found = {key: found[key] for key in content}  # a checksum whose own name is damaged is one more entry
        assert same(found, content), (damage, at, amount)
    finally: path.write_bytes(whole)


def test_the_zeroed_block_of_the_report(tmp_path):
    "4,096 bytes in the middle, in a file of PyTorch's and in one of ours: PyTorch reads both without a word."
    state = dict(weight=torch.ones(200, 200))
    for name in ("ours.pt", "theirs.pt"):
        path = tmp_path / name
        files.save_checkpoint(path, state) if name == "ours.pt" else torch.save(state, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:80_000] + bytes(4096) + whole[84_096:])
        assert torch.load(path, weights_only=True)["weight"].sum() < 40_000
        with pytest.raises(CheckpointError, match=f"{name} is not a complete checkpoint"): files.load_checkpoint(path)


def test_files_that_changed_places_are_not_taken_for_each_other(tmp_path):
    from sparsedarts.reporting.trials import Trials
    def trial(seed): return dict(value=seed)
    settings, said = [dict(seed=seed) for seed in range(3)], []
    Trials(tmp_path, echo=said.append).map(trial, settings, workers=1)
    one, two, _ = sorted((tmp_path / "trials").glob("*.json"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes()), two.write_bytes(content)
    assert Trials(tmp_path, echo=said.append).map(trial, settings, workers=1) == [dict(value=seed) for seed in range(3)]
    assert sum("holds another trial" in line for line in said) == 2


def test_the_parts_of_a_checkpoint_are_checked(tmp_path):
    data, options = sd.load_data("digits", classes=4), dict(steps=2, checkpoint=tmp_path / "run.pt", progress=False, device="cpu")
    def net(): return sd.resnet(8, width=0.25, in_channels=1, classes=4)
    sd.train(net(), data, **options)
    state = files.load_checkpoint(tmp_path / "run.pt")
    for name, value in dict(step="2", history={}, metrics=[1], seconds="1", masks=[], parts=None, rng=5).items():
        files.save_checkpoint(tmp_path / "run.pt", state | {name: value})
        with pytest.raises(CheckpointError, match=f"run.pt has not the expected content, at '{name}'"): sd.train(net(), data, **options)
    for changed in (dict(rng={}), dict(rng=dict(python=[3, [1], None])), dict(masks={"x": {}}), dict(parts={}), dict(parts=state["parts"] | {"batches": {}})):
        files.save_checkpoint(tmp_path / "run.pt", state | changed)
        with pytest.raises(CheckpointError, match="run.pt does not fit this run's"): sd.train(net(), data, **options)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[laptop", b"lr = 1", b"a = " + b"[" * 100_000])
def test_damaged_presets_are_named_and_do_not_stop_the_list(clone, content):
    from sparsedarts.reporting.notebooks import read_presets
    (clone / "reports" / "sweeps").mkdir()
    (clone / "reports" / "sweeps" / "dass.toml").write_bytes(content)
    shutil.copy(ROOT / "nbs" / "papers" / "dass.ipynb", clone / "nbs" / "papers")
    with pytest.raises(DataError, match="dass.toml"): read_presets(clone / "reports" / "sweeps" / "dass.toml")
    assert "dass cannot be run: " in command("list", "--root", clone)


@pytest.mark.parametrize("content", ["[]", "{", '{"configuration": []}', '{"configuration": {"recipe": 5}, "done": []}', '{"configuration": {}, "done": 3}'])
def test_a_damaged_record_of_a_recipe_is_named(tmp_path, content):
    from sparsedarts.training.recipes import hydra
    (tmp_path / "recipe.json").write_text(content)
    net = sd.resnet(8, width=0.25, in_channels=1, classes=4)
    with pytest.raises((CheckpointError, DataError), match="recipe.json"):
        hydra(net, sd.load_data("digits", classes=4), keep=0.5, checkpoint=tmp_path, progress=False)


def test_a_stage_of_another_shape_is_refused(tmp_path):
    from sparsedarts.strategy.found import load_stage, save_stage
    net = sd.derive("DARTS_V2", 2, 3, in_channels=1)
    save_stage(tmp_path / "stage.pt", net, "pretrain", {})
    state = files.load_checkpoint(tmp_path / "stage.pt")
    for name, value in dict(about=[], weights=None, masks=5, stage=3).items():
        files.save_checkpoint(tmp_path / "stage.pt", state | {name: value})
        with pytest.raises(CheckpointError, match=f"stage.pt has not the expected content, at '{name}'"): load_stage(tmp_path / "stage.pt", net, "prune", {})
    name, weight = next((name, p) for name, p in net.named_parameters() if p.dim() == 4)
    files.save_checkpoint(tmp_path / "stage.pt", state | {"masks": {name: torch.full_like(weight, 0.5)}})
    with pytest.raises(CheckpointError, match="stage.pt does not fit this run's masks"): load_stage(tmp_path / "stage.pt", net, "prune", {})
