"""Scores where they meet other things: published invariants, brute-force loops, collapse, foreign networks, and the user's model left alone."""
import copy
import random
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import sparsedarts as sd
from sparsedarts.core import DataError, ParameterError, ShapeError, SparseDartsError, count_kept, rng_state
from sparsedarts.pruning import filters, protocols, sensitivity  # noqa: F401  (their scores register themselves)
from sparsedarts.pruning.allocation import emptied, select
from sparsedarts.pruning.oneshot import Criterion, prunable_layers, round_sparsities, shapes_of
from sparsedarts.pruning.saliency import Examples, balanced, deal, examples, snip, synflow
from sparsedarts.pruning.scores import score_layers, scores
from sparsedarts.sparse.norms import norms_after, silence
from sparsedarts.vision import import_torchvision

SCORES = ("magnitude", "random", "snip", "grasp", "synflow", "taylor", "taylor-unit", "obd", "force", "grasp-it", "3sp", "3sp-compute",
          "wanda", "fpgm", "slimming")
LOOKING = tuple(name for name in SCORES if name not in ("magnitude", "random", "synflow", "fpgm", "slimming"))


@pytest.fixture(scope="module")
def digits(): return sd.load_data("digits")


def noise(batch, channels=3, size=32, classes=10, seed=0):
    "Images and labels without meaning."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, generator=generator), torch.randint(classes, (batch,), generator=generator)


def made(build, seed=0):
    "A network with weights of its own seed."
    torch.manual_seed(seed)
    return build()


# ---- looking at data --------------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 6), st.integers(0, 5), st.integers(1, 6), st.booleans())
def test_class_balanced_draws_are_exact(kinds, per_class, seed, batches, by_class):
    labels = torch.tensor(kinds)
    counts = labels.bincount()[labels.unique()]
    if int(counts.min()) < per_class:
        with pytest.raises(DataError, match=f"per_class={per_class}"): balanced(labels, per_class, seed)
        return
    chosen = balanced(labels, per_class, seed)
    assert chosen.shape == (len(counts), per_class) and chosen.unique().numel() == chosen.numel()
    assert (labels[chosen] == labels.unique()[:, None]).all() and torch.equal(chosen, balanced(labels, per_class, seed))
    parts = deal(chosen, min(batches, per_class), by_class)
    assert sorted(torch.cat(parts).tolist()) == sorted(chosen.flatten().tolist())
    if by_class: assert max(map(len, parts)) - min(map(len, parts)) <= 1 and labels[torch.cat(parts)].diff().ge(0).all()
    else:
        for part in parts: assert labels[part].bincount()[labels.unique()].unique().numel() == 1, "every class as often"


def test_any_source_of_pairs_gives_the_same_score(digits):
    net = made(lambda: sd.resnet(8, in_channels=1))
    layers, [(x, y)] = prunable_layers(net), examples(Examples(digits, batch_size=32), "snip")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    wanted = snip(net, layers, (x, y))
    sources = ([(x, y)], loader, Examples(loader), iter([(x, y)]), ((x, y) for _ in range(1)), Examples(digits, batch_size=32))
    for source in (*sources, Examples((x, y), loss=F.cross_entropy)):
        found = snip(net, layers, source)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    halves = snip(net, layers, Examples(loader, batch_size=16, batches=2))
    assert not torch.equal(halves["head.weight"], wanted["head.weight"])
    assert len(examples(Examples(digits.valid, per_class=3), "snip")[0][1]) == 30
    assert len(examples(torch.utils.data.DataLoader(loader.dataset, batch_size=8, num_workers=1), "snip")[0][1]) == 8


def test_redraw_shows_other_images_in_each_round_and_stays_reproducible(digits):
    seen = []

    def spy(model, layers, data=None, generator=None):
        seen.append(examples(data, "spy", generator)[0][1])
        return {name: layer.weight.detach().abs() for name, layer in layers.items()}
    fresh = Examples(digits, batch_size=16, redraw=True)
    for _ in range(2): sd.prune(made(lambda: sd.resnet(8, in_channels=1)), 0.9, spy, data=fresh, steps=3, seed=4)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert all(torch.equal(one, two) for one, two in zip(seen[:3], seen[3:]))


# ---- the user's model ---------------------------------------------------------------------------------------------------------------
class Rough(nn.Module):
    "A residual network with dropout, an inner module in another mode, a layer that is never used, and an auxiliary output."
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.unused, self.drop, self.head = nn.Linear(3, 3), nn.Dropout(0.3), nn.Linear(4, 10)
        self.fails = False

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        if self.fails and not torch.is_inference_mode_enabled(): raise RuntimeError("broken on purpose")
        z = self.drop((self.bn2(self.conv2(y)) + y).relu().mean((2, 3)))
        return self.head(z), z


def snapshot(net):
    "Everything that a score might disturb."
    state = rng_state()
    return dict(state={key: value.clone() for key, value in net.state_dict().items()},
                buffers=[b.clone() for b in net.buffers()], modes=[m.training for m in net.modules()],
                needs=[p.requires_grad for p in net.parameters()], grads=[None if p.grad is None else p.grad.clone() for p in net.parameters()],
                hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()],
                flags=[getattr(m, "dense_gradient", None) for m in net.modules()], kinds=[type(m) for m in net.modules()],
                random=(random.getstate(), np.random.get_state()[1].tolist(), state["torch"]))


def equal(one, two):
    "Deep equality with tensors inside."
    if isinstance(one, torch.Tensor): return torch.equal(one, two)
    if isinstance(one, dict): return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)): return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def rough():
    "A frozen, half-evaluating network with gradients of its own, made of masked layers."
    net = made(Rough)
    net.train().bn2.eval()
    layers = {name: layer for name, layer in prunable_layers(net, exclude="unused").items()}
    net.conv2.set_mask(torch.rand(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name != "conv1.weight")
        parameter.grad = torch.ones_like(parameter) if name != "head.bias" else None
    net.conv1.register_forward_hook(lambda *_: None)
    return net, layers


@pytest.mark.parametrize("name", SCORES)
def test_nothing_of_the_model_is_disturbed(name):
    net, layers = rough()
    if name == "slimming": layers = {key: layer for key, layer in layers.items() if key == "conv1.weight"}
    data = noise(6, 1, 8)
    before = snapshot(net)
    first = score_layers(net, layers, name, data)
    assert equal(before, snapshot(net))
    torch.rand(3)
    with torch.no_grad(): second = score_layers(net, layers, name, data)
    assert all(torch.equal(first[key], second[key]) for key in first), "a function of its seed, dropout or not, also without gradients"
    net.fails = True
    before = snapshot(net)
    try: score_layers(net, layers, name, data)
    except (RuntimeError, ShapeError): pass
    else: assert name in ("magnitude", "random", "fpgm")
    assert equal(before, snapshot(net)), "nor by an error"


@pytest.mark.parametrize("name", SCORES)
def test_frozen_weights_score_like_free_ones(name):
    net, data = made(lambda: sd.resnet(8, in_channels=1)), noise(8, 1, 8)
    layers = prunable_layers(net, exclude="head")
    free = score_layers(net, layers, name, data)
    for parameter in net.parameters(): parameter.requires_grad_(False)
    frozen = score_layers(net, layers, name, data)
    assert all(torch.equal(free[key], frozen[key]) for key in free) and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: net.eval(), lambda net: net.double()], ids=["wrapped", "eval", "double"])
def test_wrappers_modes_and_precisions(wrap):
    plain, data = made(lambda: sd.resnet(8, in_channels=1)), noise(8, 1, 8)
    other = wrap(copy.deepcopy(plain))
    for name in ("snip", "grasp", "synflow", "obd", "force", "3sp-compute", "wanda", "slimming"):
        layers, others = (prunable_layers(net, exclude="head") for net in (plain, other))
        one, two = score_layers(plain, layers, name, data), score_layers(other, others, name, data)
        assert list(one) == list(two)
        for key in one: torch.testing.assert_close(one[key].double(), two[key].double(), rtol=2e-3, atol=float(one[key].abs().max()) * 1e-4)


# ---- brute force --------------------------------------------------------------------------------------------------------------------
def test_snip_is_the_gradient_by_a_gate():
    net, (x, y) = made(lambda: sd.resnet(20)), noise(16)
    layers = prunable_layers(net)
    found = snip(net, layers, (x, y))
    gates = {name: torch.ones_like(layer.weight, requires_grad=True) for name, layer in layers.items()}
    gated = {name: layer.weight.detach() * gates[name] for name, layer in layers.items()}
    loss = F.cross_entropy(torch.func.functional_call(net.train(), gated, (x,)), y)
    for name, gate in zip(layers, torch.autograd.grad(loss, list(gates.values()))):
        assert float((found[name] - gate.abs()).abs().max()) <= 1e-6 * max(1, float(gate.abs().max()))


def forced(net, x, y, steps, sparsity, revive):
    "Iterative SNIP and FORCE written out, on a list of plain weights and with a full sort."
    weights = {name: p.detach().clone() for name, p in net.named_parameters() if p.dim() > 1}
    total, alive, returned = sum(w.numel() for w in weights.values()), {name: torch.ones_like(w) for name, w in weights.items()}, 0
    for now in round_sparsities(sparsity, steps):
        masked = {name: (w * alive[name]).requires_grad_() for name, w in weights.items()}
        found = torch.autograd.grad(F.cross_entropy(torch.func.functional_call(net.train(), masked, (x,)), y), list(masked.values()))
        scored = [(w * g).abs() for w, g in zip(weights.values(), found)]
        if not revive: scored = [score.masked_fill(mask == 0, -1) for score, mask in zip(scored, alive.values())]
        flat = torch.cat([score.flatten() for score in scored])
        mask = torch.zeros(total)
        mask[flat.argsort(descending=True, stable=True)[:count_kept(total, now)]] = 1
        new = {name: part.view_as(w) for (name, w), part in zip(weights.items(), mask.split([w.numel() for w in weights.values()]))}
        returned += sum(int(((new[name] == 1) & (alive[name] == 0)).sum()) for name in weights)
        alive = new
    return {name: mask.to(torch.uint8) for name, mask in alive.items()}, returned


@pytest.mark.parametrize("name, revive", [("snip", False), ("force", True)])
def test_rounds_equal_a_loop_written_out(name, revive):
    build, (x, y) = lambda: sd.resnet(8, in_channels=1).double(), noise(32, 1, 8)
    masks, returned = forced(made(build), x.double(), y, 5, "0.98", revive)
    net = made(build)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # emptied layers
        found = sd.prune(net, "0.98", name, data=(x.double(), y), steps=5, keep="exponential", revive=revive)
    assert all(torch.equal(found[key], masks[key]) for key in masks) and found.kept == count_kept(found.total, "0.98")
    assert (returned > 0) == revive, "FORCE lets weights return, iterative SNIP does not"
    assert all(bool((layer.weight[layer.mask == 0] == 0).all()) for layer in prunable_layers(net).values()), "hard in the end"


@pytest.mark.parametrize("score", ["3sp", "taylor-unit"])
def test_unit_scores_are_gradients_of_channel_gates(score):
    net, (x, y) = made(lambda: sd.resnet(8, in_channels=1).double()), noise(16, 1, 8)
    layers = prunable_layers(net, exclude="head")  # the head has a bias, which a gate would scale too
    paths = {name: net.get_submodule(name.removesuffix(".weight")) for name in layers}
    gates = {name: torch.ones(len(layer.weight), dtype=torch.float64, requires_grad=True) for name, layer in layers.items()}
    hooks = [layer.register_forward_hook(lambda _, __, out, gate=gates[name]: out * gate.view(1, -1, 1, 1)) for name, layer in paths.items()]
    by_gate = dict(zip(gates, torch.autograd.grad(F.cross_entropy(net.train()(x.double()), y), list(gates.values()))))
    for hook in hooks: hook.remove()
    items = Criterion(score, granularity="unit", data=(x.double(), y)).items(net, layers)
    for name, gate in by_gate.items(): torch.testing.assert_close(items[name], gate.abs() if score == "3sp" else gate.square(), rtol=1e-7, atol=1e-12)


def test_obd_equals_a_loop_over_images():
    net, (x, y) = made(lambda: sd.resnet(8, in_channels=1).double()), noise(7, 1, 8)
    layers, total = prunable_layers(net), 0
    weights = [layer.weight for layer in layers.values()]
    net.eval()
    for i in range(7):
        found = torch.autograd.grad(F.cross_entropy(net(x[i:i + 1].double()), y[i:i + 1]), weights)
        total = [g ** 2 + (0 if total == 0 else total[k]) for k, g in enumerate(found)]
    net.train()
    scored = score_layers(net, layers, "obd", [(x[:3], y[:3]), (x[3:], y[3:])])
    for (name, w), t in zip(zip(layers, weights), total): torch.testing.assert_close(scored[name], t / 7 * w.detach() ** 2 / 2, rtol=1e-9, atol=1e-25)


def test_wanda_counts_every_call_of_a_shared_weight():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.two.weight = self.one.weight

        def forward(self, x): return self.head(self.two(self.one(x).relu()) + self.one(x + 1))
    net = made(Twice)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad(): inputs = torch.cat([x, net.one(x).relu(), x + 1])
    layers = prunable_layers(net)
    expected = net.one.weight.detach().double().abs() * inputs.double().norm(dim=0)
    torch.testing.assert_close(score_layers(net, layers, "wanda", (x, y))["one.weight"], expected, rtol=1e-5, atol=1e-6)


# ---- SynFlow's law, and collapse ------------------------------------------------------------------------------------------------------
def scale_of(net, x):
    "R: the sum of the outputs of the network with absolute values for an input of ones."
    positive = copy.deepcopy(net).eval().to(x.dtype)
    with torch.no_grad():
        for value in [*positive.parameters(), *positive.buffers()]:
            if value.is_floating_point(): value.abs_()
        return positive(x).sum()


def test_synflow_is_conserved_on_a_chain():
    net = made(lambda: sd.vgg(19, width=0.25))
    totals = torch.stack([score.sum() for score in synflow(net, prunable_layers(net)).values()])
    assert len(totals) == 17 and torch.allclose(totals, scale_of(net, torch.ones(1, 3, 32, 32, dtype=torch.float64)).expand(17), rtol=1e-9)


def test_synflow_needs_float64_on_wide_residual_networks():
    net = made(lambda: sd.resnet(32, classes=100, width=2, shortcut="B"))
    assert scale_of(net, torch.ones(1, 3, 32, 32)).isinf(), "float32 overflows"
    whole, found = scale_of(net, torch.ones(1, 3, 32, 32, dtype=torch.float64)), synflow(net, prunable_layers(net))
    assert all(score.isfinite().all() for score in found.values()) and 1e40 < float(whole) < 1e52
    for name, score in found.items():
        cut = name in ("stem.conv.weight", "head.weight")  # where all paths meet
        assert (abs(float(score.sum() / whole) - 1) < 1e-9) if cut else float(score.sum() / whole) < 1 + 1e-9
    assert sum(float(score.sum() / whole) < 1 - 1e-6 for score in found.values()) > 30, "inside, part of the flow takes the shortcut"


COMPRESSIONS = (1, 1.3, 1.5, 1.7, 2, 2.5, 3, 3.5)


def kaiming(net):
    "Random weights whose variance is 2 over fan-in, in every layer."
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)): nn.init.kaiming_normal_(module.weight)
    return net


def collapse(net, score, data):
    "The first of some compressions, as a power of ten, at which one round empties a layer that no shortcut leads around."
    layers = prunable_layers(net)
    found = score_layers(net, layers, score, data)
    inside = {name for name in layers if "shortcut" in name}
    for power in COMPRESSIONS:
        masks = select(found, shapes_of(layers), 1 - Fraction(10 ** -power))
        if set(emptied(masks)) - inside: return power
    return 9


@pytest.mark.parametrize("build", [lambda: sd.vgg(19, width=0.25), lambda: sd.resnet(32, width=2, shortcut="B")],
                         ids=["quarter VGG19", "double ResNet32"])
def test_one_round_of_snip_collapses_before_magnitude(build):
    data = noise(32)
    given = {"snip": data, "magnitude": None, "synflow": (3, 32, 32)}
    first = {score: collapse(made(lambda: kaiming(build())), score, given[score]) for score in given}
    assert first["snip"] < first["magnitude"] <= 3.5 and first["synflow"] < first["magnitude"]


def test_a_hundred_rounds_of_synflow_keep_every_layer_of_a_chain_to_the_last_weight():
    net = made(lambda: sd.vgg(19, width=0.25))
    total = sum(layer.weight.numel() for layer in prunable_layers(net).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = sd.prune(net, Fraction(total - 17, total), data=(3, 32, 32), **protocols.protocol("synflow"))
    assert list(masks.counts().values()) == [1] * 17
    assert float(scale_of(net, torch.ones(1, 3, 32, 32, dtype=torch.float64))) > 0, "and they form a path"


# ---- foreign networks -----------------------------------------------------------------------------------------------------------------
def vision(name): return lambda: getattr(import_torchvision().models, name)(weights=None)


def transformer():
    "As `vit_b_16`, but small."
    make = import_torchvision().models.vision_transformer.VisionTransformer
    return make(image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)


def perceptron(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 20), nn.ReLU(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10))


FOREIGN = {"resnet18": vision("resnet18"), "mobilenet_v2": vision("mobilenet_v2"), "transformer": transformer, "mlp": perceptron}


@pytest.mark.parametrize("network", FOREIGN)
def test_every_score_on_foreign_networks(network):
    "Finite scores and exact counts, or an error of ours that says what to do."
    net, data = made(FOREIGN[network]), noise(2)
    layers = prunable_layers(net)
    for name in SCORES:
        chosen = layers
        if name == "slimming":
            with pytest.raises(ParameterError, match="exclude="): score_layers(net, layers, name, data)
            pairs = norms_after(net, (3, 32, 32))
            chosen = {key: layer for key, layer in layers.items() if key in pairs}
            assert bool(chosen) == (network in ("resnet18", "mobilenet_v2"))
            if not chosen: continue
        if network == "transformer" and name in ("wanda", "3sp-compute"):  # they watch what a layer is given, and an attention calls none of its projections
            with pytest.raises(ParameterError, match="exclude="): score_layers(net, layers, name, data)
            chosen = {key: layer for key, layer in layers.items() if not key.endswith("in_proj_weight") and "out_proj" not in key}
        found = score_layers(net, chosen, name, data)
        assert all(score.isfinite().all() for score in found.values())
        if name not in ("grasp", "synflow", "3sp", "slimming"): continue  # signed, float64, and constant over units
        total = sum(layer.weight.numel() for layer in chosen.values())
        assert sum(int(mask.sum()) for mask in select(found, shapes_of(chosen), "0.9").values()) == count_kept(total, "0.9")


def test_the_full_vision_transformer():
    net = made(lambda: import_torchvision().models.vit_b_16(weights=None, image_size=32))
    nn.init.normal_(net.heads.head.weight, std=0.01)  # zero as built, which stops every gradient
    some = ("conv_proj", "encoder.layers.encoder_layer_11", "heads")
    layers = {name: layer for name, layer in prunable_layers(net).items() if name.startswith(some)}
    found = score_layers(net, layers, "snip", noise(2))
    assert all(score.isfinite().all() for score in found.values()) and any(score.any() for score in found.values())
    with pytest.raises(ShapeError, match="pass data="): score_layers(net, layers, "synflow", (3, 30, 30))


@pytest.mark.parametrize("name", LOOKING)
def test_data_that_does_not_fit_is_a_typed_error(name):
    net = made(lambda: sd.resnet(8, in_channels=1))
    layers = prunable_layers(net)
    for data in (None, 3, "digits", (3, 32, 32), [], torch.rand(2, 1, 8, 8), noise(4, 3, 8), noise(4, 1, 8, classes=99)):
        if name == "wanda" and isinstance(data, tuple) and isinstance(data[0], torch.Tensor) and data[0].shape[1] == 1: continue  # needs no labels
        with pytest.raises(SparseDartsError): score_layers(net, layers, name, data)


# ---- norms ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("network, pairs", [("resnet18", 20), ("mobilenet_v2", 52), ("densenet121", 59), ("shufflenet_v2_x1_0", 56)])
def test_norms_follow_their_convolutions(network, pairs):
    "In these networks every pair is known by name or place; a dense block's second convolutions feed a concatenation instead."
    net = made(lambda: getattr(import_torchvision().models, network)(weights=None))
    found = norms_after(net, (3, 64, 64))
    assert len(found) == pairs
    modules = dict(net.named_modules())
    for weight, norm in found.items():
        assert modules[norm].num_features == modules[weight.removesuffix(".weight")].out_channels
        named = weight.replace("0.weight", "1.weight") if "downsample" in weight else weight.replace("conv", "bn")
        if network == "resnet18": assert norm == named.removesuffix(".weight")


def test_slimming_reads_the_right_gamma_and_silence_makes_removal_exact():
    net = made(lambda: sd.resnet(8, in_channels=1, shortcut="B"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean): value.copy_(torch.randn(value.shape, generator=generator))
    layers = prunable_layers(net, exclude="head")
    for name, score in score_layers(net, layers, "slimming", (1, 8, 8)).items():
        norm = net.get_submodule(name.replace("conv", "bn").removesuffix(".weight"))  # as this network is written
        assert torch.equal(score, norm.weight.detach().abs().view(-1, 1, 1, 1).expand(score.shape))
    outputs = {}
    masks = sd.prune(net, 0.4, "slimming", granularity="unit", data=(1, 8, 8), exclude="head")
    dead = silence(net, masks, (1, 8, 8))
    pairs = norms_after(net, (1, 8, 8))
    def note(name): return lambda _, __, out: outputs.__setitem__(name, out.clone())
    hooks = [net.get_submodule(pairs[name]).register_forward_hook(note(name)) for name in dead]
    for training in (True, False):
        with torch.no_grad(): net.train(training)(noise(4, 1, 8)[0])
        assert all(outputs[name][:, units].eq(0).all() and outputs[name][:, ~units].any() for name, units in dead.items())
    for hook in hooks: hook.remove()


# ---- protocols ----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in protocols.protocols if name != "synflow"])
def test_protocols_prune_exactly(name, digits):
    net, arguments = made(lambda: sd.resnet(8, in_channels=1)), protocols.protocol(name, digits)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d): nn.init.uniform_(module.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = sd.prune(net, 0.8, exclude="head" if name == "slimming" else None, **arguments)
    units = [mask.flatten(1).bool().any(1) for mask in masks.values()]
    if "granularity" in arguments: assert sum(int(u.sum()) for u in units) == count_kept(sum(map(len, units)), 0.8)
    else: assert masks.kept == count_kept(masks.total, 0.8)


def test_every_registered_score_is_checked_here():
    assert set(SCORES) <= set(scores)
