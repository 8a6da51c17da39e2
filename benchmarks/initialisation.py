"""Pruning at initialisation: seconds and peak memory of SNIP, GraSP and SynFlow, against straightforward code, in one interleaved run.

    OMP_NUM_THREADS=1 python benchmarks/initialisation.py [--rounds 1] [--quick] [--steps 100] [--methods snip grasp synflow] [--json]

VGG19 (20 million weights, 100 classes) is pruned to 98 % from random weights: SNIP and GraSP with one batch of 128 images 3x32x32, SynFlow
in 100 rounds (--steps) in float64. Every call is a process of its own, so that its peak memory is its own, and every round runs all of them
in a new random order. The straightforward code below is written the usual way: masks as parameters, scores concatenated and sorted (`topk`
for SNIP and GraSP), one more copy wherever the next line wants one. Ours must keep exactly the right number, and the share of its weights
that the other side keeps too is printed. With --quick: a quarter of the width, 32 images, 20 rounds of SynFlow.
"""
import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

METHODS, SIDES, SPARSITY = ("snip", "grasp", "synflow"), ("ours", "straightforward"), "0.98"
FULL, QUICK = dict(width=1, batch=128, steps=100), dict(width=0.25, batch=32, steps=20)


def build(width, batch):
    "Network, images and labels, the same in every process."
    import torch
    import sparsedarts as sd
    torch.manual_seed(0)
    sd.prune  # imports happen here, outside of what is timed
    model = sd.vgg(19, classes=100, width=width)
    return model, torch.randn(batch, 3, 32, 32), torch.arange(batch) % 100


def ours(method, model, x, y, steps):
    "Masks by `prune`."
    import sparsedarts as sd
    if method == "synflow": return sd.prune(model, SPARSITY, score="synflow", data=(3, 32, 32), steps=steps)
    return sd.prune(model, SPARSITY, score=method, data=(x, y))


def masked_copy(model):
    "A copy whose layers multiply by a mask that is a parameter."
    import torch
    import torch.nn.functional as F
    from torch import nn
    def conv(self, x): return F.conv2d(x, self.weight * self.weight_mask, self.bias, self.stride, self.padding)
    def linear(self, x): return F.linear(x, self.weight * self.weight_mask, self.bias)
    net = copy.deepcopy(model)
    layers = {f"{name}.weight": layer for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    for layer in layers.values():
        layer.weight_mask = nn.Parameter(torch.ones_like(layer.weight))
        layer.forward = (conv if isinstance(layer, nn.Conv2d) else linear).__get__(layer)
    return net, layers


def straight_snip(model, x, y, keep):
    "Derive by the mask, normalise, concatenate, threshold by topk."
    import torch
    import torch.nn.functional as F
    net, layers = masked_copy(model)
    net.train()
    for layer in layers.values(): layer.weight.requires_grad_(False)
    F.cross_entropy(net(x), y).backward()
    scores = {name: layer.weight_mask.grad.abs() for name, layer in layers.items()}
    everything = torch.cat([score.flatten() for score in scores.values()])
    total = everything.sum()
    threshold = torch.topk(everything / total, keep, sorted=True)[0][-1]
    return {name: (score / total >= threshold).float() for name, score in scores.items()}


def straight_grasp(model, x, y, keep):
    "Gradient, gradient with a graph, their product derived again; the highest -w(Hg) go."
    import torch
    import torch.nn.functional as F
    from torch import nn
    net = copy.deepcopy(model).train()
    layers = {f"{name}.weight": layer for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    weights = [layer.weight for layer in layers.values()]
    still = torch.autograd.grad(F.cross_entropy(net(x) / 200, y), weights)
    live = torch.autograd.grad(F.cross_entropy(net(x) / 200, y), weights, create_graph=True)
    sum((a * b).sum() for a, b in zip(still, live)).backward()
    scores = {name: -layer.weight.data * layer.weight.grad for name, layer in layers.items()}
    everything = torch.cat([score.flatten() for score in scores.values()])
    size = everything.abs().sum() + 1e-10
    threshold = torch.topk(everything / size, len(everything) - keep, sorted=True)[0][-1]
    return {name: (score / size < threshold).float() for name, score in scores.items()}


def straight_synflow(model, steps, keep):
    "In float64: absolute values, one image of ones, sort all scores, mask, signs back; again and again."
    import torch
    net, layers = masked_copy(model.double())
    net.eval()
    total = sum(layer.weight.numel() for layer in layers.values())
    for step in range(1, steps + 1):
        signs = {name: value.sign() for name, value in net.state_dict().items()}
        for value in net.state_dict().values(): value.abs_()
        net.zero_grad()
        net(torch.ones(1, 3, 32, 32, dtype=torch.float64)).sum().backward()
        scores = {name: (layer.weight_mask.grad * layer.weight_mask).abs().detach() for name, layer in layers.items()}
        for name, value in net.state_dict().items(): value.mul_(signs[name])
        everything = torch.cat([score.flatten() for score in scores.values()])
        now = keep if step == steps else round(total * (1 - float(SPARSITY)) ** (step / steps))
        threshold = torch.sort(everything)[0][total - now]
        for name, layer in layers.items(): layer.weight_mask.data.copy_((scores[name] >= threshold).double())
    return {name: layer.weight_mask.data for name, layer in layers.items()}


def straightforward(method, model, x, y, steps):
    "The usual code."
    from sparsedarts.core import count_kept
    keep = count_kept(sum(value.numel() for value in model.parameters() if value.dim() > 1), SPARSITY)
    if method == "synflow": return straight_synflow(model, steps, keep)
    return {"snip": straight_snip, "grasp": straight_grasp}[method](model, x, y, keep)


def memory(field):
    "A line of /proc/self/status in MB: VmRSS now, VmHWM at most; where there is none, the largest resident set so far."
    try: return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def child(method, side, size, path):
    "One call, timed, its masks packed into a file."
    import numpy as np
    import torch
    torch.set_num_threads(1)
    model, x, y = build(size["width"], size["batch"])
    names = [name for name, value in model.named_parameters() if value.dim() > 1]
    before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    masks = {"ours": ours, "straightforward": straightforward}[side](method, model, x, y, size["steps"])
    spent = dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
    flat = np.concatenate([masks[name].numpy().astype(bool).ravel() for name in names])
    np.save(path, np.packbits(flat))
    peak = memory("VmHWM")
    counts = dict(kept=int(flat.sum()), total=len(flat), empty=sum(not masks[name].any() for name in names))
    print(json.dumps(dict(**spent, peak=peak, above=peak - before, **counts)))


def measure(size, methods=METHODS, rounds=1, seed=0):
    "Method -> side -> list of what the processes reported; and method -> share of the kept weights that both sides keep."
    import numpy as np
    calls, records, same = [(method, side) for method in methods for side in SIDES], {method: {side: [] for side in SIDES} for method in methods}, {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            random.Random(f"{seed} {turn}").shuffle(calls)
            for method, side in calls:
                command = [sys.executable, __file__, "--child", method, side, json.dumps(size), f"{folder}/{method}-{side}.npy"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode: raise RuntimeError(f"{method}, {side}: {done.stderr[-2000:]}")
                records[method][side].append(json.loads(done.stdout))
        for method in methods:
            one, two = (np.load(f"{folder}/{method}-{side}.npy") for side in SIDES)
            same[method] = int(np.unpackbits(one & two).sum()) / records[method]["ours"][0]["kept"]
    return records, same


def summarise(records, same):
    "One row per method and side, with the paired ratios of ours to the straightforward code."
    from sparsedarts.core import count_kept
    rows = []
    for method, sides in records.items():
        expected = count_kept(sides["ours"][0]["total"], SPARSITY)
        for side, runs in sides.items():
            row = dict(method=method, side=side, rounds=len(runs), same=same[method], expected=expected)
            for key in ("cpu", "wall", "peak", "above"):
                row[key] = statistics.median(run[key] for run in runs)
                row[f"{key}_ratio"] = statistics.median(own[key] / other[key] for own, other in zip(runs, sides["straightforward"]))
            rows.append(row | {key: runs[0][key] for key in ("kept", "total", "empty")})
            wrong = [run["kept"] for run in runs if run["kept"] != expected]
            if side == "ours" and wrong: raise AssertionError(f"{method} keeps {wrong[0]} instead of {expected}")
    return rows


def show(rows, size):
    "A table for people."
    print(f"VGG19 width {size['width']}, sparsity {SPARSITY}, {rows[0]['total']:,} weights, {rows[0]['expected']:,} to keep, batch {size['batch']}, "
          f"SynFlow in {size['steps']} rounds, one thread, {rows[0]['rounds']} round(s)")
    print(f"{'method':8} {'side':16} {'CPU s':>8} {'wall s':>8} {'peak MB':>8} {'of it own':>9}  {'kept':>9} {'empty':>5}  ratios of ours")
    for row in rows:
        line = f"{row['method']:8} {row['side']:16} {row['cpu']:8.2f} {row['wall']:8.2f} {row['peak']:8.0f} {row['above']:9.0f}"
        line += f"  {row['kept']:9,} {row['empty']:5}"
        if row["side"] == "ours":
            line += f"  CPU {row['cpu_ratio']:.2f}, peak {row['peak_ratio']:.2f}, own memory {row['above_ratio']:.2f}"
            line += f"; {row['same']:.4%} of the kept weights the same"
        print(line)


def main(arguments=None):
    "Run and print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a quarter of the width, 32 images, 20 rounds of SynFlow")
    parser.add_argument("--steps", type=int, help="rounds of SynFlow; 100, or 20 with --quick")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child: return child(options.child[0], options.child[1], json.loads(options.child[2]), options.child[3])
    if options.rounds < 1 or options.steps is not None and options.steps < 1: parser.error("--rounds and --steps must be at least 1")
    size = (QUICK if options.quick else FULL) | ({"steps": options.steps} if options.steps else {})
    rows = summarise(*measure(size, tuple(options.methods), options.rounds))
    print(json.dumps(rows, indent=1)) if options.json else show(rows, size)


if __name__ == "__main__": sys.exit(main())
