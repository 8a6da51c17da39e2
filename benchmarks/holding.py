"""What it costs to ask whether masks are true: a training step with the questions, against the same step without them.

    OMP_NUM_THREADS=1 python benchmarks/holding.py [--steps 200] [--json]

Forward, loss, backward, SGD step (momentum 0.9, weight decay 5e-4) and the pruner's step, on one thread, of two equal networks that train in turn; the
order within each pair is random. "asked" is the package as it is: layers look whether their mask was written into, pruners whether a layer or an optimiser was
exchanged, and every update whether removed weights are still zero. In "silent" these three answer at once. The ratio is the median over all pairs of
(asked / silent) of process CPU time, and its bar is 1.02. That both networks end with the same bits is asserted in the same run.
"""
import argparse
import json
import os
import random
import statistics
import time
from contextlib import contextmanager
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

import sparsedarts as sd
from sparsedarts.pruning import dynamic, pruners
from sparsedarts.sparse import holding, modules

BAR = 1.02
CASES = {
    "resnet20, soft masks": (lambda m, o, n: sd.Pruner(m, o, 0.9, steps=n), 16),
    "resnet20, hard masks": (lambda m, o, n: sd.Pruner(m, o, 0.9, steps=n, mode="hard"), 16),
    "resnet20, RigL": (lambda m, o, n: sd.DynamicPruner(m, o, 0.9, steps=n, every=20), 16),
}


@contextmanager
def silent():
    "Nothing is asked."
    with (patch.object(modules, "true_mask", lambda mask: mask), patch.object(holding.Watch, "check", lambda *_: None),
          patch.object(holding.Watch, "note", lambda *_: None), patch.object(pruners, "check_held", lambda *_: None),
          patch.object(dynamic, "check_held", lambda *_: None)):
        yield


@contextmanager
def asked():
    "The package as it is."
    yield


class Trainer:
    "A network, its optimiser and its pruner."
    def __init__(self, make, steps, batch):
        torch.manual_seed(0)
        self.model = sd.resnet(20, classes=10).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.pruner = make(self.model, self.optimizer, steps)
        self.x, self.y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))

    def step(self):
        "CPU seconds of one step."
        began = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.pruner.step()
        return time.process_time() - began


def measure(name, steps, order):
    "Median ratio of one case, with its quartiles."
    make, batch = CASES[name]
    ways = {asked: Trainer(make, steps + 5, batch), silent: Trainer(make, steps + 5, batch)}
    ratios = []
    for step in range(steps + 5):
        seconds = {}
        for way in order.sample(list(ways), 2):
            with way(): seconds[way] = ways[way].step()
        if step >= 5: ratios.append(seconds[asked] / seconds[silent])
    one, two = (trainer.model.state_dict().values() for trainer in ways.values())
    assert all(torch.equal(a, b) for a, b in zip(one, two)), "the questions changed a training"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return dict(case=name, steps=steps, ratio=middle, low=low, high=high, bar=BAR, met=middle <= BAR)


def main():
    "Print a line for each case."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="pairs of steps in each case")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, options.steps, random.Random(0)) for name in CASES]
    if options.json: return print(json.dumps(rows))
    for row in rows:
        print(f"{row['case']:24} asked / silent {row['ratio']:.4f} (quartiles {row['low']:.3f} to {row['high']:.3f}, {row['steps']} pairs), "
              f"bar {row['bar']}: {'met' if row['met'] else 'MISSED'}")


if __name__ == "__main__": main()
