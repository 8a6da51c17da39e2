"""Every command under bad values, taken from the parser itself: exit code 1 or 2, one line on standard error, nothing on standard output, nothing made."""
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import nbformat
import pytest
import torch
import typer

from sparsedarts.cli import app, main

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = typer.main.get_command(app).commands
SMALL = ["DARTS_V2", "--channels", "4", "--cells", "3"]
PARAMETERS = 'preset = "smoke"\nseeds = [0]\nrun_dir = ""\nworkers = 1\nlr = 0.1'
BASE = {  # a command that works, in a folder with the files that `place` makes
    "list": ["--root", "clone"], "status": ["--root", "clone"], "report": ["--root", "clone"], "reproduce": ["good", "--no-report", "--root", "clone"],
    "cost": ["resnet", "--depth", "8", "--width", "0.25", "--sparsity", "0.5"], "draw": ["DARTS_V2"],
    "prune": ["resnet", "--depth", "8", "--width", "0.25", "--sparsity", "0.5"], "search": ["darts", "--epochs", "1", "--channels", "2", "--cells", "2"],
    "train": ["resnet", "--depth", "8", "--width", "0.25", "--epochs", "1"], "evaluate": ["resnet", "--depth", "8", "--width", "0.25", "--weights", "w.pt"]}
OTHER_BASE = {("train", name): [*SMALL, "--keep", "0.5", "--phase", "prune"] for name in ("source", "phase", "keep", "size", "protocol", "stem")}
OTHER_BASE |= {(command, "channels"): SMALL[:1] for command in ("cost", "prune", "train")} | {(command, "cells"): SMALL[:1] for command in ("cost", "prune", "train")}
OUTPUTS = {"out": ["file", "file/inside"], "masks": ["folder", "file/inside"], "save_dense": [], ("draw", "out"): ["folder", "file/a.svg", "a.bmp", ""]}

BAD = {int: ["x", "", "1.5", "nan", "-1", "9" * 30], float: ["x", "", "nan", "inf", "-1", "1e300"],
       str: ["no-such-thing", "x" * 5000, "\x1b[31m🙂 \n", "folder", "binary"],
       Path: ["missing", "folder", "binary", "empty", "deep.json", "no\udcffutf8", "x" * 5000, ""]}


def parameters(command):
    "Name, type and option of everything that a command takes."
    hints = typing.get_type_hints(COMMANDS[command].callback)
    for parameter in COMMANDS[command].params:
        if parameter.name in ("help", "as_json"): continue
        kinds = [kind for kind in (typing.get_args(hints[parameter.name]) or (hints[parameter.name],)) if kind is not type(None)]
        if kinds != [bool]: yield parameter.name, kinds[0], parameter.opts[0] if parameter.opts[0].startswith("-") else None


def without(words, option):
    "Words without an option and its value."
    return words if option not in words else words[:words.index(option)] + words[words.index(option) + 2:]


def cases():
    for command in sorted(COMMANDS):
        base = BASE[command]
        yield command, [*base, "--no-such-option"]
        yield command, [*base, "a", "word", "more"] if command not in ("reproduce",) else ["nobody", *base[1:]]
        if any(p.required for p in COMMANDS[command].params): yield command, []
        for name, kind, option in parameters(command):
            values = OUTPUTS.get((command, name), OUTPUTS.get(name, BAD[kind]))
            words = OTHER_BASE.get((command, name), base)
            for value in values:
                if option is None: yield command, [value, *(words[1:] if words[0][0] != "-" else words)]
                elif (name, value) in (("root", ""), ("weights", ""), ("keep", ""), ("width", "1.5")): continue
                else: yield command, [*without(words, option), f"{option}={value}" if option.startswith("--") else option, *([] if option.startswith("--") else [value])]


CASES = list(cases())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with what people put in the wrong place, and a toy clone."
    folder = tmp_path_factory.mktemp("place")
    (folder / "folder").mkdir()
    (folder / "folder/content").write_text("x")
    (folder / "file").write_text("text")
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "clone/nbs/papers").mkdir(parents=True)
    first = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Good\n\n> A toy."), first]), folder / "clone/nbs/papers/good.ipynb")
    import sparsedarts as sd
    torch.save(sd.resnet(8, width=0.25, in_channels=1).state_dict(), folder / "w.pt")
    return folder


def refused(words, place, capsys, monkeypatch, codes=(1, 2)):
    "The one line with which a command is refused."
    monkeypatch.chdir(place)
    before = sorted(str(path) for path in place.rglob("*"))
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code in codes and out == "", (code, out[:300], err[:300])
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1300 and lines[0].isprintable(), lines[:5]
    assert "not foreseen" not in err and "Traceback" not in err, err
    assert sorted(str(path) for path in place.rglob("*")) == before, "a refused command makes nothing"
    return lines[0]


def test_every_command_has_a_case_and_json():
    assert set(BASE) == set(COMMANDS), "give every command a base in this test"
    for command in COMMANDS.values(): assert any("--json" in parameter.opts for parameter in command.params), command.name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_bad_values(command, place, capsys, monkeypatch):
    failures = []
    for words in (words for name, words in CASES if name == command):
        try: refused([command, *words, "--json"], place, capsys, monkeypatch)
        except AssertionError as error: failures.append(f"{command} {' '.join(words)[:150]!r}: {str(error)[:400]}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


@pytest.mark.parametrize("words, message, code", [
    (["train", "resnet", "--depth", 8, "-o", "zz=1"], "unknown train option 'zz'", 2), (["train", *SMALL, "-o", "zz=1"], "unknown retraining option 'zz'", 2),
    (["train", *SMALL, "--keep", 0.5, "-o", "zz=1"], "'zz'", 2), (["search", "random", "-o", "zz=1"], "unknown option of random search 'zz'", 2),
    (["train", "resnet", "-o", "epochs=3", "--epochs", 1], "epochs is given twice, as --epochs 1 and as -o epochs=3", 2),
    (["search", "darts", "-o", "epochs=3", "--epochs", 1], "epochs is given twice, as --epochs 1 and as -o epochs=3", 2),
    (["search", "darts", "-o", "order=first", "--unrolled"], "order is given twice, as --unrolled second and as -o order=first", 2),
    (["search", "darts", "-o", "layers=3", "--cells", 3], "layers is given twice, as --cells 3", 2),
    (["search", "darts", "-o", "lr=0.1", "-o", "lr=0.2"], "lr is given twice, as -o lr=0.1 and as -o lr=0.2", 2),
    (["train", *SMALL, "--keep", 0.5, "-o", "keep=0.1"], "keep has an option of its own: --keep", 2),
    (["train", *SMALL, "--keep", 0.5, "-o", "only=prune"], "only has an option of its own: --phase", 2),
    (["train", *SMALL, "--keep", 0.5, "-o", "batch_size=0"], "batch_size must be", 2), (["search", "darts", "-o", "arch_betas=[]"], "arch_betas are two numbers", 2),
    (["train", "resnet", "-o", "model=3"], "model has an option of its own", 2), (["train", "resnet", "-o", "loss=mse"], "loss is an object of Python", 2),
    (["train", "resnet", "-o", "lr=fast"], "-o lr='fast': Input should be a valid number", 2), (["search", "darts", "-o", "steps=1.5"], "-o steps=1.5", 2),
    (["cost", "resnet", "--width", "1e9"], "less than or equal to 1024, got '1e9'", 2), (["cost", "resnet", "--width", 1000], "GiB, and this machine has", 2),
    (["cost", "DARTS_V2", "--channels", 60000], "GiB, and this machine has", 2), (["search", "darts", "--channels", 60000], "GiB, and this machine has", 2),
    (["train", "DARTS_V2", "--channels", 60000], "GiB, and this machine has", 2), (["train", "DARTS_V2", "--channels", 60000, "--keep", 0.1], "GiB, and", 2),
    (["search", "dars"], "unknown strategy 'dars'; did you mean 'darts' or 'dass'? Known: darts, random", 2), (["search", "gradients"], "unknown strategy 'gradients'", 2),
    (["cost", "DARTS_V3"], "more, listed by `sparsedarts list --cells`", 2), (["list", "good", "--root", "clone", "--cells"], "leave out 'good' or --cells", 2),
    (["cost", "resnet", "--allocation", "erk"], "--allocation shares out what --sparsity leaves", 2),
    (["prune", "resnet", "--sparsity", 0.5, "--masks", "folder"], "--masks folder is a folder", 2), (["train", "resnet", "--out", "file"], "--out file is a file", 2)])
def test_refusals_say_what_to_do(words, message, code, place, capsys, monkeypatch):
    line = refused(words, place, capsys, monkeypatch, (code,))
    assert message in line and line.count("_") < 60, line


TEXTS = {"not json": b"{", "not utf-8": b"\xff\xfe\x00", "empty": b"", "a list": b"[]", "no cell": b"{}", "a number": b'{"genotype": 5}', "null": b"null", "nan": b"NaN",
         "deep": b"[" * 100_000, "wrong edges": b'{"normal": [["sep_conv_3x3"]], "normal_concat": [2], "reduce": [], "reduce_concat": []}', "binary": bytes(range(256))}


@pytest.mark.parametrize("what", TEXTS)
def test_a_bad_file_in_place_of_a_network(what, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.json").write_bytes(TEXTS[what])
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    for words in (["cost"], ["draw"], ["train"], ["prune", "--sparsity", 0.5], ["evaluate", "--weights", "w.pt"]):
        refused([words[0], "bad.json", *words[1:]], tmp_path, capsys, monkeypatch)


ONE = torch.ones(2, 2)
WEIGHTS = {"a list": [1, ONE], "a tensor": ONE, "nothing": {}, "numbers": {"epoch": 3}, "numbers as names": {1: ONE}, "other names": {"a.b": ONE}, "a list inside": {"state_dict": [1]},
           "text inside": {"state_dict": "x"}, "weights of numbers": {"weights": {"a": 1}}, "masks of numbers": {"weights": {"a": ONE}, "masks": {"a": 1}},
           "masks no dictionary": {"weights": {"a": ONE}, "masks": 5}, "about no dictionary": {"weights": {"a": ONE}, "about": [1]}, "complex": {"head.weight": ONE.to(torch.complex64)},
           "whole numbers": {"head.weight": ONE.int()}, "sparse": {"head.weight": ONE.to_sparse()}, "text": "x"}


@pytest.mark.parametrize("what", WEIGHTS)
def test_a_bad_file_in_place_of_weights(what, tmp_path, capsys, monkeypatch):
    torch.save(WEIGHTS[what], tmp_path / "w.pt")
    for words in (["evaluate"], ["prune", "--sparsity", 0.5]):
        refused([*words, "resnet", "--depth", 8, "--weights", "w.pt"], tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("text, message", [("{", "is not readable JSON"), ("[]", "does not say which run"), ("\xff", "is not readable JSON"), ("null", "does not say which run"),
                                           ('{"seed": 7}', "holds a run with other settings")])
def test_damaged_settings_of_a_search(text, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "found").mkdir()
    (tmp_path / "found/search.ckpt").write_text("x")
    (tmp_path / "found/settings.json").write_bytes(text.encode("latin-1"))
    assert message in refused(["search", "darts", "--out", "found"], tmp_path, capsys, monkeypatch)
    assert (tmp_path / "found/settings.json").read_bytes() == text.encode("latin-1")


# ---- in processes of their own -------------------------------------------------------------------------------------------------------

def process(*words, cwd, **more):
    return subprocess.run([sys.executable, "-m", "sparsedarts", *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={k: v for k, v in os.environ.items() if not k.startswith("SPARSEDARTS")} | {"PYTHONPATH": str(ROOT)} | more)


def test_json_stands_alone_beside_progress_and_warnings(tmp_path):
    done = process("train", "resnet", "--depth", 8, "--width", 0.25, "--epochs", 1, "-o", "progress=true", "--json", cwd=tmp_path)
    assert done.returncode == 0 and "test_accuracy" in json.loads(done.stdout)["metrics"], done.stderr
    assert done.stderr and "Traceback" not in done.stderr, "progress was said, elsewhere"


def test_what_a_child_process_prints_is_no_answer(tmp_path):
    code = ("import os, subprocess, sys, warnings\nfrom sparsedarts.reporting.console import Commands, say\nimport typer\nprogram = Commands()\n@program.command()\n"
            "def go():\n    print('progress'); os.write(1, b'low\\n'); subprocess.run(['echo', 'child']); warnings.warn('slow', stacklevel=1); say({'a': 1}, True, '')\nprogram([])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, json.loads(done.stdout)) == (0, {"a": 1}) and done.stderr.split() == ["progress", "low", "child", "warning:", "slow"], done


def test_a_process_ends_as_main_does(tmp_path):
    done = process("cost", "bad.json", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done
    done = process("--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("sparsedarts ") and done.stderr == ""
    assert "Traceback" in process("cost", "nothing", cwd=tmp_path, SPARSEDARTS_DEBUG="1").stderr
