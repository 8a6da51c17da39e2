"""Smaller networks that compute the same: every kind of network, random graphs, a second opinion, files for others."""
import copy
import importlib.metadata
import importlib.util
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsedarts as sd
from sparsedarts.core import ParameterError, ShapeError
from sparsedarts.sparse.channels import follow_channels
from sparsedarts.sparse.compaction import compact, plain_copy
from sparsedarts.sparse.layers import masked_layers
from sparsedarts.sparse.norms import silence
from sparsedarts.vision import import_torchvision

HAS = {name: importlib.util.find_spec(name) is not None for name in ("torch_pruning", "onnx", "onnxscript", "onnxruntime")}


class Op(nn.Sequential):
    "ReLU, convolutions, norm: the operations of a cell."
    def __init__(self, c_in, c_out, kernel=1, stride=1, dilation=1, separable=False, affine=True):
        parts, pad = [nn.ReLU(inplace=False)], dilation * (kernel // 2)
        if separable: parts += [nn.Conv2d(c_in, c_in, kernel, stride, pad, dilation, groups=c_in, bias=False), nn.Conv2d(c_in, c_out, 1, bias=False)]
        else: parts.append(nn.Conv2d(c_in, c_out, kernel, stride, pad, dilation, bias=False))
        super().__init__(*parts, nn.BatchNorm2d(c_out, affine=affine))


class FactorizedReduce(nn.Module):
    "Two strided convolutions on shifted inputs, concatenated."
    def __init__(self, c_in, c_out):
        super().__init__()
        self.first, self.second, self.bn = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False), nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False), nn.BatchNorm2d(c_out)

    def forward(self, x):
        x = F.relu(x)
        return self.bn(torch.cat([self.first(x), self.second(x[:, :, 1:, 1:])], dim=1))


class Cell(nn.Module):
    "Four nodes of two operations each; the output joins the nodes."
    def __init__(self, c_before, c_in, c, reduce=False, reduced=False):
        super().__init__()
        stride = 2 if reduce else 1
        def skip(): return FactorizedReduce(c, c) if reduce else nn.Identity()
        def sep(k, s): return nn.Sequential(Op(c, c, k, s, separable=True), Op(c, c, k, separable=True))
        self.one = FactorizedReduce(c_before, c) if reduced else Op(c_before, c)
        self.two = Op(c_in, c)
        self.ops = nn.ModuleList([sep(3, stride), sep(5, stride), skip(), sep(3, 1), Op(c, c, 3, stride, 2, separable=True),
                                  nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(c, affine=False)), skip(),
                                  nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.BatchNorm2d(c, affine=False))])

    def forward(self, s0, s1):
        states = [self.one(s0), self.two(s1)]
        for i, (a, b) in enumerate(((0, 1), (0, 2), (1, 0), (1, 3))): states.append(self.ops[2 * i](states[a]) + self.ops[2 * i + 1](states[b]))
        return torch.cat(states[2:], dim=1)


class Cells(nn.Module):
    "A normal, a reduction and a normal cell; an auxiliary head that only training reaches."
    def __init__(self, c=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * c, 3, padding=1, bias=False), nn.BatchNorm2d(3 * c))
        self.cells = nn.ModuleList([Cell(3 * c, 3 * c, c), Cell(3 * c, 4 * c, 2 * c, reduce=True), Cell(4 * c, 8 * c, 2 * c, reduced=True)])
        self.auxiliary, self.pool, self.head = nn.Linear(8 * c, 5), nn.AdaptiveAvgPool2d(1), nn.Linear(8 * c, 5)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell in self.cells: s0, s1 = s1, cell(s0, s1)
        x = self.pool(s1)
        x = x.view(x.size(0), -1)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def from_torchvision(name, **options):
    "A function that makes one of torchvision's networks."
    def make():
        import_torchvision()
        import torchvision.models as models
        return getattr(models, name)(**options)
    return make


def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 3))


VIT = dict(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)   # vit_b_16's class, small
NETWORKS = {
    "resnet8 A": (lambda: sd.resnet(8, shortcut="A"), 16), "resnet20 A": (lambda: sd.resnet(20, width=0.5), 8), "resnet20 B": (lambda: sd.resnet(20, width=0.5, shortcut="B"), 8),
    "vgg11, 1 linear": (lambda: sd.vgg(11, width=0.1), 32), "vgg11, 3 linear": (lambda: sd.vgg(11, fc=3, width=0.1), 32), "vgg11, no norm": (lambda: sd.vgg(11, batch_norm=False, width=0.1), 32),
    "resnet18": (from_torchvision("resnet18", num_classes=5), 32), "mobilenet_v2": (from_torchvision("mobilenet_v2", width_mult=0.35, num_classes=5), 32),
    "cells": (Cells, 8), "vit": (from_torchvision("VisionTransformer", **VIT), 16), "mlp": (mlp, 4),
}


def lively(model, seed=0):
    "Norms, biases and zero heads as after training, in float64."
    generator = torch.Generator().manual_seed(seed)
    def draw(value, low, high): value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                draw(module.running_mean, -0.5, 0.5), draw(module.running_var, 0.5, 1.5)
                if module.affine: draw(module.weight, 0.5, 1.5), draw(module.bias, -0.5, 0.5)
            elif isinstance(module, nn.Linear):
                draw(module.weight, -0.3, 0.3)
                if module.bias is not None: draw(module.bias, -0.3, 0.3)
    return model.double().eval()


def last_linear(model): return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def unit_masked(name, sparsity=0.5, seed=0, mode="hard"):
    "A lively network with random units masked, its masks, and a batch."
    make, size = NETWORKS[name]
    torch.manual_seed(seed)
    net = lively(make(), seed)
    masks = sd.prune(net, sparsity, score="random", granularity="unit", allocation="layer", exclude=last_linear(net), mode=mode, seed=seed)
    return net, masks, torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def state_of(model): return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, state): return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_removal_is_exact_once_constants_are_silent(name):
    "Zero after the norm means zero difference, on inputs that `compact` never saw; the network itself is untouched."
    net, masks, x = unit_masked(name)
    lengths = {weight: int(mask.flatten(1).any(1).sum()) for weight, mask in masks.items()}
    silence(net, masks, x)
    net.train()
    state, modes, rng = state_of(net), [module.training for module in net.modules()], torch.get_rng_state()
    small = compact(net, x)
    assert same_state(net, state) and modes == [module.training for module in net.modules()] and torch.equal(rng, torch.get_rng_state())
    assert masked_layers(net) and not masked_layers(small) and not any(module._forward_hooks for module in [*net.modules(), *small.modules()])
    assert type(small) is type(net) and modes == [module.training for module in small.modules()]
    record, other = small.compaction, torch.randn(4, *x.shape[1:], dtype=torch.float64)
    with torch.no_grad(): torch.testing.assert_close(small.eval()(other), net.eval()(other), rtol=1e-9, atol=1e-12)
    assert small.difference <= 1e-12 and record.scale > 1e-4 and not record.rescued
    assert record.params == sum(p.numel() for p in small.parameters()) < record.params_before == sum(p.numel() for p in net.parameters()) and record.macs < record.macs_before
    if name not in ("mobilenet_v2", "cells"):   # there a filter also goes when its depthwise partner is dead
        for row in record.rows: assert row["units"] >= lengths.get(f"{row['layer']}.weight", 0), "nothing alive goes"
    with torch.no_grad(): float32 = compact(net.float(), x.float())
    assert float32.difference <= 1e-5 * max(1, record.scale)


@pytest.mark.parametrize("name", ["resnet8 A", "resnet20 B", "vgg11, 3 linear", "mobilenet_v2", "cells", "mlp"])
def test_constants_are_folded_as_well_as_a_constant_can(name):
    "Lively norms: folding leaves less than dropping; behind 1x1 convolutions and linear layers nothing is left."
    net, masks, x = unit_masked(name)
    folded, dropped = compact(net, x), compact(net, x, fold=False)
    assert folded.difference < 0.5 * dropped.difference and folded.compaction.folded and not dropped.compaction.folded
    new = {f"{layer}.bias" for layer, where in folded.compaction.folded.items() if where == "new bias"}
    assert {n for n, _ in folded.named_parameters()} - {n for n, _ in dropped.named_parameters()} == new, "only what is named has a new bias"
    assert new <= {"hidden.0.fc.bias", "hidden.1.fc.bias", "head.bias"} or name == "cells" and all("first" in n or "second" in n for n in new), sorted(new)
    if name == "mlp": assert folded.difference < 1e-12
    soft, _, _ = unit_masked(name, mode="soft")
    assert max(float(layer.weight.detach().abs().amax()) for layer in masked_layers(soft).values()) > 0
    assert abs(compact(soft, x).difference - folded.difference) < 1e-12, "raw weights behind soft masks do not count"


def test_option_a_becomes_the_narrow_resnet():
    "Masks that leave the middle of every stage turn a ResNet-8 into the ResNet-8 of half its width, parameter by parameter."
    torch.manual_seed(0)
    wide, narrow = lively(sd.resnet(8)), lively(sd.resnet(8, width=0.5))
    stage1 = list(range(8))
    stage2 = [4, 5, 6, 7, *[8 + i for i in stage1], 24, 25, 26, 27]      # four new zeros, the old channels, four new zeros
    stage3 = [*range(8, 16), *[16 + i for i in stage2], *range(48, 56)]
    keep = [stage1, list(range(0, 16, 2)), stage1, list(range(1, 32, 2)), stage2, list(range(32)), stage3]
    masks = {}
    for (name, module), units in zip([(n, m) for n, m in wide.named_modules() if isinstance(m, nn.Conv2d)], keep):
        masks[f"{name}.weight"] = torch.zeros_like(module.weight, dtype=torch.uint8)
        masks[f"{name}.weight"][units] = 1
    sd.apply_masks(wide, masks, mode="hard")
    silence(wide, masks, (3, 8, 8))
    small = compact(wide, (3, 8, 8))
    assert small.compaction.params == sum(p.numel() for p in narrow.parameters()) == 19_218
    assert [(m.before, m.after) for m in small.modules() if hasattr(m, "before")] == [(4, 4), (8, 8)] and small.difference < 1e-12
    narrow.load_state_dict(small.state_dict())
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad(): assert torch.equal(narrow(x), small(x))
    for (name, units), module in zip(((n, u) for n, (u, _) in small.compaction.kept.items() if "conv" in n), keep): assert units.tolist() == sorted(module), name


def test_inner_widths_count_as_the_shape_says():
    "Only inside the blocks: stage widths stay, parameters and MACs are those of a ResNet of that shape."
    torch.manual_seed(0)
    net = lively(sd.resnet(20, shortcut="B"))
    masks = {f"{n}.weight": (torch.arange(m.out_channels) % 4 == 0).view(-1, 1, 1, 1).expand(m.weight.shape) for n, m in net.named_modules() if n.endswith("conv1")}
    sd.apply_masks(net, masks)
    small = compact(net, (3, 8, 8))
    shape = [16] + [w for c in (16, 32, 64) for _ in range(3) for w in (c // 4, c)]
    alike = sd.cost(sd.resnet(20, shape=shape, shortcut="B"), (3, 8, 8))
    assert (small.compaction.params, small.compaction.macs) == (alike.params, alike.macs)


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_keeps_what_any_filter_adds(seed):
    "With projections, the channels of a stage are those that stem, shortcut or any second convolution of the stage keeps."
    torch.manual_seed(seed)
    net = lively(sd.resnet(20, width=0.5, shortcut="B"), seed)
    masks = sd.prune(net, 0.8, score="random", granularity="unit", allocation="layer", exclude="head", seed=seed)
    small = compact(net, (3, 8, 8))
    alive = {name: mask.flatten(1).any(1) for name, mask in masks.items()}
    for stage in range(3):
        adding = [f"stages.{stage}.{i}.conv2.weight" for i in range(3)] + (["stem.conv.weight"] if stage == 0 else [f"stages.{stage}.0.shortcut.conv.weight"])
        union = torch.stack([alive[name] for name in adding]).any(0).nonzero().flatten().tolist()
        for name in adding: assert small.compaction.kept[name.removesuffix(".weight")][0].tolist() == union


STEPS = st.lists(st.tuples(st.sampled_from(["conv", "depthwise", "add", "cat", "pool", "gate"]), st.integers(0, 99), st.integers(0, 99), st.integers(1, 5)), min_size=2, max_size=9)


class RandomGraph(nn.Module):
    "Each step makes a tensor from earlier ones; the head reads the last two."
    def __init__(self, steps, kernel, norms):
        super().__init__()
        self.steps, self.ops, widths = [], nn.ModuleList([nn.Conv2d(2, 4, kernel, padding=kernel // 2, bias=norms)]), [4]
        for kind, a, b, width in steps:
            a, b = a % len(widths), b % len(widths)
            if kind == "cat" and widths[a] + widths[b] > 12: kind = "conv"
            out = {"conv": width, "cat": widths[a] + widths[b]}.get(kind, widths[a])
            if kind in ("add", "gate") and widths[a] != widths[b]: kind = "depthwise"
            groups = widths[a] if kind == "depthwise" else 1
            op = nn.Conv2d(widths[a], out, kernel, padding=kernel // 2, groups=groups, bias=norms) if kind in ("conv", "depthwise") else nn.Identity()
            self.ops.append(nn.Sequential(op, nn.BatchNorm2d(out)) if norms and kind != "gate" else op)
            self.steps.append((kind, a, b))
            widths.append(out)
        self.head = nn.Linear(widths[-1] + widths[-2], 2)

    def forward(self, x):
        made = [self.ops[0](x)]
        for (kind, a, b), op in zip(self.steps, self.ops[1:]):
            if kind == "add": y = made[a] + made[b]
            elif kind == "gate": y = made[a] * torch.sigmoid(made[b].mean((2, 3), keepdim=True)) if a != b else made[a]
            elif kind == "cat": y = torch.cat([made[a], made[b]], 1)
            elif kind == "pool": y = F.max_pool2d(made[a], 3, 1, 1)
            else: y = made[a]
            made.append(F.relu(op(y)))
        return self.head(torch.cat(made[-2:], 1).mean((2, 3)))


@settings(max_examples=25, deadline=None)
@given(STEPS, st.sampled_from([1, 3]), st.floats(0.1, 0.9), st.integers(0, 999))
def test_random_graphs(steps, kernel, share, seed):
    "1x1 convolutions with norms and biases: folding is exact. 3x3 without: dead is zero. Nothing that could go is left."
    torch.manual_seed(seed)
    net, generator = lively(RandomGraph(steps, kernel, norms=kernel == 1), seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d): module.weight[torch.rand(len(module.weight), generator=generator) < share] = 0
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator)
    small = compact(net, x)
    other = torch.randn(2, 2, 5, 5, dtype=torch.float64, generator=generator)
    with torch.no_grad(): torch.testing.assert_close(small(other), net(other), rtol=1e-8, atol=1e-10)
    assert small.difference < 1e-10 and all(p.numel() for p in small.parameters())
    if not any(row["constant"] for row in small.compaction.rows): assert compact(small, x).compaction.removed == 0
    for multiple in (2, 3):
        rounded = compact(net, x, round_to=multiple)
        assert rounded.difference < 1e-10
        for row in rounded.compaction.rows: assert row["units"] % multiple == 0 or row["units"] == row["units_before"] or row["units_before"] == 1


@pytest.mark.parametrize("name", ["resnet20 B", "vgg11, 3 linear", "resnet18", "mobilenet_v2", "cells", "mlp"])
@pytest.mark.skipif(not HAS["torch_pruning"], reason="torch-pruning is not installed: pip install torch-pruning==1.6.1")
def test_torch_pruning_agrees(name):
    "A second opinion on what goes together: the same units taken out by Torch-Pruning give the same shapes and outputs."
    import torch_pruning
    net, masks, x = unit_masked(name)
    silence(net, masks, x)
    small, theirs = compact(net, x, fold=False), plain_copy(net)
    modules, removed = dict(theirs.named_modules()), {}
    for row in small.compaction.rows:
        gone = set(range(row["units_before"])) - set(small.compaction.kept[row["layer"]][0].tolist())
        if gone: removed[row["layer"]] = sorted(gone)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, example_inputs=x)
    names = {module: path for path, module in modules.items()}
    while removed:
        layer, units = next(iter(removed.items()))
        cut = torch_pruning.prune_linear_out_channels if isinstance(modules[layer], nn.Linear) else torch_pruning.prune_conv_out_channels
        group = graph.get_pruning_group(modules[layer], cut, units)
        for dependency, indices in group:
            path = names.get(dependency.target.module)
            if path in removed and graph.is_out_channel_pruning_fn(dependency.handler): assert sorted(set(indices)) == removed.pop(path), path
        group.prune()
    assert {name: tuple(p.shape) for name, p in theirs.named_parameters()} == {name: tuple(p.shape) for name, p in small.named_parameters()}
    with torch.no_grad(): torch.testing.assert_close(theirs(x), small(x), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not HAS["torch_pruning"], reason="torch-pruning is not installed: pip install torch-pruning==1.6.1")
def test_why_torch_pruning_is_not_the_engine():
    "Version 1.6.1 takes option A's padding of channels for an elementwise operation. If this fails, it has learnt better: reconsider."
    import torch_pruning
    version = importlib.metadata.version("torch-pruning")
    if version != "1.6.1": pytest.skip(f"written for torch-pruning 1.6.1, this is {version}")
    torch.manual_seed(0)
    net, x = lively(sd.resnet(8)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    group = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=x).get_pruning_group(net.stem.conv, torch_pruning.prune_conv_out_channels, [1])
    paths = {module: name for name, module in net.named_modules()}
    touched = {paths.get(dependency.target.module): list(indices) for dependency, indices in group}
    assert touched["stages.1.0.conv2"] == [1], "the right answer would be 9: eight zeros come first"


def test_unstructured_zeros_leave_dead_units_too():
    "At 98 % single weights, filters that nobody reads go as well, and the output stays."
    torch.manual_seed(0)
    net = sd.resnet(20, shortcut="B").double()
    sd.prune(net, "0.98", allocation="global")
    small = compact(net, (3, 8, 8))
    assert small.difference < 1e-12 and small.compaction.removed > 50
    unread = [row for row in small.compaction.rows if row["units"] < row["units_before"] - row["dead"]]
    assert unread, "some filters have weights, but nobody reads them"


def test_training_goes_on():
    "A smaller network has gradients everywhere, learns, and takes the engine's training."
    torch.manual_seed(0)
    net, data = sd.resnet(8, in_channels=1), sd.load_data("digits")
    sd.prune(net, 0.5, granularity="unit", allocation="layer", exclude="head")
    small = compact(net, (1, 8, 8))
    assert not [name for name, p in small.named_parameters() if p.grad is not None or not p.requires_grad or not p.is_leaf]
    x, y = next(data.train.batches(64, shuffle=True, augment=False, seed=0, epochs=1))
    optimizer = torch.optim.SGD(small.train().parameters(), lr=0.1)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(small(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] and all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    before = state_of(small)
    sd.train(small, data, steps=2, batch_size=32, progress=False)
    assert not same_state(small, before)
    masks = sd.prune(small, 0.5)
    assert masks.kept == masks.total - masks.total // 2 - masks.total % 2 or abs(masks.sparsity - 0.5) < 1e-4


def test_other_tensors_can_follow():
    "The record's cuts bring momenta and averaged weights along: cutting the state is the state of the cut network."
    net, masks, x = unit_masked("cells")
    silence(net, masks, x)
    small = compact(net, x, fold=False)
    assert same_state(small, small.compaction.cut(net.state_dict()))
    momentum = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    cut = small.compaction.cut(momentum)
    assert all(cut[name].shape == p.shape for name, p in small.named_parameters())
    rows, columns = small.compaction.kept["head"]
    assert torch.equal(cut["head.weight"], momentum["head.weight"][rows][:, columns])
    with pytest.raises(ShapeError, match="this cut is for a tensor of shape"): small.compaction.cut(small.state_dict())


def test_files_copies_and_wrappers():
    net, masks, x = unit_masked("resnet8 A")
    small = compact(nn.DataParallel(net), x)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with torch.no_grad(): assert torch.equal(again(x), small(x))
        assert again.difference == small.difference and again.compaction.macs == small.compaction.macs and "Compaction: " in repr(again)
    stream = io.BytesIO()
    torch.save(small.state_dict(), stream)
    stream.seek(0)
    fresh = compact(net, x)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(fresh, (x,)).module()(x), small(x))
    last = compact(net.to(memory_format=torch.channels_last), x)
    torch.testing.assert_close(last.difference, small.difference, rtol=1e-6, atol=1e-12)
    half = compact(net.to(torch.bfloat16), x)
    assert half.head.weight.dtype == torch.bfloat16 and half.compaction.params == small.compaction.params


def test_what_training_alone_reaches_is_named():
    net, masks, x = unit_masked("cells")
    small = compact(net, x)
    assert small.compaction.unreached == ("auxiliary",) and "not reached, unchanged: auxiliary" in repr(small) and small.auxiliary.in_features == net.auxiliary.in_features


class Shuffle(nn.Module):
    "Splits, shuffles and joins channels as ShuffleNet does, around one convolution that can be thinned."
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.out, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Linear(8, 2)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        y = torch.cat([a, self.out(F.relu(self.inner(b)))], 1)
        n, c, h, w = y.shape
        return self.head(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).mean((2, 3)))


class Recurrent(nn.Module):
    "One layer that runs three times, one that shares its weight with another."
    def __init__(self):
        super().__init__()
        self.first, self.again, self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)
        self.right.weight = self.left.weight

    def forward(self, x):
        x = torch.relu(self.first(x))
        for _ in range(3): x = torch.relu(self.again(x))
        return self.head(torch.relu(self.left(x)) + torch.relu(self.right(x)))


class Overwritten(nn.Module):
    "A channel that is zero by its filter is written to through another view."
    def __init__(self): super().__init__(); self.a, self.b, self.head = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 2)
    def forward(self, x):
        y = self.a(x)
        y[:, :, 0] += self.b(x)[:, :, 0]
        return self.head(y.mean((2, 3)))


class Noisy(nn.Module):
    "Adds noise to a convolution's output, also in evaluation mode."
    def __init__(self): super().__init__(); self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
    def forward(self, x):
        y = self.a(x)
        return self.head(self.b(y + torch.randn_like(y)).mean((2, 3)))


def test_awkward_networks():
    "Where channels are split they stay; where a layer runs twice they go once; views that are written to are seen; noise is no difference."
    torch.manual_seed(0)
    net = lively(Shuffle())
    with torch.no_grad(): net.stem.weight[:3], net.inner.weight[2:], net.out.weight[0] = 0, 0, 0
    small = compact(net, (3, 4, 4))
    assert [row["units"] for row in small.compaction.rows] == [8, 2, 4, 2] and small.compaction.held == {"split": 3, "view": 1}
    net = lively(Recurrent())
    with torch.no_grad():
        net.again.weight[[1, 4]], net.first.weight[[1, 3]], net.left.weight[2] = 0, 0, 0
        for module in (net.first, net.again): module.bias[:] = 0
    small = compact(net, (4,))
    assert small.again.weight.shape == (5, 5) and small.left.weight is small.right.weight and small.left.weight.shape == (4, 5) and small.difference < 1e-12
    net = lively(Overwritten())
    with torch.no_grad(): net.a.weight[[0, 1]], net.b.weight[[1, 2]] = 0, 0
    small = compact(net, (3, 4, 4))
    assert small.compaction.kept["a"][0].tolist() == [0, 2, 3] and small.difference < 1e-12
    net = lively(Noisy())
    with torch.no_grad(): net.a.weight[0], net.b.weight[1] = 0, 0
    small = compact(net, (3, 4, 4))
    assert [row["units"] for row in small.compaction.rows] == [4, 3, 2] and small.difference < 1e-12 and small.compaction.held == {"randn_like": 1}


@pytest.mark.parametrize("net, shape", [
    (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 6, 1), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 2)), (3, 12)),
    (nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 6, 1), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(6, 2)), (2, 6, 6, 6)),
    (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)), (7, 5))])
def test_sequences_volumes_and_tokens(net, shape):
    net = lively(copy.deepcopy(net))
    first, second = [module for module in net if hasattr(module, "weight") and not isinstance(module, nn.modules.batchnorm._BatchNorm)][:2]
    with torch.no_grad(): first.weight[:3], second.weight[4] = 0, 0
    small = compact(net, shape)
    assert [row["units"] for row in small.compaction.rows] == [5, 5, 2] and small.difference < 1e-12


def test_a_reader_without_norm_or_bias_gets_a_bias():
    "Two norms read the same convolution, so neither can take its constant."
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.m, self.n, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(4, 2)
        def forward(self, x):
            y = self.b(self.a(x))
            return self.head((torch.relu(self.m(y)) + torch.relu(self.n(y))).mean((2, 3)))
    torch.manual_seed(0)
    net = lively(Twice())
    with torch.no_grad(): net.a.weight[1], net.a.bias[1] = 0, 2
    small = compact(net, (3, 4, 4))
    assert small.b.bias is not None and small.b.bias.requires_grad and small.difference < 1e-12 and small.compaction.folded == {"b": "new bias"}


def test_groups_stay_equal():
    "A convolution of two groups keeps as many inputs and units in each: those of the group with more alive ones."
    torch.manual_seed(0)
    net = lively(nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)))
    with torch.no_grad(): net[0].weight[[0, 1, 2, 3, 7, 9]], net[3].weight[[1, 4, 6]] = 0, 0
    small = compact(net, (3, 4, 4))
    assert (small[3].in_channels, small[3].out_channels, small[3].groups) == (8, 6, 2) and small.difference < 1e-12
    assert [units.tolist() for units in small.compaction.kept["3"]] == [[0, 2, 3, 4, 5, 7], [0, 1, 4, 5, 6, 8, 10, 11]]
    assert compact(net, (3, 4, 4), round_to=4)[3].weight.shape == (8, 4, 3, 3)


def test_what_only_the_unread_read_is_unread():
    "A unit whose only reader is read by nobody goes too, through three layers."
    torch.manual_seed(0)
    net = lively(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        net[6].weight[:, 1] = 0
        for layer in (net[2], net[4]): layer.weight[[0, 2, 3], 1] = 0
    small = compact(net, (3,))
    assert [row["units"] for row in small.compaction.rows] == [3, 3, 3, 2] and small.difference < 1e-12 and not small.compaction.folded


def test_silenced_gammas_remove_their_filters():
    "Network slimming: a zero gamma is enough, whatever the filter's weights."
    torch.manual_seed(0)
    net = lively(sd.vgg(11, width=0.1))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d): module.weight[::2], module.bias[::2] = 0, 0
    small = compact(net, (3, 32, 32))
    assert small.difference < 1e-12 and [row["units"] for row in small.compaction.rows[:-1]] == [row["units_before"] // 2 for row in small.compaction.rows[:-1]]


def test_masks_of_a_transformer():
    "The hidden units of its MLP blocks go, the stream between blocks and attention stay."
    net, masks, x = unit_masked("vit")
    small = compact(net, x)
    widths = {row["layer"]: (row["units_before"], row["units"]) for row in small.compaction.rows}
    assert {name: width for name, width in widths.items() if "mlp.0" in name} == {f"encoder.layers.encoder_layer_{i}.mlp.0": (32, 16) for i in range(2)}
    assert all(before == now for name, (before, now) in widths.items() if "mlp.0" not in name) and small.difference < 1e-12
    assert set(small.compaction.held) <= {"cat", "native_layer_norm", "add"} and "dead units by" in repr(small)


def test_examples_and_refusals():
    net, masks, x = unit_masked("resnet8 A")
    assert compact(net, (3, 16, 16)).compaction.params == compact(net, x[:1]).compaction.params == compact(net, x.float()).compaction.params
    with pytest.raises(ShapeError, match="built for 3 channels"): compact(net, (1, 16, 16))
    with pytest.raises(ParameterError, match="the example must be a floating point batch"): compact(net, None)
    with pytest.raises(ParameterError, match="matches none of the layers"): compact(net, x, exclude="backbone")
    whole = compact(net, x, exclude=["stem", "*conv2"])
    assert {row["layer"]: row["units"] for row in whole.compaction.rows}["stem.conv"] == 16 and whole.compaction.held == {"exclude": 8 + 8 + 16 + 32}


def test_parameters_that_something_else_reads():
    "A weight decay inside the forward, or an embedding tied to the head: such layers stay whole."
    class Tied(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        def forward(self, x): return self.c(self.b(torch.relu(self.a(x)))), self.b.weight.square().sum()
    torch.manual_seed(0)
    net = lively(Tied())
    with torch.no_grad(): net.a.weight[0], net.b.weight[1] = 0, 0
    small = compact(net, (3,))
    assert small.compaction.removed == 0 and small.difference == 0 and small.compaction.held == {"a parameter that something else reads too": 2}


@pytest.mark.parametrize("name", ["resnet8 A", "mlp"])
@pytest.mark.skipif(not (HAS["onnx"] and HAS["onnxscript"]), reason="onnx and onnxscript are not installed: pip install onnx onnxscript")
def test_compacted_networks_go_to_onnx(name, tmp_path):
    from sparsedarts.sparse.export import to_onnx
    net, masks, x = unit_masked(name, mode="soft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = to_onnx(small := compact(net, x), tmp_path / "small.onnx", x)
    assert written.size < 1.3 * sum(4 * value.numel() for value in small.state_dict().values()) + 60_000 and masked_layers(net)
    if not HAS["onnxruntime"]: pytest.skip("onnxruntime is not installed: the file was written, but not run")
    import onnxruntime
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    other = torch.randn(5, *x.shape[1:])
    with torch.no_grad(): torch.testing.assert_close(torch.from_numpy(session.run(None, {"input": other.numpy()})[0]), small.float()(other), rtol=1e-4, atol=1e-4)
    assert written.difference < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", ["resnet8 A", "mobilenet_v2", "cells", "vit"])
def test_on_cuda(name):
    "The same cuts as on the processor; float64 agrees to rounding, float32 passes the surgery's own check."
    net, masks, x = unit_masked(name)
    silence(net, masks, x)
    there, here = compact(net.cuda(), x), compact(copy.deepcopy(net).cpu(), x)
    assert next(there.parameters()).is_cuda and there.difference < 1e-10
    for layer, (units, inputs) in here.compaction.kept.items(): assert torch.equal(there.compaction.kept[layer][0], units) and torch.equal(there.compaction.kept[layer][1], inputs)
    assert compact(net.float(), x).compaction.params == here.compaction.params


def test_every_label_is_explained():
    "On all networks: units outnumber classes, and each norm's labels are those of what it reads."
    for name in ("resnet8 A", "cells", "mobilenet_v2"):
        net, _, x = unit_masked(name)
        flow = follow_channels(plain_copy(net), x)
        assert all(torch.equal(layer.ins, layer.outs) for layer in flow.layers.values() if isinstance(layer.module, nn.BatchNorm2d))
        assert len(flow.labels.roots().unique()) <= len(flow.labels.parent) and set(flow.labels.pinned.values()) == {"input", "output"}
