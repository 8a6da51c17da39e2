"""Masks that stay true: after any sequence of what people do to networks in training, and an error where they are not."""
import copy
import io
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import sparsedarts as sd
from sparsedarts.core import MaskError, ParameterError
from sparsedarts.pruning.diagnosis import cuts, paths
from sparsedarts.sparse.export import to_onnx
from sparsedarts.sparse.kernels import to_csr
from sparsedarts.sparse.layers import awake_weights, masked_layers, zero_removed
from sparsedarts.sparse.packed import load_packed, save_packed
from sparsedarts.strategy.found import save_stage

torch.manual_seed(0)
X, Y = torch.randn(64, 20), torch.randint(0, 4, (64,))
SGD = torch.optim.SGD


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))


def run(model, pruner, optimizers, steps=40, penalty=lambda: 0):
    for _ in range(steps):
        for optimizer in optimizers: optimizer.zero_grad()
        (F.cross_entropy(model(X), Y) + penalty()).backward()
        for optimizer in optimizers: optimizer.step()
        if pruner: pruner.step()


def leaks(model):
    return sum(int(layer.weight[layer.mask == 0].count_nonzero()) for layer in model.modules() if hasattr(layer, "mask"))


# ---------------------------------------------------------------------------- zeros that nobody checked

def broken():
    "A hard-masked network whose first layer was initialised anew."
    model = net()
    sd.prune(model.eval(), 0.5)
    nn.init.kaiming_normal_(model[0].weight)
    return model


ASKS = {
    "masks_of": lambda model, folder: sd.masks_of(model),
    "cost": lambda model, folder: sd.cost(model, (20,)),
    "compact": lambda model, folder: sd.compact(model, (20,)),
    "prune": lambda model, folder: sd.prune(model, 0.9),
    "save_packed": lambda model, folder: save_packed(model, folder / "net.safetensors"),
    "to_onnx": lambda model, folder: to_onnx(model, folder / "net.onnx", (20,)),
    "save_stage": lambda model, folder: save_stage(folder / "net.pt", model, "prune", {}),
    "to_csr": lambda model, folder: to_csr(model, 0.1),
    "paths": lambda model, folder: paths(model, (20,)),
    "cuts": lambda model, folder: cuts(model, (20,)),
}


@pytest.mark.parametrize("ask", ASKS)
def test_nothing_is_said_about_a_network_whose_zeros_do_not_hold(ask, tmp_path):
    model = broken()
    with pytest.raises(MaskError, match="removed weights of hard layers are not zero"): ASKS[ask](model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert zero_removed(model) == leaks(broken()) > 0 and sd.masks_of(model).density == 0.5


def test_compact_measures_the_network_that_was_given():
    model = net()
    sd.prune(model.eval(), 0.5)
    assert sd.compact(model, (20,)).difference < 1e-6
    nn.init.kaiming_normal_(model[0].weight)
    with pytest.raises(MaskError, match="zero_removed"): sd.compact(model, (20,))


def pulled(model):
    start = [parameter.detach().clone() for parameter in model.parameters()]
    return lambda: 0.01 * sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), start))


@pytest.mark.parametrize("kind", ["pruner", "dynamic"])
@pytest.mark.parametrize("every_step", [None, True])
def test_a_penalty_that_pulls_weights_back(kind, every_step):
    model = net()
    optimizer, penalty = SGD(model.parameters(), 0.1), pulled(model)
    options = dict(steps=40, every_step=every_step)
    pruner = sd.Pruner(model, optimizer, 0.9, mode="hard", **options) if kind == "pruner" else sd.DynamicPruner(model, optimizer, 0.9, every=5, **options)
    if every_step:
        run(model, pruner, [optimizer], penalty=penalty)
        assert leaks(model) == 0 and pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    else:
        with pytest.raises(MaskError, match="every_step=True"): run(model, pruner, [optimizer], penalty=penalty)


def test_pruning_in_the_middle_of_a_training():
    for told in (False, True):
        model = net()
        optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
        run(model, None, [optimizer], 5)
        sd.prune(model, 0.9, optimizer=[optimizer] if told else None)
        run(model, None, [optimizer], 5)
        if told: assert leaks(model) == 0 and sd.masks_of(model).sparsity == pytest.approx(0.9, abs=1e-3)
        else:
            with pytest.raises(MaskError, match="an optimiser made before pruning needs hold"): sd.masks_of(model)
    with pytest.raises(ParameterError, match="trained by none of the given optimisers"): sd.prune(net(), 0.5, optimizer=SGD(net().parameters(), 0.1))
    model = net()
    with pytest.raises(ParameterError): sd.prune(model, 0.5, optimizer=SGD(model[0].parameters(), 0.1))
    assert not masked_layers(model), "a refusal leaves the network as it was"


@pytest.mark.parametrize("buffers, rule", [(False, "own"), (False, "ema"), (False, "swa"), (True, "own"), (True, "ema")])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_averaged_models(buffers, mode, rule):
    "PyTorch's equal average itself refuses whole numbers, so that one is for parameters alone."
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    pruner = sd.Pruner(model, optimizer, 0.9, steps=20, every=2, mode=mode)
    def own(averages, values, number):
        for average, value in zip(averages, values): average.copy_(average * 0.9 + value * 0.1 if average.is_floating_point() else average + value)
    rules = {"own": own, "ema": get_ema_multi_avg_fn(0.9), "swa": get_swa_multi_avg_fn()}
    average = AveragedModel(model, use_buffers=buffers, multi_avg_fn=rules[rule])
    for _ in range(20):
        run(model, pruner, [optimizer], 1)
        average.update_parameters(model)
    if buffers:
        with pytest.raises(MaskError, match="written into from outside"): average.train()(X)
        with pytest.raises(MaskError, match="written into from outside"): sd.masks_of(average)
    sd.apply_masks(average, sd.masks_of(model), mode=mode)
    assert sd.masks_of(average) == sd.masks_of(model) == pruner.masks and average(X).isfinite().all()
    assert all(layer.mask.max() == 1 for layer in masked_layers(average).values())


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_running_mean_of_a_state_dictionary(mode):
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    pruner, mean = sd.Pruner(model, optimizer, 0.9, steps=20, every=2, mode=mode), copy.deepcopy(model)
    for _ in range(20):
        run(model, pruner, [optimizer], 1)
        with torch.no_grad():
            for name, value in mean.state_dict().items(): value.mul_(0.9).add_(model.state_dict()[name], alpha=0.1)
    sd.apply_masks(mean, sd.masks_of(model), mode=mode)
    assert sd.masks_of(mean) == pruner.masks and (mode == "soft" or leaks(mean) == 0)


# ---------------------------------------------------------------------------- what pruners are bound to

def pruners(model, optimizers, **options):
    yield "Pruner", lambda: sd.Pruner(model, optimizers, 0.9, steps=40, mode="hard", **options)
    yield "DynamicPruner", lambda: sd.DynamicPruner(model, optimizers, 0.9, steps=40, every=5, **options)


@pytest.mark.parametrize("which", [0, 1])
def test_exchanged_optimizer_and_layer(which):
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    pruner = list(pruners(model, optimizer))[which][1]()
    run(model, pruner, [optimizer], 12)
    with pytest.raises(MaskError, match="none of the optimisers it was made with made a step"):
        run(model, pruner, [torch.optim.Adam(model.parameters(), 1e-2)], 1)
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    name, make = list(pruners(model, optimizer))[which]
    pruner = make()
    model[0] = nn.Linear(20, 32)
    with pytest.raises(MaskError, match=f"'0.weight' is no longer what this {name} prunes"): run(model, pruner, [SGD(model.parameters(), 0.1)], 1)
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    pruner = list(pruners(model, optimizer))[which][1]()
    sd.densify(model)
    with pytest.raises(MaskError, match="made a plain one again"): run(model, pruner, [optimizer], 1)


@pytest.mark.parametrize("which", [0, 1])
def test_several_optimizers(which):
    model = net()
    both = [SGD(model[0].parameters(), 0.1, momentum=0.9), torch.optim.Adam(model[2].parameters(), 1e-2)]
    with pytest.raises(ParameterError, match="give all optimisers in a list"): list(pruners(model, both[0]))[which][1]()
    model = net()
    both = [SGD(model[0].parameters(), 0.1, momentum=0.9), torch.optim.Adam(model[2].parameters(), 1e-2)]
    pruner = list(pruners(model, both))[which][1]()
    run(model, pruner, both)
    assert leaks(model) == 0 and pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    if which: assert len({line["step"] for line in pruner.history}) > 4
    pruner.remove()
    assert not any(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks for optimizer in both)


def test_tied_weights_after_a_move():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    optimizer = SGD(model.parameters(), 0.1)
    pruner = sd.Pruner(model, optimizer, 0.75, steps=4, every=1, end=1.0)
    model._apply(torch.clone)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
        pruner.step()
    assert int(model[0].mask.sum()) == int(model[2].mask.sum()) == 64


@pytest.mark.parametrize("order", list(itertools.permutations(("model", "optimizer", "pruner"))), ids="-".join)
@pytest.mark.parametrize("which", [0, 1])
def test_restoring_in_any_order(order, which):
    def start(seed):
        model = net()
        torch.manual_seed(seed)
        for parameter in model.parameters(): nn.init.normal_(parameter, std=0.2)
        optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, list(pruners(model, optimizer))[which][1]()
    model, optimizer, pruner = start(1)
    run(model, pruner, [optimizer], 17)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, file := io.BytesIO())
    run(model, pruner, [optimizer], 23)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other, again, restored = start(2)
    parts = {"model": other, "optimizer": again, "pruner": restored}
    for part in order: parts[part].load_state_dict(state[part])
    run(other, restored, [again], 23)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert restored.masks == pruner.masks and restored.history == pruner.history


def test_gradients_that_users_see_are_those_of_the_sparse_network():
    seen = []
    for every in (5, 1000):
        model = net()
        optimizer = SGD(model.parameters(), 0.1)
        pruner = sd.DynamicPruner(model, optimizer, 0.9, steps=4000, every=every)
        norms = []
        for step in range(5):
            optimizer.zero_grad()
            for part in range(4): F.cross_entropy(model(X[part::4]), Y[part::4]).div(4).backward()
            assert not any(layer.weight.grad[layer.mask == 0].any() for layer in masked_layers(model).values())
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
            optimizer.step()
            pruner.step()
        assert len(pruner.history) == (2 if every == 5 else 1)
        seen.append(norms)
    assert seen[0] == seen[1]


def test_the_update_of_accumulated_and_clipped_gradients_is_that_of_one_batch():
    grown = []
    for parts, clip in ((1, 1e9), (4, 1e9), (1, 1e-3)):
        model = net()
        optimizer = SGD(model.parameters(), 0.0)
        pruner = sd.DynamicPruner(model.double(), optimizer, 0.9, steps=400, every=2)
        for step in range(2):
            optimizer.zero_grad()
            for part in range(parts): F.cross_entropy(model(X.double()[part::parts]), Y[part::parts]).div(parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            pruner.step()
        grown.append(pruner.masks)
    assert grown[0] == grown[1] == grown[2] and pruner.history[-1]["grown"] > 0


@pytest.mark.parametrize("scale", [1.0, 2.0 ** 10])
def test_several_optimizers_under_a_loss_scaler(scale):
    "An update takes the place of the step of every optimiser, and its gradients are in one scale, whichever of them the scaler has seen."
    masks = []
    for scaled in (False, True):
        model = net()
        both = [SGD(model[0].parameters(), 0.1), SGD(model[2].parameters(), 0.1)]
        pruner, scaler = sd.DynamicPruner(model, both, 0.9, steps=40, every=4, accumulate=2), torch.amp.GradScaler("cpu", init_scale=scale, enabled=scaled)
        for step in range(40):
            for optimizer in both: optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(X), Y)).backward()
            for optimizer in both: scaler.step(optimizer)
            scaler.update()
            pruner.step()
        assert len(pruner.history) > 6 and leaks(model) == 0
        masks.append(pruner.masks)
    assert masks[0] == masks[1]


# ---------------------------------------------------------------------------- any sequence

OPTIMIZERS = [lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=1e-3), lambda p: torch.optim.Adam(p, 1e-2), lambda p: torch.optim.AdamW(p, 1e-2),
              lambda p: torch.optim.Rprop(p, 1e-2), lambda p: torch.optim.Adamax(p, 1e-2)]


class Life:
    "A network, its optimiser, and the masks it should have."
    def __init__(self, mode):
        torch.manual_seed(0)
        self.mode, self.made, self.sparsity = mode, 0, 0.2
        self.model = self.fresh()
        self.optimizer = OPTIMIZERS[0](self.model.parameters())
        self.masks = sd.prune(self.model, 0.2, mode=mode, optimizer=self.optimizer)

    def fresh(self):
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 3))

    def renew(self, kind=None):
        "An optimiser for the network as it is now."
        self.made = self.made if kind is None else kind
        self.optimizer = OPTIMIZERS[self.made](self.model.parameters())
        if self.mode == "hard": sd.hold(self.model, self.optimizer)

    def train(self, seed):
        self.model.train()
        for step in range(2):
            like = self.model[0].weight
            x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(seed + step)).to(like)
            self.optimizer.zero_grad()
            self.model(x).square().sum().backward()
            self.optimizer.step()

    def prune(self, seed):
        self.sparsity = min(0.9, self.sparsity + 0.2)
        self.masks = sd.prune(self.model, round(self.sparsity, 2), mode=self.mode, optimizer=self.optimizer)

    def swap(self, seed): self.renew(seed % len(OPTIMIZERS))

    def copy(self, seed):
        self.model = copy.deepcopy(self.model)
        memory = self.optimizer.state_dict()
        self.renew()
        self.optimizer.load_state_dict(memory)

    def move(self, seed):
        ways = [lambda m: m.double(), lambda m: m.float(), lambda m: m._apply(torch.clone), lambda m: m.to(memory_format=torch.channels_last)]
        ways[seed % len(ways)](self.model)
        self.renew()

    def save_and_load(self, seed):
        model, memory = self.fresh().to(self.model[0].weight.dtype), self.optimizer.state_dict()
        with tempfile.TemporaryDirectory() as folder:
            if seed % 3 == 0 and self.mode == "hard": load_packed(save_packed(self.model, Path(folder) / "a.safetensors"), model)
            else:
                torch.save(self.model.state_dict(), Path(folder) / "a.pt")
                self.masks.save(Path(folder) / "masks.safetensors")
                state, masks = torch.load(Path(folder) / "a.pt", weights_only=True), sd.Masks.load(Path(folder) / "masks.safetensors")
                sd.sparsify(model, mode=self.mode)
                steps = [lambda: model.load_state_dict(state), lambda: sd.apply_masks(model, masks, mode=self.mode)]
                for step in steps if seed % 2 else steps[::-1]: step()
        before, self.model = self.model, model
        assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), model.state_dict().values()))
        self.renew()
        self.optimizer.load_state_dict(memory)

    def average(self, seed):
        average = AveragedModel(self.model, use_buffers=bool(seed % 2), multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for step in range(2):
            average.update_parameters(self.model)
            self.train(seed + step)
        sd.apply_masks(average, sd.masks_of(self.model), mode=self.mode)
        self.model = average.module
        self.renew()


DEEDS = ["train", "prune", "swap", "copy", "move", "save_and_load", "average"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["soft", "hard"]), st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 9)), min_size=1, max_size=8))
def test_masks_are_true_after_anything(mode, deeds):
    life = Life(mode)
    for deed, seed in deeds:
        before = life.masks
        getattr(life, deed)(seed)
        life.train(seed)
        assert sd.masks_of(life.model) == life.masks and (mode == "soft" or awake_weights(life.model) == {}), deed
        assert deed == "prune" or life.masks is before
        assert sd.cost(life.model, (2, 4, 4)).kept == sum(p.numel() for p in life.model.parameters()) - (life.masks.total - life.masks.kept)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["train", "penalty", "swap", "average", "scale", "init", "repair"]), st.integers(0, 9)), min_size=1, max_size=6))
def test_what_is_written_by_others_is_never_taken_for_zero(deeds):
    "Nobody is told of anything here: the masks are true, or asking for them is an error, and never the third."
    model = net()
    sd.prune(model, 0.5)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    for deed, seed in deeds:
        if deed == "train": run(model, None, [optimizer], 2)
        if deed == "penalty": run(model, None, [optimizer], 1, pulled(net()) if seed % 2 else lambda: sum((p - 1).square().sum() for p in model.parameters()))
        if deed == "swap": optimizer = OPTIMIZERS[seed % len(OPTIMIZERS)](model.parameters())
        if deed == "average": nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(net().parameters()), model.parameters())
        if deed == "scale": model[0].weight.data.mul_(2)
        if deed == "init": nn.init.ones_(model[seed % 2 * 2].weight)
        if deed == "repair": zero_removed(model)
        if leaks(model):
            with pytest.raises(MaskError): sd.masks_of(model)
        else: assert sd.masks_of(model).density == 0.5
