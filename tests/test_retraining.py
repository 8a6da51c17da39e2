"""Training from scratch by published protocols, smaller derived networks, random search over NAS-Bench-201, films of searches."""
import dataclasses
import math
import multiprocessing
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import sparsedarts as sd
from sparsedarts.core import CheckpointError, DataError, ParameterError, ShapeError, derive_seed, expect_error
from sparsedarts.space.cells import derive
from sparsedarts.space.genotypes import Genotype
from sparsedarts.space.nasbench201 import NB201_EDGES, nb201_cells, parse_nb201, random_nb201
from sparsedarts.space.draw import nasbench201_edges
from sparsedarts.strategy.animation import animate, draw_epoch, draw_trajectory, mixed_edges
from sparsedarts.strategy.bilevel import SearchResult, mixing_weights
from sparsedarts.strategy.sampling import candidate
from sparsedarts.training.engine import train
from sparsedarts.training.retraining import (DropPath, Retraining, auxiliary_loss, changed, retrain, retraining_data, retraining_network,
                                             retraining_schedule, retrainings)

SMALL = dict(channels=2, layers=3, device="cpu", progress=False)


@pytest.fixture(scope="module")
def digits(): return sd.load_data("digits")


@pytest.fixture(scope="module")
def patterns(): return sd.load_data("synthetic", size=32, classes=3)


class Watch:
    "Notes what every step is run with."
    def __init__(self): self.rates, self.paths, self.groups, self.clip = [], [], None, None
    def before_step(self, run): self.groups, self.clip = run.optimizer.param_groups, run.options.clip
    def after_step(self, run):
        self.rates.append(run.optimizer.param_groups[0]["lr"])
        self.paths.append(getattr(run.model, "drop_path_prob", 0.0))


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# ---------------------------------------------------------------- numbers of the protocols

def test_published_numbers():
    cifar, large = retrainings["darts-cifar"], retrainings["darts-imagenet"]
    wanted = dict(optimizer="sgd", momentum=0.9, nesterov=False, clip=5.0)
    assert cifar.training == wanted | dict(batch_size=96, lr=0.025, weight_decay=3e-4)
    assert large.training == wanted | dict(batch_size=128, lr=0.1, weight_decay=3e-5, label_smoothing=0.1)
    assert (cifar.epochs, cifar.auxiliary, cifar.drop_path, cifar.cutout * 32) == (600, 0.4, 0.2, 16)
    assert (large.epochs, large.auxiliary, large.drop_path, large.cutout) == (250, 0.4, 0.0, 0.0)
    assert all(entry.source and isinstance(entry, Retraining) for entry in retrainings.values())


def test_rates_of_every_epoch():
    for e, rate in enumerate(retrainings["darts-cifar"].learning_rates()):
        assert rate == pytest.approx(0.025 * (1 + math.cos(math.pi * e / 600)) / 2, rel=1e-12)
    for e, rate in enumerate(retrainings["darts-imagenet"].learning_rates()): assert rate == 0.1 * 0.97 ** e
    line = retrainings["fpdarts-imagenet"].learning_rates()
    for e, rate in enumerate(line):
        plain = 0.1 * (245 - e) / 245 if 250 - e > 5 else 0.1 * (250 - e) / (245 * 5)
        assert rate == pytest.approx(plain * (e + 1) / 5 if e < 5 else plain, rel=1e-12)
    assert line[244] == pytest.approx(5 * line[249]) and min(line) == line[249] > 0
    for e, p in enumerate(retrainings["darts-cifar"].drop_paths()): assert p == 0.2 * e / 600


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 600))
def test_a_rate_is_held_for_its_epoch(epochs, steps):
    schedule = retraining_schedule("epoch-decay", epochs)
    for e in {0, epochs // 2, epochs - 1}:
        for step in {0, steps // 2, steps - 1}: assert schedule((e * steps + step) / (epochs * steps)) == 0.97 ** e


def test_no_epoch_begins_late():
    "Every epoch of every length: shares such as 48 / 49 times 49 fall below the whole number."
    wrong = [(epochs, e) for epochs in range(1, 400) for e in range(epochs) if math.floor(e / epochs * epochs) != e]
    assert len(wrong) > 100
    for epochs, e in wrong: assert retraining_schedule("epoch-decay", epochs)(e / epochs) == 0.97 ** e


def test_sizes_of_published_networks(digits):
    names = retraining_network("DARTS_V2", dataclasses.replace(digits, shape=(3, 32, 32)), retrainings["darts-cifar"], seed=0)
    assert sum(p.numel() for p in names.parameters()) == 3_825_768
    with torch.device("meta"):
        large = derive("DARTS_V2", classes=1000, auxiliary=True, **retrainings["darts-imagenet"].network)
    assert sum(p.numel() for p in large.parameters()) == 5_979_528


# ---------------------------------------------------------------- runs

def test_a_run_uses_the_numbers(digits):
    watch = Watch()
    done = retrain("DARTS_V2", digits, "darts-cifar", epochs=4, auxiliary=0, drop_path_of=600, batch_size=300, callbacks=(watch,), **SMALL)
    assert watch.rates == [0.025 * ((1 + math.cos(math.pi * (e / 4))) / 2) for e in range(4) for _ in range(3)]
    assert watch.paths == [0.2 * e / 600 for e in range(4) for _ in range(3)]
    group = watch.groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"], watch.clip) == (0.9, False, 3e-4, 5.0) and len(watch.groups) == 1
    assert done.model.drop_path_prob == 0 and done.history.lr.tolist() == watch.rates[::3]
    watch = Watch()
    done = retrain("DARTS_V2", digits, "darts-imagenet", epochs=3, auxiliary=False, stem="cifar", callbacks=(watch,), **SMALL)
    assert watch.rates == [0.1 * 0.97 ** e for e in range(3) for _ in range(7)] and set(watch.paths) == {0.0}
    assert "valid_accuracy" not in done.metrics


def test_the_same_run_composed_by_hand(patterns):
    "Network, loss, schedule and drop path put together here, without `retrain`."
    done = retrain("DASS", patterns, "darts-cifar", epochs=2, seed=5, batch_size=150, label_smoothing=0.1, **SMALL)
    before = torch.get_rng_state()
    from sparsedarts.core import restore_rng, rng_state, seed_everything
    state = rng_state()
    seed_everything(derive_seed(5, "weights"))
    net = derive("DASS", channels=2, layers=3, classes=3, auxiliary=True)
    restore_rng(state)

    class Path:
        def before_step(self, run): run.model.drop_path_prob = 0.2 * (run.step // 2) / 2

    def loss(output, y):
        return sum(w * nn.functional.cross_entropy(z, y, label_smoothing=0.1) for w, z in zip((1.0, 0.4), output))
    data = patterns.merged().with_augmentation(cutout=16)
    train(net, data, epochs=2, seed=5, batch_size=150, lr=0.025, momentum=0.9, nesterov=False, weight_decay=3e-4, clip=5.0, loss=loss,
          schedule=lambda p: (1 + math.cos(math.pi * math.floor(p * 2 + 1e-9) / 2)) / 2, callbacks=(Path(),), device="cpu", progress=False)
    assert same(done.model, net) and torch.equal(torch.get_rng_state(), before)


def test_auxiliary_loss_by_hand():
    rng = np.random.default_rng(0)
    z, aux, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), rng.integers(4, size=6)

    def cost(logits, smoothing):
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        target = np.eye(4)[y] * (1 - smoothing) + smoothing / 4
        return -(target * logs).sum(1).mean()
    for weight, smoothing in ((0.4, 0.0), (0.4, 0.1), (0.0, 0.2)):
        found = auxiliary_loss((torch.tensor(z), torch.tensor(aux)), torch.tensor(y), weight, smoothing)
        assert float(found) == pytest.approx(cost(z, smoothing) + weight * cost(aux, smoothing), rel=1e-12)
    assert float(auxiliary_loss(torch.tensor(z), torch.tensor(y))) == pytest.approx(cost(z, 0.0), rel=1e-12)


def test_the_head_is_trained_and_silent_in_evaluation(patterns):
    start = retraining_network("DARTS_V2", patterns, changed("darts-cifar", channels=2, layers=3), seed=0)
    done = retrain("DARTS_V2", patterns, epochs=1, batch_size=100, **SMALL)
    moved = [not torch.equal(a, b) for a, b in zip(start.auxiliary_head.parameters(), done.model.auxiliary_head.parameters())]
    assert all(moved) and done.model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    frozen = retrain(start, patterns, epochs=1, auxiliary=0, batch_size=150, device="cpu", progress=False, weight_decay=0.0)
    fresh = retraining_network("DARTS_V2", patterns, changed("darts-cifar", channels=2, layers=3), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(fresh.auxiliary_head.parameters(), frozen.model.auxiliary_head.parameters()))


# ---------------------------------------------------------------- cutout

@pytest.mark.parametrize("name, size, length", [("synthetic", 32, 16), ("synthetic", 16, 8), ("digits", None, 4)])
def test_cutout_in_batches(name, size, length):
    "Squares of the right share, uniformly centred, clipped at the borders, zero after normalising."
    plain = sd.load_data(name, size=size).merged().with_augmentation(pad=0, flip=False)
    cut, side = retraining_data(plain, retrainings["darts-cifar"]), plain.shape[1]
    assert cut.augmentation["cutout"] == length
    boxes = []
    for _ in range(3):
        for (x, _), (y, _) in zip(plain.train.batches(100, augment=True, epochs=3, seed=1), cut.train.batches(100, augment=True, epochs=3, seed=1)):
            inside = (y == 0).all(1)
            outside = torch.where(inside[:, None], torch.zeros(()), x)
            assert torch.equal(outside, y)
            boxes += [(int(i.any(1).sum()), int(i.any(0).sum()), int(i.sum())) for i in inside]
    heights, widths, areas = np.array(boxes).T
    expected = np.mean([min(side, c + length // 2) - max(0, c - length // 2) for c in range(side)])
    assert (areas == heights * widths).all() and heights.max() == widths.max() == length and heights.min() == length // 2
    for found in (heights, widths): assert abs(found.mean() - expected) < 5 * found.std() / math.sqrt(len(found) / 3)
    share = (np.array([min(side, c + length // 2) - max(0, c - length // 2) for c in range(side)]) == length).mean()
    assert share == pytest.approx((side - length + 1) / side) and abs((heights == length).mean() - share) < 0.05


# ---------------------------------------------------------------- killed and resumed

class Killer:
    "Ends this process with SIGKILL after a step."
    def __init__(self, step): self.step = step
    def after_step(self, run):
        if run.step == self.step: os.kill(os.getpid(), signal.SIGKILL)


def work(path, step):
    "A run with drop path, cutout and auxiliary head; step 0: to its end."
    torch.set_num_threads(1)
    return retrain("DARTS_V2", sd.load_data("synthetic", size=32, classes=3), "darts-cifar", epochs=3, batch_size=150, drop_path=0.5, checkpoint=path,
                   checkpoint_every=1, callbacks=(Killer(step),), **SMALL)


def test_killed_and_resumed(tmp_path):
    whole = work(tmp_path / "whole.pt", 0)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work, args=(tmp_path / "run.pt", 4))   # inside the second of three epochs of two steps
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "run.pt").exists()
    resumed = work(tmp_path / "run.pt", 0)
    assert same(whole.model, resumed.model)
    assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds")) and len(whole.history) == 3
    with pytest.raises(CheckpointError, match="drop path was"):
        retrain("DARTS_V2", sd.load_data("synthetic", size=32, classes=3), "darts-cifar", epochs=3, batch_size=150, drop_path=0.4,
                checkpoint=tmp_path / "run.pt", checkpoint_every=1, callbacks=(Killer(0),), **SMALL)


def test_refusals(digits, patterns):
    expect_error(lambda: retrain("DARTS_V2", digits, epochs=1, **SMALL), ShapeError, "takes maps of 8 to 10 pixels after both reductions, got 2x2")
    expect_error(lambda: retrain("DARTS_V2", patterns, "darts-imagenet", epochs=1, **SMALL), ShapeError, "224 (ImageNet stem)")
    expect_error(lambda: retrain("DARTS_V2", digits, "darts-cifar", epochs=0), ParameterError, "epochs must be a whole number of at least 1, got 0")
    expect_error(lambda: retrain("DARTS_V2", digits, seed=-1), ParameterError, "seed must be")
    expect_error(lambda: retrain("DARTS_V9", digits, "laptop", epochs=1), ParameterError, "unknown published cell 'DARTS_V9'")
    expect_error(lambda: retrain(sd.resnet(8, in_channels=1), digits, "laptop", epochs=1, device="cpu"), ParameterError, "ResNet has no drop path")
    net = derive("DARTS_V2", channels=2, layers=3, in_channels=1, drop_path_prob=0.1)
    with pytest.raises(ParameterError): retrain(net, digits, "laptop", epochs=1, drop_path=0.9, drop_path_of=0)
    class Burst:
        def after_step(self, run): raise DataError("enough")
    with pytest.raises(DataError): retrain(net, digits, "laptop", epochs=1, callbacks=(Burst(),), device="cpu")
    assert net.drop_path_prob == 0.1 and net.training


# ---------------------------------------------------------------- smaller derived networks

FREE = Genotype([("skip_connect", 0), ("max_pool_3x3", 1), ("avg_pool_3x3", 1), ("skip_connect", 2)], [2, 3],
                [("max_pool_3x3", 0), ("skip_connect", 1), ("skip_connect", 2), ("avg_pool_3x3", 0)], [2, 3])


def pruned(genotype, trained, sparsity=0.5):
    "In float64, with half of the units gone; with statistics as after a training, dead units answer with constants."
    torch.manual_seed(0)
    net = derive(genotype, channels=8, layers=5).double()
    for m in net.modules() if trained else ():
        if isinstance(m, nn.BatchNorm2d):
            for value in (m.running_mean, m.bias.data): value.uniform_(-0.2, 0.2)
            for value in (m.running_var, m.weight.data): value.uniform_(0.5, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.prune(net, sparsity, granularity="unit")
    return net.eval()


@pytest.mark.parametrize("genotype, trained", [("DARTS_V2", False), ("DASS", False), (FREE, False), (FREE, True)])
def test_compact_cells_are_exact(genotype, trained):
    "Concatenations, skips, pools, factorised reduces: nothing is lost where no padded convolution reads a constant that is not zero."
    net = pruned(genotype, trained)
    small = sd.compact(net, (3, 16, 16))
    x = torch.randn(5, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad(): assert (small.eval()(x) - net(x)).abs().max() < 1e-14
    assert small.compaction.removed > 50 and small.compaction.params < 0.75 * small.compaction.params_before


@pytest.mark.parametrize("genotype", ["DARTS_V2", "DASS"])
def test_compact_cells_with_constants(genotype):
    "Zero padding makes a constant differ at the borders; folding keeps its mean, and the rest is stated. Whole depthwise layers make it exact."
    net = pruned(genotype, True)
    small, unfolded = sd.compact(net, (3, 16, 16)), sd.compact(net, (3, 16, 16), fold=False)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad(): assert float((small.eval()(x) - net(x)).abs().max()) == pytest.approx(small.difference, rel=1e-6)
    assert 0 < small.difference < 0.05 * unfolded.difference and small.difference < 0.01 * small.compaction.scale
    whole = sd.compact(net, (3, 16, 16), exclude=lambda name, module: getattr(module, "groups", 1) > 1)
    assert whole.difference < 1e-14 and 0 < whole.compaction.removed < small.compaction.removed


# ---------------------------------------------------------------- random search over NAS-Bench-201

def test_random_search_over_nasbench201(digits, tmp_path):
    options = dict(space="nasbench201", data=digits, candidates=3, steps=3, channels=2, layers=1, batch_size=32, device="cpu")
    found = sd.search("random", seed=4, **options)
    assert list(found.history.genotype) == [candidate(random_nb201, k, 4) for k in range(3)] and found.genotype in nb201_cells()
    best = found.history.valid_accuracy.idxmax()
    assert found.genotype == found.history.genotype[best] and found.model.genotype == found.genotype
    again = sd.search("random", seed=4, checkpoint=tmp_path / "file", **options)
    resumed = sd.search("random", seed=4, checkpoint=tmp_path / "file", **options)
    for other in (again, resumed):
        assert other.genotype == found.genotype and other.history.drop(columns="seconds").equals(found.history.drop(columns="seconds"))
        assert same(other.model, found.model)
    expect_error(lambda: sd.supernet("nasbench201", path="fast"), ParameterError, "takes no path='fast'")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 15624))
def test_one_parser(number):
    cell = nb201_cells()[number]
    assert nasbench201_edges(cell) == tuple((name, source, target) for name, (target, source) in zip(parse_nb201(cell), NB201_EDGES))
    drawn = sd.draw(cell, scale=0.5)
    assert len([p for p in drawn.axes[0].patches if (p.get_gid() or "").startswith("cell-edge-")]) == 6


# ---------------------------------------------------------------- pictures of a search

def result(epochs, space="s2", nodes=2):
    "A search that never ran: a supernet and alphas of every epoch."
    torch.manual_seed(1)
    net = sd.supernet(space, **({"nodes": nodes} if space != "nasbench201" else {}), channels=2, layers=1 if space == "nasbench201" else 3)
    rng = np.random.default_rng(0)
    trajectory = {cell: rng.normal(size=(epochs + 1, *alpha.shape)).astype("float32") for cell, alpha in net.alphas.items()}
    return SearchResult(net.genotype(), None, 0.0, trajectory, model=net)


@pytest.mark.parametrize("space, cell, epochs, every, frames", [("s2", "normal", 5, 1, 6), ("s2", "reduce", 5, 2, 4), ("darts", "normal", 2, 9, 2),
                                                                ("nasbench201", "cell", 4, 4, 2), ("s3", "normal", 0, 1, 1)])
def test_films(tmp_path, space, cell, epochs, every, frames):
    found = result(epochs, space)
    path = animate(found, tmp_path / "a.gif", cell, every, scale=0.5)
    film = Image.open(path)
    assert film.n_frames == frames and path.read_bytes() == animate(found, tmp_path / "b.gif", cell, every, scale=0.5).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "b.gif"] and path.stat().st_size < 60_000
    before = {name: alpha.clone() for name, alpha in found.model.alphas.items()}
    figure = draw_epoch(found, 0, cell)
    weights = mixing_weights(found.trajectory)[cell]
    drawn = {p.get_gid(): p.get_linewidth() for p in figure.axes[0].patches if p.get_gid().startswith(f"{cell}-edge-")}
    names = [names for *_, names in mixed_edges(found.model, cell)]
    assert len(drawn) == len(names)
    if cell != "cell":
        passing = [[i for i, name in enumerate(row) if name != "none"] for row in names]
        full = max(frame[k, i] for frame in weights for k, row in enumerate(passing) for i in row)
        for k, row in enumerate(passing):
            assert drawn[f"{cell}-edge-{k}"] == pytest.approx(0.8 * (0.5 + 3.2 * max(weights[0][k, i] for i in row) / full), rel=1e-5)
    lines = [line for axis in draw_trajectory(found, cell).axes for line in axis.lines]
    assert len(lines) == sum(map(len, names)) and all(len(line.get_ydata()) == epochs + 1 for line in lines)
    assert all(torch.equal(alpha, before[name]) for name, alpha in found.model.alphas.items())
