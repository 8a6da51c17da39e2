"""DASS: published counts, what learns in which phase, released behaviours one by one, exact resume, and found cells through the whole recipe."""
import copy
import functools
import itertools
import math
import multiprocessing
import os
import signal
from fractions import Fraction

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedarts as sd
from sparsedarts.core import CheckpointError, CollapseError, NumericalError, ParameterError, UnknownName
from sparsedarts.files import load_checkpoint
from sparsedarts.pruning.scored import LayerCeil, ScoredLayer, learning, scored_layers, scored_masks, set_keep, set_scores
from sparsedarts.pruning.straight import best_masks
from sparsedarts.space.cells import derive, derived_size
from sparsedarts.space.genotypes import decode_cell, parse_alphas
from sparsedarts.sparse.cost import cost
from sparsedarts.sparse.layers import masked_layers, masks_of
from sparsedarts.strategy.bilevel import Search
from sparsedarts.strategy.dass import Released, ScoreStep, dass_phases, released_step, with_alphas
from sparsedarts.strategy.found import METHODS, SIZES, found_row, kept_weights, least_magnitude, load_stage, train_found
from sparsedarts.strategy.gradients import second_order
from sparsedarts.training.optim import make_optimizer
from sparsedarts.training.recipes import hydra

DATA = sd.load_data("digits", classes=3)
BATCH = dict(batch_size=67, progress=False)  # two steps to an epoch
NET = dict(channels=4, layers=3, nodes=1, space="s3", alpha_scale=0.1)
LENGTHS = dict(pretrain_epochs=2, prune_epochs=1, finetune_epochs=2)
EACH = dict(pretrain_epochs=1, prune_epochs=1, finetune_epochs=1)
PHASES = ("pretrain", "prune", "finetune")


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return sd.supernet("dass", **{**NET, "classes": 3, "in_channels": 1, **options})


def dass(net=None, **options):
    return sd.search("dass", DATA, net=tiny() if net is None else net, **{"keep": "0.3", "order": "first", "arch_lr": 0.01, **LENGTHS, **BATCH, **options})


def bits(net): return {name: value.detach().clone() for name, value in net.state_dict().items()}


def same(one, two): return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def moved(one, two): return {name for name in one if not torch.equal(one[name], two[name])}


class Stop(Exception): "What ends a run in the middle."


class Watch:
    "Calls a function after every step, or ends the run at one."
    def __init__(self, look=None, at=None): self.look, self.at, self.n = look, at, 0

    def after_step(self, run):
        self.n += 1
        if self.look: self.look(run)
        if self.n == self.at: raise Stop


# ---- numbers that need no training -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("normal, reduce, counts", [
    ("s30 d51 sk0 s31 sk0 d31 d30 d51", "sk1 mp0 d52 mp0 ap0 sk1 sk2 sk3", (1_678_180, 2_942_398, 8_564_836, 17_232_166)),
    ("s30 s31 sk0 s31 s30 d32 s30 s31", "ap0 ap1 ap0 sk2 ap0 sk1 sk2 ap0", (2_114_230, 3_735_550, 10_664_268, 21_715_246)),
    ("d30 d51 d32 s30 d32 d53 d54 d52", "s51 s50 d52 s51 d52 d53 d52 d54", (2_003_530, 3_435_526, 10_440_152, 20_380_582))], ids=["ORIGINAL", "prun", "found"])
def test_other_cells_of_the_release(normal, reduce, counts):
    cell = sd.Genotype(decode_cell(normal), (2, 3, 4, 5), decode_cell(reduce), (2, 3, 4, 5))
    assert tuple(derived_size(cell, *shape) for shape in SIZES.values()) == counts


@pytest.mark.parametrize("size, maskable, kept", [
    ("tiny", 979_860, (97_986, 48_996, 9_805)), ("small", 1_701_468, (170_185, 85_114, 17_045)),
    ("medium", 5_359_950, (536_021, 268_028, 53_621)), ("large", 10_540_908, (1_054_122, 527_078, 105_440))])
def test_kept_weights_of_the_four_sizes(size, maskable, kept):
    "By the allocation that HYDRA uses, exact and as released."
    with torch.device("meta"): net = derive("DASS", *SIZES[size])
    sizes = {name: p.numel() for name, p in net.named_parameters() if p.dim() > 1}
    assert sum(sizes.values()) == maskable
    for compat in (False, True):
        assert tuple(sum(LayerCeil(compat).counts({}, sizes, 1 - Fraction(k)).values()) for k in ("0.1", "0.05", "0.01")) == kept


@pytest.mark.parametrize("name, kept, maskable, layers", [("DARTS_ORIG_120", 21_057, 2_098_476, 192), ("DARTS_V2", 33_251, 3_308_940, 440),
                                                          ("DARTS_V1", 31_469, 3_132_036, 404)])
def test_kept_weights_of_other_cells(name, kept, maskable, layers):
    with torch.device("meta"): net = derive(name)
    sizes = {name: p.numel() for name, p in net.named_parameters() if p.dim() > 1}
    assert (sum(LayerCeil().counts({}, sizes, Fraction("0.99")).values()), sum(sizes.values()), len(sizes)) == (kept, maskable, layers)


def test_compression_of_the_small_network():
    net = least_magnitude(derive("DASS", *SIZES["small"], auxiliary=True), "0.01")
    row = found_row(net, (3, 4, 4)).iloc[0]
    assert (row.params, row.weights, row.kept_weights, row.kept, row.layers) == (1_713_790, 1_701_468, 17_045, 29_367, 100)
    assert sum(p.numel() for p in net.parameters()) == 2_190_216 and row.kept - row.kept_weights - 10 == row.norms == 12_312
    assert 0.419 < row.norm_share < 0.420 and 58 < row.params / row.kept < 59
    assert 64 * row.macs - 63 * 5760 == 275_103_360, "the head's multiply-accumulates are not counted"
    assert net.auxiliary_head.classifier.mask.float().mean() < 0.02, "but it is pruned"
    assert kept_weights(masks_of(net)) == row.kept_weights < masks_of(net).kept == sum(-(-mask.numel() // 100) for mask in masks_of(net).values())


@pytest.mark.parametrize("channels, layers, weights, modules", [(16, 8, 1_930_618, 1396), (8, 5, 394_210, 886), (4, 3, 72_854, 545)])
def test_sparse_supernets(channels, layers, weights, modules):
    with torch.device("meta"): net = sd.supernet("dass", channels=channels, layers=layers)
    scored = scored_layers(net)
    maskable = sum(layer.weight.numel() for layer in scored.values())
    assert len(scored) == modules and maskable == weights - 6 * channels - 10
    total = sum(p.numel() for p in net.parameters())
    assert total == weights + maskable and sum(alpha.numel() for alpha in net.alphas.values()) == 224
    assert (channels, layers) != (16, 8) or (maskable, total + 224) == (1_930_512, 3_861_354)


def test_a_sparse_supernet_costs_what_a_dense_one_costs():
    assert cost(sd.supernet("dass", channels=4, layers=3, keep=0.1), (3, 16, 16)).macs == 3_871_360
    keep = {keep: scored_masks(tiny(keep=keep)) for keep in (1, "0.9", "0.01")}
    assert keep[1].density == 1 and all(mask.any() for mask in keep["0.01"].values())
    assert keep["0.01"].counts() == {name: -(-mask.numel() // 100) for name, mask in keep["0.01"].items()}


def test_rounding_trap_is_a_switch():
    "Of N = 10 weights 0.9 keeps 9 exactly, and 10 as released."
    net = tiny(in_channels=1, channels=10)
    exact, floats = [], []
    for released, found in ((Released(), exact), (Released(float_counts=True), floats)):
        prune = dass_phases(Fraction("0.9"), (1, 1, 1), (1, 1, 1), (), released, True)[1]
        prune.prepare(net)
        found.append(scored_masks(net).counts())
    sizes = {name: layer.weight.numel() for name, layer in scored_layers(net).items()}
    assert exact[0] == {name: -(-9 * n // 10) for name, n in sizes.items()}
    assert floats[0] == {name: n - int((1 - 0.9) * n) for name, n in sizes.items()} and floats[0] != exact[0]
    assert {n: (LayerCeil().counts({}, {"": n}, 1 - Fraction("0.9"))[""], LayerCeil(True).counts({}, {"": n}, 1 - Fraction("0.9"))[""]) for n in (10, 324)} == {
        10: (9, 10), 324: (292, 292)}


# ---- what a masked supernet computes ---------------------------------------------------------------------------------------------

def test_gradients_of_scores_and_weights_through_the_supernet():
    net = tiny(keep="0.3").double()
    plain = tiny(layer_type="dense").double()
    scored, state = scored_layers(net), bits(net)
    for name, layer in scored.items(): state[name] = layer.weight.detach() * layer.mask
    plain.load_state_dict({name: value for name, value in state.items() if not name.endswith("scores")})
    x, y = torch.randn(6, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    for model in (net, plain): F.cross_entropy(model(x), y).backward()
    effective = dict(plain.named_parameters())
    for name, layer in scored.items():
        gradient = effective[name].grad
        torch.testing.assert_close(layer.weight.grad, layer.mask * gradient, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(layer.scores.grad, layer.scores.sign() * layer.weight * gradient, rtol=1e-9, atol=1e-14)
    for cell in net.alphas: torch.testing.assert_close(net.alphas[cell].grad, plain.alphas[cell].grad, rtol=1e-9, atol=1e-14)
    assert any((layer.scores.grad[layer.mask == 0] != 0).any() for layer in scored.values()), "removed weights have a say"


def test_first_masks_of_the_prune_phase_are_least_magnitude():
    net = tiny()
    prune = dass_phases(Fraction("0.3"), (1, 1, 1), (1, 1, 1), (), Released(), True)[1]
    prune.prepare(net)
    for layer in scored_layers(net).values():
        n, fan_in = layer.weight.numel(), layer.weight[0].numel()
        assert torch.equal(layer.mask, best_masks([layer.weight.detach().abs()], math.ceil(Fraction("0.3") * n))[0])
        assert abs(layer.scores.abs().max().item() - math.sqrt(6 / fan_in)) < 1e-6
    result = dass(net := tiny(), **EACH | dict(prune_epochs=0))
    assert list(result.phases) == ["pretrain", "finetune"], "no prune phase: the masks of least magnitude stay"
    for layer in scored_layers(net).values(): assert layer.kept == math.ceil(Fraction("0.3") * layer.weight.numel())


def test_memory_format_of_scores():
    nets = {last: tiny(in_channels=3) for last in (False, True)}  # only the stem's weights have an order to change
    for last, net in nets.items(): net.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    for net in nets.values(): set_scores(net, "kaiming-normal", seed=3), set_keep(net, "0.3")
    one, two = (scored_masks(net) for net in nets.values())
    assert one == two and one.kept == sum(-(-3 * mask.numel() // 10) for mask in one.values())
    assert not nets[True].stem[0].scores.is_contiguous() and dass(tiny(in_channels=1), channels_last=True, **EACH).masks.density > 0.3


def test_second_order_against_the_exact_product():
    "With masks fixed, the loss is piecewise smooth in the kept weights: within a piece the difference quotient meets double backpropagation."
    net = tiny(keep="0.3").double()
    batches = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(i)).double(), torch.arange(8) % 3) for i in range(2)]
    before = bits(net)
    with learning(net, "weights"):
        sgd = make_optimizer(net, "sgd", lr=0.05, momentum=0.0, nesterov=False, weight_decay=1e-3)
        exact, near = (second_order(net, *batches, F.cross_entropy, sgd, epsilon=1e-6, exact=exact).gradients for exact in (True, False))
        first = torch.autograd.grad(F.cross_entropy(net(batches[1][0]), batches[1][1]), list(net.alphas.values()))
    size = math.sqrt(sum((g ** 2).sum() for g in exact))
    gap = math.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(exact, near)))
    assert gap < 1e-8 * size and math.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(exact, first))) > 1e-2 * size
    after = bits(net)
    assert not {name for name in moved(before, after) if "running" not in name and "num_batches" not in name}


def test_the_released_virtual_step_by_a_second_network():
    "Theta, v and epsilon over weights, scores and alphas, with decay 3e-4, written with a copy as the released architect does it."
    net = tiny(keep="0.3").double()
    train, arch = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(i)).double(), torch.arange(8) % 3) for i in range(2)]
    with learning(net, "weights"):
        search = Search(net, DATA, lr=0.05, momentum=0.0, weight_decay=1e-3, optimizer=with_alphas, **BATCH)
        step = released_step(search, Released(scores_unrolled=True, unrolled_constants=True), 10)
    eta, count = 0.05, len(net.alphas)
    assert step.param_groups[0]["lr"] == eta
    def theta(of): return [*of.alphas.values(), *of.parameters()]
    def loss(of, batch): return F.cross_entropy(of(batch[0]), batch[1])
    other = copy.deepcopy(net)
    gradients = torch.autograd.grad(loss(net, train), theta(net))
    with torch.no_grad():
        for mine, its, g in zip(theta(net), theta(other), gradients): its.copy_(mine - eta * (g + 3e-4 * mine))
    v = torch.autograd.grad(loss(other, arch), theta(other))
    size = 0.01 / math.sqrt(sum((x ** 2).sum() for x in v))
    sides = []
    for sign in (1, -1):
        beside = copy.deepcopy(net)
        with torch.no_grad():
            for its, x in zip(theta(beside), v): its.add_(sign * size * x)
        sides.append(torch.autograd.grad(loss(beside, train), list(beside.alphas.values())))
    expected = [d - eta * (p - m) / (2 * size) for d, p, m in zip(v[:count], *sides)]
    found = second_order(net, train, arch, F.cross_entropy, step).gradients
    for a, b in zip(expected, found): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def test_degenerate_alphas():
    "The cell of dead alphas is named D in the release; here it is refused."
    dead = [("max_pool_3x3", source) for _ in range(4) for source in (0, 1)]
    for value in (0.0, math.nan):
        flat = torch.full((14, 8), value)
        cell = parse_alphas(flat, flat)
        assert [tuple(edge[:2]) for edge in cell.edges("normal")] == dead == [tuple(edge[:2]) for edge in cell.edges("reduce")]
    net = tiny(alpha_scale=0.0)
    with pytest.raises(CollapseError): dass(net, arch_phases=(), **{**LENGTHS, "pretrain_epochs": 1, "finetune_epochs": 0})
    net = tiny()
    with torch.no_grad(): net.alphas["normal"][0, 0] = math.nan
    with pytest.raises(NumericalError, match="not finite before the search has begun"): dass(net)


def test_known_alphas_give_the_known_cell():
    net = sd.supernet("dass", channels=2, layers=3)
    pattern = torch.tensor([[((8 * r + c) % 7) / 7 for c in range(8)] for r in range(14)])
    net.set_alphas(normal=pattern, reduce=pattern)
    names = [(name, source) for name, source, _ in net.genotype().edges("normal")]
    assert names == [("dil_conv_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("skip_connect", 1), ("dil_conv_3x3", 2), ("sep_conv_5x5", 3),
                     ("sep_conv_3x3", 0), ("skip_connect", 1)]


# ---- what learns in which phase --------------------------------------------------------------------------------------------------

def watched(**options):
    "The network before every phase and after every step: phase -> list of (values, masks)."
    seen = {}
    def look(search):
        phase = "prune" if any(layer.scores.requires_grad for layer in scored_layers(search.supernet).values()) else "finetune" if "prune" in seen else "pretrain"
        seen.setdefault(phase, []).append((bits(search.supernet), scored_masks(search.supernet)))
    result = dass(callbacks=(Watch(look),), **options)
    return result, seen


def kinds(names):
    "What kinds of values these are."
    found = set()
    for name in names:
        last = name.split(".")[-1]
        found.add("scores" if last == "scores" else "alphas" if name.startswith("alphas_") else "statistics" if last.startswith(("running_", "num_batches"))
                  else "norms" if name.startswith("stem.1.") else "weights")
    return found


@pytest.mark.parametrize("order", ["first", "second"])
def test_each_phase_moves_what_it_should(order):
    result, seen = watched(order=order, lrs=(0.025, 5.0, 0.025), **EACH)
    assert list(seen) == ["pretrain", "prune", "finetune"] and [len(entries) for entries in seen.values()] == [2, 2, 2]
    changes = {phase: kinds(moved(entries[0][0], entries[-1][0])) for phase, entries in seen.items()}
    assert changes == {"pretrain": {"weights", "norms", "alphas", "statistics"}, "prune": {"scores", "norms", "statistics"},
                       "finetune": {"weights", "norms", "alphas", "statistics"}}
    across = moved(seen["pretrain"][-1][0], seen["prune"][-1][0])
    assert "weights" not in kinds(across) and "alphas" not in kinds(across), "from the last pretrain step to the last prune step"
    assert kinds(moved(seen["prune"][-1][0], seen["finetune"][-1][0])) == {"weights", "norms", "alphas", "statistics"}
    assert all(masks.density == 1 for _, masks in seen["pretrain"])
    assert seen["prune"][0][1] != seen["prune"][-1][1] == result.masks and all(masks == result.masks for _, masks in seen["finetune"])
    bound = {name: value for name, value in seen["prune"][0][0].items() if not name.endswith("scores")}
    assert all(layer.kept == math.ceil(Fraction("0.3") * layer.weight.numel()) for layer in scored_layers(result.model).values()) and bound
    assert all(p.requires_grad for p in result.model.parameters()) and all(p.grad is None for p in result.model.parameters())


def test_alphas_move_by_the_architecture_step_alone():
    for options in (EACH | dict(arch_phases=()), EACH | dict(arch_lr=0.0)):
        net = tiny()
        before = {name: alpha.detach().clone() for name, alpha in net.alphas.items()}
        result = dass(net, **options)
        assert all(torch.equal(before[name], alpha) for name, alpha in net.alphas.items())
        assert (result.trajectory["normal"] == before["normal"].numpy()).all()
    drift = dass(arch_phases=(), compat=Released(alphas_trained=True), **EACH).phases
    for phase in PHASES:
        frames = drift[phase].trajectory["normal"]
        assert abs(frames[-1] - frames[0]).max() > 1e-6, f"the weights' optimiser moves them in {phase}"


def test_alphas_of_a_phase_are_where_the_last_one_left_them():
    result = dass()
    frames = [result.phases[phase].trajectory for phase in PHASES]
    for cell in ("normal", "reduce"):
        assert all((one[cell][-1] == two[cell][0]).all() for one, two in itertools.pairwise(frames))
        assert len(result.trajectory[cell]) == 6 and (frames[1][cell] == frames[1][cell][0]).all()
    assert result.genotypes["finetune"] == result.genotype and result.history.phase.tolist() == ["pretrain"] * 2 + ["prune"] + ["finetune"] * 2
    assert len({result.phases[phase].seconds for phase in PHASES}) == 3


def test_learning_rates():
    lengths = dict(pretrain_epochs=4, prune_epochs=2, finetune_epochs=2, batch_size=134)
    def cosine(t, epochs, lr): return 0.001 + (lr - 0.001) * (1 + math.cos(math.pi * t / epochs)) / 2
    sound, released = (dass(tiny(channels=2), arch_phases=(), compat=compat, **lengths).history.lr for compat in (False, Released(shifted_cosine=True, long_cosine=True)))
    expected = [[cosine(t + shift, horizon, lr) for lr, epochs, horizon in zip((0.025, 0.1, 0.025), (4, 2, 2), horizons) for t in range(epochs)]
                for shift, horizons in ((0, (4, 2, 2)), (1, (4, 4, 4)))]
    assert max(abs(sound - expected[0])) < 1e-12 and max(abs(released - expected[1])) < 1e-12
    assert abs(released[5] - 0.0505) < 1e-12, "half of the cosine, as the published phase of 50 epochs has it"


SECOND = dict(order="second", pretrain_epochs=2, prune_epochs=1, finetune_epochs=0)

@pytest.mark.parametrize("switch, changes", [("alphas_trained", {"alphas"}), ("scores_unrolled", {"alphas"}), ("unrolled_constants", {"alphas"}),
                                             ("recursive_eta", {"alphas"}), ("shifted_cosine", {"weights"}), ("noisy_forward", {"statistics"})])
def test_every_released_behaviour_changes_something(switch, changes):
    sound = reference()
    net = dass(compat=Released(**{switch: True}), **SECOND).model
    found = kinds(moved(bits(sound), bits(net)))
    assert changes <= found and (switch != "noisy_forward" or found == {"statistics"})


@functools.cache
def reference(): return dass(**SECOND).model


def test_compat_is_all_of_it():
    everything = dass(compat=True, **SECOND)
    listed = dass(compat=Released(**{name: name != "one_optimizer" for name in Released.__dataclass_fields__}), **SECOND)
    assert same(bits(everything.model), bits(listed.model)) and not same(bits(everything.model), bits(reference()))


# ---- one level -------------------------------------------------------------------------------------------------------------------

def test_one_level_makes_three_steps_on_a_batch():
    net = tiny(keep="0.3")
    before, between = bits(net), []
    class Between:
        def after_architecture(self, search): between.append(bits(net))
        def after_step(self, search): between.append(bits(net))
    with learning(net, "weights"):
        search = Search(net, DATA, order="first", arch_lr=0.01, callbacks=(Between(), ScoreStep(net, 0.5, 0.0, None)), **BATCH)
        search.step()
    first, second = between
    assert kinds(moved(before, first)) == {"alphas", "statistics"} and kinds(moved(first, second)) == {"weights", "norms", "statistics"}
    assert kinds(moved(second, bits(net))) == {"scores", "statistics"}
    probe = tiny(keep="0.3")
    probe.load_state_dict(second)
    F.cross_entropy(probe(search.batch[0]), search.batch[1]).backward()
    for (name, layer), mine in zip(scored_layers(probe).items(), scored_layers(net).values()):
        torch.testing.assert_close(mine.scores, layer.scores - 0.5 * layer.scores.grad, msg=name)


def test_one_level_search():
    options = {**BATCH, "keep": "0.3", "one_level": True, "epochs": 2, "order": "first", "arch_lr": 0.01}
    result = sd.search("dass", DATA, net=tiny(), **options)
    again, released = (sd.search("dass", DATA, net=tiny(), compat=compat, **options) for compat in (False, Released(one_optimizer=True)))
    assert result.history.phase.tolist() == ["onelevel"] * 2 and same(bits(result.model), bits(again.model))
    assert result.history.lr.round(12).tolist() == [0.025, 0.013] and released.history.lr.tolist() == [0.1, 0.1]
    assert {layer.kept for layer in scored_layers(result.model).values()} == {math.ceil(Fraction("0.3") * layer.weight.numel()) for layer in scored_layers(result.model).values()}
    with pytest.raises(ParameterError, match="a one-level search has one phase"): sd.search("dass", DATA, net=tiny(), **{**options, "prune_epochs": 3})


def test_other_spaces_and_dense_layers():
    sizes = dict(channels=2, layers=1, order="first", **BATCH)
    found = sd.search("dass", DATA, space="nasbench201", keep="0.5", **sizes, **EACH)
    assert isinstance(found.genotype, str) and found.masks.kept == sum(-(-mask.numel() // 2) for mask in found.masks.values())
    dense = sd.search("dass", DATA, layer_type="dense", **{**sizes, "layers": 3, "nodes": 2, "space": "s2"}, pretrain_epochs=1, finetune_epochs=1)
    assert dense.masks is None and list(dense.phases) == ["pretrain", "finetune"] and not any(isinstance(m, ScoredLayer) for m in dense.model.modules())
    same_seed = [sd.search("dass", DATA, sparsity=s, keep=k, **{**sizes, "layers": 3, "nodes": 2, "space": "s2"}, **EACH) for s, k in ((0.7, None), (None, "0.3"))]
    assert same(*(bits(result.model) for result in same_seed)), "sparsity is 1 - keep"


def test_control_masks():
    "Without an epoch of learning scores: least magnitude, or by lot; the lot of a search differs from that of another seed."
    whole = EACH | dict(prune_epochs=0, finetune_epochs=1)
    masks, largest = {}, {}
    for name, options in {"scaled": {}, "lot": dict(initial="kaiming-normal"), "other seed": dict(initial="kaiming-normal", seed=1)}.items():
        net, weights = tiny(), {}
        def look(search):
            if scored_masks(search.supernet).density == 1: weights.update({n: layer.weight.detach().clone() for n, layer in scored_layers(search.supernet).items()})
        masks[name] = dass(net, callbacks=(Watch(look),), **options, **whole).masks
        largest[name] = sd.Masks({n: best_masks([w.abs()], math.ceil(Fraction("0.3") * w.numel()))[0] for n, w in weights.items()})
    assert masks["scaled"] == largest["scaled"], "of the weights after pretraining"
    assert masks["lot"].counts() == masks["scaled"].counts()
    chance = sum(int(mask.count_nonzero()) ** 2 / mask.numel() for mask in masks["lot"].values()) / masks["lot"].kept
    for one, two in ((masks["lot"], largest["lot"]), (masks["other seed"], largest["other seed"]), (masks["lot"], masks["other seed"])):
        assert abs((one & two).kept / one.kept - chance) < 0.06, "as much as chance gives"


def test_random_scores_of_two_phases_are_two_draws():
    scores, net = {}, tiny()
    for phase in dass_phases(Fraction(1), (1, 1, 1), (1, 1, 1), (), Released(), True, initial="kaiming-normal"):
        phase.prepare(net)
        scores[phase.name] = bits(net)
    unlike = moved(scores["pretrain"], scores["prune"])
    assert unlike == {name for name in scores["prune"] if name.endswith("scores")} and same(scores["prune"], scores["finetune"])


def test_first_scores_of_one_level():
    options = dict(one_level=True, epochs=1, lrs=(0.025, 0.0), weight_decay=0.0, pretrain_epochs=None, prune_epochs=None, finetune_epochs=None)
    lot, again, other, scaled = (dass(**options, **more).masks for more in (dict(initial="kaiming-normal"), dict(initial="kaiming-normal"), dict(initial="kaiming-normal", seed=1), {}))
    assert lot == again != other and lot != scaled and lot.counts() == scaled.counts()


def test_another_first_score_is_another_run(tmp_path):
    dass(checkpoint=tmp_path / "run", **EACH)
    with pytest.raises(CheckpointError, match="belongs to another run: initial was"): dass(checkpoint=tmp_path / "run", initial="kaiming-normal", **EACH)


@pytest.mark.parametrize("initial, error, text", [("largest", UnknownName, "unknown initial score 'largest'"), ("snip", ParameterError, "score 'snip' needs data"),
                                                  ("zeros", ParameterError, "a score of zero never moves"), (torch.ones, ParameterError, "initial is the name of first scores")])
def test_unfit_first_scores_are_refused_before_the_first_step(initial, error, text):
    steps = []
    with pytest.raises(error, match=text): dass(initial=initial, callbacks=(Watch(steps.append),))
    assert not steps


def test_compat_of_a_dense_search_leaves_scores_out():
    "It was refused in the first step before, for want of scores."
    sizes = dict(channels=4, layers=3, nodes=1, space="s3", pretrain_epochs=1, finetune_epochs=1, order="second", **BATCH)
    rest = {name: name not in ("scores_unrolled", "float_counts", "one_optimizer") for name in Released.__dataclass_fields__}
    one, two = (sd.search("dass", DATA, layer_type="dense", compat=compat, **sizes) for compat in (True, Released(**rest)))
    assert one.masks is None and same(bits(one.model), bits(two.model))


@pytest.mark.parametrize("options, text", [
    (dict(layer_type="dense", prune_epochs=0), "prune_epochs: a dense"),
    (dict(layer_type="dense", compat=Released(scores_unrolled=True)), "compat with scores_unrolled: a dense"),
    (dict(layer_type="dense", compat=Released(float_counts=True)), "compat with float_counts: a dense"),
    (dict(compat=Released(one_optimizer=True)), "compat with one_optimizer: only the one-level search has it; leave it out, or give compat=True"),
    (dict(one_level=True, compat=Released(long_cosine=True)), "compat with long_cosine: a one-level search has one cosine"),
    (dict(one_level=True, compat=Released(alphas_trained=True)), "compat with alphas_trained: the released one-level search keeps alphas out"),
    (dict(one_level=True, compat=True), "the released one-level search is not reproduced.*What is meant here is compat=False"),
    (dict(layer_type="dense", keep=0.1, initial="scaled"), "keep, initial: a dense.*leave that out, or search with layer_type='sparse'"),
    (dict(layer_type="dense", keep=0.1), "keep: a dense supernet keeps all its weights"), (dict(layer_type="dense", sparsity=0.9), "sparsity: a dense"),
    (dict(layer_type="dense", prune_epochs=1), "prune_epochs: a dense"), (dict(layer_type="dense", initial="scaled"), "initial: a dense"),
    (dict(layer_type="dense", arch_phases=("prune",)), "arch_phases with 'prune': a dense"), (dict(net="dense", keep=0.1), "keep: a dense"),
    (dict(net="dense", prune_epochs=0), "prune_epochs: a dense"), (dict(net="sparse", space="darts"), "space would be"),
    (dict(net="sparse", space="s1"), "space would be those of a new supernet"), (dict(net="sparse", layer_type="sparse"), "layer_type would be"),
    (dict(net="sparse", channels=4), "channels would be")])
def test_nothing_is_ignored(options, text):
    if "net" in options: options = options | dict(net=tiny(layer_type=options["net"]))
    with pytest.raises(ParameterError, match=text): sd.search("dass", DATA, **options)


# ---- stopped and gone on ---------------------------------------------------------------------------------------------------------

def assert_same_search(one, two):
    assert same(bits(one.model), bits(two.model)) and one.masks == two.masks and one.genotypes == two.genotypes
    pd.testing.assert_frame_equal(one.history.drop(columns="seconds"), two.history.drop(columns="seconds"), check_exact=True)
    assert all((one.trajectory[cell] == two.trajectory[cell]).all() for cell in one.trajectory)


VARIANTS = {"sound": EACH | dict(at=2), "released": dict(order="second", compat=True, at=3, **EACH),
            "one level": dict(at=2, one_level=True, epochs=2, compat=Released(one_optimizer=True, noisy_forward=True), pretrain_epochs=None, prune_epochs=None, finetune_epochs=None)}

@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_anywhere_and_gone_on_is_the_same(name, tmp_path):
    options, folder = dict(VARIANTS[name]), tmp_path / "run"
    at = options.pop("at")
    whole = dass(callbacks=(Watch(),), **options)
    for runs in itertools.count(1):
        try: resumed = dass(callbacks=(Watch(at=at),), checkpoint=folder, checkpoint_every=1, **options)
        except Stop: assert runs < 20
        else: break
    assert runs >= 3
    assert_same_search(whole, resumed)
    with pytest.raises(CheckpointError, match="belongs to another run: keep was"): dass(checkpoint=folder, **{**options, "keep": "0.4"})


def work(folder, die):
    "A search that kills itself in its n-th step."
    torch.set_num_threads(1)
    def look(search):
        look.left -= 1
        if look.left == 0: os.kill(os.getpid(), signal.SIGKILL)
    look.left = die
    dass(callbacks=(Watch(look),), checkpoint=folder, checkpoint_every=1, **EACH)


def test_killed_in_every_phase(tmp_path):
    "kill -9 in the second step of each phase; the step before it is on disk."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparsedarts.strategy.dass", "sparsedarts.data.loading", "sklearn.datasets", "pandas", "torch._dynamo", "pytest"])
    folder = tmp_path / "run"
    steps = 2
    for phase in PHASES:
        process = context.Process(target=work, args=(folder, 2 if phase == "pretrain" else steps - 1 + 2))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL and (folder / f"{phase}.pt").exists()
        assert load_checkpoint(folder / f"{phase}.pt")["steps_done"] == 1
    one, two = (dass(callbacks=(Watch(),), checkpoint=where, checkpoint_every=1, **EACH) for where in (folder, None))
    assert_same_search(one, two)


# ---- found cells -----------------------------------------------------------------------------------------------------------------

FOUND = dict(size=(4, 3), keep="0.2", pretrain_epochs=2, prune_epochs=1, finetune_epochs=1, lrs=(0.1, 0.1, 0.02), auxiliary=False, batch_size=40, evaluate_on=("test",), progress=False)


def found(**options): return train_found("DASS", DATA, **{**FOUND, **options})


def test_phase_by_phase_is_the_whole(tmp_path):
    whole = found(folder=tmp_path / "whole", save_dense=tmp_path / "dense.pt")
    for phase in PHASES: last = found(phase=phase, folder=tmp_path / "parts")
    assert same(bits(whole.model), bits(last.model)) and whole.masks == last.masks and whole.model.drop_path_prob == 0
    assert whole.masks.counts() == {name: -(-mask.numel() // 5) for name, mask in whole.masks.items()}
    plain = derive("DASS", 4, 3, classes=3, in_channels=1)
    plain.load_state_dict(load_checkpoint(tmp_path / "dense.pt"))
    for name, layer in masked_layers(whole.model).items(): assert torch.equal(plain.get_parameter(name), layer.weight * layer.mask)
    x, _ = next(DATA.test.batches(30))
    with torch.no_grad(): assert torch.equal(plain.eval()(x), whole.model.eval()(x))
    sparser = found(phase="prune", keep="0.1", source=tmp_path / "whole" / "pretrained.pt")
    assert sparser.masks.counts() == {name: -(-mask.numel() // 10) for name, mask in sparser.masks.items()}, "one pretrained network, several shares"
    with pytest.raises(CheckpointError, match="keep is 1/5, here 1/10"): found(phase="finetune", keep="0.1", source=tmp_path / "whole" / "pruned.pt")
    with pytest.raises(CheckpointError, match="genotype is"): train_found("DARTS_V2", DATA, **FOUND, phase="finetune", source=tmp_path / "whole" / "pruned.pt")


def test_found_stopped_anywhere_and_gone_on(tmp_path):
    whole = found(callbacks=(Watch(),))
    for runs in itertools.count(1):
        try: resumed = found(callbacks=(Watch(at=2),), folder=tmp_path / "run", checkpoint_every=1)
        except Stop: assert runs < 30
        else: break
    assert runs > 3 and same(bits(whole.model), bits(resumed.model)) and whole.masks == resumed.masks
    assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))


def test_baselines_share_the_recipe(tmp_path):
    first = found(phase="pretrain", folder=tmp_path)
    pruned = found(phase="prune", source=tmp_path / "pretrained.pt")
    whole = {method: found(method=method) for method in METHODS}
    weights = {name: p.detach() for name, p in first.model.named_parameters() if p.dim() > 1}
    lwm = {name: best_masks([weight.abs()], math.ceil(Fraction("0.2") * weight.numel()))[0] for name, weight in weights.items()}
    assert whole["lwm"].masks == sd.Masks(lwm) and whole["hydra"].masks == pruned.masks
    assert len({str(result.masks.counts()) for result in whole.values()}) == 1 and whole["lwm"].masks != whole["hydra"].masks != whole["random"].masks
    overlap = (whole["random"].masks & whole["lwm"].masks).kept / whole["lwm"].masks.kept
    assert 0.1 < overlap < 0.35, "by lot, about a fifth of the weights of largest magnitude"
    assert [list(whole[method].metrics) for method in METHODS] == [list(PHASES), ["pretrain", "finetune"], ["pretrain", "finetune"]]


def test_auxiliary_head_and_drop_path():
    patterns, probabilities = sd.load_data("synthetic", size=32, classes=2), []
    result = train_found("DASS", patterns, **{**FOUND, "auxiliary": True, "size": (2, 3), "pretrain_epochs": 2, "batch_size": 25,
                                              "callbacks": (Watch(lambda run: probabilities.append(run.model.drop_path_prob)),)})
    steps = len(patterns.train) // 25
    assert probabilities[:2 * steps] == [0.0] * steps + [0.1] * steps and set(probabilities[2 * steps:]) == {0.0}
    assert any(name.startswith("auxiliary_head") for name in result.masks), "the head is pruned"
    row = found_row(result.model, (3, 32, 32)).iloc[0]
    assert row.params == derived_size(sd.genotype("DASS"), 2, 3, classes=2) and row.kept_weights == sum(n for name, n in result.masks.counts().items() if "auxiliary" not in name) == kept_weights(result.masks) < result.masks.kept
    assert result.history.train_loss.iloc[0] > 1.2 * math.log(2), "the sum with 0.4 of the head's loss"


def test_released_found_settings():
    seen = []
    found(compat=True, callbacks=(Watch(lambda run: seen.append(run.model.drop_path_prob)),))
    assert max(seen) == 0.2 * 1 / 600, "as if 600 epochs were to come"
    for options, decay in ((dict(compat=True), 4e-4), (dict(compat=False), 3e-4), (dict(compat=True, weight_decay=1e-3), 1e-3)):
        decays = set()
        found(phase="pretrain", pretrain_epochs=1, callbacks=(Watch(lambda run: decays.update(group["weight_decay"] for group in run.optimizer.param_groups)),), **options)
        assert decays - {0.0} == {decay}, options
    wide = found(classes=1000, phase="pretrain", pretrain_epochs=1)
    assert wide.model.classifier.out_features == 1000 and derived_size(sd.genotype("DASS"), *SIZES["small"], classes=1000) == 2_285_020


def test_refusals(tmp_path):
    for options, error, text in ((dict(method="snip"), UnknownName, "unknown method"), (dict(phase="tune"), UnknownName, "unknown phase"),
                                 (dict(size="huge"), UnknownName, "unknown size"), (dict(keep=0), ParameterError, "keep must be a number above 0"),
                                 (dict(phase="finetune"), ParameterError, "begins with pruned.pt"), (dict(source="a.pt"), ParameterError, "begins with new weights")):
        with pytest.raises(error, match=text): found(**options)
    with pytest.raises(CheckpointError, match="no checkpoint"): load_stage(tmp_path / "none.pt", nn.Linear(1, 1), "prune", {})
    with pytest.raises(ParameterError, match="finetune.*trains what a mask has left"):
        hydra(derive("DASS", 2, 3, in_channels=1), DATA, 0.1, only="finetune", progress=False)


def test_save_dense_is_written_by_every_phase_alone(tmp_path):
    data = sd.load_data("digits")
    options = dict(size=(4, 3), keep=0.5, auxiliary=False, drop_path=0.0, pretrain_epochs=1, prune_epochs=1, finetune_epochs=1, batch_size=450, progress=False, folder=tmp_path / "run", evaluate_on=())
    for phase in ("pretrain", "prune", "finetune"):
        result = train_found("DARTS_V2", data, phase=phase, save_dense=tmp_path / f"{phase}.pt", **options)
        written = torch.load(tmp_path / f"{phase}.pt", weights_only=True)
        plain = sd.densify(result.model).state_dict()
        assert all(torch.equal(written[name], plain[name]) for name in plain), phase
