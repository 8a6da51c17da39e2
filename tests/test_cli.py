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
for words in ([], ["list"], ["reproduce"], ["status"], ["report"], ["cost"], ["train"], ["evaluate"]):
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


# ---- train and evaluate, in this process: the library is loaded once ------------------------------------------------------------------

PHASES = ["-o", "pretrain_epochs=1", "-o", "prune_epochs=1", "-o", "finetune_epochs=1", "-o", "progress=false"]
COUNTS = ("params", "weights", "kept_weights", "norms", "macs", "kept_macs")
NB201 = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"


def here(*words):
    "Exit code, answer, errors of a command in this process; the answer is read where it is JSON."
    from typer.testing import CliRunner
    from sparsedarts.cli import app
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, json.loads(done.stdout) if "--json" in words and not done.exit_code else done.stdout, done.stderr


def refused(words, message, code=2):
    found = here(*words)
    assert found[0] == code and message in found[2] and len(found[2].splitlines()) == 1, found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A small cell network after its three phases: the folder and the record."
    folder = tmp_path_factory.mktemp("trained")
    words = ["train", "DARTS_V2", "--channels", 4, "--cells", 3, "--keep", 0.1, *PHASES, "--save-dense", folder / "dense.pt", "--out", folder]
    code, record, errors = here(*words, "--json")
    assert code == 0, errors
    return folder, record


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Images of 32 pixels, which carry an auxiliary head: 2 classes, 16 for training, 6 for testing."
    import numpy as np
    from PIL import Image
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for kind in ("a", "b"):
            (folder / part / kind).mkdir(parents=True)
            for i in range(count): Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / part / kind / f"{i}.png")
    return f"imagefolder:{folder}"


@pytest.mark.parametrize("words, message", [
    (["train", "DARTS_V2", "--protocol", "laptop", "--keep", 0.1], "--protocol laptop is for a cell trained dense"),
    (["train", "DARTS_V2", "--protocol", "darts-cifar", "--phase", "pretrain"], "leave out --protocol, or --keep and --phase"),
    (["train", "resnet", "--protocol", "laptop"], "--protocol: for networks of cells"),
    (["train", "vgg", "--stem", "imagenet"], "--stem: for networks of cells"), (["cost", "vgg", "--stem", "imagenet"], "vgg has no --stem"),
    (["train", NB201, "--stem", "imagenet"], "a NAS-Bench-201 network has one stem; leave out --stem imagenet"),
    (["cost", NB201, "--stem", "cifar"], "a NAS-Bench-201 network has one stem"),
    (["train", "DARTS_V2", "--stem", "imagnet"], "unknown stem 'imagnet'; did you mean 'imagenet'"),
    (["train", "DARTS_V2", "--stem", "cifar", "-o", "stem=cifar"], "stem is given twice, as --stem cifar and as -o stem=cifar"),
    (["train", "DARTS_V2", "--stem", "imagenet", "--keep", 0.1, "--channels", 3], "channels must be even, got 3")])
def test_train_and_cost_refuse_what_does_not_belong(words, message, tmp_path):
    refused([*words, *(["--out", tmp_path] if words[0] == "train" else [])], message)


def test_an_imagenet_stem_has_an_option():
    words = ["cost", "DARTS_V2", "--channels", 4, "--cells", 3, "--shape", "3,64,64", "--json"]
    plain, large = here(*words)[1], here(*words, "--stem", "imagenet")[1]
    assert large["macs"] < plain["macs"] and {"stem0.0", "stem1.1"} <= {row["layer"] for row in large["layers"]}


def test_a_dense_training_takes_the_stem(tmp_path, pictures):
    words = ["DARTS_V2", "--data", pictures, "--channels", 8, "--cells", 3, "--stem", "imagenet"]
    code, record, errors = here("train", *words, "--epochs", 1, "-o", "batch_size=8", "-o", "progress=false", "--out", tmp_path, "--json")
    assert code == 0, errors
    answer = here("evaluate", *words, "--weights", tmp_path / "weights.safetensors", "--json")[1]
    assert answer["loss"] == record["metrics"]["test_loss"] and answer["kept_weights"] == answer["weights"]
    refused(["evaluate", *words[:-2], "--weights", tmp_path / "weights.safetensors"], "does not fit this network", 1)


@pytest.mark.parametrize("name, stage", [("phases/finetuned.pt", "finetune"), ("dense.pt", ""), ("phases/pruned.pt", "prune")])
def test_evaluate_finds_what_the_training_said(trained, name, stage):
    folder, record = trained
    code, answer, errors = here("evaluate", "DARTS_V2", "--channels", 4, "--cells", 3, "--weights", folder / name, "--json")
    assert code == 0 and answer["stage"] == stage and answer["images"] == 897, errors
    said = record["phases"][stage or "finetune"]
    assert (answer["accuracy"], answer["loss"]) == (said["test_accuracy"], said["test_loss"])
    assert {n: answer[n] for n in COUNTS} == {n: record[n] for n in COUNTS} and answer["kept_weights"] < answer["weights"] / 8


def test_evaluate_says_it_in_words(trained):
    folder, record = trained
    words = ["evaluate", "DARTS_V2", "--channels", 4, "--cells", 3, "--weights", folder / "phases/pretrained.pt"]
    text = here(*words, "--split", "valid", "--timed")[1]
    assert "% of 450 valid images" in text and f"{record['weights']:,} of {record['weights']:,} weights kept" in text
    assert "evaluation mode, batch 1 of 1x8x8" in text
    assert here(*words, "--json")[1]["loss"] == record["phases"]["pretrain"]["test_loss"]


def test_the_auxiliary_head_is_counted_apart(tmp_path, pictures):
    words = ["DARTS_V2", "--data", pictures, "--channels", 4, "--cells", 3]
    own = ["--keep", 0.1, *PHASES, "-o", "batch_size=8", "--save-dense", tmp_path / "dense.pt", "--out", tmp_path]
    code, record, errors = here("train", *words, *own, "--json")
    assert code == 0 and "kept" not in record and record["auxiliary_kept"] > 20 * record["kept_weights"], errors
    for name in ("dense.pt", "phases/finetuned.pt"):
        answer = here("evaluate", *words, "--weights", tmp_path / name, "--json")[1]
        assert answer["loss"] == record["phases"]["finetune"]["test_loss"] and answer["images"] == 6
        assert {n: answer[n] for n in COUNTS} == {n: record[n] for n in COUNTS}


def test_evaluate_counts_the_zeros_of_a_plain_state_dictionary(tmp_path):
    import torch
    import sparsedarts as sd
    net = sd.resnet(8, width=0.25, in_channels=1)
    state = net.state_dict()
    state["stem.conv.weight"][0] = 0
    torch.save(state, tmp_path / "w.pt")
    answer = here("evaluate", "resnet", "--depth", 8, "--width", 0.25, "--weights", tmp_path / "w.pt", "--json")[1]
    assert answer["kept_weights"] == answer["weights"] - 9 and answer["params"] == sum(p.numel() for p in net.parameters())


def test_evaluate_refuses_on_one_line(trained, tmp_path):
    import torch
    folder, _ = trained
    (tmp_path / "cut.pt").write_bytes((folder / "phases/finetuned.pt").read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(dict(epoch=3), tmp_path / "note.pt")
    fits, stage = ["evaluate", "DARTS_V2", "--channels", 4, "--cells", 3, "--weights"], folder / "phases/finetuned.pt"
    for name in ("cut.pt", "list.pt"): refused([*fits, tmp_path / name], f"{name} is no state dictionary of tensors", 1)
    refused([*fits, tmp_path / "note.pt"], "note.pt holds epoch, not only weights", 1)
    refused([*fits, folder / "phases/finetune.pt"], "not only weights", 1)  # a checkpoint of the training, not the network it leaves
    refused([*fits, tmp_path / "none.pt"], "no file", 1)
    refused([*fits, stage, "--split", "tests"], "unknown split 'tests'; did you mean 'test'")
    refused(["evaluate", "DARTS_V2", "--size", "tiny", "--weights", stage], "size is 4x3, here 30x16", 1)
    refused(["evaluate", "DARTS_V1", *fits[2:], stage], "finetuned.pt belongs to another network: genotype is", 1)
    refused(["evaluate", "resnet", "--weights", stage], "belongs to another network", 1)
    refused(["evaluate", "DARTS_V2", "--channels", 8, "--cells", 3, "--weights", folder / "dense.pt"], "dense.pt does not fit this network", 1)
    refused([*fits, stage, "--size", "tiny"], "--size says channels and cells together")
    refused(["evaluate", "resnet", "--size", "tiny", "--weights", stage], "--size: for networks of cells; resnet has --depth and --width")
