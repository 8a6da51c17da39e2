"""Exact counts and ties under every allocation, the published allocation tables, schedules, and Union Mask's invariants."""
import math
import os
import subprocess
import sys
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from sparsedarts.core import ParameterError, count_kept, count_removed
from sparsedarts.pruning.allocation import UniformPlus, allocations, as_allocation, emptied, erk_densities, lamp_scores, round_counts, select, spread, top_up
from sparsedarts.pruning.combine import combinations
from sparsedarts.pruning.oneshot import prune
from sparsedarts.pruning.pruners import Pruner
from sparsedarts.pruning.schedules import begins, peak, schedules
from sparsedarts.pruning.selection import SMALL, check_scores, order_keys, top_masks, top_rows
from sparsedarts.sparse.layers import masks_of

QUICK = settings(deadline=None, max_examples=60)
SPARSITIES = ("0", "0.5", "0.9", "0.95", "0.98", "0.999")


# ---- exact selection ------------------------------------------------------------------------------------------------------------
def by_sorting(layers, keep):
    "The definition: a stable sort of everything, lower indices first."
    flat = torch.cat([scores.flatten().double() for scores in layers.values()])
    mask = torch.zeros(len(flat), dtype=torch.uint8)
    mask[flat.argsort(descending=True, stable=True)[:keep]] = 1
    return mask


@st.composite
def some_layers(draw):
    "A few layers of few distinct values, so that ties are everywhere, or of any finite floats."
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    value = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1.0]) if draw(st.booleans()) else st.floats(-1e4, 1e4)
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    return {f"layer{i}": torch.tensor(draw(st.lists(value, min_size=n, max_size=n)), dtype=torch.float64).to(dtype) for i, n in enumerate(sizes)}


@QUICK
@given(some_layers(), st.data())
def test_top_masks_are_a_stable_sort(layers, data):
    total = sum(len(scores) for scores in layers.values())
    for keep in {0, 1, min(len(layers), total), total, data.draw(st.integers(0, total))}:
        masks = top_masks(layers, keep)
        assert torch.equal(torch.cat(list(masks.values())), by_sorting(layers, keep))


@QUICK
@given(some_layers(), st.data())
def test_pool_is_respected(layers, data):
    pool = {name: torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=len(scores), max_size=len(scores))), dtype=torch.uint8) for name, scores in layers.items()}
    members = sum(int(mask.sum()) for mask in pool.values())
    keep = data.draw(st.integers(0, members))
    masks = top_masks(layers, keep, pool)
    assert sum(int(mask.sum()) for mask in masks.values()) == keep
    assert all(bool((masks[name] <= pool[name]).all()) for name in pool)
    kept = [float(value) for name in layers for value in layers[name][masks[name].bool()]]
    left = [float(value) for name in layers for value in layers[name][(pool[name] - masks[name]).bool()]]
    assert not kept or not left or min(kept) >= max(left)


@pytest.mark.parametrize("values", ["normal", "signed", "equal", "narrow", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_radix_path_on_many_scores(values, dtype):
    "More than fits the sorted remainder, so that every digit is counted."
    n = 3 * SMALL
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = {"normal": noise.abs(), "signed": noise, "equal": torch.ones_like(noise), "narrow": 1 + 1e-7 * noise, "two": (noise > 0.5).double()}[values].to(dtype)
    layers = {"a": scores[:100], "b": scores[100:]}
    for keep in (0, 1, 99, n // 10, n // 2, n - 1, n):
        assert torch.equal(torch.cat(list(top_masks(layers, keep).values())), by_sorting(layers, keep))


@QUICK
@given(st.data())
def test_rows_keep_exactly_their_counts(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    scores = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=rows * columns, max_size=rows * columns))).view(rows, columns)
    keep = torch.tensor(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    mask = top_rows(scores, keep)
    assert torch.equal(mask.sum(1), keep)
    for row in range(rows): assert torch.equal(mask[row], by_sorting({"": scores[row]}, int(keep[row])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ties_go_by_index(dtype):
    scores = torch.linspace(0, 1, 5000).to(dtype)  # far more scores than values
    mask = top_masks({"w": scores}, 2500)["w"]
    assert int(mask.sum()) == 2500
    lowest = scores[mask.bool()].min()
    inside = (scores == lowest).nonzero().flatten()
    wanted = int(mask[inside].sum())
    assert mask[inside].tolist() == [1] * wanted + [0] * (len(inside) - wanted)


def test_signed_scores_are_not_shifted():
    "Signed scores over 70 orders of magnitude: subtracting the minimum would make most of them equal."
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(100_000, generator=generator) * 10.0 ** torch.randint(-35, 35, (100_000,), generator=generator)
    assert torch.equal(top_masks({"w": scores}, 40_000)["w"], by_sorting({"w": scores}, 40_000))
    assert torch.equal(order_keys(scores).argsort(stable=True), scores.argsort(stable=True))


def test_wide_and_narrow_layers_compete_as_equals():
    layers = {"half": torch.tensor([1.0, 0.5], dtype=torch.float16), "double": torch.tensor([1.0 + 1e-12, 0.5 - 1e-12], dtype=torch.float64)}
    assert {name: mask.tolist() for name, mask in top_masks(layers, 3).items()} == {"half": [1, 1], "double": [1, 0]}


# ---- allocation -----------------------------------------------------------------------------------------------------------------
@QUICK
@given(st.lists(st.tuples(st.integers(1, 40), st.fractions(0, 1)), min_size=1, max_size=6), st.data())
def test_rounding_is_exact_and_within_bounds(layers, data):
    sizes = {str(i): size for i, (size, _) in enumerate(layers)}
    shares = {str(i): size * share for i, (size, share) in enumerate(layers)}
    total = data.draw(st.integers(0, sum(sizes.values())))
    counts = round_counts(shares, total, sizes)
    assert sum(counts.values()) == total and all(0 <= counts[name] <= sizes[name] for name in sizes)


@QUICK
@given(st.lists(st.integers(0, 30), min_size=1, max_size=10), st.data())
def test_spread_is_exact_and_within_capacity(capacity, data):
    total = data.draw(st.integers(0, sum(capacity)))
    handed = spread(total, torch.tensor(capacity))
    assert int(handed.sum()) == total and bool((handed >= 0).all()) and bool((handed <= torch.tensor(capacity)).all())


@st.composite
def networks(draw):
    "Shapes of convolutions and linear layers, with scores full of ties."
    shapes = {}
    for i in range(draw(st.integers(1, 4))):
        shapes[f"conv{i}"] = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), *(draw(st.sampled_from([(1, 1), (3, 3), (1, 3)]))))
    shapes["fc"] = (draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    levels = draw(st.sampled_from([1, 3, 1000]))
    return shapes, {name: torch.randint(0, levels, shape, generator=generator).to(draw(st.sampled_from([torch.float16, torch.float32]))) for name, shape in shapes.items()}


@pytest.mark.parametrize("allocation", list(allocations))
@settings(deadline=None, max_examples=40)
@given(networks(), st.sampled_from(SPARSITIES) | st.floats(0, 0.999).map(str), st.data())
def test_every_allocation_is_exact_nested_and_tied_by_index(allocation, network, sparsity, data):
    (shapes, items), total = network, sum(math.prod(shape) for shape in network[0].values())
    try: masks = select(items, shapes, sparsity, allocation)
    except ParameterError:
        assert allocation == "uniform+"
        least = UniformPlus().least(shapes, {name: scores.numel() for name, scores in items.items()})
        assert count_kept(total, sparsity) < sum(least.values())
        return
    assert sum(int(mask.sum()) for mask in masks.values()) == total - count_removed(total, sparsity)
    for name, mask in masks.items():  # inside a layer (or row) nothing left is better, and of equals the lower index is kept
        groups = zip(mask.flatten(1), items[name].flatten(1)) if as_allocation(allocation).rows else [(mask.flatten(), items[name].flatten())]
        for kept, scores in groups: assert torch.equal(kept, by_sorting({"": scores}, int(kept.sum())))
    between = data.draw(st.floats(0, float(Fraction(sparsity))).map(str))  # a ramp inside a pool is nested and ends at the same counts
    first = select(items, shapes, between, allocation, final=sparsity)
    second = select(items, shapes, sparsity, allocation, pool=first)
    assert sum(int(mask.sum()) for mask in first.values()) == count_kept(total, between)
    assert all(bool((second[name] <= first[name]).all()) for name in first)
    if as_allocation(allocation).counts(shapes, {name: s.numel() for name, s in items.items()}, Fraction(sparsity)):
        assert {name: int(mask.sum()) for name, mask in second.items()} == {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.mark.parametrize("allocation", [name for name in allocations if name != "uniform+"])
@settings(deadline=None, max_examples=30)
@given(networks(), st.sampled_from(SPARSITIES), st.data())
def test_a_pool_is_topped_up_to_its_target(allocation, network, sparsity, data):
    shapes, items = network
    seed = data.draw(st.integers(0, 99))
    pool = {name: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1).to(torch.uint8) for name, shape in shapes.items()}
    wide = top_up(pool, items, shapes, sparsity, allocation)
    masks = select(items, shapes, sparsity, allocation, pool=wide)
    assert all(bool((wide[name] >= pool[name]).all() and (masks[name] <= wide[name]).all()) for name in pool)
    assert sum(int(mask.sum()) for mask in masks.values()) == count_kept(sum(s.numel() for s in items.values()), sparsity)


@QUICK
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(1e-30, 1e30))
def test_lamp_ranks_a_layer_as_its_scores_do(values, scale):
    scores = torch.tensor(values, dtype=torch.float64) * scale
    lamp = lamp_scores(scores)
    assert torch.equal(lamp.argsort(descending=True, stable=True), scores.argsort(descending=True, stable=True))
    assert float(lamp.max()) == (1.0 if max(values) else 0.0)


def test_lamp_and_erk_empty_no_layer_where_global_does():
    generator = torch.Generator().manual_seed(0)
    shapes = resnet32()
    items = {name: torch.randn(shape, generator=generator).abs() * (1e-3 if "2." in name else 1) for name, shape in shapes.items()}
    assert emptied(select(items, shapes, "0.98", "global")) and not emptied(select(items, shapes, "0.98", "erk"))
    masks = select(items, shapes, Fraction(1_867_104 - 34, 1_867_104), "lamp")
    assert {int(mask.sum()) for mask in masks.values()} == {1}, "34 weights for 34 layers: one each"


# ---- published tables -----------------------------------------------------------------------------------------------------------
def resnet32(widths=(32, 64, 128), classes=100, shortcuts=True):
    "Shapes of a CIFAR ResNet-32, as the original and GraSP build it (or He's, with other widths and no shortcut weights)."
    given, shapes = widths[0], {"stem": (widths[0], 3, 3, 3)}
    for stage, width in enumerate(widths):
        for block in range(5):
            shapes[f"{stage}.{block}.conv1"] = (width, given, 3, 3)
            shapes[f"{stage}.{block}.conv2"] = (width, width, 3, 3)
            if shortcuts and given != width: shapes[f"{stage}.{block}.shortcut"] = (width, given, 1, 1)
            given = width
    return shapes | {"fc": (classes, widths[-1])}


def vgg19(classes=100):
    widths = [3, 64, 64, 128, 128] + [256] * 4 + [512] * 8
    return {f"conv{i}": (out, given, 3, 3) for i, (given, out) in enumerate(zip(widths, widths[1:]))} | {"fc": (classes, 512)}


def resnet50():
    "Name -> (shape, side of the output map) of ResNet-50 at 224x224."
    layers, given, side = {"stem": ((64, 3, 7, 7), 112)}, 64, 56
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512))):
        for block in range(blocks):
            before = side
            if block == 0 and stage: side //= 2
            layers[f"{stage}.{block}.1"] = ((width, given, 1, 1), before)
            layers[f"{stage}.{block}.2"] = ((width, width, 3, 3), side)
            layers[f"{stage}.{block}.3"] = ((4 * width, width, 1, 1), side)
            if block == 0: layers[f"{stage}.{block}.shortcut"] = ((4 * width, given, 1, 1), side)
            given = 4 * width
    return layers | {"fc": ((1000, 2048), 1)}


ERK_RESNET32 = {  # layer -> density at 10, 5 and 2 % of the weights of the doubled ResNet-32, 100 classes
    "stem": (1, 0.864400, 0.345760), "0.0.conv1": (0.279992, 0.138357, 0.055343), "1.0.conv1": (0.203994, 0.100803, 0.040321),
    "1.0.conv2": (0.133996, 0.066214, 0.026485), "1.0.shortcut": (1, 0.871647, 0.348659), "2.0.conv1": (0.098997, 0.048919, 0.019568),
    "2.4.conv2": (0.065498, 0.032366, 0.012946), "2.0.shortcut": (0.872974, 0.431376, 0.172551), "fc": (0.656620, 0.324466, 0.129786)}
ERK_VGG19 = {"conv0": (1, 1, 1), "conv1": (0.675066, 0.328391, 0.130484), "conv3": (0.329976, 0.160519, 0.063781),
             "conv5": (0.163099, 0.079341, 0.031525), "conv15": (0.081077, 0.039441, 0.015671), "fc": (1, 1, 0.429077)}
ERK_HE = {"stem": (1, 0.542094, 0.216339), "0.0.conv1": (0.313696, 0.154497, 0.061657), "1.0.conv2": (0.144465, 0.071150, 0.028395),
          "2.4.conv2": (0.069137, 0.034050, 0.013589), "fc": (1, 1, 0.432246)}


@pytest.mark.parametrize("shapes, weights, table", [(resnet32(), 1_867_104, ERK_RESNET32), (vgg19(), 20_070_080, ERK_VGG19),
                                                    (resnet32((16, 32, 64), 10, shortcuts=False), None, ERK_HE)], ids=["resnet32x2", "vgg19", "he-resnet32"])
def test_erk_densities_are_the_published_ones(shapes, weights, table):
    if weights: assert sum(math.prod(shape) for shape in shapes.values()) == weights
    for column, density in enumerate(("0.10", "0.05", "0.02")):
        densities = erk_densities(shapes, density)
        assert {name: round(float(densities[name]), 6) for name in table} == {name: row[column] for name, row in table.items()}
        assert sum(densities[name] * math.prod(shape) for name, shape in shapes.items()) == Fraction(density) * sum(math.prod(shape) for shape in shapes.values())


def test_erk_scales_and_dense_sets():
    expected = {"0.10": (36.862896109, {"stem", "1.0.shortcut"}), "0.05": (18.215648780, set()), "0.02": (7.286259512, set())}
    shapes = resnet32()
    for density, (scale, dense) in expected.items():
        densities = erk_densities(shapes, density)
        found = densities["2.4.conv2"] * Fraction(math.prod(shapes["2.4.conv2"]), sum(shapes["2.4.conv2"]))
        assert round(float(found), 9) == scale and {name for name, value in densities.items() if value == 1} == dense


def test_erk_of_resnet50_costs_what_rigl_reports():
    layers = resnet50()
    shapes = {name: shape for name, (shape, _) in layers.items()}
    macs = {name: math.prod(shape) * side * side for name, (shape, side) in layers.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(sizes.values()) == 25_502_912 and round(sum(macs.values()) / 1e9, 3) == 4.089
    erk, uniform = [], []
    for sparsity in ("0.8", "0.9", "0.95", "0.965"):
        densities = erk_densities(shapes, 1 - Fraction(sparsity))
        erk.append(round(float(sum(densities[name] * macs[name] for name in macs)) / sum(macs.values()), 4))
        rest = 1 - float(sparsity)
        uniform.append(round(sum(macs[name] * (1 if name == "stem" else rest) for name in macs) / sum(macs.values()), 4))
    assert erk == [0.4138, 0.2418, 0.1217, 0.0852] and uniform == [0.2231, 0.1260, 0.0774, 0.0628]


@pytest.mark.parametrize("sparsity, published", [("0.8", 23.683), ("0.9", 13.499), ("0.95", 8.399)])
def test_erk_of_resnet50_weighs_what_rigl_reports(sparsity, published):
    "Megabytes of the kept weights, a bit mask of the layers that are not dense, and 27,560 other parameters."
    shapes = {name: shape for name, (shape, _) in resnet50().items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = allocations["erk"]().counts(shapes, sizes, Fraction(sparsity))
    masked = sum(size for name, size in sizes.items() if counts[name] < size)
    assert abs((4 * sum(counts.values()) + masked / 8 + 4 * 27_560) / 1e6 - published) < 1.1e-3


@pytest.mark.parametrize("allocation", ["layer", "erk", "uniform+"])
@pytest.mark.parametrize("shapes", [resnet32(), vgg19()], ids=["resnet32", "vgg19"])
def test_real_networks_sum_exactly(allocation, shapes):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for sparsity in ("0.5", "0.9", "0.95", "0.98"):
        counts = allocations[allocation]().counts(shapes, sizes, Fraction(sparsity))
        assert sum(counts.values()) == count_kept(sum(sizes.values()), sparsity) and all(0 < counts[name] <= sizes[name] for name in sizes)


# ---- schedules and pruners ------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(schedules)), st.integers(20, 400), st.integers(1, 60), st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.6, 0.75, 1.0]), st.sampled_from(["0", "0.9", "0.98"]))
def test_schedules_end_exactly_at_their_target(name, steps, every, cycles, start, end, target):
    cycles = 1 if name == "one-shot" else min(cycles, 3)
    schedule = schedules[name](target, steps, start, end, every, cycles)
    peaks = [t for t in range(steps + 1) if peak(schedule, t) is not None]
    assert len(peaks) == cycles and peaks[-1] == schedule.last and all(schedule.due(t) and schedule(t) == float(target) for t in peaks)
    assert all(0 <= schedule(t) <= float(target) for t in range(steps + 1)) and schedule(steps) == float(target)
    assert [t for t in range(steps + 1) if begins(schedule, t) is not None and t <= schedule.first] == []


def train(options, steps=40, seed=0):
    "A small network under a pruner; the pruner and its masks after every step."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner, trace = Pruner(model, optimizer, steps=steps, **options), []
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(torch.randn(8, 2, 4, 4)), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pruner.step()
            trace.append(pruner.masks)
    return pruner, trace, model


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([name for name in schedules if name != "one-shot"]), st.sampled_from([name for name in allocations if name != "uniform+"]), st.sampled_from([None, *combinations]),
       st.sampled_from(["soft", "hard"]), st.sampled_from(["0.5", "0.9", "0.97"]), st.integers(1, 9), st.integers(2, 4))
def test_cyclic_pruners_keep_their_promises(schedule, allocation, combine, mode, sparsity, every, cycles):
    if schedule == "cyclical-full": mode = "soft"
    pruner, trace, model = train(dict(sparsity=sparsity, schedule=schedule, allocation=allocation, combine=combine, mode=mode, every=every, cycles=cycles, end=0.9))
    keep = count_kept(150, sparsity)
    tops = [segment[1] for segment in pruner.schedule.segments if segment[2]]
    assert [trace[t - 1].kept for t in tops] == [keep] * cycles, "every cycle ends exactly at the target"
    assert all(masks == pruner.masks for masks in trace[pruner.schedule.last - 1:]) and masks_of(model) == pruner.masks, "frozen afterwards"
    assert pruner.saved == [trace[t - 1] for t in tops[:-1]]
    if combine: assert (pruner.masks & pruner.pool) == pruner.masks, "the end is inside the pool"
    begin = [segment[0] for segment in pruner.schedule.segments if segment[2]][-1]  # the last ramp; its first step installs the pool
    if combine == "union": assert pruner.pool == trace[begin] and all((masks & pruner.pool) == masks for masks in pruner.saved)


def test_prune_is_exact_on_real_shapes():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(shape[1], shape[0], shape[2:], bias=False) for shape in list(resnet32().values())[:-1]], nn.Linear(128, 100))
    for sparsity in ("0.9", "0.95", "0.98"):
        masks = prune(model, sparsity, allocation="erk")
        assert masks.total - masks.kept == count_removed(1_867_104, sparsity)


def test_equal_seeds_give_equal_masks_in_another_process():
    code = ("import torch, hashlib, sys\nfrom torch import nn\nfrom sparsedarts.pruning.oneshot import prune\ntorch.manual_seed(3)\n"
            "m = prune(nn.Sequential(nn.Conv2d(3, 9, 3), nn.Conv2d(9, 7, 3)), 0.7, score='random', allocation='erk', seed=5)\n"
            "print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in m.values())).hexdigest())")
    digests = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": n}).stdout for n in "12"}
    assert len(digests) == 1


def test_scores_of_many_weights_are_checked():
    scores = torch.ones(1_000_000)
    check_scores({"w": scores})
    scores[77] = float("nan")
    with pytest.raises(ArithmeticError, match="1 NaN or infinite values of 1000000 in layer 'w'"): check_scores({"w": scores})


def test_warnings_point_at_the_line_that_prunes():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1), torch.nn.LSTM(1, 1))
    torch.nn.init.constant_(model[1].weight, 1e-9)  # pruned away whole
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prune(model, 0.999)
    assert len(seen) == 2 and all(warning.filename == __file__ for warning in seen)
