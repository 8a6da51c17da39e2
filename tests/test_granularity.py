"""Items of every granularity against brute force, exact counts with ties, N:M under every allocation and schedule, rounds, FORCE and collapse."""
import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from sparsedarts.core import CollapseError, ParameterError, UnknownName, count_kept
from sparsedarts.pruning.allocation import UniformPlus, allocations, as_allocation, select
from sparsedarts.pruning.combine import combinations
from sparsedarts.pruning.granularity import NM, Block, as_granularity, granularities, reductions
from sparsedarts.pruning.oneshot import Criterion, capped_shares, check_informative, prefer, prune, round_sparsities, select_within, top_up_within
from sparsedarts.pruning.pruners import Pruner
from sparsedarts.pruning.scores import reduced_by
from sparsedarts.sparse.layers import masked_layers, masks_of, sparsify
from sparsedarts.sparse.masks import Masks

pytestmark = pytest.mark.filterwarnings("ignore::sparsedarts.pruning.allocation.CollapseWarning")
QUICK = settings(deadline=None, max_examples=40)
FREE = [name for name in allocations if name != "uniform+"]  # those that can share out any total
GRAINS = (*granularities, "2:4", "1:4", "4:8", Block(2, 3, "mean"), Block(3, 100, "l1"))


# ---- items ----------------------------------------------------------------------------------------------------------------------
def members(grain, shape):
    "By definition: the coordinates of the weights of each item, items in row-major order."
    cells = {}
    for index in range(math.prod(shape)):
        place, rest = [], index
        for size in reversed(shape): place, rest = [rest % size, *place], rest // size
        o, i, column = place[0], place[1], index % math.prod(shape[1:])
        if grain in ("weight", "2:4", "1:4", "4:8"): key = tuple(place)
        elif grain in ("unit", "filter"): key = (o,)
        elif grain == "kernel": key = (o, i)
        elif grain == "channel": key = (i,)
        else:
            block = as_granularity(grain)
            key = (o // block.rows, column // block.cols)
        cells.setdefault(key, []).append(index)
    return [cells[key] for key in sorted(cells)]


def joined(values, reduce):
    values = [float(value) for value in values]
    return {"l2": math.hypot(*values), "l1": sum(map(abs, values)), "sum": sum(values), "abs-sum": abs(sum(values)),
            "mean": sum(values) / len(values), "max": max(values)}[reduce]


SHAPES = st.sampled_from([(1, 8), (5, 8), (8, 16), (3, 8, 1, 1), (4, 8, 2, 3), (1, 16, 3, 1), (7, 8, 3, 3)])


@QUICK
@given(SHAPES, st.sampled_from(GRAINS), st.sampled_from(list(reductions)), st.sampled_from([torch.float16, torch.float64]), st.integers(0, 99))
def test_items_alive_and_expand_are_what_they_say(shape, grain, reduce, dtype, seed):
    made, generator = as_granularity(grain, reduce), torch.Generator().manual_seed(seed)
    cells = members(grain, shape)
    scores = torch.randn(shape, generator=generator).to(dtype)
    items, flat = made.items(scores), scores.flatten()
    assert items.numel() == len(cells)
    if isinstance(made, NM) or grain == "weight": assert torch.equal(items, scores)
    else:
        expected = torch.tensor([joined(flat[cell], made.reduce) for cell in cells], dtype=torch.float64)
        torch.testing.assert_close(items.flatten(), expected, rtol=1e-9, atol=1e-9)
    mask = (torch.rand(shape, generator=generator) < 0.1).to(torch.uint8)
    assert made.alive(mask).flatten().tolist() == [int(mask.flatten()[cell].any()) for cell in cells] and made.alive(mask).shape == items.shape
    kept = (torch.rand(items.shape, generator=generator) < 0.5).to(torch.uint8)
    wide, expected = made.expand(kept, torch.Size(shape)), torch.zeros(math.prod(shape), dtype=torch.uint8)
    for value, cell in zip(kept.flatten(), cells): expected[cell] = value
    assert torch.equal(wide, expected.view(shape)) and wide.dtype == torch.uint8 and wide.is_contiguous()
    assert torch.equal(made.alive(wide), kept), "and back again"


@pytest.mark.parametrize("allocation", ["global", "lamp", "layer", "unit-local", "erk"])
def test_kernels_of_a_linear_layer_are_its_weights(allocation):
    def mlp():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    assert prune(mlp(), "0.7", allocation=allocation, granularity="kernel") == prune(mlp(), "0.7", allocation=allocation)


# ---- N:M ------------------------------------------------------------------------------------------------------------------------
def groups_of(tensor, m): return tensor.movedim(1, -1).reshape(-1, m)


def best_of_groups(scores, n, m, pool=None):
    "By definition: in each group a stable sort, from the front."
    mask = torch.zeros_like(scores, dtype=torch.uint8)
    out, inputs, *rest = scores.shape
    for o in range(out):
        for place in range(math.prod(rest)):
            where = [place // rest[1], place % rest[1]] if rest else []
            for first in range(0, inputs, m):
                group = [i for i in range(first, first + m) if pool is None or pool[(o, i, *where)]]
                for i in sorted(group, key=lambda i: -float(scores[(o, i, *where)]))[:n]: mask[(o, i, *where)] = 1
    return mask


@st.composite
def tied_layers(draw, low=0):
    "Layers whose inputs divide by 4 and 8, with scores full of ties."
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    levels, dtype = draw(st.sampled_from([2, 3, 1000])), draw(st.sampled_from([torch.float16, torch.float64]))
    shape = st.sampled_from([(1, 8), (3, 16), (2, 8, 1, 1), (4, 8, 3, 1), (1, 16, 2, 2), (6, 8)])
    shapes = draw(st.lists(shape, min_size=1, max_size=3))
    return {f"layer{i}": (torch.randint(0, levels, shape, generator=generator) + low).to(dtype) for i, shape in enumerate(shapes)}


def shapes_in(items): return {name: tuple(scores.shape) for name, scores in items.items()}
def total(items): return sum(scores.numel() for scores in items.values())
def kept(masks): return sum(int(mask.sum()) for mask in masks.values())


@QUICK
@given(tied_layers(low=-1), st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (1, 8)]), st.booleans(), st.integers(0, 99))
def test_the_limit_is_the_best_n_of_each_group_by_index(layers, nm, pooled, seed):
    grain = NM(*nm)
    for scores in layers.values():
        pool = (torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.6).to(torch.uint8) if pooled else None
        limit = grain.limit(scores, pool)
        assert torch.equal(limit, best_of_groups(scores, *nm, pool)) and limit.is_contiguous()
        if not pooled: assert groups_of(limit, nm[1]).sum(1).unique().tolist() == [nm[0]]


@pytest.mark.parametrize("allocation", list(allocations))
@settings(deadline=None, max_examples=15)
@given(tied_layers(), st.sampled_from([(2, 4), (1, 4), (4, 8)]))
def test_at_its_own_sparsity_every_allocation_gives_exactly_n(allocation, items, nm):
    masks = select_within(NM(*nm), items, shapes_in(items), 1 - Fraction(*nm), allocation)
    for name, mask in masks.items(): assert torch.equal(mask, best_of_groups(items[name], *nm))


@pytest.mark.parametrize("allocation", FREE)
@settings(deadline=None, max_examples=15)
@given(tied_layers(), st.fractions(Fraction(1, 2), Fraction(99, 100)))
def test_above_it_the_choice_is_the_usual_one_inside_the_limit(allocation, items, sparsity):
    "The limit is a pool; where an allocation wants more of a layer than the pool holds, its counts are capped."
    grain, shapes = NM(2, 4), shapes_in(items)
    masks = select_within(grain, items, shapes, sparsity, allocation)
    limit = {name: grain.limit(scores) for name, scores in items.items()}
    assert kept(masks) == count_kept(total(items), sparsity) and all(bool((masks[name] <= limit[name]).all()) for name in items)
    counts = as_allocation(allocation).counts(shapes, {name: scores.numel() for name, scores in items.items()}, sparsity)
    if counts is None or all(counts[name] <= items[name].numel() // 2 for name in items):
        assert all(torch.equal(masks[name], mask) for name, mask in select(items, shapes, sparsity, allocation, pool=limit).items())


def test_lamp_counts_only_what_the_limit_lets_live():
    "The tail sums of LAMP run over the limit, so the layers compete as if the other weights were gone already."
    generator = torch.Generator().manual_seed(0)
    items = {"flat": torch.rand(16, 16, generator=generator) + 1, "peaked": torch.rand(16, 16, generator=generator) ** 4}
    grain, shapes = NM(1, 8), shapes_in(items)
    masks = select_within(grain, items, shapes, "0.9", "lamp")
    limit = {name: grain.limit(scores) for name, scores in items.items()}
    assert all(torch.equal(masks[name], mask) for name, mask in select(items, shapes, "0.9", "lamp", pool=limit).items())
    everywhere = select(prefer(as_allocation("lamp").rank(items), limit), shapes, "0.9")
    assert any(not torch.equal(masks[name], mask) for name, mask in everywhere.items()), "which is not the same as ranking all"


@QUICK
@given(tied_layers(), st.sampled_from(FREE), st.fractions(Fraction(1, 2), Fraction(99, 100)), st.integers(0, 99), st.floats(0, 1))
def test_pools_are_topped_up_to_the_limit(items, allocation, sparsity, seed, share):
    grain, shapes = NM(2, 4), shapes_in(items)
    pool = {name: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).to(torch.uint8) for name, shape in shapes.items()}
    wide = top_up_within(grain, pool, items, shapes, sparsity, allocation)
    masks = select_within(grain, items, shapes, sparsity, allocation, pool=wide)
    for name, mask in masks.items():
        assert bool((pool[name] <= wide[name]).all() and (mask <= wide[name]).all()) and groups_of(mask, 4).sum(1).max() <= 2
    assert kept(masks) == count_kept(total(items), sparsity)
    if allocation in ("global", "lamp"):  # no more than what is missing
        inside = sum(int(grain.limit(items[name], mask).sum()) for name, mask in pool.items())
        assert kept(wide) - kept(pool) == max(0, count_kept(total(items), sparsity) - inside)


@QUICK
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=6))
def test_capped_shares_keep_their_sum(layers):
    counts = {str(i): min(count, size + room) for i, (count, size) in enumerate(layers) for room in [3]}
    room = {str(i): size for i, (_, size) in enumerate(layers)}
    shares = capped_shares(counts, room)
    assert all(0 <= shares[name] <= room[name] for name in room)
    if sum(counts.values()) <= sum(room[name] for name in room if counts[name]): assert sum(shares.values()) == sum(counts.values())


@QUICK
@given(tied_layers(low=-1), st.integers(0, 99))
def test_preference_comes_before_score_and_keeps_order_and_ties(items, seed):
    generator = torch.Generator().manual_seed(seed)
    first = {name: (torch.rand(scores.shape, generator=generator) < 0.5).to(torch.uint8) for name, scores in items.items()}
    ranks = torch.cat([values.flatten() for values in prefer(items, first).values()]).tolist()
    keys = [(int(mark), float(score)) for name in items for mark, score in zip(first[name].flatten(), items[name].flatten())]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for a, b in zip(order, order[1:]): assert (ranks[a] == ranks[b]) if keys[a] == keys[b] else (ranks[a] < ranks[b])


def test_errors_of_n_to_m_name_layers_and_remedies():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Linear(16, 10))
    uneven = r"multiple of 4: 0\.weight has 3, 1\.weight has 1; use exclude=\['0\.weight', '1\.weight'\]"
    with pytest.raises(ParameterError, match=uneven): prune(model, 0.5, granularity="2:4")
    with pytest.raises(ParameterError, match=uneven): Pruner(model, torch.optim.SGD(model.parameters(), 0.1), 0.5, steps=9, granularity="2:4")
    excluded = ["0.weight", "1.weight"]  # what the message says can be pasted
    few = "1:4 keeps at most 25 % of a layer, and sparsity 0.5 would keep 144 of 288 items: use a sparsity of at least 0.75, or exclude"
    with pytest.raises(ParameterError, match=few): prune(model, 0.5, granularity="1:4", exclude=excluded)
    masks = prune(model, 0.5, granularity="2:4", exclude=excluded)
    assert masks.kept == 144 and all(groups_of(mask, 4).sum(1).eq(2).all() for mask in masks.values())
    assert prune(nn.Sequential(nn.Linear(9, 2)), "2/3", granularity="1:3").kept == 6


# ---- exact counts on networks -----------------------------------------------------------------------------------------------------
def net(seed=0, kind="mixed"):
    "Grouped and depthwise convolutions, a 1x1, a layer of one output; 8 inputs everywhere but in the depthwise layer."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, (3, 1), groups=2), nn.ReLU(),
                          nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    if kind == "half": model = model.half()
    if kind == "double": model = model.double()
    if kind == "tied":
        with torch.no_grad(): [weight.copy_(weight.sign() * (weight.abs() > 0.1)) for weight in model.parameters()]
    return model


def sizes_of(grain, exclude=()):
    layers = {name: layer for name, layer in masked_layers(sparsify(net())).items() if name not in exclude}
    return {name: items.numel() for name, items in Criterion(granularity=grain).items(None, layers).items()}


@pytest.mark.parametrize("grain", GRAINS, ids=repr)
@settings(deadline=None, max_examples=12)
@given(st.sampled_from([name for name in allocations if name != "unit-local"]), st.sampled_from(["mixed", "half", "double", "tied"]),
       st.sampled_from(["0", "1", "L", "N", "some"]), st.floats(0, 1))
def test_every_granularity_and_allocation_is_exact_in_items(grain, allocation, kind, which, share):
    exclude = ["4.weight"] if isinstance(as_granularity(grain), NM) else []
    sizes = sizes_of(grain, exclude)
    n = sum(sizes.values())
    most = int(as_granularity(grain).most * n)
    keep = {"0": 0, "1": 1, "L": len(sizes), "N": most, "some": int(share * most)}[which]
    sparsity = Fraction(n - keep, n) if keep else Fraction(2 * n - 1, 2 * n)
    criterion, model = Criterion(granularity=grain), net(kind=kind)
    try: masks = prune(model, sparsity, allocation=allocation, granularity=grain, exclude=exclude or None)
    except ParameterError as error:
        assert allocation == "uniform+" and "cannot keep" in str(error) and not masked_layers(model)
        shapes = {name: tuple(model.get_parameter(name).shape) for name in sizes}
        assert keep < sum(UniformPlus().least(shapes, sizes).values())
        return
    alive = criterion.alive(masks)
    layers = {name: layer for name, layer in masked_layers(model).items() if name in masks}
    assert kept(alive) == keep and criterion.expand(alive, layers) == masks == masks_of_some(model, masks)
    assert all(not layer.weight[layer.mask == 0].any() for layer in masked_layers(model).values())
    if allocation == "global" and not exclude:  # a stable sort of all items
        items = criterion.items(None, {name: layer for name, layer in masked_layers(sparsify(net(kind=kind))).items()})
        order = torch.cat([values.flatten().double() for values in items.values()]).argsort(descending=True, stable=True)
        assert torch.equal(torch.cat([mask.flatten() for mask in alive.values()]).nonzero().flatten(), order[:keep].sort().values)
    if keep > 1:  # again, inside what is left
        less = Fraction(n - keep // 2, n)
        try: further = prune(model, less, score="random", granularity=grain, exclude=exclude or None)
        except CollapseError: return
        assert kept(criterion.alive(further)) == keep // 2 and (further & masks) == further


def masks_of_some(model, masks): return Masks({name: mask for name, mask in masks_of(model).items() if name in masks})


@pytest.mark.parametrize("grain", ["weight", "kernel", "2:4", "block"])
def test_unit_local_shares_out_the_items_of_each_unit(grain):
    exclude = ["4.weight"] if grain == "2:4" else None
    masks = prune(net(), "0.5", "random", "unit-local", grain, exclude=exclude)
    for name, items in Criterion(granularity=grain).alive(masks).items():
        counts = items.flatten(1).sum(1)
        assert counts.max() - counts.min() <= 1 + (grain == "block"), name
    for coarse in ("unit", "channel"):
        with pytest.raises(ParameterError, match="use granularity='weight' or allocation='layer'"):
            prune(net(), "0.5", allocation="unit-local", granularity=coarse)


@pytest.mark.parametrize("grain", ["unit", "kernel", "channel", "block", "2:4"])
def test_another_granularity_stays_inside_hard_masks(grain):
    model = net()
    first = prune(model, "0.3", "random", exclude="4")
    second = prune(model, "0.8", granularity=grain, exclude="4")
    assert (first & second) == second
    alive = Criterion(granularity=grain).alive(second)
    assert kept(alive) == count_kept(sum(items.numel() for items in alive.values()), "0.8")
    if grain == "2:4": assert all(groups_of(mask, 4).sum(1).max() <= 2 for mask in second.values())


def test_the_score_says_how_it_is_reduced():
    @reduced_by("sum")
    def signed(model, layers, data=None, generator=None): return {name: layer.weight.detach() for name, layer in layers.items()}
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad(): model.weight.copy_(torch.tensor([[-9., 1.], [1., 1.]]))
    assert prune(nn.Sequential(model), 0.5, signed, granularity="unit")["0.weight"].tolist() == [[0, 0], [1, 1]]
    def plain(model, layers, data=None, generator=None): return signed(model, layers)
    plain.reduce = "l3"
    with pytest.raises(UnknownName, match="unknown reduce 'l3'"): prune(nn.Linear(2, 2), 0.5, plain, granularity="unit")


# ---- gradual N:M ----------------------------------------------------------------------------------------------------------------
def train(options, steps=40, seed=0):
    "A small network under a pruner; the pruner, its masks after every step, the network."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    pruner, trace = Pruner(model, optimizer, steps=steps, **options), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 4, 5, 5)), torch.randint(0, 3, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        trace.append(pruner.masks)
    return pruner, trace, model


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("allocation", FREE)
@pytest.mark.parametrize("sparsity", ["0.5", "0.75", "0.9"])
def test_a_ramp_passes_the_limit_and_ends_inside_it(mode, allocation, sparsity):
    pruner, trace, model = train(dict(sparsity=sparsity, schedule="cubic", granularity="2:4", mode=mode, allocation=allocation, every=2, end=0.8))
    n = pruner.masks.total
    scheduled = {line["step"]: line["scheduled"] for line in pruner.history}
    for t, masks in enumerate(trace, 1):
        groups = {name: groups_of(mask, 4).sum(1) for name, mask in masks.items()}
        if t in scheduled: assert abs(masks.kept - n * (1 - scheduled[t])) <= 0.5 + 1e-6, "exact at every step"
        for name, counts in groups.items():
            where = counts if allocation != "global" else torch.cat(list(groups.values()))
            if allocation == "lamp": where = torch.cat(list(groups.values()))
            if allocation == "unit-local": continue
            full = int(where.sum()) >= 2 * len(where)
            assert bool((where >= 2).all() if full else (where <= 2).all()), (t, name)
        if mode == "hard" and t > 1: assert (masks & trace[t - 2]) == masks, "nested"
    final = torch.cat([groups_of(mask, 4).sum(1) for mask in pruner.masks.values()])
    assert final.max() <= 2 and pruner.masks.kept == count_kept(n, sparsity) and masks_of(model) == pruner.masks
    if sparsity == "0.5": assert final.unique().tolist() == [2]
    assert any(masks.density > 0.5 for masks in trace) and len({masks.kept for masks in trace}) > 5


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(list(combinations)), st.sampled_from(FREE), st.sampled_from(["soft", "hard"]), st.sampled_from(["0.5", "0.8"]),
       st.sampled_from(["2:4", "kernel", "block"]))
def test_cycles_join_and_end_inside_the_limit(combine, allocation, mode, sparsity, grain):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner, _, _ = train(dict(sparsity=sparsity, schedule="cyclical", cycles=3, combine=combine, granularity=grain, mode=mode,
                                  allocation=allocation, every=2, end=0.9))
    alive = pruner.criterion.alive(pruner.masks)
    assert kept(alive) == count_kept(sum(items.numel() for items in alive.values()), sparsity)
    assert (pruner.masks & pruner.pool) == pruner.masks
    for masks in (*pruner.saved, pruner.masks):
        if grain == "2:4": assert all(groups_of(mask, 4).sum(1).max() <= 2 for mask in masks.values())


def test_a_ramp_in_rounds_ends_as_one_shot_does_for_magnitudes():
    for keep in ("exponential", "linear"):
        assert prune(net(), "0.8", granularity="2:4", exclude="4", steps=5, keep=keep) == prune(net(), "0.8", granularity="2:4", exclude="4")


# ---- rounds, revival, collapse, trained scores ----------------------------------------------------------------------------------
def batch(): return torch.randn(12, 8, 6, 6, generator=torch.Generator().manual_seed(3)), torch.zeros(12).long()


def head(model):
    "Two classes, so that there is a loss."
    torch.manual_seed(9)
    model[-1] = nn.Linear(8, 2)
    return model


@pytest.mark.parametrize("keep", ["exponential", "linear"])
def test_keep_schedules_in_rounds(keep):
    counts = []
    def watching(model, layers, data=None, generator=None):
        counts.append(masks_of(model).kept)
        return {name: layer.weight.detach().abs() for name, layer in layers.items()}
    torch.manual_seed(0)
    assert prune(nn.Linear(40, 20), "0.915", watching, steps=4, keep=keep).kept == 68
    exact = [800 * 0.085 ** (t / 4) for t in range(1, 4)] if keep == "exponential" else [800 - 732 * t / 4 for t in range(1, 4)]
    assert counts == [800, *(round(value) for value in exact)]


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("grain", ["weight", "unit", "2:4"])
def test_revived_weights_return_and_only_the_end_is_applied(mode, grain):
    model, exclude = head(net()), ["4.weight"]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    state = torch.get_rng_state()
    rounds = []
    def force(model, layers, data=None, generator=None):
        rounds.append((masks_of_some(model, layers), {(layer.mode, layer.dense_gradient) for layer in layers.values()}))
        loss = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
        slopes = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
        return {name: (layer.weight * slope).detach().abs() for (name, layer), slope in zip(layers.items(), slopes)}
    masks = prune(model, "0.7", force, granularity=grain, steps=4, exclude=exclude, mode=mode, revive=True)
    assert len(rounds) == 4 and all(ways == {("soft", True)} for _, ways in rounds)
    chain = [*(seen for seen, _ in rounds), masks]
    if grain != "unit": assert not all((later & earlier) == later for earlier, later in zip(chain, chain[1:])), "something returned"
    assert all(not layer.dense_gradient and layer.mode == mode for layer in masked_layers(model).values())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name] * masks[name] if mode == "hard" and name in masks else before[name])
    alive = Criterion(granularity=grain).alive(masks)
    assert kept(alive) == count_kept(sum(items.numel() for items in alive.values()), "0.7") and torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_hard_masked_weights_never_return(mode):
    model = head(net())
    first = prune(model, "0.4", "random")
    second = prune(model, "0.8", "snip", data=batch(), steps=3, mode=mode, revive=True)
    assert (first & second) == second
    if mode == "soft": return
    with pytest.raises(ParameterError, match="already pruned to"): prune(model, "0.1", "snip", data=batch(), steps=3, revive=True)
    assert masks_of(model) == second


def test_settings_without_meaning_are_refused():
    model = net()
    with pytest.raises(ParameterError, match="revive=True lets weights return in a later round, and steps is 1"): prune(model, 0.5, revive=True)
    with pytest.raises(ParameterError, match="keep='linear' is a schedule over several rounds"): prune(model, 0.5, keep="linear")
    with pytest.raises(UnknownName, match="unknown keep 'lienar'; did you mean 'linear'"): round_sparsities(0.5, 2, "lienar")
    assert not masked_layers(model)


@pytest.mark.parametrize("name, recipe", [("hydra", "hydra"), ("edge-popup", "edge_popup"), ("movement", "movement")])
def test_trained_scores_name_their_recipe(name, recipe):
    model = net()
    def pruner(): return Pruner(model, torch.optim.SGD(model.parameters(), 0.1), 0.5, steps=9, score=name)
    for call in (lambda: prune(model, 0.5, name), lambda: Criterion(name), pruner):
        with pytest.raises(ParameterError, match=f"learned during training .* use sparsedarts.training.recipes.{recipe}, or one of magnitude"): call()
    with pytest.raises(UnknownName, match="unknown score 'hydrate'.*Known: magnitude, random"): prune(model, 0.5, "hydrate")


@QUICK
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_collapse_is_equal_scores_where_there_is_a_choice(values, data):
    items = {str(i): torch.tensor(row) for i, row in enumerate(values)}
    def marks(row): return torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=len(row), max_size=len(row))))
    pool = {name: marks(row) for name, row in items.items()} if data.draw(st.booleans()) else None
    inside = [float(value) for name, row in items.items() for i, value in enumerate(row) if pool is None or pool[name][i]]
    keep = data.draw(st.integers(0, len(inside)))
    layers = {name: sparsify(nn.Linear(len(row), 1)) for name, row in items.items()}
    if 0 < keep < len(inside) and len(set(inside)) == 1:
        with pytest.raises(CollapseError, match=f"^round 2 of 5: all {len(inside)} scores of snip are [01] while "):
            check_informative(items, pool, keep, layers, "snip", "round 2 of 5")
    else: check_informative(items, pool, keep, layers, "snip")


@pytest.mark.parametrize("mode, revive", [("hard", False), ("soft", False), ("hard", True)])
def test_a_network_that_collapses_in_a_round_is_left_as_it_was(mode, revive):
    "A score like a gradient's, in a network whose second convolution is nearly zero: the first round empties it, the second finds nothing."
    model = head(net())
    with torch.no_grad(): model[2].weight.mul_(1e-12)
    sparsify(model[0])
    model[0].set_mask(torch.rand(model[0].weight.shape, generator=torch.Generator().manual_seed(1)) < 0.9)
    before, masks = {name: value.detach().clone() for name, value in model.named_parameters()}, model[0].mask.clone()
    def flow(model, layers, data=None, generator=None):
        flows = float(masks_of(model)["2.weight"].any())
        return {name: layer.weight.detach().abs() * flows for name, layer in layers.items()}
    with pytest.raises(CollapseError, match=r"round 2 of 3: all \d+ scores of flow are 0 while \d+ of 1688 weights are kept.*use more rounds"):
        prune(model, "0.9", flow, steps=3, mode=mode, revive=revive)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert list(masked_layers(model)) == ["0.weight"] and model[0].mode == "soft" and torch.equal(model[0].mask, masks)
    assert type(model[2]) is nn.Conv2d


def test_zeros_everywhere_raise_and_zeros_in_part_do_not():
    model = net()
    with torch.no_grad(): model[2].weight.zero_()
    assert prune(model, "0.9").kept == count_kept(sum(layer.weight.numel() for layer in masked_layers(model).values()), "0.9")
    with torch.no_grad(): [value.zero_() for value in model.parameters()]
    with pytest.raises(CollapseError, match="scores of magnitude are 0"): prune(model, "0.95")
    assert prune(net(), 0).density == 1 and prune(nn.Linear(1, 1), 0.5).kept == 0
    zero = nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    assert prune(zero, 0.5, "random").kept == 8 and prune(nn.Linear(4, 4), 0, granularity="unit").kept == 16
