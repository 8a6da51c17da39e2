"""The steps of a DARTS search: the library's fast path against a plain loop over operations.

    OMP_NUM_THREADS=1 python benchmarks/supernet.py [--configurations A B] [--rounds 6] [--unrolled-rounds 5] [--json]

The reference is written as DARTS is usually written: every operation of every edge by itself with its own ReLU, a `sum` that begins at 0,
maps with channels first, a full backward pass in the architecture step, and for the unrolled step a second network by deep copy. The
library's steps are `weight_step` and `architecture_step` of `strategy.bilevel`, as a search calls them. Both begin with the same supernet
and see the same batches.

One thread; process CPU time; the steps of both alternate within a round; two rounds of warm-up; the minimum over the rounds counts,
because other work on the machine only ever adds time. In the same run: the reference's calls of convolution_backward are counted and must
be what the structure says, float32 logits and float64 gradients of both are compared, bytes saved for backward are counted (unique
storages, by saved-tensor hooks), and so is the peak of a step (the allocator's events as the profiler records them, beyond what was held
before; second step of its kind).
"""
import argparse
import copy
import itertools
import json
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import nn

import sparsedarts as sd
from sparsedarts.space.darts import supernet
from sparsedarts.strategy.bilevel import Search, architecture_step, weight_step

CONFIGURATIONS = {"A": (8, 5, 64, 8), "B": (16, 8, 8, 32)}   # channels, layers, batch, image size
CALLS = {"A": 1770, "B": 2790}                               # of convolution_backward, a weight step and a first-order step of the reference
BARS = {("A", "first"): 3.6, ("B", "first"): 2.8, ("A", "unrolled"): 3.0, ("B", "unrolled"): 2.5}
SAVED_BAR = -0.35                                            # saved bytes of the weight step against the reference


def plain_forward(net, x):
    "All operations one by one."
    weights = {name: alpha.softmax(-1) for name, alpha in net.alphas.items()}
    s0, s1 = net.inputs(x)
    for cell in net.cells:
        w, states, row = weights["reduce" if cell.reduction else "normal"], [cell.preprocess0(s0), cell.preprocess1(s1)], 0
        for _ in range(cell.nodes):
            new = sum(sum(w[row + j][k] * op(state) for k, op in enumerate(cell._ops[row + j]._ops)) for j, state in enumerate(states))
            row += len(states)
            states.append(new)
        s0, s1 = s1, torch.cat(states[2:], 1)
    return net.head(s1)


class Reference:
    "The usual steps."
    def __init__(self, net, train, valid):
        self.net, self.train, self.valid, self.lr = net, train, valid, 0.025
        self.optimizer = torch.optim.SGD(net.parameters(), self.lr, momentum=0.9, weight_decay=3e-4)
        self.arch_optimizer = torch.optim.Adam(net.alphas.values(), 3e-4, (0.5, 0.999), weight_decay=1e-3)

    def loss(self, net, batch): return F.cross_entropy(plain_forward(net, batch[0]), batch[1])

    def weights(self):
        self.optimizer.zero_grad()
        self.loss(self.net, self.train).backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
        self.optimizer.step()

    def first(self):
        self.arch_optimizer.zero_grad()
        self.loss(self.net, self.valid).backward()
        self.arch_optimizer.step()

    def moved_copy(self, flat):
        "A second network with the given weights."
        other, start = copy.deepcopy(self.net), 0
        for p in other.parameters():
            p.data, p.grad, start = flat[start:start + p.numel()].view_as(p).clone(), None, start + p.numel()
        for alpha in other.alphas.values(): alpha.grad = None
        return other

    def unrolled(self):
        weights, alphas = list(self.net.parameters()), list(self.net.alphas.values())
        def flat(tensors): return torch.cat([t.reshape(-1) for t in tensors])
        gradient, theta = flat(torch.autograd.grad(self.loss(self.net, self.train), weights)), flat([p.data for p in weights])
        momentum = 0.9 * flat([self.optimizer.state[p]["momentum_buffer"] for p in weights]) if self.optimizer.state else 0
        other = self.moved_copy(theta - self.lr * (momentum + gradient + 3e-4 * theta))
        self.loss(other, self.valid).backward()
        direct, vector = [alpha.grad for alpha in other.alphas.values()], [p.grad for p in other.parameters()]
        epsilon, sides = 0.01 / flat(vector).norm(), []
        for move in (epsilon, -2 * epsilon):
            for p, v in zip(weights, vector): p.data.add_(v, alpha=move)
            sides.append(torch.autograd.grad(self.loss(self.net, self.train), alphas))
        for p, v in zip(weights, vector): p.data.add_(v, alpha=epsilon)
        for alpha, d, plus, minus in zip(alphas, direct, *sides): alpha.grad = d - self.lr * (plus - minus) / (2 * epsilon)
        self.arch_optimizer.step()


class Ours:
    "The library's steps, on given batches."
    def __init__(self, net, train, valid):
        net.path, data = "fast", sd.load_data("digits")
        self.searches = {order: Search(net, data, order=order, device="cpu", progress=False) for order in ("first", "second")}
        for search in self.searches.values():
            search.batch, search.arch_batch = ((x.contiguous(memory_format=search.format), y) for x, y in (train, valid))
            search.optimizer, search.arch_optimizer = (getattr(self.searches["first"], name) for name in ("optimizer", "arch_optimizer"))

    def call(self, step, order):
        search = self.searches[order]
        step(search)
        search.meter.reset(), search.arch_meter.reset()

    def weights(self): self.call(weight_step, "first")
    def first(self): self.call(architecture_step, "first")
    def unrolled(self): self.call(architecture_step, "second")


def scene(name, seed=0):
    "A supernet and two batches of noise."
    channels, layers, batch, size = CONFIGURATIONS[name]
    torch.manual_seed(seed)
    net = supernet("darts", channels=channels, layers=layers, path="plain")
    return net, *[(torch.randn(batch, 3, size, size), torch.randint(10, (batch,))) for _ in range(2)]


def timed(step):
    "Seconds of CPU time."
    began = time.process_time()
    step()
    return time.process_time() - began


def measure(name, rounds, unrolled_rounds, warmup=2):
    "step -> (reference, ours), the least seconds over the rounds."
    net, train, valid = scene(name)
    both = Reference(net, train, valid), Ours(copy.deepcopy(net), train, valid)
    found = {}
    for steps, count in ((("weights", "first"), rounds), (("unrolled",), unrolled_rounds)):
        for round_ in range(-warmup, count):
            for step in steps:
                spent = [timed(getattr(one, step)) for one in both]
                if round_ >= 0: found[step] = [min(pair) for pair in zip(spent, found.get(step, spent))]
    return found


def backward_calls(name):
    "How often the reference computes the backward pass of a convolution in a weight step and a first-order step."
    reference = Reference(*scene(name))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        reference.weights()
        reference.first()
    return next(event.count for event in profile.key_averages() if event.key == "aten::convolution_backward")


def saved_bytes(step):
    "Bytes kept for the backward pass by a step, each storage once."
    sizes, alive = {}, []
    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)  # so that no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor): step()
    return sum(sizes.values())


def saved(name):
    "step -> (reference, ours), bytes; both count the parameters that are saved."
    net, train, valid = scene(name)
    both = Reference(net, train, valid), Ours(copy.deepcopy(net), train, valid)
    return {step: [saved_bytes(getattr(one, step)) for one in both] for step in ("weights", "first")}


def agreement(name):
    "The largest difference of float32 logits, and of float64 gradients relative to the largest gradient of each tensor or one."
    net, train, _ = scene(name)
    fast = copy.deepcopy(net)
    fast.path = "fast"
    logits = (plain_forward(net, train[0]) - fast(train[0])).abs().max().item()
    net, train, _ = scene(name)
    fast = copy.deepcopy(net).double()
    fast.path, net, found = "fast", net.double(), []
    for one, forward in ((net, plain_forward), (fast, lambda one, x: one(x))):
        loss = F.cross_entropy(forward(one, train[0].double()), train[1])
        found.append(torch.autograd.grad(loss, [*one.alphas.values(), *one.parameters()]))
    gradients = max(((a - b).abs().max() / a.abs().max().clamp_min(1)).item() for a, b in zip(*found))
    buffers = max((a - b).abs().max().item() for a, b in zip(net.buffers(), fast.buffers()))
    if logits > 1e-4 or gradients > 1e-9 or buffers > 1e-9:
        raise AssertionError(f"the paths differ: logits {logits}, gradients {gradients}, statistics {buffers}")
    return logits, gradients, buffers


def peak_bytes(step):
    "The most bytes a step holds at once beyond what was held before it, by the allocator's own events."
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile: step()
    events = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


def peaks(name):
    "step -> (reference, ours), bytes."
    net, train, valid = scene(name)
    both = Reference(net, train, valid), Ours(copy.deepcopy(net), train, valid)
    return {step: [peak_bytes(getattr(one, step)) for one in both] for step in ("weights", "first", "unrolled")}


def report(name, rounds, unrolled_rounds):
    "Everything about a configuration."
    calls = backward_calls(name)
    if calls != CALLS[name]: raise AssertionError(f"the reference calls convolution_backward {calls} times, its structure has {CALLS[name]}")
    found = dict(configuration=name, calls=calls, agreement=agreement(name), saved=saved(name), peaks=peaks(name))
    seconds = found["seconds"] = measure(name, rounds, unrolled_rounds)
    sums = [seconds["weights"][i] + seconds["first"][i] for i in (0, 1)]
    found["ratios"] = {step: old / new for step, (old, new) in seconds.items()} | {"weights + first": sums[0] / sums[1]}
    found["less_saved"] = {step: new / old - 1 for step, (old, new) in found["saved"].items()}
    found["ok"] = (found["ratios"]["weights + first"] >= BARS[name, "first"] and found["ratios"]["unrolled"] >= BARS[name, "unrolled"]
                   and found["less_saved"]["weights"] <= SAVED_BAR)
    return found


def show(found):
    "A table for people."
    name, seconds, ratios = found["configuration"], found["seconds"], found["ratios"]
    print(f"{name}: channels, layers, batch, size = {CONFIGURATIONS[name]}; convolution_backward of the reference: {found['calls']} calls")
    for step in ("weights", "first", "unrolled"):
        print(f"  {step:16} {1e3 * seconds[step][0]:8.1f} ms  {1e3 * seconds[step][1]:8.1f} ms  {ratios[step]:6.2f}")
    bars = BARS[name, "first"], BARS[name, "unrolled"]
    print(f"  weights + first  {ratios['weights + first']:28.2f}   bars {bars[0]} and, unrolled, {bars[1]}: {'met' if found['ok'] else 'MISSED'}")
    for kind in ("saved", "peaks"):
        for step, (old, new) in found[kind].items():
            print(f"  {kind + ', ' + step:16} {old / 2**20:8.1f} MiB {new / 2**20:8.1f} MiB {100 * (new / old - 1):6.1f} %")
    print("  agreement: logits {:.1e} (float32), gradients {:.1e}, running statistics {:.1e} (float64)".format(*found["agreement"]), flush=True)


def main(arguments=None):
    "Run, print, and return 0 if every bar is met."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--unrolled-rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.unrolled_rounds) < 1: parser.error("rounds must be at least 1")
    torch.set_num_threads(1)
    rows = []
    for name in options.configurations:
        rows.append(report(name, options.rounds, options.unrolled_rounds))
        if not options.json: show(rows[-1])
    if options.json: print(json.dumps(rows, indent=1))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__": sys.exit(main())
