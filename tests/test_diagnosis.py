"""Paths, packed files, controls and kernels on random networks, against brute force; masked networks where they are copied and saved."""
import copy
import importlib.util
import io
import itertools
import pickle
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsedarts as sd
from sparsedarts.core import CheckpointError, CollapseError, ParameterError, SparseDartsError
from sparsedarts.pruning import ablations
from sparsedarts.pruning.allocation import as_allocation, erk_densities
from sparsedarts.pruning.diagnosis import check_connected, cuts, diagnose, effective, is_connected, paths
from sparsedarts.sparse.kernels import speed_table, to_csr
from sparsedarts.sparse.layers import masked_layers
from sparsedarts.sparse.packed import load_packed, pack_bits, packed_bytes, packed_sizes, save_packed, unpack_bits
from sparsedarts.vision import import_torchvision

# Random small networks as programs: a list of steps on a current map, with memories for residual sums and concatenations.

SHAPE = (2, 4, 4)


def program(seed, pool="max"):
    "A random list of steps: (kind, settings)."
    pick, channels, size, steps = torch.Generator().manual_seed(seed), SHAPE[0], SHAPE[1], []
    def choose(*options): return options[int(torch.randint(len(options), (), generator=pick))]
    def conv(c_in, c_out, **more): return ("conv", dict(in_channels=c_in, out_channels=c_out, kernel_size=3, padding=1, bias=False) | more)
    for _ in range(3):
        kind, act = choose("plain", "residual", "depthwise", "grouped", "concat", "pool"), ("act", choose(nn.ReLU, nn.GELU, nn.SiLU))
        if kind == "plain":
            stride, padding, kernel = choose(1, 2), choose(0, 1), choose(2, 3)
            if size + 2 * padding < kernel: continue
            steps += [conv(channels, 3, stride=stride, padding=padding, kernel_size=kernel), ("norm", 3), act]
            channels, size = 3, (size + 2 * padding - kernel) // stride + 1
        elif kind == "residual": steps += [("save",), conv(channels, 2), act, conv(2, channels), ("add",), act]
        elif kind == "depthwise": steps += [conv(channels, channels, groups=channels), act]
        elif kind == "grouped" and channels % 2 == 0:
            steps += [conv(channels, 4, groups=2), act]
            channels = 4
        elif kind == "concat" and channels < 4:
            steps += [("save",), conv(channels, 2), ("cat",)]
            channels += 2
        elif kind == "pool" and size >= 3:
            kernel, stride, padding, ceil = choose(2, 3), choose(1, 2), choose(0, 1), choose(False, True)
            steps += [("pool", pool, kernel, stride, padding, ceil)]
            size = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)(torch.zeros(1, 1, size, size)).shape[2]
    return steps


class Programmed(nn.Module):
    "A network that runs a program and ends with a linear layer on everything."
    def __init__(self, steps):
        super().__init__()
        kinds = {"conv": lambda options: nn.Conv2d(**options), "norm": nn.BatchNorm2d, "act": lambda kind: kind(),
                 "pool": lambda which, *options: nn.MaxPool2d(*options[:3], ceil_mode=options[3]) if which == "max" else nn.AvgPool2d(*options)}
        self.steps, self.parts = steps, nn.ModuleList(kinds[kind](*rest) if kind in kinds else nn.Identity() for kind, *rest in steps)
        self.head = nn.Linear(self.eval().features(torch.zeros(1, *SHAPE)).shape[1], 2, bias=False)

    def features(self, x):
        saved = []
        for (kind, *_), part in zip(self.steps, self.parts):
            if kind == "save": saved.append(x)
            elif kind == "add": x = x + saved.pop()
            elif kind == "cat": x = torch.cat([saved.pop(), x], 1)
            else: x = part(x)
        return x.flatten(1)

    def forward(self, x): return self.head(self.features(x))


def brute_force(net, masks):
    "Weights on a path, from a graph whose vertices are single positions and whose edges are single multiplications."
    edges, count = [], itertools.count()   # (from, to, (weight's name, index) or None)
    def fresh(shape): return torch.tensor([next(count) for _ in range(torch.Size(shape).numel())]).view(shape)
    def join(here, there, weight=None): edges.append((int(here), int(there), weight))
    inputs = now = fresh(SHAPE)
    saved = []
    for i, (kind, *rest) in enumerate(net.steps):
        part = net.parts[i]
        if kind == "save": saved.append(now)
        elif kind == "add":
            made, other = fresh(now.shape), saved.pop()
            for source in (now, other):
                for a, b in zip(source.flatten(), made.flatten()): join(a, b)
            now = made
        elif kind == "cat": now = torch.cat([saved.pop(), now])
        elif kind in ("conv", "pool"):
            now = windows(now, part, kind, f"parts.{i}.weight", masks, fresh, join)
    outputs = fresh((2,))
    for (out, into), kept in zip(itertools.product(range(2), range(now.numel())), masks["head.weight"].flatten()):
        if kept: join(now.flatten()[into], outputs[out], ("head.weight", (out, into)))
    ahead, back = closure(inputs, [(a, b) for a, b, _ in edges]), closure(outputs, [(b, a) for a, b, _ in edges])
    alive = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for a, b, weight in edges:
        if weight and a in ahead and b in back: alive[weight[0]][weight[1]] = 1
    return alive, [int(out) in ahead for out in outputs]


def windows(now, part, kind, name, masks, fresh, join):
    "Edges of a convolution or pool; returns the vertices of its output."
    def two(value): return value if isinstance(value, tuple) else (value, value)
    (kh, kw), (sh, sw), (ph, pw) = two(part.kernel_size), two(part.stride), two(part.padding)
    height, width = part(torch.zeros(1, *now.shape)).shape[2:]
    groups = part.groups if kind == "conv" else len(now)
    made = fresh((part.out_channels if kind == "conv" else len(now), height, width))
    per_out, per_in = len(made) // groups, len(now) // groups
    for o, y, x, i, dy, dx in itertools.product(range(len(made)), range(height), range(width), range(per_in), range(kh), range(kw)):
        row, column = y * sh + dy - ph, x * sw + dx - pw
        if not (0 <= row < now.shape[1] and 0 <= column < now.shape[2]): continue
        if kind == "conv" and not masks[name][o, i, dy, dx]: continue
        join(now[o // per_out * per_in + i, row, column], made[o, y, x], (name, (o, i, dy, dx)) if kind == "conv" else None)
    return made


def closure(start, edges):
    "Everything that can be walked to."
    after = {}
    for a, b in edges: after.setdefault(a, []).append(b)
    seen, stack = set(), [int(v) for v in start.flatten()]
    while stack:
        vertex = stack.pop()
        if vertex not in seen:
            seen.add(vertex)
            stack += after.get(vertex, [])
    return seen


def thinned(seed, density, pool="max"):
    "A random network with random masks."
    net, generator = sd.sparsify(Programmed(program(seed, pool))), torch.Generator().manual_seed(seed)
    return sd.apply_masks(net, {name: torch.rand(layer.weight.shape, generator=generator) < density for name, layer in masked_layers(net).items()})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.08, 0.15, 0.3, 0.6]))
def test_effective_weights_are_those_on_a_path(seed, density):
    "Convolutions of every kind, pools, residual sums and concatenations, against a graph of single positions."
    net = thinned(seed, density)
    expected, outputs = brute_force(net, sd.masks_of(net))
    found, reached = paths(net, SHAPE)
    assert {name: mask.tolist() for name, mask in found.items()} == {name: mask.tolist() for name, mask in expected.items()}
    assert reached.bool().tolist() == outputs and is_connected(net, SHAPE) == any(outputs)
    report = diagnose(net, SHAPE)
    assert report.total("effective") == sum(int(mask.sum()) for mask in expected.values()) and report.connected == any(outputs)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_effective_weights_are_those_that_matter(seed):
    "With positive weights and inputs every kept weight is taken out once: the output changes exactly if the weight is on a path."
    net = thinned(seed, 0.25, pool="avg").double().eval()
    generator = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(part, (nn.ReLU, nn.GELU, nn.SiLU)): part.forward = lambda x: x
    with torch.no_grad():
        for parameter in net.parameters(): parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
        for name, value in net.named_buffers():
            if "running_mean" in name or name.endswith("bias"): value.zero_()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d): part.bias.zero_()
        x = torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64) + 0.5
        before, alive = net(x), effective(net, SHAPE)
        for name, layer in masked_layers(net).items():
            for place in layer.mask.nonzero().tolist():
                old = layer.weight[tuple(place)].item()
                layer.weight[tuple(place)] = 0
                assert bool((net(x) != before).any()) == bool(alive[name][tuple(place)]), (name, place)
                layer.weight[tuple(place)] = old


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.03, 0.08, 0.15]))
def test_cuts_are_enough_and_none_is_too_many(seed, density):
    "Opening the named layers connects the network; opening all but one of them does not."
    net = thinned(seed, density)
    named = cuts(net, SHAPE)
    assert (named == []) == is_connected(net, SHAPE)
    def opened(names):
        twin = copy.deepcopy(net)
        if names: sd.apply_masks(twin, {name: torch.ones_like(sd.masks_of(net)[name]) for name in names})
        return is_connected(twin, SHAPE)
    if named:
        assert opened(named) and not any(opened([other for other in named if other != name]) for name in named)
        with pytest.raises(CollapseError, match=named[0]): check_connected(net, SHAPE)


def test_depth_does_not_overflow():
    "4 to the power of 600 paths, and a single one."
    net = sd.sparsify(nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(600)]))
    assert effective(net, (4,)).density == 1
    first = torch.zeros(4, 4)
    first[0, 0] = 1
    sd.apply_masks(net, {name: first for name in masked_layers(net)})
    assert effective(net, (4,)) == sd.masks_of(net)
    sd.apply_masks(net, {"300.weight": torch.zeros(4, 4)})
    assert effective(net, (4,)).kept == 0 and cuts(net[290:310], (4,)) == ["300.weight"]




@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "swin_t"])
def test_nothing_is_called_dead_in_dense_networks(name):
    "Depthwise layers, concatenations, shuffles, gates, windowed attention: every weight is on a path."
    alive, reached = paths(getattr(import_torchvision().models, name)(weights=None), (3, 64, 64))
    assert reached.all() and all(mask.all() for mask in alive.values()), [name for name, mask in alive.items() if not mask.all()]


def test_padding_is_not_a_path():
    "5x5 depthwise kernels on the 2x2 maps of a small image use 9 of 25 weights; classifiers beside the main path none in evaluation."
    alive, _ = paths(import_torchvision().models.mnasnet0_5(weights=None), (3, 64, 64))
    odd = {name: mask.float().mean().item() for name, mask in alive.items() if not mask.all()}
    assert len(odd) == 3 and all(share == pytest.approx(9 / 25) for share in odd.values())
    alive, _ = paths(import_torchvision().models.googlenet(weights=None, init_weights=False, aux_logits=True), (3, 64, 64))
    assert {name.split(".")[0] for name, mask in alive.items() if not mask.any()} == {"aux1", "aux2"}


class Handmade(nn.Module):
    "What people write in a forward: in-place sums, a buffer that is filled, a loop, a transposed product."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.token, self.unit = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 4, bias=False)

    def forward(self, x):  # (B, 3, 4)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y = self.a(x)
        y += x
        y[:, 0] = 0
        y.mul_(self.b(x).sigmoid())
        for _ in range(2): y = y @ self.unit.weight.t()
        return y.max(1).values


def test_handmade_forwards():
    net = Handmade()
    alive, reached = paths(net, (3, 4))
    assert reached.all() and all(mask.all() for mask in alive.values()) and set(alive) == {"a.weight", "b.weight", "unit.weight"}
    class Filled(nn.Module):
        "Writes its input into a tensor of zeros."
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
        def forward(self, x):
            y = torch.zeros(x.shape, dtype=x.dtype)
            y[:] = self.fc(x)
            return y
    with pytest.raises(ParameterError, match="cannot follow a signal through __setitem__"): paths(Filled(), (4,))


@pytest.mark.parametrize("call", [
    lambda net: effective(net, SHAPE), lambda net: diagnose(net, SHAPE), lambda net: cuts(net, SHAPE), lambda net: diagnose(net, (9, 1)),
    lambda net: speed_table(net, SHAPE, rounds=2), lambda net: packed_sizes(net), lambda net: to_csr(net, 0.01)])
def test_reports_leave_the_network_alone(call):
    "State, masks, modes, gradients, hooks, random generators: as before, also after an error."
    net, x = thinned(3, 0.3), torch.randn(2, *SHAPE)
    net.train().head.eval()
    net(x).sum().backward()
    def everything():
        return ([*net.state_dict().values(), *sd.masks_of(net).values(), *(p.grad for p in net.parameters()), torch.get_rng_state()],
                [(m.training, type(m), len(m._forward_hooks)) for m in net.modules()], [p.requires_grad for p in net.parameters()])
    before = copy.deepcopy(everything())
    try: call(net)
    except SparseDartsError: pass
    after = everything()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0])) and before[1:] == after[1:]


def test_packed_bytes_of_resnet50_are_the_published_ones():
    "ERK at 80, 90 and 95 %: 4 bytes a kept weight, a bit for each weight of a sparse layer, and 27,560 numbers beside the weights (RigL's README)."
    with torch.device("meta"): net = import_torchvision().models.resnet50(weights=None)
    shapes = {f"{name}.weight": tuple(layer.weight.shape) for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(sizes.values()) == 25_502_912
    beside = sum(p.numel() for name, p in net.named_parameters() if name.endswith("bias"))  # of norms (folded scales) and of the classifier
    assert beside == 27_560
    for sparsity, published, exact in (("0.8", 23.683, 23_683_536), ("0.9", 13.499, 13_498_756), ("0.95", 8.399, 8_398_688)):
        kept = as_allocation("erk").counts(shapes, sizes, Fraction(sparsity))
        assert sum(kept.values()) == 25_502_912 - int(Fraction(sparsity) * 25_502_912 + Fraction(1, 2))
        packed = sum(packed_bytes(size, kept[name]) for name, size in sizes.items()) + 4 * beside
        assert packed == exact and packed / 1e6 == pytest.approx(published, abs=1e-3)
    assert any(density == 1 for density in erk_densities(shapes, Fraction("0.2")).values())


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64)


def raw(tensor):
    "The bytes of a tensor."
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_packed_states_come_back_bit_for_bit(tmp_path_factory, data):
    "Any types, shapes and masks; NaN, infinities and negative zeros among the kept values."
    generator, state, masks = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000))), {}, {}
    for i in range(data.draw(st.integers(1, 4))):
        shape, dtype = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4))), data.draw(st.sampled_from(DTYPES))
        value = (10 * torch.randn(shape, generator=generator)).to(dtype)
        if dtype.is_floating_point and value.numel() > 2: value.view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")]).to(dtype)
        state[f"layer {i}.weight"] = value
        if data.draw(st.booleans()): masks[f"layer {i}.weight"] = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0, 0.3, 1]))
    path = save_packed(state, tmp_path_factory.mktemp("packed") / "p.safetensors", masks)
    again, sizes = load_packed(path), packed_sizes(state, masks)
    assert list(again.state) == list(state) and (again.masks or {}) == (sd.Masks(masks) if masks else {})
    for name, value in state.items():
        expected = torch.tensor(raw(value), dtype=torch.uint8).reshape(value.numel(), -1 if value.numel() else 1)  # bytes: arithmetic may change the bits of a NaN
        if name in masks: expected[~masks[name].reshape(-1)] = 0
        assert again.state[name].dtype == value.dtype and again.state[name].shape == value.shape and raw(again.state[name]) == expected.reshape(-1).tolist(), name
    assert 0 <= path.stat().st_size - sizes.packed.sum() < 400 + 400 * len(state)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_damaged_packed_files_are_typed_errors(tmp_path_factory, seed, where):
    "Cut anywhere, or with a byte of the header changed: a typed error or the same content, never something else."
    net, folder = thinned(seed, 0.3), tmp_path_factory.mktemp("packed")
    whole = save_packed(net, folder / "p.safetensors").read_bytes()
    damaged, place = folder / "d.safetensors", int(where * (len(whole) - 1))
    damaged.write_bytes(whole[:place])
    with pytest.raises(CheckpointError): load_packed(damaged)
    header = 8 + int.from_bytes(whole[:8], "little")
    place %= header
    damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    try: found = load_packed(damaged)
    except CheckpointError: return
    assert set(found.state) == set(net.state_dict()) and found.masks.counts() == sd.masks_of(net).counts()


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_packed_networks_compute_the_same(tmp_path, mode):
    "A ResNet and a network with shared weights: masks, modes, outputs; what is behind soft masks is gone."
    torch.manual_seed(0)
    net = sd.resnet(8, in_channels=1)
    sd.prune(net, "0.9", mode=mode)
    before = [p.detach().clone() for p in net.parameters()]
    twin = sd.resnet(8, in_channels=1)
    load_packed(save_packed(net, tmp_path / "net.safetensors"), twin)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net.eval()(x), twin.eval()(x)) and sd.masks_of(twin) == sd.masks_of(net) and twin.head.mode == mode
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters())), "saving changes nothing"
    if mode == "hard": assert all(torch.equal(value, net.state_dict()[name]) for name, value in twin.state_dict().items())
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tied[2].weight = tied[0].weight
    sd.prune(tied, 0.5, mode=mode)
    other = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    other[2].weight = other[0].weight
    load_packed(save_packed(tied, tmp_path / "tied.safetensors"), other)
    assert other[2].weight is other[0].weight and other[2].mask is other[0].mask and torch.equal(other(torch.ones(1, 6)), tied(torch.ones(1, 6)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=70))
def test_bits_are_packed_lowest_first(bits):
    mask = torch.tensor(bits, dtype=torch.uint8)
    by_hand = [sum(bit << place for place, bit in enumerate(bits[i:i + 8])) for i in range(0, len(bits), 8)]
    assert pack_bits(mask).tolist() == by_hand and torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from(["layer", "unit"]))
def test_shuffles_keep_counts(seed, density, within):
    "Per layer and per unit; a permutation of what was there; the same for the same seed."
    generator = torch.Generator().manual_seed(seed)
    masks = sd.Masks({name: torch.rand(shape, generator=generator) < density for name, shape in {"a": (4, 3, 2, 2), "b": (5, 7), "c": (1,)}.items()})
    moved = ablations.shuffle(masks, seed, within)
    assert moved.counts() == masks.counts() and moved == ablations.shuffle(masks, seed, within)
    if within == "unit": assert all(torch.equal(moved[name].flatten(1).sum(1), masks[name].flatten(1).sum(1)) for name in ("a", "b"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.decimals("0", "0.97", places=2), st.sampled_from(["global", "layer", "erk"]))
def test_random_masks_are_exact(seed, sparsity, allocation):
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(5, 7))
    masks = ablations.random_masks(net, str(sparsity), allocation, seed=seed)
    assert masks.kept == masks.total - int(Fraction(str(sparsity)) * masks.total + Fraction(1, 2)) and not hasattr(net[0], "mask")


@pytest.mark.parametrize("kind", ["shuffled", "random", "reinitialised", None])
def test_ablations_are_deterministic_and_leave_the_generators_alone(kind):
    from sparsedarts.nets.resnets import initialise
    nets = []
    for again in range(2):
        torch.manual_seed(0)
        net = sd.resnet(8, in_channels=1)
        initial = copy.deepcopy(net.state_dict())
        sd.prune(net, 0.9)
        torch.manual_seed(again)
        state = torch.get_rng_state()
        masks = ablations.ablate(net, kind, seed=5, initial=initial, init=initialise)
        assert torch.equal(torch.get_rng_state(), state) and masks == sd.masks_of(net)
        assert all((layer.weight[layer.mask == 0] == 0).all() for layer in masked_layers(net).values())
        if kind != "reinitialised": assert all(torch.equal(layer.weight, initial[name] * layer.mask) for name, layer in masked_layers(net).items())
        nets.append(net)
    one, two = nets
    assert sd.masks_of(one) == sd.masks_of(two) and all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    if kind == "reinitialised":
        deep = nets[0].stages[2][0].conv2
        kept = deep.weight[deep.mask == 1]
        assert kept.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.15), "drawn by the network's own rule, which was given"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 6), st.floats(0, 1), st.booleans())
def test_csr_layers_compute_the_same(rows, columns, batch, density, bias):
    generator = torch.Generator().manual_seed(rows + 100 * columns)
    layer = sd.sparsify(nn.Linear(columns, rows, bias=bias), mode="hard")
    layer.set_mask(torch.rand(rows, columns, generator=generator) < density)
    x = torch.randn(batch, columns, generator=generator)
    with torch.no_grad(): torch.testing.assert_close(to_csr(layer, above=0)(x), layer(x), rtol=1e-4, atol=1e-5)


# Masked networks, copied and saved (pruning.md e.10); torch.export, torch.compile and several processes are in test_sparse.py.

def copies(net):
    "The ways in which people copy a network as a whole."
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    return {"deepcopy": copy.deepcopy(net), "pickle": pickle.loads(pickle.dumps(net)), "torch.save": torch.load(stream, weights_only=False)}


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_copies_are_masked_and_independent(mode):
    net, x = sd.resnet(8, in_channels=1), torch.randn(2, 1, 8, 8)
    masks = sd.prune(net, 0.8, mode=mode)
    net.eval()
    for way, twin in copies(net).items():
        assert torch.equal(twin(x), net(x)) and sd.masks_of(twin) == masks and twin.head.mode == mode, way
        sd.apply_masks(twin, {"head.weight": torch.zeros(10, 64)})
        assert sd.masks_of(net) == masks, way
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if mode == "hard": sd.hold(twin, optimizer)
        twin.train()(x).square().sum().backward()
        optimizer.step()
        if mode == "hard": assert all((layer.weight[layer.mask == 0] == 0).all() for layer in masked_layers(twin).values()), way


def test_state_dictionaries_are_the_dense_networks():
    "The keys of the dense network, no mask among them; a dense state loaded into hard layers is masked."
    dense, net = sd.resnet(8, in_channels=1), sd.resnet(8, in_channels=1)
    masks = sd.prune(net, 0.8)
    assert list(net.state_dict()) == list(dense.state_dict())
    dense.load_state_dict(net.state_dict(), strict=True)
    net.load_state_dict(sd.resnet(8, in_channels=1).state_dict(), strict=True)
    assert sd.masks_of(net) == masks and all((layer.weight[layer.mask == 0] == 0).all() for layer in masked_layers(net).values())


@pytest.fixture
def benchmark(root):
    "benchmarks/initialisation.py as a module, with a tiny network."
    spec = importlib.util.spec_from_file_location("initialisation", root / "benchmarks" / "initialisation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_benchmark_compares_the_same_thing(benchmark, method):
    "Ours and the straightforward code keep the same weights."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x, y = benchmark.build(1 / 16, 4)
        one, two = (getattr(benchmark, side)(method, copy.deepcopy(model), x, y, 4) for side in benchmark.SIDES)
    assert set(one) == set(two) and one.kept == sum(int(mask.sum()) for mask in two.values()) > 0
    assert sum(int((one[name] * two[name]).sum()) for name in one) >= 0.99 * one.kept


def test_benchmark_would_notice_a_wrong_count(benchmark):
    run = dict(wall=1.0, cpu=1.0, peak=2.0, above=1.0, kept=20, total=1000, empty=0)
    rows = benchmark.summarise({"snip": {"ours": [run], "straightforward": [run | dict(cpu=2.0, kept=21)]}}, {"snip": 1.0})
    assert rows[0]["cpu_ratio"] == 0.5 and rows[0]["expected"] == 20 and rows[1]["cpu_ratio"] == 1
    wrong = {"snip": {"ours": [run | dict(kept=21)], "straightforward": [run]}}
    with pytest.raises(AssertionError, match="snip keeps 21 instead of 20"): benchmark.summarise(wrong, {"snip": 1.0})
