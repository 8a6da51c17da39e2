"""Exact global threshold and mask over 20 million float32 scores, against the classic ways, in one interleaved run.

    OMP_NUM_THREADS=1 python benchmarks/threshold.py [--scores 20000000] [--rounds 7] [--json]

Each method must keep exactly K scores and all must agree on the threshold. Times are process CPU seconds on one thread; a ratio is the
median over rounds of (ours / theirs) within a round, the order of the methods shuffled every round. The bar is 0.5 against `kthvalue`.
"""
import argparse
import json
import os
import random
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from sparsedarts.core import count_kept
from sparsedarts.pruning.selection import top_masks

BAR = 0.5


def by_radix(scores, keep): return top_masks({"scores": scores}, keep)["scores"]
def by_kthvalue(scores, keep): return (scores >= scores.kthvalue(len(scores) - keep + 1).values).view(torch.uint8)
def by_topk(scores, keep): return (scores >= scores.topk(keep, sorted=False).values.min()).view(torch.uint8)
def by_sort(scores, keep): return (scores >= scores.sort().values[len(scores) - keep]).view(torch.uint8)


METHODS = {"ours": by_radix, "kthvalue": by_kthvalue, "topk": by_topk, "sort": by_sort}
KINDS = {"normal": lambda n, generator: torch.randn(n, generator=generator).abs_(), "uniform": lambda n, generator: torch.rand(n, generator=generator)}


def measure(scores, keep, rounds, skip=()):
    "CPU seconds of every method in every round, after checking the masks once."
    methods = {name: method for name, method in METHODS.items() if name not in skip}
    masks = {name: method(scores, keep) for name, method in methods.items()}
    threshold = scores[masks["ours"].bool()].min()
    if int(masks["ours"].sum()) != keep: raise AssertionError(f"kept {int(masks['ours'].sum())} instead of {keep}")
    for name, mask in masks.items():  # the classic masks keep every tie of the threshold
        if scores[mask.bool()].min() != threshold or not bool((mask >= masks["ours"]).all()): raise AssertionError(f"{name} disagrees")
    seconds = {name: [] for name in methods}
    for round_ in range(rounds):
        order = list(methods)
        random.Random(round_).shuffle(order)
        for name in order:
            start = time.process_time()
            methods[name](scores, keep)
            seconds[name].append(time.process_time() - start)
    return seconds


def run(n=20_000_000, rounds=7, sparsities=("0.5", "0.9", "0.98"), seed=0):
    "A list of rows: distribution, sparsity, median milliseconds of each method, and the paired ratio of ours to each."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for kind, draw in KINDS.items():
            scores = draw(n, torch.Generator().manual_seed(seed))
            for sparsity in sparsities:
                seconds = measure(scores, count_kept(n, sparsity), rounds)
                rows.append({"scores": kind, "n": n, "sparsity": sparsity, "rounds": rounds,
                             "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
                             "ratio": {name: statistics.median(a / b for a, b in zip(seconds["ours"], values)) for name, values in seconds.items() if name != "ours"}})
        return rows
    finally: torch.set_num_threads(threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    rows = run(options.scores, options.rounds)
    worst = max(row["ratio"]["kthvalue"] for row in rows if row["scores"] == "normal")
    if options.json:
        print(json.dumps(rows))
        return int(worst > BAR)
    for row in rows:
        times = "  ".join(f"{name} {value:7.1f} ms" for name, value in row["milliseconds"].items())
        ratios = "  ".join(f"/{name} {value:.3f}" for name, value in row["ratio"].items())
        print(f"{row['scores']:8s} S={row['sparsity']:5s} {times}   ours {ratios}")
    print(f"normal scores: at worst {worst:.3f} of kthvalue (bar {BAR}): {'met' if worst <= BAR else 'NOT met'}")
    return int(worst > BAR)


if __name__ == "__main__": sys.exit(main())
