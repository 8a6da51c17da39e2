"""What a training step costs: the engine beside the barest loop, by network and memory format, interleaved on one thread.

    OMP_NUM_THREADS=1 python benchmarks/training.py [--rounds 30]
"""
import argparse
import inspect
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import sparsedarts as sd
from sparsedarts.training.engine import Run, advance

DEFAULTS = {name: p.default for name, p in inspect.signature(sd.train).parameters.items() if name not in ("model", "data")}


def network(depth, width, channels_last=False):
    torch.manual_seed(0)
    model = sd.resnet(depth, width=width, shortcut="B", in_channels=1)
    return model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def engine_step(data, depth, width, channels_last, **options):
    "One step of `sd.train`: batch, augmentation, metrics and all."
    run = Run(network(depth, width), data, SimpleNamespace(**{**DEFAULTS, "epochs": 1000, "channels_last": channels_last, **options}))
    run.model.train()
    return lambda: advance(run)


def bare_step(data, depth, width, channels_last, fused=True):
    "Forward, backward and update on one batch that never changes."
    model = network(depth, width, channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused, foreach=None if fused else False)
    x, y = next(data.train.batches(64, drop_last=True))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    data = sd.load_data("digits").merged()
    nets = [(20, 1), (20, 0.5), (14, 1), (14, 0.5), (8, 1), (8, 0.5)]
    steps = {("engine", *net, last): engine_step(data, *net, last) for net in nets for last in (False, True)}
    steps |= {("bare", *net, last): bare_step(data, *net, last) for net in nets for last in (False, True)}
    steps[("bare, no fused SGD", 20, 1, True)] = bare_step(data, 20, 1, True, fused=False)
    steps[("engine, bf16", 20, 1, True)] = engine_step(data, 20, 1, True, precision="bf16")
    times = {name: [] for name in steps}
    for _ in range(rounds + 3):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            times[name].append(1000 * (time.process_time() - begin))
    median = {name: statistics.median(values[3:]) for name, values in times.items()}
    print(f"{'ms a step, batch 64, digits 8x8':38s} {'contiguous':>10s} {'channels last':>14s}   epoch of {len(data.train)} images")
    for depth, width in nets:
        for kind in ("bare", "engine"):
            first, last = (median[kind, depth, width, order] for order in (False, True))
            print(f"{f'ResNet{depth} x{width} {kind}':38s} {first:10.2f} {last:14.2f}   {last * (len(data.train) // 64) / 1000:.2f} s")
    for name in (("bare, no fused SGD", 20, 1, True), ("engine, bf16", 20, 1, True)):
        print(f"{f'ResNet{name[1]} x{name[2]} {name[0]}':38s} {'':10s} {median[name]:14.2f}")


if __name__ == "__main__":
    main()
