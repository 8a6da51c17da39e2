"""What a mask costs in training: one step with hard masks, soft masks and torch.nn.utils.prune, against the dense network.

    OMP_NUM_THREADS=1 python benchmarks/masking.py [--rounds 20] [--steps 3] [--networks resnet32x2 vgg19] [--threshold] [--json]

Forward, loss, backward, SGD step (momentum 0.9, nesterov, weight decay 5e-4) on one thread, 90 % of all convolution and linear weights
masked at random. Every round runs all methods in a new random order and takes the fastest of a few consecutive steps of each, because
other work on the machine only ever adds time; a ratio is the median over rounds of (method / dense) within a round. Process CPU time
decides, wall time is printed beside it. At the end of the same run the hard network's masked weights and their momentum
must all be exactly zero. With --threshold the benchmark of the exact global threshold follows.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch.nn.utils import prune

import sparsedarts as sd
from sparsedarts.core import derive_seed
from sparsedarts.sparse.layers import masked_layers

NETWORKS = {"resnet32x2": (lambda: sd.resnet(32, classes=100, width=2, shortcut="B"), 64), "vgg19": (lambda: sd.vgg(19, classes=100), 16)}
BARS = {("resnet32x2", "hard"): 1.02, ("resnet32x2", "soft"): 1.02, ("vgg19", "hard"): 1.05, ("vgg19", "soft"): 1.09}
NEAR_PRUNE = 0.01  # soft may be slower than torch.nn.utils.prune by at most this
METHODS = ("dense", "hard", "soft", "prune")


def random_masks(model, density, seed):
    "Name of the weight -> mask, the same for every copy of the network."
    generator = torch.Generator().manual_seed(derive_seed(seed, "masks"))
    ones = sd.Masks.ones_like(model)
    return sd.Masks({name: torch.rand(mask.shape, generator=generator) < density for name, mask in ones.items()})


class Trainer:
    "One network with one kind of mask and its optimiser."
    def __init__(self, name, method, density, seed):
        torch.manual_seed(seed)
        build, self.batch = NETWORKS[name]
        self.model, self.method = build(), method
        masks = random_masks(self.model, density, seed)
        if method in ("hard", "soft"): sd.apply_masks(self.model, masks, mode=method)
        if method == "prune":
            for key, mask in masks.items(): prune.custom_from_mask(self.model.get_submodule(key.rpartition(".")[0]), "weight", mask)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        if method == "hard": sd.hold(self.model, self.optimizer)

    def step(self, images, labels):
        "Seconds of CPU and wall time of one training step."
        cpu, wall = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        return time.process_time() - cpu, time.perf_counter() - wall

    def leaks(self):
        "Masked weights and momenta that are not exactly zero."
        count = 0
        for layer in masked_layers(self.model).values():
            for values in (layer.weight.detach(), self.optimizer.state[layer.weight]["momentum_buffer"]):
                count += int(values[layer.mask == 0].count_nonzero())
        return count


def measure(name, rounds=20, steps=3, density=0.1, seed=0, warmup=1):
    "Lists of (cpu, wall) seconds for every method, the fastest of `steps` steps in each round; the hard network's zeros are checked at the end."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainers = {method: Trainer(name, method, density, seed) for method in METHODS}
        generator, order, seconds = torch.Generator().manual_seed(seed), list(METHODS), {method: [] for method in METHODS}
        for round_ in range(-warmup, rounds):
            batch = trainers["dense"].batch
            images, labels = torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(100, (batch,), generator=generator)
            random.Random(f"{seed} {round_}").shuffle(order)
            for method in order:
                spent = [trainers[method].step(images, labels) for _ in range(steps)]
                if round_ >= 0: seconds[method].append(tuple(map(min, zip(*spent))))
        leaks = trainers["hard"].leaks()
        if leaks: raise AssertionError(f"{leaks} masked weights or momenta of the hard network are not zero")
        return seconds
    finally: torch.set_num_threads(threads)


def summarise(name, seconds):
    "One row per method: median milliseconds, paired ratios to dense, the bar and whether it is met."
    rows, ratios = [], {}
    for method in METHODS:
        cpu, wall = ([own[i] / dense[i] for own, dense in zip(seconds[method], seconds["dense"])] for i in (0, 1))
        ratios[method] = statistics.median(cpu)
        quarters = statistics.quantiles(cpu, n=4)
        bar = BARS.get((name, method))
        row = dict(network=name, method=method, rounds=len(cpu), cpu_ms=1e3 * statistics.median(s for s, _ in seconds[method]), cpu_ratio=ratios[method],
                   quartiles=(quarters[0], quarters[2]), wall_ratio=statistics.median(wall), bar=bar, ok=None if bar is None else ratios[method] <= bar)
        rows.append(row)
    soft = next(row for row in rows if row["method"] == "soft")
    soft["minus_prune"] = statistics.median((own[0] - other[0]) / dense[0] for own, other, dense in zip(*(seconds[method] for method in ("soft", "prune", "dense"))))
    soft["ok"] = soft["ok"] and soft["minus_prune"] <= NEAR_PRUNE
    return rows


def show(rows):
    "A table for people."
    print(f"{'network':11} {'method':6} {'CPU ms':>8} {'ratio':>7} {'quartiles':>15} {'wall':>7}  bar")
    for row in rows:
        low, high = row["quartiles"]
        bar = "" if row["bar"] is None else f"{row['bar']:.2f} {'met' if row['ok'] else 'MISSED'}"
        if "minus_prune" in row: bar += f" ({row['minus_prune']:+.3f} to torch.nn.utils.prune, at most +{NEAR_PRUNE})"
        print(f"{row['network']:11} {row['method']:6} {row['cpu_ms']:8.1f} {row['cpu_ratio']:7.3f} {low:7.3f} {high:7.3f} {row['wall_ratio']:7.3f}  {bar}")
    print("hard: masked weights and their momentum are exactly zero at the end of the run")


def main(arguments=None):
    "Run, print, and return 0 if every bar is met."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="steps of each method in a round, of which the fastest counts")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threshold", action="store_true", help="also run benchmarks/threshold.py")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.steps < 1: parser.error("--rounds must be at least 2 and --steps at least 1")
    rows = [row for name in options.networks for row in summarise(name, measure(name, options.rounds, options.steps))]
    print(json.dumps(rows, indent=1)) if options.json else show(rows)
    failed = any(row["ok"] is False for row in rows)
    if options.threshold:
        command = [sys.executable, str(Path(__file__).with_name("threshold.py")), *(["--json"] if options.json else [])]
        failed |= bool(subprocess.run(command).returncode)
    return int(failed)


if __name__ == "__main__": sys.exit(main())
