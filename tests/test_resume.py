"""A training killed with SIGKILL at any moment and started again ends with the same bits as one that was left alone."""
import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparsedarts as sd
from sparsedarts.files import load_checkpoint
from sparsedarts.sparse.layers import masked_layers

STEPS = 45  # of 7 to an epoch, so the last epoch is incomplete
MASKED = dict(sparsity="0.9", every=4, end=0.8, exclude="head")
VARIANTS = {
    "dense": dict(clip=1.0, label_smoothing=0.1, evaluate_every=2),
    "adamw": dict(optimizer="adamw", lr=0.01, decay_all=False, precision="bf16", schedule="linear"),
    "soft union": dict(pruner=functools.partial(sd.Pruner, schedule="cyclical", cycles=3, combine="union", mode="soft", **MASKED)),
    "hard cubic": dict(pruner=functools.partial(sd.Pruner, schedule="cubic", mode="hard", **MASKED)),
    "random scores": dict(pruner=functools.partial(sd.Pruner, schedule="linear", mode="soft", score="random", **MASKED)),
    "fine-tuning": dict(prune=0.5),
}


class Average:
    "A callback with a state: a running average of the head's bias, noted in the history."
    def __init__(self): self.value = torch.zeros(10)
    def after_epoch(self, run): run.history[-1]["average"] = self.value.sum().item()
    def after_step(self, run): self.value = 0.9 * self.value + 0.1 * run.model.head[1].bias.detach()
    def state_dict(self): return {"value": self.value}
    def load_state_dict(self, state): self.value = state["value"]


class Rewire:
    "A callback without a state that replaces masks once: afterwards only the layers know them."
    def after_step(self, run):
        if run.step != 12: return
        for layer in masked_layers(run.model).values(): layer.set_mask(layer.mask.flip(0))


class Tell:
    "A callback that sends every step's number to whoever wants to kill this process."
    def __init__(self, send): self.send = send
    def after_step(self, run): self.send(run.step)


def work(variant, path, every, send):
    "One training from its beginning, as a script would write it; it goes on from `path` if that exists."
    options = dict(VARIANTS[variant])
    torch.manual_seed(3)
    model = sd.resnet(8, in_channels=1, width=0.25)
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(16, 10))
    callbacks = [Average(), Tell(send)]
    if "prune" in options:
        sd.prune(model, options.pop("prune"), mode="hard")
        callbacks.append(Rewire())
    sd.train(model, sd.load_data("digits"), steps=STEPS, checkpoint=path, checkpoint_every=every, progress=False,
             callbacks=callbacks, **options)


@pytest.fixture(scope="module")
def processes():
    "New processes that have imported everything already, but computed nothing."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparsedarts.training.engine", "sparsedarts.pruning.pruners", "sparsedarts.nets.resnets",
                                    "sparsedarts.data.loading", "sklearn.datasets", "pandas", "torch._dynamo", "pytest"])
    return context


def child(connection, variant, path, every):
    work(variant, path, every, connection.send)


def start(processes, variant, path, every):
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=child, args=(theirs, variant, path, every))
    process.start()
    theirs.close()
    return process, ours


def finish(process, connection):
    "Let a run end by itself; how many steps it made."
    steps = 0
    while True:
        try: connection.recv()
        except EOFError: break
        steps += 1
    process.join(60)
    assert process.exitcode == 0
    return steps


def kill(process, connection, step, delay):
    "Wait until the run has made `step` steps, then a little, then SIGKILL; the last step heard of."
    last = 0
    while last < step: last = connection.recv()
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
    return last


def differences(one, two, at=""):
    "Where two checkpoints differ, bit by bit; times are not compared."
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [d for key in one if key != "seconds" for d in differences(one[key], two[key], f"{at}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        return [d for i, pair in enumerate(zip(one, two)) for d in differences(*pair, f"{at}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [at]
    return [] if type(one) is type(two) and one == two else [at]


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_the_same(variant, processes, tmp_path):
    whole, path = tmp_path / "whole.pt", tmp_path / "killed" / "run.pt"
    assert finish(*start(processes, variant, whole, None)) == STEPS
    rng = random.Random()
    every = rng.choice([1, 2, 5])
    moments = [(step, rng.uniform(0, 0.02)) for step in sorted(rng.sample(range(1, STEPS - 6), 3))]
    for step, delay in moments: kill(*start(processes, variant, path, every), step, delay)
    assert finish(*start(processes, variant, path, every)) < STEPS, "the last process did not go on from the checkpoint"
    one, two = load_checkpoint(whole), load_checkpoint(path)
    assert one["step"] == STEPS and len(one["history"]) == 7 and len(one["parts"]["meter"]["counts"]) == 0
    assert not differences(one, two), f"checkpoint_every={every}, killed at {moments}"
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"], "something half-written was left behind"
    assert finish(*start(processes, variant, path, every)) == 0


def test_cold_start(processes, tmp_path):
    "The same with interpreters that share nothing with the undisturbed run, not even the order of their hashes."
    script = ("import sys; sys.path.insert(0, sys.argv[1])\nfrom test_resume import work\n"
              "work('soft union', sys.argv[2], 3, lambda step: print(step, flush=True))\n")
    def run(): return subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "run.pt")], stdout=subprocess.PIPE, text=True)
    killed = run()
    for line in killed.stdout:
        if int(line) >= 23: break
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert killed.returncode == -signal.SIGKILL
    steps = run().communicate(timeout=120)[0].split()
    assert 20 <= int(steps[0]) and steps[-1] == str(STEPS)
    assert finish(*start(processes, "soft union", tmp_path / "whole.pt", None)) == STEPS
    assert not differences(load_checkpoint(tmp_path / "whole.pt"), load_checkpoint(tmp_path / "run.pt"))


def test_differences_are_seen():
    one = dict(a=torch.ones(2), b=[1, dict(seconds=3.0, c=2.0)])
    assert not differences(one, dict(a=torch.ones(2), b=[1, dict(seconds=4.0, c=2.0)]))
    assert differences(one, dict(a=torch.ones(2, dtype=torch.float64), b=[1, dict(seconds=3.0, c=2.5)])) == ["/a", "/b/1/c"]
    assert differences(one, dict(a=torch.ones(2))) == [""]
