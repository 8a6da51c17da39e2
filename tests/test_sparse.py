"""Masks, masked layers and cost where they meet other things: random inputs, torchvision, compilers, several processes."""
import copy
import importlib.util
import io
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsedarts as sd
from sparsedarts.core import ParameterError
from sparsedarts.sparse.layers import dense_gradients, masked_layers
from sparsedarts.vision import import_torchvision

LAYOUT = {"stem.weight": (3, 2, 2, 2), "head.weight": (2, 5), "gate.weight": (1,)}


def random_mask_sets(count):
    "Strategy: several sets of masks of one network."
    size = sum(torch.Size(shape).numel() for shape in LAYOUT.values())
    def build(bits):
        parts = torch.tensor(bits, dtype=torch.uint8).split([torch.Size(shape).numel() for shape in LAYOUT.values()])
        return sd.Masks({name: part.reshape(shape) for (name, shape), part in zip(LAYOUT.items(), parts)})
    return st.tuples(*[st.lists(st.integers(0, 1), min_size=size, max_size=size).map(build)] * count)


@settings(max_examples=60, deadline=None)
@given(random_mask_sets(3))
def test_masks_are_a_boolean_algebra(sets):
    a, b, c = sets
    assert a | b == b | a and a & b == b & a
    assert (a | b) | c == a | (b | c) and (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c) and a | (a & b) == a
    assert ~(a | b) == ~a & ~b and ~~a == a and (a | ~a).density == 1 and (a & ~a).kept == 0
    assert a.kept + b.kept == (a | b).kept + (a & b).kept
    assert a.kept == sum(a.counts().values()) == a.table().kept.sum() and a.kept + (~a).kept == a.total == a.table().total.sum()


@settings(max_examples=60, deadline=None)
@given(random_mask_sets(3))
def test_distances_are_metrics_and_majority_lies_between(sets):
    a, b, c = sets
    for kind in ("hamming", "jaccard"):
        assert a.distance(a, kind) == 0 and a.distance(b, kind) == b.distance(a, kind)
        assert (a.distance(b, kind) == 0) == (a == b)
        assert a.distance(c, kind) <= a.distance(b, kind) + b.distance(c, kind) + 1e-12
    vote = sd.Masks.majority(sets)
    assert vote | (a & b & c) == vote and vote & (a | b | c) == vote
    assert vote == (a & b) | (a & c) | (b & c)


@settings(max_examples=20, deadline=None)
@given(random_mask_sets(1))
def test_masks_survive_a_file(tmp_path_factory, sets):
    path = sets[0].save(tmp_path_factory.mktemp("masks") / "m.safetensors")
    again = sd.Masks.load(path)
    assert again == sets[0] and list(again) == list(LAYOUT)


def half(model, seed=0):
    "Random masks of density one half for every masked layer."
    generator = torch.Generator().manual_seed(seed)
    return sd.Masks({name: torch.rand(layer.mask.shape, generator=generator) < 0.5 for name, layer in masked_layers(model).items()})


def masked(mode, seed=0):
    "A small network with every second weight masked."
    torch.manual_seed(seed)
    model = sd.sparsify(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 4)), mode=mode)
    return sd.apply_masks(model, half(model, seed))


@pytest.mark.parametrize("name, parameters, macs", [("resnet18", 11_689_512, 1_814_073_344), ("mobilenet_v2", 3_504_872, 300_774_272)])
def test_torchvision_networks(name, parameters, macs):
    "Masked, counted, trained one step and densified; the published sizes come out."
    torch.manual_seed(0)
    model = getattr(import_torchvision().models, name)(weights=None)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    counted = sd.cost(model, (3, 224, 224))
    assert counted.params == parameters and counted.macs == macs
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()) and model.training
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    sd.sparsify(model, mode="hard")
    assert torch.equal(model(x), before)
    model.load_state_dict(state, strict=True)
    masks = half(model)
    sd.apply_masks(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    sd.hold(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    assert all((layer.weight[layer.mask == 0] == 0).all() for layer in masked_layers(model).values())
    assert sd.cost(model, (3, 64, 64)).kept == parameters - (masks.total - masks.kept)
    after = model.eval()(x)
    plain = sd.densify(copy.deepcopy(model))
    assert torch.equal(plain(x), after) and all(type(m) in (nn.Conv2d, nn.Linear) for m in plain.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    getattr(import_torchvision().models, name)(weights=None).load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_compile(mode):
    "torch.compile (aot_eager, full graph): same outputs and gradients, in training and evaluation, and after the masks change."
    model = masked(mode)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 6, 6)
    for masks in (sd.masks_of(model), ~sd.masks_of(model)):
        sd.apply_masks(model, masks)
        sd.apply_masks(compiled, masks)
        assert sd.masks_of(compiled) == masks
        model.train(), compiled.train()
        model.zero_grad(), compiled.zero_grad()
        model(x).square().sum().backward()
        compiled(x).square().sum().backward()
        for (name, own), other in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(other.grad, own.grad, rtol=1e-5, atol=1e-5, msg=name)
            if name in masks: assert (other.grad[masks[name] == 0] == 0).all()
        model.eval(), compiled.eval()
        with torch.no_grad(): torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("training", [True, False])
def test_export_and_trace(mode, training):
    "torch.export (saved and loaded) and torch.jit.trace give the network's own outputs."
    model, x = masked(mode).train(training), torch.randn(4, 3, 6, 6)
    expected = copy.deepcopy(model)(x)
    for strict in (False, True):
        program = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        torch.testing.assert_close(torch.export.load(stream).module()(x), expected)
    if not training: torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_functional_transforms(mode):
    "Gradients per sample, a batch of networks, and vectorised Jacobians, all masked."
    from torch.func import functional_call, grad, vmap
    model, x = masked(mode).eval(), torch.randn(4, 3, 6, 6)
    parameters, mask = dict(model.named_parameters()), model[0].mask
    def loss(values, image): return functional_call(model, values, (image[None],)).square().sum()
    each = vmap(grad(loss), in_dims=(None, 0))({k: p.detach() for k, p in parameters.items()}, x)["0.weight"]
    model(x).square().sum().backward()
    torch.testing.assert_close(each.sum(0), model[0].weight.grad, rtol=1e-4, atol=1e-4)
    stacked = {key: torch.stack([p.detach(), 2 * p.detach()]) for key, p in parameters.items()}
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled): outputs = vmap(lambda values: functional_call(model, values, (x,)))(stacked)
        torch.testing.assert_close(outputs[0], model(x))
    rows, = torch.autograd.grad(model(x)[0], model[0].weight, grad_outputs=torch.eye(4), is_grads_batched=True)
    assert rows.shape == (4, *mask.shape) and (rows[:, mask == 0] == 0).all() and (rows[:, mask == 1] != 0).any()


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_mixed_precision(mode):
    "Under bfloat16 autocast and Adam, masked weights get no gradient and hard ones stay zero."
    model, x = masked(mode), torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if mode == "hard": sd.hold(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16): loss = model(x).square().sum()
        loss.backward()
        assert all((layer.weight.grad[layer.mask == 0] == 0).all() for layer in masked_layers(model).values())
        optimizer.step()
    if mode == "hard": assert all((layer.weight[layer.mask == 0] == 0).all() for layer in masked_layers(model).values())


def test_gradient_accumulation_and_checkpointing():
    "Masked gradients add up over several backward passes, also through activation checkpointing."
    from torch.utils.checkpoint import checkpoint
    model, x = masked("hard").eval(), torch.randn(4, 3, 6, 6)
    for part in x.split(1): checkpoint(model, part, use_reentrant=False).square().sum().backward()
    summed = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(summed, model[0].weight.grad, rtol=1e-4, atol=1e-4)
    assert (summed[model[0].mask == 0] == 0).all()


def test_dense_gradients_leave_the_invariant_alone():
    "RigL's question (the gradient of absent weights), followed by an ordinary step."
    model, x = masked("hard"), torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sd.hold(model, optimizer)
    with dense_gradients(model) as gradients: model(x).square().sum().backward()
    assert set(gradients) == set(masked_layers(model))
    assert all((gradients[name][layer.mask == 0] != 0).any() for name, layer in masked_layers(model).items())
    optimizer.step()
    assert all((layer.weight[layer.mask == 0] == 0).all() for layer in masked_layers(model).values())


def test_transformers():
    "Attention reads some weights without calling their layers: masks of both modes hold there too; attention's products are counted."
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    soft = sd.sparsify(copy.deepcopy(layer)).eval()
    sd.apply_masks(soft, half(soft))
    with torch.no_grad(): torch.testing.assert_close(soft(x), sd.densify(copy.deepcopy(soft))(x))
    sd.sparsify(layer, mode="hard")
    sd.apply_masks(layer, half(layer))
    layer.eval()
    with torch.no_grad(): fast = layer(x)
    torch.testing.assert_close(fast, sd.densify(copy.deepcopy(layer))(x))
    counted = sd.cost(layer, (5, 16))
    weights, products = 5 * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 32), 2 * 5 * 5 * 16
    assert counted.macs == weights + products and counted.params == sum(p.numel() for p in layer.parameters())


WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
import sparsedarts as sd
from sparsedarts.sparse.layers import masked_layers
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
sd.sparsify(model, mode="hard")
wrapped = nn.parallel.DistributedDataParallel(model)
masks = sd.Masks({name: torch.rand(layer.mask.shape) < 0.5 for name, layer in masked_layers(wrapped).items()})
sd.apply_masks(wrapped, masks)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
sd.hold(wrapped, optimizer)
torch.manual_seed(rank)
for _ in range(3):
    optimizer.zero_grad()
    wrapped(torch.randn(4, 3, 6, 6)).square().mean().backward()
    optimizer.step()
assert sd.masks_of(wrapped) == masks and list(masks) == ["0.weight", "4.weight"]
assert all((layer.weight[layer.mask == 0] == 0).all() for layer in masked_layers(wrapped).values())
torch.save({"state": model.state_dict(), "masks": dict(masks)}, f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_data_parallel_processes_keep_equal_masks(tmp_path, root):
    "Two processes, equal seeds, different data: equal masks, equal weights, zeros at zero."
    workers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORKER), str(rank), str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for worker in workers:
        error = worker.communicate(timeout=120)[1]
        assert worker.returncode == 0, error
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert sd.Masks(one["masks"]) == sd.Masks(two["masks"])
    assert all(torch.equal(value, two["state"][key]) for key, value in one["state"].items() if "running" not in key)


def test_benchmark_checks_its_zeros(root, monkeypatch):
    "The masking benchmark runs, pairs every method with dense, and would notice a weight that wakes up."
    spec = importlib.util.spec_from_file_location("masking", root / "benchmarks" / "masking.py")
    masking = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(masking)
    monkeypatch.setattr(masking, "NETWORKS", {"resnet32x2": (lambda: sd.resnet(8, classes=100), 2)})
    rows = masking.summarise("resnet32x2", masking.measure("resnet32x2", rounds=3, warmup=1))
    assert [row["method"] for row in rows] == ["dense", "hard", "soft", "prune"] and rows[0]["cpu_ratio"] == 1 and rows[1]["bar"] == 1.02
    monkeypatch.setattr(masking.sd, "hold", lambda model, optimizer: [layer.weight.data.add_(1e-30) for layer in masked_layers(model).values()])
    with pytest.raises(AssertionError, match="are not zero"): masking.measure("resnet32x2", rounds=2, warmup=0)
