"""Trained scores: exact counts and ties, gradients, caching under every optimiser, copies and compilers, and recipes that resume bit for bit in every phase."""
import copy
import io
import itertools
import math
import pickle
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsedarts as sd
from sparsedarts.core import CheckpointError, NumericalError, ParameterError, UnknownName, count_kept, expect_error, rng_state
from sparsedarts.files import load_checkpoint, read_json
from sparsedarts.pruning import straight
from sparsedarts.pruning.allocation import allocations
from sparsedarts.pruning.scored import (KeepSchedule, LayerCeil, ScoredConv2d, ScoredLayer, ScoredLinear, from_scored, learning, scored_layers, scored_masks, set_cut,
                                        set_keep, set_scores, to_scored)
from sparsedarts.pruning.straight import QUICKSELECT, ScoredWeight, best_masks, traced_masks
from sparsedarts.sparse.layers import masked_layers
from sparsedarts.training.recipes import ScoreGroups, edge_popup, hydra, movement

QUICK = settings(deadline=None, max_examples=60)
FUSED = [False, True]


def net(seed=0, dtype=torch.float32):
    "Two convolutions, one grouped, norms, and a classifier for 8x8 digits."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)).to(dtype)


def batch(n=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator).to(dtype), torch.randint(10, (n,), generator=generator)


def bits(model): return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two): return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def present(model):
    "The masks by definition: a stable sort of the present scores of every layer."
    masks = {}
    for name, layer in scored_layers(model).items():
        ranked = layer.scores.detach().double().flatten()
        ranked = ranked.abs() if layer.rule == "absolute" else ranked
        best = ranked.argsort(descending=True, stable=True)[:layer.budget.kept]
        masks[name] = torch.zeros(len(ranked), dtype=torch.uint8).index_fill_(0, best, 1).view(layer.scores.shape)
    return sd.Masks(masks)


# ---- counts and ties ------------------------------------------------------------------------------------------------------------
@QUICK
@given(st.integers(1, 5000), st.fractions(0, 1).filter(lambda k: k > 0))
def test_layer_ceil_is_the_exact_ceiling(n, k):
    kept = LayerCeil().counts({}, {"": n}, 1 - k)[""]
    assert kept == math.ceil(k * n) == n - math.floor((1 - k) * n) and 1 <= kept <= n


@QUICK
@given(st.integers(1, 5000), st.sampled_from([1, 0.9, 0.7, 0.5, 0.3, 0.1, 0.05, 0.01]) | st.floats(0.001, 1))
def test_compat_counts_in_floats(n, k):
    assert LayerCeil(compat=True).counts({}, {"": n}, 1 - Fraction(str(k)))[""] == n - int((1 - k) * n)


def test_published_counts():
    "CIFAR ResNet-18 with 1x1 shortcuts at 1 %: 111,653 of 11,164,352; and two single layers."
    shapes, c = [(64, 3, 3, 3)], 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, c, 3, 3), (width, width, 3, 3)] + ([(width, c, 1, 1)] if c != width else [])
            c = width
    shapes.append((10, 512))
    sizes = {str(i): math.prod(shape) for i, shape in enumerate(shapes)}
    assert sum(sizes.values()) == 11_164_352 and sum(LayerCeil().counts({}, sizes, Fraction("0.99")).values()) == 111_653
    assert [ScoredConv2d(4, 9, 3, keep="0.01").kept, ScoredLinear(16, 9, keep="0.01").kept, ScoredLinear(5, 2, keep="0.9").kept] == [4, 2, 9]


@st.composite
def some_values(draw):
    "Tensors of few distinct values, so that ties are everywhere, or of any finite floats, in several layouts."
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    value = st.sampled_from([-1.5, -0.0, 0.0, 0.25]) if draw(st.booleans()) else st.floats(-1e4, 1e4)
    values = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from([(3,), (2, 5), (4, 1), (2, 3, 2, 2), (3, 2, 1, 1), (1, 4, 3, 1)]))
        n = math.prod(shape)
        tensor = torch.tensor(draw(st.lists(value, min_size=n, max_size=n)), dtype=torch.float64).to(dtype).view(shape)
        if tensor.dim() == 4 and draw(st.booleans()): tensor = tensor.to(memory_format=torch.channels_last)
        if tensor.dim() == 2 and draw(st.booleans()): tensor = tensor.T.contiguous().T
        values.append(tensor)
    return values


@QUICK
@given(some_values(), st.data())
def test_masks_are_a_stable_sort_in_every_layout(values, data):
    total = sum(value.numel() for value in values)
    for keep in {0, 1, total, data.draw(st.integers(0, total))}:
        order = torch.cat([value.reshape(-1).double() for value in values]).argsort(descending=True, stable=True)
        wanted = torch.zeros(total, dtype=torch.uint8).index_fill_(0, order[:keep], 1)
        for choose in (best_masks, traced_masks):
            assert torch.equal(torch.cat([mask.reshape(-1) for mask in choose(values, keep)]), wanted), choose.__name__
        assert all(mask.dtype == torch.uint8 and mask.shape == value.shape for mask, value in zip(best_masks(values, keep), values))


@pytest.mark.parametrize("levels", [3, 10_000_000])
def test_large_layers_are_counted(levels):
    values = [torch.randint(-levels, levels, (QUICKSELECT // 2 + 5,), generator=torch.Generator().manual_seed(i)).float() for i in range(3)]
    order = torch.cat(values).argsort(descending=True, stable=True)
    for keep in (1, 1000, len(order) - 1):
        wanted = torch.zeros(len(order), dtype=torch.uint8).index_fill_(0, order[:keep], 1)
        assert torch.equal(torch.cat(best_masks(values, keep)), wanted)


@pytest.mark.parametrize("rule", ["absolute", "signed"])
def test_memory_format_changes_nothing(rule):
    "A layer in channels_last chooses the same weights, ties included, and its mask is laid out like its weight."
    torch.manual_seed(0)
    plain = ScoredConv2d(16, 16, 3, keep=0.37, rule=rule)
    with torch.no_grad(): plain.scores.copy_(torch.randint(-3, 4, plain.scores.shape))
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert torch.equal(plain.mask, last.mask) and last.mask.stride() == last.weight.stride() != plain.mask.stride()
    assert plain.kept == math.ceil(Fraction("0.37") * plain.weight.numel())
    mask = plain.mask
    plain.to(memory_format=torch.channels_last)   # the same layer, moved after its mask was made
    assert torch.equal(plain.mask, mask) and plain.mask.stride() == plain.weight.stride()


@pytest.mark.parametrize("allocation", ["layer-ceil", "layer", "erk", "uniform+", "global", "lamp"])
@pytest.mark.parametrize("keep", ["1", "0.5", "0.21"])
def test_every_allocation_keeps_its_exact_count(allocation, keep):
    model = to_scored(net(), keep, allocation=allocation)
    masks, total = scored_masks(model), sum(layer.weight.numel() for layer in scored_layers(model).values())
    exact = sum(math.ceil(Fraction(keep) * n) for n in (72, 432, 480)) if allocation == "layer-ceil" else count_kept(total, 1 - Fraction(keep))
    assert masks.kept == exact and masks == sd.masks_of(from_scored(copy.deepcopy(model)))
    assert all(layer.kept == masks.counts()[name] for name, layer in scored_layers(model).items())
    if allocation not in ("global", "lamp"): assert masks == present(model)


def test_global_is_top_k_over_all_layers():
    model = to_scored(net(), 0.3, allocation="global", initial="scaled")
    ranked = torch.cat([layer.scores.detach().abs().flatten() for layer in scored_layers(model).values()])
    wanted = torch.zeros(len(ranked), dtype=torch.uint8).index_fill_(0, ranked.argsort(descending=True, stable=True)[:count_kept(len(ranked), 0.7)], 1)
    assert torch.equal(torch.cat([mask.flatten() for mask in scored_masks(model).values()]), wanted)
    for name, layer in scored_layers(model).items(): assert torch.equal(layer.mask, scored_masks(model)[name])


def test_layer_ceil_is_for_scored_layers_only():
    "Every registered allocation promises an exact total; this one does not."
    assert "layer-ceil" not in allocations
    assert scored_masks(to_scored(net(), 0.3, allocation=LayerCeil())) == scored_masks(to_scored(net(), 0.3, allocation="layer-ceil"))
    expect_error(lambda: to_scored(net(), 0.3, allocation="layerceil"), UnknownName, "unknown allocation 'layerceil'; did you mean 'layer-ceil'")


# ---- first scores ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", ["0.5", "0.1", "0.01"])
def test_first_hydra_mask_is_least_magnitude(keep):
    torch.manual_seed(1)
    model = sd.resnet(8, in_channels=1)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    to_scored(model, keep, initial="scaled")
    for name, layer in scored_layers(model).items():
        n = weights[name].numel()
        order = weights[name].abs().flatten().argsort(descending=True, stable=True)
        assert set(layer.mask.flatten().nonzero().flatten().tolist()) == set(order[:math.ceil(Fraction(keep) * n)].tolist())
        assert float(layer.scores.detach().abs().max()) == float(torch.tensor(math.sqrt(6 / weights[name][0].numel())))


def test_a_layer_of_zeros_has_finite_scores():
    model = net()
    nn.init.zeros_(model[8].weight)
    to_scored(model, 0.1, initial="scaled")
    assert not model[8].scores.any() and model[8].mask.flatten().nonzero().flatten().tolist() == list(range(48))


def test_scores_by_function():
    def by_name(model, layers, data=None, generator=None): return {name: torch.rand(layer.weight.shape, generator=generator) for name, layer in layers.items()}
    one, two = to_scored(net(), 0.3, initial=by_name, seed=1), to_scored(net(), 0.3, initial=by_name, seed=2)
    assert scored_masks(one) != scored_masks(two)
    set_scores(two, by_name, seed=1)
    assert scored_masks(one) == scored_masks(two)
    def bad(model, layers, data=None, generator=None): return {name: torch.full_like(layer.weight, math.nan) for name, layer in layers.items()}
    expect_error(lambda: set_scores(two, bad), NumericalError, "NaN")


def test_random_generators_stay():
    torch.manual_seed(5)
    before = rng_state()
    set_scores(to_scored(copy.deepcopy(FIXED), 0.2), "kaiming-normal")
    assert torch.equal(rng_state()["torch"], before["torch"])


FIXED = net()


# ---- gradients ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", ["absolute", "signed"])
@pytest.mark.parametrize("make", [lambda **o: ScoredConv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect", keep=0.3, dtype=torch.float64, **o),
                                  lambda **o: ScoredLinear(7, 5, keep=0.3, dtype=torch.float64, **o)])
def test_gradients_by_hand(make, rule):
    torch.manual_seed(0)
    layer = make(rule=rule)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64) if isinstance(layer, nn.Conv2d) else torch.randn(3, 7, dtype=torch.float64)
    plain = nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect", dtype=torch.float64) if isinstance(layer, nn.Conv2d) else nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(layer.weight * layer.mask)
        plain.bias.copy_(layer.bias)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    g = plain.weight.grad
    torch.testing.assert_close(layer.weight.grad, layer.mask * g)
    torch.testing.assert_close(layer.scores.grad, layer.weight * g * (layer.scores.sign() if rule == "absolute" else 1))
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    assert (layer.scores.grad != 0).all() and int((layer.weight.grad != 0).sum()) == layer.kept


@pytest.mark.parametrize("rule", ["absolute", "signed"])
def test_gradcheck(rule):
    "Numerically, for the weight; the scores' gradient is a definition, and has its second derivatives from the plain form."
    torch.manual_seed(0)
    weight, scores = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = (torch.rand(4, 5) < 0.5).to(torch.uint8)
    assert torch.autograd.gradcheck(lambda w: ScoredWeight.apply(w, scores.detach(), mask, rule), (weight,))
    for fn in (ScoredWeight.apply, ScoredWeight.plain):
        first = torch.autograd.grad((fn(weight, scores, mask, rule) ** 3).sum(), (weight, scores), create_graph=True)
        second = torch.autograd.grad(sum((part ** 2).sum() for part in first), (weight,))
        if fn == ScoredWeight.apply: kept = (*first, *second)
        else: torch.testing.assert_close((*first, *second), kept)


def test_only_what_is_asked_for():
    x, y = batch()
    model = to_scored(net(), 0.3)
    with learning(model, "scores", freeze_norms=True):
        F.cross_entropy(model(x), y).backward()
        assert all(layer.weight.grad is None and layer.scores.grad is not None for layer in scored_layers(model).values()) and model[1].weight.grad is None
    model.zero_grad()
    with learning(model, "weights"):
        F.cross_entropy(model(x), y).backward()
        assert all(layer.scores.grad is None and int((layer.weight.grad != 0).sum()) <= layer.kept for layer in scored_layers(model).values())


def test_two_forwards_before_two_backwards():
    x, y = batch()
    model = to_scored(net(), 0.3).eval()
    first, second = F.cross_entropy(model(x), y), F.cross_entropy(model(2 * x), y)
    first.backward(), second.backward()
    together = model[3].scores.grad.clone()
    model.zero_grad()
    (F.cross_entropy(model(x), y) + F.cross_entropy(model(2 * x), y)).backward()
    torch.testing.assert_close(model[3].scores.grad, together)


@pytest.mark.parametrize("allocation", ["layer-ceil", "global"])
def test_precisions(allocation):
    x, y = batch()
    model = to_scored(net(), 0.3, allocation=allocation)
    with torch.autocast("cpu", dtype=torch.bfloat16): loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert model[3].scores.grad.dtype == model[3].weight.grad.dtype == torch.float32 and model[3].scores.grad.isfinite().all()
    for dtype in (torch.bfloat16, torch.float64):
        other = to_scored(net(dtype=dtype), 0.3, allocation=allocation)
        F.cross_entropy(other(x.to(dtype)), y).backward()
        assert other[3].scores.grad.dtype == dtype and scored_masks(other).kept == scored_masks(model).kept
    mixed = to_scored(net(), 0.3, allocation=allocation)
    mixed[3].scores.data = mixed[3].scores.data.double()
    F.cross_entropy(mixed(x), y).backward()
    assert mixed[3].scores.grad.dtype == torch.float64 and scored_masks(mixed).kept == scored_masks(model).kept


def test_nan_scores_stop():
    model = to_scored(net(), 0.3)
    with torch.no_grad(): model[3].scores[0, 0, 0, 0] = -math.nan
    expect_error(lambda: model(batch()[0]), NumericalError, "NaN or infinite values (in a layer of 432 weights)")


# ---- remembering masks ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def thresholds(monkeypatch):
    "A list that grows with every threshold that is found."
    calls, found = [], straight.threshold
    monkeypatch.setattr(straight, "threshold", lambda keys, keep: calls.append(keep) or found(keys, keep))
    return calls


OPTIMISERS = {"sgd": lambda p, **o: torch.optim.SGD(p, lr=1.0, **o), "momentum": lambda p, **o: torch.optim.SGD(p, lr=1.0, momentum=0.9, **o),
              "adam": lambda p, **o: torch.optim.Adam(p, lr=0.05, **o), "adamw": lambda p, **o: torch.optim.AdamW(p, lr=0.05, **o)}


@pytest.mark.parametrize("allocation", ["layer-ceil", "global"])
@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("none_first", [True, False])
def test_masks_follow_every_optimiser(name, fused, allocation, none_first):
    "Fused optimisers do not move the version counter; each forward pass must use the present scores all the same."
    x, y = batch()
    model = to_scored(net(), 0.3, allocation=allocation)
    optimizer, seen = OPTIMISERS[name]([layer.scores for layer in scored_layers(model).values()], fused=fused), []
    used = [layer.register_forward_hook(lambda layer, *_: seen.append(layer.effective_weight().detach().clone())) for layer in scored_layers(model).values()]
    for _ in range(3):
        if none_first: optimizer.zero_grad()
        seen.clear()
        loss = F.cross_entropy(model(x), y)
        wanted = scored_masks(model)
        for value, (key, layer) in zip(seen, scored_layers(model).items()): assert torch.equal(value, layer.weight * wanted[key])
        if not none_first: optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert scored_masks(model) != wanted
    for hook in used: hook.remove()
    with torch.no_grad(): output = model.eval()(x)
    assert torch.equal(output, from_scored(copy.deepcopy(model), "plain")(x))


@pytest.mark.parametrize("allocation, each", [("layer-ceil", 3), ("global", 1)])
def test_one_threshold_for_one_change(thresholds, allocation, each):
    x, y = batch()
    model = to_scored(net(), 0.3, allocation=allocation)
    def count(act):
        thresholds.clear()
        act()
        return len(thresholds)
    def train(*parameters):
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    scores, weights = ([getattr(layer, name) for layer in scored_layers(model).values()] for name in ("scores", "weight"))
    assert [count(lambda: train(*scores)) for _ in range(3)] == [each] * 3
    for score in scores: score.requires_grad_(False)
    assert count(lambda: model(x)) == each and [count(lambda: train(*weights)) for _ in range(3)] == [0] * 3
    with torch.no_grad(): assert count(lambda: [model.eval()(x) for _ in range(3)]) == 0
    with torch.no_grad(): scores[1].neg_()
    assert count(lambda: model(x)) == 1 and count(lambda: model(x)) == 0
    model.load_state_dict(model.state_dict())
    assert count(lambda: model(x)) == each, "loading counts as a change"
    set_keep(model, 0.4, allocation=allocation)
    assert count(lambda: model(x)) == each
    scores[2].data = scores[2].data.flip(0)
    assert count(lambda: model(x)) == 1 and all(torch.equal(layer.effective_weight() != 0, layer.mask.bool()) for layer in scored_layers(model).values())
    model.double()
    assert count(lambda: model(x.double())) == each
    set_keep(model, 1, allocation=allocation)
    assert count(lambda: model(x.double())) == 0, "nothing to choose"


def test_global_masks_survive_odd_orders():
    "A budget of several layers, fused steps, and looks at the masks or parts of the network at any moment."
    x, y = batch()
    model = to_scored(net(), 0.3, allocation="global")
    scores, layers = [layer.scores for layer in scored_layers(model).values()], list(scored_layers(model).values())
    optimizer = torch.optim.SGD(scores, lr=2.0, fused=True)
    def used(): return torch.cat([layer.effective_weight().detach().ne(0).flatten() for layer in layers])
    def wanted(): return torch.cat([mask.flatten().bool() for mask in scored_masks(model).values()])
    looks = (lambda: None, lambda: layers[1].mask, lambda: layers[0].kept, lambda: scored_masks(model), lambda: model(x),
             lambda: [layers[i].effective_weight() for i in (2, 0, 1)])
    for look in looks:
        before = scored_masks(model)
        F.cross_entropy(model(x), y).backward()
        look()
        optimizer.step()
        assert torch.equal(used(), wanted()) and scored_masks(model) != before
        model[3].effective_weight().square().sum().backward()  # only one layer of three is asked, and learns
        optimizer.step()
        assert torch.equal(used(), wanted())


def test_scores_frozen_after_a_fused_step():
    "The last mask of a training must not outlive its last step."
    x, y = batch()
    model = to_scored(net(), 0.3)
    scores = [layer.scores for layer in scored_layers(model).values()]
    optimizer = torch.optim.SGD(scores, lr=5.0, fused=True)
    for set_to_none in (True, False):
        for score in scores: score.requires_grad_(True)
        F.cross_entropy(model(x), y).backward()
        model(x)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        for score in scores: score.requires_grad_(False)
        assert all(torch.equal(layer.mask, present(model)[name]) for name, layer in scored_layers(model).items())


def test_frozen_scores_cost_nothing_when_everything_is_kept():
    x, _ = batch()
    model, dense = to_scored(net(), keep=1), net()
    with learning(model, "weights"):
        assert all(layer.effective_weight() is layer.weight for layer in scored_layers(model).values())
        assert torch.equal(model(x), dense(x))
    assert all(layer.effective_weight() is not layer.weight for layer in scored_layers(model).values()), "scores that learn need their gradient"


# ---- copies, files, compilers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("allocation", ["layer-ceil", "global"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
                                 lambda m: torch.load(io.BytesIO(_saved(m)), weights_only=False)])
def test_copies_live_their_own_lives(allocation, how):
    x, _ = batch()
    model = to_scored(net(), 0.3, allocation=allocation).eval()
    for layer in scored_layers(model).values(): layer.scores.requires_grad_(False)
    output = model(x)
    other = how(model)
    assert torch.equal(other(x), output) and other[0].scores is not model[0].scores
    for _ in range(3):  # as many changes as the original's counter has seen, whatever that was
        with torch.no_grad(): other[3].scores.copy_(torch.randn(other[3].scores.shape))
        assert all(torch.equal(layer.mask, scored_masks(other)[name]) for name, layer in scored_layers(other).items())
    assert torch.equal(model(x), output) and not torch.equal(other(x), output)


def _saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


def test_checkpoints_go_both_ways():
    dense, model = net(3), to_scored(net(), 0.3)
    missing = model.load_state_dict(dense.state_dict(), strict=False)
    assert missing.missing_keys == ["0.scores", "3.scores", "8.scores"] and not missing.unexpected_keys
    assert [name for name in model.state_dict() if not name.endswith("scores")] == list(dense.state_dict())
    again = to_scored(net(9), 0.3)
    again.load_state_dict(torch.load(io.BytesIO(_saved(model.state_dict())), weights_only=True))
    assert scored_masks(again) == scored_masks(model) and torch.equal(again.eval()(batch()[0]), model.eval()(batch()[0]))
    again.load_state_dict(model.state_dict(), assign=True)
    assert scored_masks(again) == scored_masks(model) and torch.equal(again(batch()[0]), model(batch()[0]))


@pytest.mark.parametrize("allocation", ["layer-ceil", "global"])
def test_compiled(allocation):
    "One graph, no breaks; gradients and masks as in eager mode, after fused steps too."
    torch._dynamo.reset()
    model = to_scored(net(), 0.3, allocation=allocation)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=True)
    for i in range(3):
        x, y = batch(seed=i)
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters(): torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
    with torch.no_grad(): torch.testing.assert_close(compiled(x), from_scored(copy.deepcopy(model), "plain").train()(x), rtol=1e-4, atol=1e-5)


def test_inference_mode_leaves_no_trace():
    x, y = batch()
    model = to_scored(net(), 0.3)
    for layer in scored_layers(model).values(): layer.scores.requires_grad_(False)
    with torch.inference_mode(): model.eval()(x)
    assert not model[3].budget.mask_of(0).is_inference()
    found = torch.autograd.grad(F.cross_entropy(model(x), y), model[3].weight, create_graph=True)[0]
    found.square().sum().backward()
    assert model[3].weight.grad is not None
    with torch.inference_mode(): other = to_scored(net(), 0.3)(x)
    assert other.shape == (16, 10)


def test_shared_weights_share_scores():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
        def forward(self, x): return self.b(self.a(x).relu())
    torch.manual_seed(0)
    for allocation in ("layer-ceil", "global"):
        model = to_scored(Twice(), 0.3, allocation=allocation)
        assert model.a.scores is model.b.scores and list(scored_layers(model)) == ["a.weight"] and torch.equal(model.a.mask, model.b.mask) and model.a.kept == 11
        model(torch.randn(4, 6)).sum().backward()
        assert from_scored(model).a.weight is model.b.weight and list(masked_layers(model)) == ["a.weight"]
    expect_error(lambda: to_scored(Twice(), 0.3, exclude="b"), ParameterError, "include both or exclude both")


def test_left_alone_and_refused():
    model = to_scored(net(), 0.3, exclude=["0", nn.Linear])
    assert list(scored_layers(model)) == ["3.weight"] and type(model[0]) is nn.Conv2d
    expect_error(lambda: to_scored(sd.sparsify(net()), 0.3), ParameterError, "call densify(model) or from_scored")
    expect_error(lambda: to_scored(net(), 0.3, 0.7), ParameterError, "give either keep")
    expect_error(lambda: from_scored(model, "firm"), UnknownName, "unknown mode 'firm'")
    expect_error(lambda: set_keep(net(), 0.3), ParameterError, "call to_scored(model, keep=...) first")
    with pytest.raises(ParameterError, match="uniform\\+ cannot keep"): to_scored(net(), "0.001", allocation="uniform+")


def test_fixed_masks_hold_in_training():
    "From scores to hard masks, trained on with any optimiser: zeros stay zeros."
    x, y = batch()
    model = to_scored(net(), 0.3)
    masks = scored_masks(model)
    from_scored(model, "hard")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sd.hold(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert sd.masks_of(model) == masks and all(not layer.weight[layer.mask == 0].any() for layer in masked_layers(model).values())


# ---- movement -------------------------------------------------------------------------------------------------------------------
def test_movement_is_the_sum_of_w_g():
    "S_t = -lr sum w g with plain SGD, computed beside it on a plain network with its weights masked by hand."
    model, dense, lr = to_scored(net(dtype=torch.float64).eval(), 0.4, rule="signed", initial="zeros"), net(dtype=torch.float64).eval(), 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    names = list(scored_layers(model))
    values = {name: value.detach().clone() for name, value in dense.named_parameters()}
    sums = {name: torch.zeros_like(values[name]) for name in names}
    for t in range(12):
        x, y = batch(seed=t, dtype=torch.float64)
        best = {name: (-lr * sums[name]).flatten().argsort(descending=True, stable=True)[:math.ceil(Fraction("0.4") * sums[name].numel())] for name in names}
        masks = {name: torch.zeros(sums[name].numel()).index_fill_(0, best[name], 1).view(sums[name].shape) for name in names}
        used = {name: (value * masks[name] if name in masks else value).requires_grad_() for name, value in values.items()}
        found = torch.autograd.grad(F.cross_entropy(torch.func.functional_call(dense, used, (x,)), y), list(used.values()))
        with torch.no_grad():
            for (name, value), g in zip(values.items(), found):
                if name in sums: sums[name] += value * g
                values[name] = value.detach() - lr * (g * masks[name] if name in masks else g)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, layer in scored_layers(model).items():
        torch.testing.assert_close(layer.scores.detach(), -lr * sums[name])
        torch.testing.assert_close(layer.weight.detach(), values[name])
        assert (sums[name] != 0).any()


def test_cut_keeps_what_is_above_tau():
    model = to_scored(net(), 1, rule="signed")
    set_cut(model, 0.5)
    for name, layer in scored_layers(model).items():
        assert torch.equal(layer.mask.bool(), layer.scores > 0) and 0 < layer.kept < layer.weight.numel()
    set_cut(model, 0.51)
    assert torch.equal(model[3].mask.bool(), model[3].scores.sigmoid() > 0.51)


# ---- recipes --------------------------------------------------------------------------------------------------------------------
DATA = sd.load_data("digits", valid=0.8)
TRAIN = dict(batch_size=64, seed=3, progress=False, evaluate_on=("test",), weight_decay=1e-3)
HYDRA = dict(keep="0.3", pretrain_epochs=2, prune_epochs=2, finetune_epochs=2, lrs=(0.1, 0.5, 0.05), **TRAIN)


class Stop(Exception): "What ends a run in the middle."


class Watch:
    "A callback that looks at every step and may end the run at one; a resumed run has another of the same kind."
    def __init__(self, at=None, look=None): self.at, self.look, self.n = at, look, 0

    def after_step(self, run):
        self.n += 1
        if self.look: self.look(run)
        if self.n == self.at: raise Stop


def phases_seen(act):
    "The networks after every step: phase -> list of {name: value}."
    seen = []
    def look(run):
        layers = masked_layers(run.model) or scored_layers(run.model)
        kind = "finetune" if masked_layers(run.model) else "scores" if any(layer.scores.requires_grad for layer in layers.values()) else "weights"
        seen.append((kind, bits(run.model), {name: layer.mask.clone() for name, layer in layers.items()}))
    result = act(Watch(look=look))
    return result, {kind: [entry for entry in seen if entry[0] == kind] for kind in dict.fromkeys(entry[0] for entry in seen)}


def changed(entries):
    "Names of the parameters and buffers that are not the same in the first and in the last entry."
    first, last = entries[0][1], entries[-1][1]
    return {name for name in first if not torch.equal(first[name], last[name])}


@pytest.mark.parametrize("freeze_bn", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_hydra_keeps_frozen_what_is_frozen(freeze_bn, precision):
    result, seen = phases_seen(lambda watch: hydra(net(), DATA, freeze_bn=freeze_bn, precision=precision, callbacks=(watch,), **HYDRA))
    assert list(seen) == ["weights", "scores", "finetune"]
    scores, weights = {"0.scores", "3.scores", "8.scores"}, {"0.weight", "3.weight", "8.weight", "3.bias", "8.bias"}
    norms, statistics = {"1.weight", "1.bias", "4.weight", "4.bias"}, {f"{i}.{name}" for i in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed(seen["weights"]) == weights | norms | statistics and all(mask.all() for entry in seen["weights"] for mask in entry[2].values())
    assert changed(seen["scores"]) == scores | statistics | (set() if freeze_bn else norms)
    assert changed(seen["finetune"]) == weights | norms | statistics
    for _, values, masks in seen["scores"]:
        assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 22, "3.weight": 130, "8.weight": 144}
        assert all(torch.equal(values[name], seen["weights"][-1][1][name]) for name in weights), "to the bit"
    for _, values, masks in seen["finetune"]:
        assert all(torch.equal(mask, result.masks[name]) and not values[name][mask == 0].any() for name, mask in masks.items())
    assert same({f"{name[:-7]}.scores": value for name, value in result.scores.items()}, {name: seen["scores"][-1][1][name] for name in scores})
    assert result.masks.counts() == {name: int(best_masks([score.abs()], n)[0].sum()) for (name, score), n in zip(result.scores.items(), (22, 130, 144))}
    assert all(torch.equal(best_masks([result.scores[name].abs()], n)[0], result.masks[name]) for name, n in result.masks.counts().items())
    assert all(layer.mode == "hard" for layer in masked_layers(result.model).values()) and all(p.requires_grad for p in result.model.parameters())
    assert result.history.phase.tolist() == ["pretrain"] * 2 + ["prune"] * 2 + ["finetune"] * 2 and list(result.metrics) == ["pretrain", "prune", "finetune"]


def test_pretraining_is_plain_training():
    plain, model = net(), net()
    trained = sd.train(plain, DATA, epochs=2, lr=0.1, nesterov=False, **TRAIN)
    result = hydra(model, DATA, **{**HYDRA, "keep": 1, "prune_epochs": 0, "finetune_epochs": 0})
    assert same(bits(plain), bits(model)) and result.metrics["pretrain"]["test_accuracy"] == trained.metrics["test_accuracy"] and result.masks.density == 1


def test_least_magnitude_is_hydra_without_its_middle():
    model = net()
    sd.train(model, DATA, epochs=1, lr=0.1, **TRAIN)
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    result = hydra(model, DATA, **{**HYDRA, "pretrain_epochs": 0, "prune_epochs": 0})
    for name, mask in result.masks.items(): assert torch.equal(mask, best_masks([dense[name].abs()], math.ceil(Fraction("0.3") * mask.numel()))[0])
    assert list(result.metrics) == ["finetune"]


def test_the_first_scores_come_from_the_pretrained_weights():
    result, seen = phases_seen(lambda watch: hydra(net(), DATA, callbacks=(watch,), **{**HYDRA, "prune_epochs": 0}))
    for name, mask in result.masks.items():
        weight = seen["weights"][-1][1][name]
        ours, untrained = (best_masks([values.abs()], int(mask.sum()))[0] for values in (weight, net().get_parameter(name).detach()))
        assert torch.equal(mask, ours) and not torch.equal(mask, untrained)
        torch.testing.assert_close(result.scores[name], math.sqrt(6 / weight[0].numel()) * weight / weight.abs().max())


RECIPES = {
    "hydra": lambda model, **o: hydra(model, DATA, **HYDRA, **o),
    "hydra global": lambda model, **o: hydra(model, DATA, allocation="global", optimizer="adam", clip=1.0, **{**HYDRA, "lrs": (0.01, 0.02, 0.01)}, **o),
    "hydra compat": lambda model, **o: hydra(model, DATA, compat=True, freeze_bn=True, **HYDRA, **o),
    "magnitude": lambda model, **o: hydra(model, DATA, **{**HYDRA, "prune_epochs": 0}, **o),
    "edge-popup": lambda model, **o: edge_popup(model, DATA, "0.4", epochs=3, lr=0.5, **TRAIN, **o),
    "movement": lambda model, **o: movement(model, DATA, "0.7", epochs=4, every=2, **TRAIN, **o),
    "soft movement": lambda model, **o: movement(model, DATA, soft=0.45, penalty=15.0, score_lr=20.0, epochs=3, **TRAIN, **o),
}


def assert_same_result(one, two):
    assert same(bits(one.model), bits(two.model)) and one.masks == two.masks and same(one.scores, two.scores)
    for a, b in zip(one.history.drop(columns="seconds").to_dict("records"), two.history.drop(columns="seconds").to_dict("records"), strict=True):
        assert a.keys() == b.keys() and all(a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]) for k in a)
    assert one.metrics == two.metrics


def in_pieces(run, folder, every, lengths):
    "Run until stopped, again and again, until a run comes to its end; that result, and how many runs it took."
    for runs in itertools.count(1):
        model = net()
        try: return run(model, callbacks=(Watch(at=lengths[runs % len(lengths)]),), checkpoint=folder, checkpoint_every=every), runs
        except Stop: assert masked_layers(model) or not any(isinstance(module, ScoredLayer) for module in model.modules()), "left plain"
        assert runs < 50, "no progress"


@pytest.mark.parametrize("name", RECIPES)
def test_stopped_anywhere_and_gone_on_is_the_same(name, tmp_path):
    "Stopped after every step or two, also in the first and the last of each phase, or at longer intervals."
    run = RECIPES[name]
    whole = run(net(), callbacks=(counter := Watch(),))
    for every, lengths in ((1, (2, 3)), (2, (4, 3, 5))):
        resumed, runs = in_pieces(run, tmp_path / str(every), every, lengths)
        assert runs > counter.n / 5 > 1
        assert_same_result(resumed, whole)
        again = run(net(), callbacks=(idle := Watch(),), checkpoint=tmp_path / str(every), checkpoint_every=every)
        assert_same_result(again, whole)
        assert idle.n == 0, "nothing was left to do"
        phases = list(whole.metrics)
        assert read_json(tmp_path / str(every) / "recipe.json")["done"] == phases
        assert sorted(path.name for path in (tmp_path / str(every)).iterdir()) == sorted([*(f"{phase}.pt" for phase in phases), "recipe.json"]), "nothing half-written"


def test_the_records_order_does_not_matter(tmp_path, monkeypatch):
    "Stopped between a phase's last checkpoint and the note that it is done."
    from sparsedarts.training import recipes
    whole = hydra(net(), DATA, **HYDRA)
    with monkeypatch.context() as patch:
        def write(path, value):
            if value["done"] == ["pretrain", "prune"]: raise Stop
            return real(path, value)
        real = recipes.write_json
        patch.setattr(recipes, "write_json", write)
        with pytest.raises(Stop): hydra(net(), DATA, checkpoint=tmp_path, **HYDRA)
    assert read_json(tmp_path / "recipe.json")["done"] == ["pretrain"]
    assert_same_result(hydra(net(), DATA, checkpoint=tmp_path, **HYDRA), whole)


def test_folders_belong_to_one_run(tmp_path):
    short = {**HYDRA, "pretrain_epochs": 1, "prune_epochs": 1, "finetune_epochs": 0}
    hydra(net(), DATA, checkpoint=tmp_path / "run", **short)
    for changes, message in ((dict(keep="0.4"), "keep was '3/10', now '2/5'"), (dict(prune_epochs=2), "epochs was"), (dict(compat=True), "compat was False, now True"),
                             (dict(lrs=(0.1, 0.1, 0.1)), "lrs was"), (dict(seed=4), "seed was 3, now 4"), (dict(freeze_bn=True), "freeze_bn was")):
        model = net()
        expect_error(lambda: hydra(model, DATA, checkpoint=tmp_path / "run", **{**short, **changes}), CheckpointError, message)
        assert same(bits(model), bits(net())) and not any(isinstance(module, ScoredLayer) for module in model.modules())
    expect_error(lambda: edge_popup(net(), DATA, 0.3, epochs=1, checkpoint=tmp_path / "run", **TRAIN), CheckpointError, "recipe was 'hydra', now 'edge-popup'")
    (tmp_path / "file").write_text("")
    expect_error(lambda: hydra(net(), DATA, checkpoint=tmp_path / "file", **short), CheckpointError, "is a file; the checkpoints of a recipe need a folder")
    expect_error(lambda: hydra(net(), DATA, checkpoint=tmp_path / "run", **{**short, "momentum": 0.5}), CheckpointError, "momentum was 0.9, now 0.5")


def test_save_dense_is_the_masked_network(tmp_path):
    result = hydra(net(), DATA, save_dense=tmp_path / "dense.pt", channels_last=True, **HYDRA)
    plain, (x, _) = net(5), batch()
    plain.load_state_dict(load_checkpoint(tmp_path / "dense.pt"))
    assert torch.equal(plain.eval()(x), result.model.eval()(x))
    assert all(torch.equal((plain.get_parameter(name) != 0).to(torch.uint8), mask) for name, mask in result.masks.items())


def test_compat_is_the_released_schedule_counts_and_decay():
    ours, theirs = (hydra(net(), DATA, **{**HYDRA, "keep": "0.9", "prune_epochs": 5}, compat=compat) for compat in (False, True))
    half = [(1 + math.cos(math.pi * (e - 1) / 5)) / 2 for e in range(5)]
    released = theirs.history[theirs.history.phase == "prune"].lr
    assert released.tolist() == pytest.approx([0.5 * value for value in half]) and released.iloc[1] == 0.5 > released.iloc[0]
    assert ours.history[ours.history.phase == "prune"].lr.iloc[-1] < released.iloc[-1]
    for phase, lr in (("pretrain", 0.1), ("finetune", 0.05)): assert theirs.history[theirs.history.phase == phase].lr.tolist() == pytest.approx([lr / 2, lr])
    sizes = {name: mask.numel() for name, mask in ours.masks.items()}
    assert ours.masks.counts() == {name: math.ceil(Fraction("0.9") * n) for name, n in sizes.items()}
    assert theirs.masks.counts() == {name: n - int((1 - 0.9) * n) for name, n in sizes.items()} != ours.masks.counts()
    strong = {**HYDRA, "pretrain_epochs": 0, "finetune_epochs": 0, "lrs": (0.1, 0.01, 0.01), "weight_decay": 0.5, "lr_schedule": "constant"}
    plain, decayed = (hydra(net(), DATA, compat=compat, **strong) for compat in (False, True))
    norm = lambda result: sum(float(score.square().sum()) for score in result.scores.values())
    assert norm(decayed) < 0.99 * norm(plain)


def test_groups_of_scores():
    model = to_scored(net(), 0.3)
    with learning(model, "scores"):
        trainable = [p for p in model.parameters() if p.requires_grad]
        made = ScoreGroups(model, "sgd", momentum=0.8, score_lr=0.02)([dict(params=trainable, weight_decay=0.1)], lr=0.1)
    assert [(g["lr"], g["weight_decay"], g["momentum"], len(g["params"])) for g in made.param_groups] == [(0.02, 0.0, 0.8, 3), (0.1, 0.1, 0.8, 4)]
    own = ScoreGroups(model, lambda groups, lr: torch.optim.RMSprop(groups, lr=lr))([dict(params=trainable, weight_decay=0.1)], lr=0.1)
    assert type(own) is torch.optim.RMSprop and len(own.param_groups) == 2


def test_what_the_user_froze_stays_frozen():
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    before = bits(model)
    result = hydra(model, DATA, exclude="0", **HYDRA)
    assert torch.equal(model[0].weight, before["0.weight"]) and torch.equal(model[1].weight, before["1.weight"]) and not torch.equal(model[1].bias, before["1.bias"])
    assert "0.weight" not in result.masks and [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight", "1.weight"]


def test_excluded_layers_rest_while_scores_learn():
    result, seen = phases_seen(lambda watch: hydra(net(), DATA, exclude="8", callbacks=(watch,), **HYDRA))
    assert not changed(seen["scores"]) & {"8.weight", "8.bias"} and {"8.weight", "8.bias"} <= changed(seen["finetune"]) and list(result.masks) == ["0.weight", "3.weight"]


@pytest.mark.parametrize("name, stops", [("hydra", (1, 5)), ("edge-popup", (1,)), ("movement", (3,))])
def test_errors_leave_a_plain_model(name, stops):
    recipe, model = RECIPES[name], net().eval()
    model[4].weight.requires_grad_(False)
    for at in stops:
        with pytest.raises(Stop): recipe(model, callbacks=(Watch(at=at),))
        assert list(model.state_dict()) == list(net().state_dict()) and [type(m) for m in model] == [type(m) for m in net()] and not model.training
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["4.weight"]
    expect_error(lambda: recipe(model, stepps=3), UnknownName, "unknown option 'stepps'")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_leave_the_generators_alone(name):
    model, before = net(), rng_state()["torch"]
    RECIPES[name](model)
    assert torch.equal(rng_state()["torch"], before)


def test_the_same_seed_the_same_network():
    one, two = (edge_popup(net(), DATA, 0.3, epochs=1, **TRAIN) for _ in range(2))
    assert_same_result(one, two)
    other = edge_popup(net(), DATA, 0.3, epochs=1, **{**TRAIN, "seed": 4})
    assert one.masks != other.masks


def test_movement_follows_its_schedule():
    seen = []
    watch = Watch(look=lambda run: seen.append(scored_masks(run.model).kept))
    result = movement(net(), DATA, "0.8", epochs=6, start=0.25, end=0.75, callbacks=(watch,), allocation="global", **TRAIN)
    steps, total = len(seen), 72 + 432 + 480
    schedule = sd.pruning.schedules.make_schedule("cubic", "0.8", steps, start=0.25, end=0.75, every=1)
    assert seen == [count_kept(total, schedule.target * schedule.way(t)) for t in range(1, steps + 1)] and seen[0] == total
    assert result.masks.kept == count_kept(total, "0.8") == seen[-1]


def test_keep_schedule_in_a_loop_of_ones_own():
    model = to_scored(net(), 1, rule="signed", initial="zeros")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = KeepSchedule(model, optimizer, sparsity=0.75, steps=10, end=0.5, every=2)
    for t in range(10):
        x, y = batch(seed=t)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
    assert {name: layer.kept for name, layer in scored_layers(model).items()} == {"0.weight": 18, "3.weight": 108, "8.weight": 120} and pruner.sparsity == 0.75
