"""What trained scores cost: one step with the scores learning, and one with them frozen, against the dense network and a full sort.

    OMP_NUM_THREADS=1 python benchmarks/scored.py [--rounds 20] [--steps 3] [--networks resnet32 resnet32x2 vgg19] [--keep 0.1] [--json]

Forward, loss, backward, SGD step (momentum 0.9, nesterov, weight decay 5e-4) on one thread, a tenth of every convolution's and linear layer's
weights kept. "dense" trains the weights. "scores" trains the scores of our layers and "frozen" their weights behind a fixed mask; "global" trains scores that
compete in one pool. "sort" trains the scores of layers in the style of the released code: every forward pass sorts every layer, fills a 0/1 tensor of floats through
the order, and hands the gradient straight through. Every round runs all methods in a new random order and takes the fastest of a few consecutive steps of
each, because other work on the machine only ever adds time; a ratio is the median over rounds of (method / dense) within a round. Process CPU time decides, wall time
is printed beside it. That our masks and those of the sort agree, and keep the exact number, is asserted in the same run.
"""
import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from fractions import Fraction

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import nn

import sparsedarts as sd
from sparsedarts.core import count_kept
from sparsedarts.pruning.scored import scored_layers, scored_masks, to_scored

NETWORKS = {"resnet32": (lambda: sd.resnet(32, classes=10), 64), "resnet32x2": (lambda: sd.resnet(32, classes=100, width=2, shortcut="B"), 64),
            "vgg19": (lambda: sd.vgg(19, classes=100), 16)}
BARS = {("resnet32", "scores"): 1.08, ("resnet32x2", "scores"): 1.08, ("vgg19", "scores"): 2.0}
METHODS = ("dense", "scores", "frozen", "global", "sort")


class SortedMask(torch.autograd.Function):
    "The reference: sort everything, zero the lowest, and let the gradient through."
    @staticmethod
    def forward(ctx, ranked, keep):
        order = ranked.flatten().sort().indices
        mask = torch.ones_like(ranked).flatten()
        mask[order[:int((1 - keep) * len(order))]] = 0
        return mask.view_as(ranked)

    @staticmethod
    def backward(ctx, gradient): return gradient, None


class SortedConv2d(nn.Conv2d):
    "A convolution as in the released code."
    def forward(self, x): return self._conv_forward(x, self.weight * SortedMask.apply(self.scores.abs(), self.keep), self.bias)


class SortedLinear(nn.Linear):
    "A linear layer as in the released code."
    def forward(self, x): return F.linear(x, self.weight * SortedMask.apply(self.scores.abs(), self.keep), self.bias)


def sorted_layers(model, keep):
    "The reference network: weights frozen, one score for each."
    for module in list(model.modules()):
        if type(module) not in (nn.Conv2d, nn.Linear): continue
        module.__class__ = SortedConv2d if type(module) is nn.Conv2d else SortedLinear
        weight = module.weight.detach()
        module.keep, module.scores = keep, nn.Parameter(math.sqrt(6 / weight[0].numel()) * weight / weight.abs().max())
        for parameter in (module.weight, module.bias):
            if parameter is not None: parameter.requires_grad_(False)


class Trainer:
    "One network with one kind of layer and its optimiser."
    def __init__(self, name, method, keep, seed):
        torch.manual_seed(seed)
        build, self.batch = NETWORKS[name]
        self.model, self.method = build(), method
        if method == "sort": sorted_layers(self.model, keep)
        elif method != "dense": to_scored(self.model, keep=keep, initial="scaled", allocation="global" if method == "global" else "layer-ceil")
        if method not in ("dense", "sort"):
            for layer in scored_layers(self.model).values():
                for parameter in (layer.weight, layer.bias):
                    if parameter is not None: parameter.requires_grad_(method == "frozen")
                layer.scores.requires_grad_(method != "frozen")
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step(self, images, labels):
        "Seconds of CPU and wall time of one training step."
        cpu, wall = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        return time.process_time() - cpu, time.perf_counter() - wall


def check(trainers, keep):
    "Raise unless our layers keep exactly what the sort keeps of the same scores (equal scores aside)."
    for name, layer in scored_layers(trainers["scores"].model).items():
        ranked = layer.scores.detach().abs()
        ours, theirs = ranked[layer.mask.bool()].sort().values, ranked[SortedMask.apply(ranked, keep).bool()].sort().values
        if not torch.equal(ours, theirs): raise AssertionError(f"{name}: our mask keeps {len(ours)} scores, the sort {len(theirs)}, and they are not the same")
    together = scored_masks(trainers["global"].model)
    if together.kept != count_kept(together.total, 1 - Fraction(str(keep))): raise AssertionError(f"the global mask keeps {together.kept} of {together.total}")


def measure(name, rounds=20, steps=3, keep=0.1, seed=0, warmup=1):
    "Lists of (cpu, wall) seconds for every method, the fastest of `steps` steps in each round; the masks are checked before and after."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainers = {method: Trainer(name, method, keep, seed) for method in METHODS}
        check(trainers, keep)
        generator, order, seconds = torch.Generator().manual_seed(seed), list(METHODS), {method: [] for method in METHODS}
        for round_ in range(-warmup, rounds):
            batch = trainers["dense"].batch
            images, labels = torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(10, (batch,), generator=generator)
            random.Random(f"{seed} {round_}").shuffle(order)
            for method in order:
                spent = [trainers[method].step(images, labels) for _ in range(steps)]
                if round_ >= 0: seconds[method].append(tuple(map(min, zip(*spent))))
        check(trainers, keep)
        return seconds
    finally: torch.set_num_threads(threads)


def summarise(name, seconds):
    "One row per method: median milliseconds, paired ratios to dense, the bar and whether it is met."
    rows = []
    for method in METHODS:
        cpu, wall = ([own[i] / dense[i] for own, dense in zip(seconds[method], seconds["dense"])] for i in (0, 1))
        ratio, quarters, bar = statistics.median(cpu), statistics.quantiles(cpu, n=4), BARS.get((name, method))
        rows.append(dict(network=name, method=method, rounds=len(cpu), cpu_ms=1e3 * statistics.median(s for s, _ in seconds[method]), cpu_ratio=ratio,
                         quartiles=(quarters[0], quarters[2]), wall_ratio=statistics.median(wall), bar=bar, ok=None if bar is None else ratio <= bar))
    return rows


def show(rows):
    "A table for people."
    print(f"{'network':11} {'method':6} {'CPU ms':>8} {'ratio':>7} {'quartiles':>15} {'wall':>7}  bar")
    for row in rows:
        low, high = row["quartiles"]
        bar = "" if row["bar"] is None else f"{row['bar']:.2f} {'met' if row['ok'] else 'MISSED'}"
        print(f"{row['network']:11} {row['method']:6} {row['cpu_ms']:8.1f} {row['cpu_ratio']:7.3f} {low:7.3f} {high:7.3f} {row['wall_ratio']:7.3f}  {bar}")
    print("scores: kept exactly what a full sort keeps, before and after the run")


def main(arguments=None):
    "Run, print, and return 0 if every bar is met."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="steps of each method in a round, of which the fastest counts")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--keep", type=float, default=0.1, help="share of the weights that stays")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.steps < 1: parser.error("--rounds must be at least 2 and --steps at least 1")
    if not 0 < options.keep < 1: parser.error("--keep must lie between 0 and 1")
    rows = [row for name in options.networks for row in summarise(name, measure(name, options.rounds, options.steps, options.keep))]
    print(json.dumps(rows, indent=1)) if options.json else show(rows)
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__": sys.exit(main())
