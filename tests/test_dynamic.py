"""Dynamic sparse training and the regimes: one update by brute force, exact counts, the step that is replaced, resume to the bit."""
import copy
import functools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import sparsedarts as sd
from sparsedarts.core import CheckpointError, ParameterError, UnknownName, count_kept, derive_seed
from sparsedarts.files import load_checkpoint
from sparsedarts.pruning.allocation import as_allocation
from sparsedarts.pruning.dynamic import DynamicPruner, drop_count, exchange
from sparsedarts.sparse.layers import densify, masked_layers, masks_of
from sparsedarts.training.regimes import dense_sparse_dense, granet, iterative_magnitude, rigl, round_targets, set_training, train_dynamic

QUICK = settings(deadline=None, max_examples=60)


# ---- one exchange and one update, by brute force --------------------------------------------------------------------------------
def by_sorting(mask, worth, wish, count):
    "The definition with Python's stable sort: drop the last of the active, then grow the first of all that are not kept."
    active = sorted((i for i in range(len(mask)) if mask[i]), key=lambda i: -worth[i])
    kept = set(active[:len(active) - count])
    free = sorted((i for i in range(len(mask)) if i not in kept), key=lambda i: -wish[i])
    return [int(i in kept or i in free[:count]) for i in range(len(mask))]


@QUICK
@given(st.data(), st.integers(1, 20))
def test_exchange_is_a_stable_sort(data, size):
    few = st.sampled_from([0.0, 0.25, 1.0, 3.5])
    mask, worth, wish = (data.draw(st.lists(kind, min_size=size, max_size=size)) for kind in (st.integers(0, 1), few, few))
    count = data.draw(st.integers(0, sum(mask)))
    found = exchange(torch.tensor(mask, dtype=torch.uint8), torch.tensor(worth), torch.tensor(wish), count)
    assert found.tolist() == by_sorting(mask, worth, wish, count) and int(found.sum()) == sum(mask)


@QUICK
@given(st.integers(0, 100), st.integers(0, 5000))
def test_drop_counts_are_exact_decimals(percent, active):
    assert drop_count(percent / 100, active) == percent * active // 100


def small(seed=0):
    "A convolutional network with a batch norm: three layers with 774 prunable weights."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3, stride=2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(36, 5))


def batch(t):
    generator = torch.Generator().manual_seed(1000 + t)
    return torch.randn(12, 2, 8, 8, generator=generator), torch.randint(0, 5, (12,), generator=generator)


def backward(model, t):
    x, y = batch(t)
    nn.functional.cross_entropy(model(x), y).backward()


def walk(model, optimizer, pruner, until, clip=None):
    "Steps with a pruner, until it has counted so many."
    trace = []
    while pruner.t < until:
        optimizer.zero_grad()
        backward(model, pruner.t)
        if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        pruner.step()
        trace.append(pruner.masks)
    return trace


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, fused=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),  # not known to keep zeros: held after every step
}


def plain_gradients(model, t):
    "Gradients of the network as plain layers, computed on a copy."
    plain = densify(copy.deepcopy(model))
    plain.zero_grad()
    backward(plain, t)
    return {name: p.grad.clone() for name, p in plain.named_parameters()}


def expected_update(model, masks, gradients, share):
    "RigL's update in numpy."
    new = {}
    for name, mask in masks.items():
        old, weight, gradient = mask.numpy().ravel() > 0, model.get_parameter(name).detach().numpy().ravel(), gradients[name].numpy().ravel()
        count = int(Fraction(str(share)) * int(old.sum()))
        active = np.flatnonzero(old)
        kept = np.zeros_like(old)
        kept[active[np.argsort(-np.abs(weight[active]), kind="stable")[:len(active) - count]]] = True
        free = np.flatnonzero(~kept)
        kept[free[np.argsort(-np.abs(gradient[free]), kind="stable")[:count]]] = True
        new[name] = torch.from_numpy(kept.reshape(mask.shape).astype(np.uint8))
    return new


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_replaced_step(name):
    "Masks as predicted; what stays is untouched in weights and state, what grows or goes is zero in both; the next step is an ordinary one."
    model = small()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = DynamicPruner(model, optimizer, "0.8", steps=40, every=6, fraction=0.5)
    walk(model, optimizer, pruner, 5, clip=0.5)
    def values(): return {key: [p.detach().clone(), *(v.clone() for v in optimizer.state[p].values() if torch.is_tensor(v))] for key, p in model.named_parameters()}
    before, masks, statistics = values(), pruner.masks, model[1].running_mean.clone()
    expected = expected_update(model, masks, plain_gradients(model, 5), 0.25 * (1 + math.cos(math.pi * 6 / 30)))
    walk(model, optimizer, pruner, 6, clip=0.5)
    assert pruner.masks == expected and pruner.masks != masks and pruner.masks.counts() == masks.counts()
    for key, now in values().items():
        stays = (masks[key] & pruner.masks[key]).bool() if key in masks else slice(None)
        for a, b in zip(before[key], now):
            if a.shape != before[key][0].shape: assert torch.equal(a, b)
            else:
                assert torch.equal(a[stays], b[stays]) and torch.isfinite(b).all()
                if key in masks: assert not b[~stays].any(), "grown and dropped weights are zero, and so is their state"
    assert not torch.equal(statistics, model[1].running_mean), "batch norms have seen the batch"
    assert all(p.grad is None for p in model.parameters())
    moved = {key: p.detach().clone() for key, p in model.named_parameters()}
    walk(model, optimizer, pruner, 7)
    assert sum(int(model.get_parameter(key)[(mask & ~masks[key]) == 1].count_nonzero()) for key, mask in pruner.masks.items()) > 0, "new weights learn"
    for key, mask in pruner.masks.items(): assert not model.get_parameter(key)[mask == 0].any() and not torch.equal(model.get_parameter(key), moved[key])


def test_averaged_gradients_by_brute_force():
    "The mean of the dense gradients of three steps, of which two were ordinary steps, chooses the masks."
    model = small()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = DynamicPruner(model, optimizer, "0.8", steps=40, every=6, fraction=0.5, accumulate=3)
    walk(model, optimizer, pruner, 3)
    sums = {}
    for t in (3, 4, 5):
        for name, gradient in plain_gradients(model, t).items(): sums[name] = sums.get(name, 0) + gradient
        masks, state = pruner.masks, copy.deepcopy(model)
        walk(model, optimizer, pruner, t + 1)
    assert pruner.masks == expected_update(state, masks, {name: total / 3 for name, total in sums.items()}, 0.25 * (1 + math.cos(math.pi * 6 / 30)))


def test_random_growth_is_seeded_and_follows_the_step():
    model = small()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = DynamicPruner(model, optimizer, "0.8", steps=40, every=6, grow="random", decay="constant", seed=5)
    walk(model, optimizer, pruner, 5)
    masks, before = pruner.masks, copy.deepcopy(model)
    plain = copy.deepcopy(model)
    twin = OPTIMIZERS["sgd"](plain.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.zero_grad()
    backward(plain, 5)
    twin.step()
    walk(model, optimizer, pruner, 6)
    noise = torch.Generator().manual_seed(derive_seed(5, "grow", 6))
    wishes = {name: torch.rand(mask.shape, generator=noise) for name, mask in masks.items()}
    assert pruner.masks == expected_update(plain, masks, wishes, 0.3), "drawn after a step that was made"
    assert not torch.equal(model[1].weight, before[1].weight)
    def last(seed):
        net = small()
        opt = OPTIMIZERS["sgd"](net.parameters())
        return walk(net, opt, DynamicPruner(net, opt, "0.8", steps=20, every=5, grow="random", seed=seed), 20)
    assert last(5) == last(5) and last(5)[0] != last(6)[0]


# ---- counts ---------------------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["0", "0.5", "0.83", "0.9", "0.97"]), st.sampled_from(["erk", "layer", "global", "lamp"]), st.sampled_from(["gradient", "random"]),
       st.sampled_from([None, "cubic", "linear"]), st.sampled_from(["cosine", "constant", "linear"]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 7), st.integers(1, 7))
def test_counts_are_exact_at_every_moment(sparsity, allocation, grow, schedule, decay, fraction, every, accumulate):
    model = small()
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    initial = {"0": "0", "0.5": "0.2", "0.83": "0.5", "0.9": None, "0.97": "0.97"}[sparsity] if schedule else None
    pruner = DynamicPruner(model, optimizer, sparsity, steps=20, every=every, grow=grow, schedule=schedule, decay=decay, fraction=fraction, allocation=allocation,
                           initial=initial, accumulate=min(accumulate, every), seed=3)
    first, target = Fraction(initial or ("0" if schedule else sparsity)), Fraction(sparsity)
    total = pruner.masks.total
    sizes, shapes = {name: mask.numel() for name, mask in pruner.masks.items()}, {name: tuple(mask.shape) for name, mask in pruner.masks.items()}
    ends = as_allocation(allocation).counts(shapes, sizes, target)
    trace = [pruner.masks, *walk(model, optimizer, pruner, 20)]
    assert trace[0].kept == count_kept(total, first)
    for line in pruner.history:
        t, p = line["step"], Fraction(line["step"], 15)
        way = {None: 0, "linear": p, "cubic": 1 - (1 - p) ** 3}[schedule]
        assert trace[t].kept == count_kept(total, first + (target - first) * way), line
        assert t < 15 or (t == 15 and schedule)
    if schedule is None: assert all(masks.counts() == trace[0].counts() for masks in trace)
    if ends: assert pruner.masks.counts() == ends
    assert pruner.masks.kept == count_kept(total, sparsity) and all(masks is trace[15] for masks in trace[15:])
    assert pruner.explored == functools.reduce(lambda a, b: a | b, trace).density
    for name, layer in masked_layers(model).items():
        assert torch.equal(layer.mask, pruner.masks[name]) and not layer.weight[layer.mask == 0].any() and not layer.dense_gradient
        assert not optimizer.state[layer.weight]["momentum_buffer"][layer.mask == 0].any()


def test_first_masks_are_the_allocations_and_the_seeds():
    def masks(**options):
        model = small()
        return DynamicPruner(model, OPTIMIZERS["sgd"](model.parameters()), "0.9", steps=100, every=5, **options).masks
    assert masks(seed=1) == masks(seed=1) == masks(seed=1, grow="random") != masks(seed=2)
    shapes = {name: tuple(mask.shape) for name, mask in masks().items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert masks().counts() == as_allocation("erk").counts(shapes, sizes, Fraction("0.9"))
    for initial in ("0.3", "0.5", "0.899", "0.9"):  # no layer below its end, and the sum is exact
        start = masks(schedule="cubic", initial=initial)
        assert start.kept == count_kept(start.total, initial) and all(start.counts()[name] >= count for name, count in masks().counts().items())


# ---- odd cases ------------------------------------------------------------------------------------------------------------------
class Odd(nn.Module):
    "Two layers share a weight, and one is not used in every step."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.side = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.aside = True

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return x + self.side(x) if self.aside else x


def test_shared_and_unused_layers():
    model = Odd()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = DynamicPruner(model, optimizer, "0.75", steps=12, every=2, allocation="layer", fraction=0.5)
    def step(aside):
        model.aside = aside
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(pruner.t))).square().sum().backward()
        optimizer.step()
        pruner.step()
    step(True)
    plain = densify(copy.deepcopy(model))
    plain.zero_grad()
    plain.aside = False
    plain(torch.randn(4, 8, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    old, share = pruner.masks, 0.25 * (1 + math.cos(math.pi * 2 / 9))
    chosen = expected_update(model, {"first.weight": old["first.weight"]}, {"first.weight": plain.first.weight.grad}, share)
    step(False)
    assert torch.equal(pruner.masks["first.weight"], chosen["first.weight"]) and pruner.masks != old
    assert torch.equal(pruner.masks["side.weight"], old["side.weight"]), "a layer without a gradient keeps its places"
    assert torch.equal(model.first.mask, model.second.mask)


def test_no_gradient_at_all_postpones():
    model = small()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = DynamicPruner(model, optimizer, "0.8", steps=40, every=4)
    walk(model, optimizer, pruner, 3)
    old = pruner.masks
    optimizer.zero_grad()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
    backward(model, 4)
    model[0].weight.grad[0, 0, 0, 0] = math.nan
    masked = model[0].weight.grad[0, 0, 0, 0]
    pruner.layers["0.weight"].mask[0, 0, 0, 0] or masked.fill_(math.nan)
    state = copy.deepcopy(model.state_dict())
    assert pruner.masks is old and pruner.awaited
    model[0].weight.grad.nan_to_num_(0)
    optimizer.step()
    pruner.step()
    assert [line["step"] for line in pruner.history] == [0, 5] and not pruner.awaited
    assert torch.equal(state["1.weight"], model[1].weight)


def test_overflow_under_a_loss_scaler_postpones_and_keeps_zeros():
    for fused in (False, True):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        scaler, pruner = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10), DynamicPruner(model, optimizer, "0.8", steps=40, every=6, accumulate=2)
        while pruner.t < 14:
            optimizer.zero_grad()
            x, y = batch(pruner.t)
            scaler.scale(nn.functional.cross_entropy(model(x), y) * (math.inf if pruner.t + 1 in (6, 7, 11) else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            pruner.step()
            for layer in pruner.layers.values(): assert not layer.weight[layer.mask == 0].any() and layer.weight.isfinite().all()
        assert [line["step"] for line in pruner.history] == [0, 8, 12] and pruner.summed == 0


def test_a_closure_is_refused_only_where_it_would_spoil_an_update():
    model = small()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = DynamicPruner(model, optimizer, "0.8", steps=40, every=2)
    def closure():
        optimizer.zero_grad()
        backward(model, 0)
    optimizer.step(closure)
    pruner.step()
    with pytest.raises(ParameterError, match="computes gradients after the update was chosen"): optimizer.step(closure)
    with pytest.raises(ParameterError, match="step\\(\\) without a closure"): optimizer.step(closure=closure)


def test_custom_rules():
    "A drop score, a decay and a grow rule of one's own; a decay that leaves [0, 1] is refused."
    from sparsedarts.pruning.dynamic import Growth
    class Last(Growth):
        def wishes(self, layers, gradients, generator): return {name: torch.arange(layer.weight.numel(), dtype=torch.float32).view(layer.weight.shape) for name, layer in layers.items()}
    def first(model, layers, data=None, generator=None): return {name: -torch.arange(layer.weight.numel(), dtype=torch.float32).view(layer.weight.shape) for name, layer in layers.items()}
    model = small()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = DynamicPruner(model, optimizer, "0.8", steps=40, every=2, drop=first, grow=Last(), decay=lambda p: 1 - p, fraction=1.0)
    name, mask = next(iter(pruner.masks.items()))
    count = drop_count(1 - 2 / 30, int(mask.sum()))
    walk(model, optimizer, pruner, 2)
    places = mask.flatten().nonzero().flatten().tolist()
    kept = places[:len(places) - count]
    free = [i for i in range(mask.numel()) if i not in kept]
    assert pruner.masks[name].flatten().nonzero().flatten().tolist() == sorted(kept + free[-count:])
    wild = DynamicPruner(model := small(), optimizer := OPTIMIZERS["sgd"](model.parameters()), "0.8", steps=40, every=2, decay=lambda p: 9.0)
    with pytest.raises(ParameterError, match="fraction times decay must be a number of at least 0 and at most 1"): walk(model, optimizer, wild, 2)


# ---- in the engine --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits():
    return sd.load_data("digits")


def net(seed=0):
    torch.manual_seed(seed)
    return sd.resnet(8, in_channels=1, width=0.25)


class Stop:
    "Interrupts a training before its checkpoint of one step is written."
    def __init__(self, step): self.step = step
    def after_step(self, run):
        if run.step == self.step: raise KeyboardInterrupt


def differences(one, two, at=""):
    "Where two checkpoints differ, bit by bit; times are not compared."
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [d for key in one if key != "seconds" for d in differences(one[key], two[key], f"{at}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        return [d for i, pair in enumerate(zip(one, two)) for d in differences(*pair, f"{at}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor): return [] if one.dtype == two.dtype and torch.equal(one, two) else [at]
    return [] if type(one) is type(two) and one == two else [at]


VARIANTS = {
    "rigl": (rigl, dict(clip=1.0)),
    "averaged": (rigl, dict(accumulate=3, optimizer="adamw", lr=0.01)),
    "set": (set_training, dict()),
    "granet": (granet, dict(precision="bf16", initial=0.4)),
    "interlude": (dense_sparse_dense, dict()),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_resumed_is_the_same(variant, digits, tmp_path):
    "Whatever the last checkpoint is: before the window of an update, inside it, just after it."
    regime, options = VARIANTS[variant]
    options = dict(steps=24, exclude="head", checkpoint_every=1, evaluate_on=(), progress=False, **options) | ({} if regime is dense_sparse_dense else dict(every=6))
    def go(path, stop, seed=0): return regime(net(seed), digits, "0.8", checkpoint=path, callbacks=[Stop(stop)], **options)
    whole = go(tmp_path / "whole.pt", None)
    for i, stop in enumerate((5, 6, 10, 12)):  # the checkpoint that is left is of the step before; a later process has other initial weights
        with pytest.raises(KeyboardInterrupt): go(tmp_path / "run.pt", stop, seed=i)
    again = go(tmp_path / "run.pt", None, seed=9)
    assert not differences(load_checkpoint(tmp_path / "whole.pt"), load_checkpoint(tmp_path / "run.pt"))
    assert again.pruner.masks == whole.pruner.masks and again.pruner.history == whole.pruner.history
    with pytest.raises(CheckpointError, match="pruner was|belongs to another run"): regime(net(), digits, "0.7", checkpoint=tmp_path / "run.pt", callbacks=[Stop(None)], **options)


class Trace:
    "Weights and masks after every step."
    def __init__(self): self.weights, self.masks = [], []
    def after_step(self, run):
        self.weights.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        self.masks.append(masks_of(run.model))


def test_the_engine_needs_no_change(digits):
    "Under `train` an update takes the place of a step; all others are steps, and zeros stay zero."
    trace = Trace()
    result = rigl(net(), digits, "0.9", steps=24, every=5, clip=0.5, exclude="head", callbacks=[trace], evaluate_on=(), progress=False)
    assert [line["step"] for line in result.pruner.history] == [0, 5, 10, 15]
    for t in range(1, 24):
        before, after, mask = trace.weights[t - 1], trace.weights[t], trace.masks[t]
        replaced = t + 1 in (5, 10, 15)
        assert torch.equal(before["head.bias"], after["head.bias"]) == replaced
        assert (trace.masks[t - 1] != mask) == replaced
        for name, kept in mask.items():
            assert not after[name][kept == 0].any()
            if replaced: assert torch.equal(after[name], before[name] * kept)
    assert set(result.history["sparsity"]) == {result.pruner.sparsity}


def test_granet_ends_exactly_at_its_target(digits):
    for initial in (0, 0.5):
        result = granet(net(), digits, "0.95", initial=initial, steps=20, every=4, evaluate_on=(), progress=False)
        assert result.pruner.masks.kept == count_kept(result.pruner.masks.total, "0.95") and result.pruner.history[-1]["step"] == 15
        assert result.pruner.history[0]["realised"] == pytest.approx(initial, abs=1e-3) and sum(line["grown"] for line in result.pruner.history) > 0


# ---- iterative magnitude pruning ------------------------------------------------------------------------------------------------
@QUICK
@given(st.integers(0, 995), st.sampled_from([0.05, 0.2, 0.35, 0.5, 0.9]))
def test_rounds_remove_a_share_of_what_is_left(thousandths, rate):
    target = Fraction(thousandths, 1000)
    targets, left = round_targets(target, rate), 1 - Fraction(str(rate))
    assert targets[:-1] == [1 - left ** k for k in range(1, len(targets))] and targets[-1] == target
    assert all(one < two for one, two in zip(targets, targets[1:])) and 1 - left ** len(targets) >= target


class Watch:
    "Weights at the beginning and end of each training, and the learning rates."
    def __init__(self): self.begins, self.ends, self.rates = [], [], []
    def before_step(self, run):
        if run.step == 0: self.begins.append(copy.deepcopy(run.model.state_dict())), self.rates.append([])
        self.rates[-1].append(run.optimizer.param_groups[0]["lr"])
        if run.step == 0: assert not run.optimizer.state, "every round begins with a new optimiser"
    def after_step(self, run):
        if run.step == run.steps: self.ends.append(copy.deepcopy(run.model.state_dict()))


def equal(one, two): return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("rewind", ["weights", "learning-rate", "none"])
@pytest.mark.parametrize("step", [0, 4])
def test_iterative_pruning(rewind, step, digits):
    options = dict(lr=0.2, evaluate_on=(), progress=False)
    fresh, reached = sd.sparsify(net(), mode="hard"), {}
    class Reach:
        def before_step(self, run):
            if run.step == step: reached.update(copy.deepcopy(run.model.state_dict()))
    sd.train(fresh, digits, steps=10, callbacks=[Reach()], **options)
    watch = Watch()
    result = iterative_magnitude(net(), digits, "0.55", rewind=rewind, rewind_to=step, steps=10, callbacks=[watch], **options)
    total = result.masks[0].total
    assert [masks.kept for masks in result.masks] == [total, *(count_kept(total, 1 - Fraction(4, 5) ** k) for k in (1, 2, 3)), count_kept(total, "0.55")]
    assert result.history["kept"].tolist() == [masks.kept for masks in result.masks] and result.history["step"].tolist() == [10, *4 * [10 - step]]
    assert equal(result.snapshot, reached) and equal(watch.ends[0], fresh.state_dict())
    for k in range(1, 5):
        source = reached if rewind == "weights" else watch.ends[k - 1]
        assert equal(watch.begins[k], {name: value * result.masks[k].get(name, 1) for name, value in source.items()})
        assert (result.masks[k] & result.masks[k - 1]) == result.masks[k]
        strongest = {name: watch.ends[k - 1][name].abs() for name in result.masks[0]}
        kept = torch.cat([strongest[name][mask == 1] for name, mask in result.masks[k].items()]).min()
        gone = torch.cat([strongest[name][(result.masks[k - 1][name] == 1) & (mask == 0)] for name, mask in result.masks[k].items()]).max()
        assert kept >= gone, "the smallest of those that were left go"
        cosine = [0.2 * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(step, 10)]
        assert watch.rates[k] == pytest.approx(cosine if rewind != "none" else (10 - step) * [0.1 * (1 + math.cos(0.9 * math.pi))])
    assert masks_of(result.model) == result.masks[-1]


def test_iterative_pruning_killed_in_any_round(digits, tmp_path):
    options = dict(steps=6, rewind_to=2, checkpoint_every=2, evaluate_on=(), progress=False)
    class Fuse:
        "Interrupts after so many steps, whichever round they are in."
        def __init__(self, steps): self.left = steps
        def after_step(self, run):
            self.left -= 1
            if self.left == 0: raise KeyboardInterrupt
    def go(folder, steps, seed=0): return iterative_magnitude(net(seed), digits, "0.5", checkpoint=folder, callbacks=[Fuse(steps)], **options)
    whole = go(tmp_path / "whole", math.inf)
    rng, times = random.Random(1), 0
    while True:
        times += 1
        try: again = go(tmp_path / "killed", rng.randint(3, 7), seed=times - 1)
        except KeyboardInterrupt: continue
        break
    assert times >= 4 and equal(again.model.state_dict(), whole.model.state_dict()) and again.masks == whole.masks and equal(again.snapshot, whole.snapshot)
    assert again.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["rounds.pt"]
    with pytest.raises(CheckpointError, match="sparsity was '1/2', now '3/5'"):
        iterative_magnitude(net(), digits, "0.6", checkpoint=tmp_path / "killed", callbacks=[Fuse(0)], **options)


# ---- dense, sparse, dense -------------------------------------------------------------------------------------------------------
def test_released_weights_return_at_zero_with_zero_state(digits):
    seen = {}
    class Look:
        def after_step(self, run):
            layer = masked_layers(run.model)["stem.conv.weight"]
            state = run.optimizer.state[layer.weight]["momentum_buffer"]
            seen[run.step] = (layer.weight.detach().clone(), state.clone(), layer.mask.clone(), run.optimizer.param_groups[0]["lr"])
    result = dense_sparse_dense(net(), digits, "0.5", start=0.5, end=0.75, steps=20, lr=0.1, lr_schedule="constant", callbacks=[Look()], evaluate_on=(), progress=False)
    cut = seen[10][2] == 0
    assert int(cut.sum()) == cut.numel() // 2 and not (seen[9][2] == 0).any() and [line["step"] for line in result.pruner.history] == [10, 15]
    for t in range(10, 15): assert torch.equal(seen[t][2] == 0, cut) and not seen[t][0][cut].any() and not seen[t][1][cut].any()
    assert seen[15][2].all() and not seen[15][0][cut].any() and not seen[15][1][cut].any(), "released, still zero"
    assert seen[16][0][cut].all() and result.pruner.sparsity == 0
    assert [seen[t][3] for t in (1, 10, 11, 15, 16, 20)] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    counts = {name: int(mask.count_nonzero()) for name, mask in result.pruner.masks.items()}
    assert counts == {name: mask.numel() for name, mask in result.pruner.masks.items()}


# ---- errors ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, message", [
    (dict(evry=3), "unknown option 'evry'; did you mean 'every'"),
    (dict(grow="gradients"), "unknown grow rule 'gradients'"),
    (dict(drop="magnitud"), "unknown score 'magnitud'"),
    (dict(fraction=2), "fraction must be a number of at least 0 and at most 1"),
    (dict(decay="cos"), "unknown decay 'cos'"),
    (dict(allocation="unit-local"), "weights move anywhere in their layer"),
    (dict(schedule="cyclical"), "a density schedule rises once"),
    (dict(initial=0.5), "add schedule='cubic' or leave initial out"),
    (dict(every=0), "every must be a whole number of at least 1"),
    (dict(every=20), "no weight would ever move"),
    (dict(accumulate=5), "accumulate must be a whole number of at least 1 and at most 4"),
])
def test_wrong_options_are_refused_before_anything_is_touched(options, message, digits):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ParameterError, UnknownName)) as caught: train_dynamic(model, digits, "0.8", **{"steps": 20, "every": 4, "progress": False, **options})
    assert message in str(caught.value)
    assert equal(model.state_dict(), before) and not masked_layers(model)


def test_a_frozen_layer_is_named():
    model = small()
    model[3].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ParameterError, match="'3.weight' for one, are trained by none of the given optimisers"): DynamicPruner(model, optimizer, "0.8", steps=40, every=4)
    assert DynamicPruner(model, optimizer, "0.8", steps=40, every=4, exclude="3").masks.kept == count_kept(108 + 180, "0.8")


def test_state_survives_only_equal_settings():
    def pruner(**options):
        model = small()
        return DynamicPruner(model, OPTIMIZERS["sgd"](model.parameters()), "0.8", **{"steps": 40, "every": 4, **options})
    state = pruner().state_dict()
    pruner().load_state_dict(state)
    for options, name in ((dict(steps=44), "schedule"), (dict(every=5), "schedule"), (dict(end=0.5), "schedule"), (dict(schedule="linear", initial="0.8"), "schedule"),
                          (dict(grow="random"), "grow"), (dict(drop="random"), "drop"), (dict(fraction=0.2), "fraction"), (dict(decay="linear"), "decay"),
                          (dict(allocation="layer"), "allocation"), (dict(accumulate=2), "accumulate"), (dict(seed=1), "seed"), (dict(exclude="3"), "layers")):
        with pytest.raises(CheckpointError, match=f"the saved pruner has {name} "): pruner(**options).load_state_dict(state)
