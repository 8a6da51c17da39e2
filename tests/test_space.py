"""Cells, supernets and genotypes against published numbers, brute force and random input."""
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsedarts.core import CollapseError, NumericalError, ParameterError, ShapeError
from sparsedarts.space.catalogue import catalogue, fits, genotype, genotypes
from sparsedarts.space.cells import Cell, derive, derived_size, drop_path, stack_plan
from sparsedarts.space.darts import MixedOp, supernet
from sparsedarts.space.genotypes import (Genotype, active_edges, decode_cell, derive_genotype, encode_cell, parse_alphas, parse_cell, random_genotype)
from sparsedarts.space.reading import parse_genotype
from sparsedarts.space.ops import DARTS_OPERATIONS, DENSE, MASKED, FactorizedReduce, Layers, edge_index, operation_size, operations, search_space
from sparsedarts.sparse.cost import cost
from sparsedarts.sparse.layers import masked_layers

LEARNING = [name for name in operations if name not in ("none", "noise")]


def size(module): return sum(p.numel() for p in module.parameters())


def multiply_accumulates(model, channels, side, run=None):
    "Counted by hooks, convolutions and linear layers only. Every map's area grows with the image's, so a smaller image is run and scaled."
    run, total = run or side, 0
    def note(layer, given, made):
        nonlocal total
        scale = (side // run) ** 2 if made.dim() == 4 else 1
        total += scale * made.shape[1:].numel() * layer.weight[0].numel()
    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    with torch.no_grad(): model.eval()(torch.zeros(1, channels, run, run))
    for hook in hooks: hook.remove()
    return total


def maskable(model): return [p.numel() for p in model.parameters() if p.dim() > 1]


# ---------------------------------------------------------------------------- published numbers

def test_every_published_cell_has_its_exact_and_its_printed_size():
    printed = 0
    for name, entry in catalogue().items():
        shape = (entry.genotype, entry.channels, entry.layers, entry.classes)
        assert derived_size(*shape) == entry.parameters, name
        if entry.reported:
            printed += 1
            assert fits(derived_size(*shape, auxiliary=entry.auxiliary), entry.reported) == (name != "DARTS_V1"), name
        if entry.imagenet: assert fits(derived_size(entry.genotype, 48, 14, 1000, stem="imagenet"), entry.imagenet), name
    assert printed == 67 and len(genotypes()) == len(catalogue())


@pytest.mark.parametrize("name", ["DARTS_V1", "PDARTS", "NASNet_5block", "FairDARTS_a", "FairDARTS_b", "darts_pt_s1_c100_1", "XNAS_medium_C44"])
def test_built_networks_have_the_size_of_the_closed_form(name):
    entry = catalogue()[name]
    net = derive(name, entry.channels, entry.layers, entry.classes, auxiliary=True)
    assert size(net) - size(net.auxiliary_head) == entry.parameters
    assert size(net) == derived_size(entry.genotype, entry.channels, entry.layers, entry.classes, auxiliary=True)


@pytest.mark.parametrize("name, channels, layers, params, with_head, weights, norms, macs", [
    ("DARTS_V1", 36, 20, 3_169_414, 3_645_840, 3_132_046, 37_368, 500_987_520),
    ("DARTS_V2", 36, 20, 3_349_342, 3_825_768, 3_308_950, 40_392, 528_359_040),
    ("NASNet", 36, 20, 3_830_950, 4_288_944, 3_789_262, 41_688, 603_452_448),
    ("AmoebaNet", 36, 20, 3_145_078, 3_603_072, 3_109_870, 35_208, 488_931_552),
    ("DARTS_V1", 16, 8, 232_890, 668_356, 227_034, 5_856, 41_355_776),
    ("DARTS_V2", 16, 8, 246_106, 681_572, 239_802, 6_304, 43_444_736),
    ("NASNet", 16, 8, 333_946, 761_220, 326_170, 7_776, 56_224_896),
    ("AmoebaNet", 16, 8, 326_330, 753_604, 319_642, 6_688, 52_873_088)])
def test_cifar_networks(name, channels, layers, params, with_head, weights, norms, macs):
    net = derive(name, channels, layers)
    assert size(net) == params and derived_size(genotype(name), channels, layers, auxiliary=True) == with_head
    assert sum(p.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters()) == weights
    assert sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()) == norms
    assert multiply_accumulates(net, 3, 32, 8 if channels == 36 else 32) == macs


@pytest.mark.parametrize("name, params, with_head, macs", [
    ("DARTS_V1", 4_510_432, 5_771_208, 505_864_704), ("DARTS_V2", 4_718_752, 5_979_528, 529_911_552), ("NASNet", 5_564_320, 6_800_520, 604_031_616),
    ("AmoebaNet", 4_627_360, 5_863_560, 526_746_624), ("DASS", 2_900_704, 4_161_480, 312_737_280), ("DARTS_ORIG_120", 3_309_760, 4_570_536, 365_450_304)])
def test_imagenet_networks(name, params, with_head, macs):
    net = derive(name, 48, 14, 1000, auxiliary=True, stem="imagenet")
    assert size(net) == with_head and with_head - size(net.auxiliary_head) == params
    assert multiply_accumulates(net, 3, 224, 32) == macs
    assert derived_size(genotype(name), 48, 14, 1000, True, "imagenet") == with_head


SIZES = ((30, 16), (36, 20), (86, 12), (108, 14))

@pytest.mark.parametrize("name, counts", [
    ("DARTS_prune_three_for", (988_510, 1_713_790, 5_379_052, 10_568_782)), ("DARTS_ORIG_120", (1_199_740, 2_118_142, 6_221_508, 12_603_718)),
    ("DARTS_V2", (1_892_290, 3_349_342, 9_527_004, 19_454_590)), ("DARTS_V1", (1_790_500, 3_169_414, 9_032_848, 18_441_550)),
    ("DARTS_prune_three_for_90", (2_274_340, 3_936_430, 11_489_180, 22_763_926)), ("DARTS_prune_three_for_95", (2_298_640, 3_962_134, 12_004_664, 23_559_886)),
    ("DARTS_PRUNE_ONE_FOR", (1_519_150, 2_610_190, 7_953_204, 15_544_990)), ("DARTS_PRUNE_Randomizd_Smoothing", (2_437_780, 4_230_838, 12_630_744, 25_025_662))])
def test_the_four_sizes_of_dass(name, counts):
    assert tuple(derived_size(genotype(name), *shape) for shape in SIZES) == counts


@pytest.mark.parametrize("shape, params, with_head, macs, wide, weights, kept, rest, layers", [
    ((30, 16), 988_510, 1_452_648, 158_036_160, 1_464_700, 979_860, (97_986, 48_996, 9_805), 8_650, 84),
    ((36, 20), 1_713_790, 2_190_216, 275_103_360, 2_285_020, 1_701_468, (170_185, 85_114, 17_045), 12_322, 100),
    ((86, 12), 5_379_052, 5_957_878, 969_972_672, 6_742_282, 5_359_950, (536_021, 268_028, 53_621), 19_102, 68),
    ((108, 14), 10_568_782, 11_192_664, 1_739_297_664, 12_280_492, 10_540_908, (1_054_122, 527_078, 105_440), 27_874, 76)])
def test_the_dass_cell(shape, params, with_head, macs, wide, weights, kept, rest, layers):
    cell, net = genotype("DASS"), derive("DASS", *shape, layer_type="masked")
    assert size(net) == params and derived_size(cell, *shape, auxiliary=True) == with_head and derived_size(cell, *shape, classes=1000) == wide
    assert multiply_accumulates(net, 3, 32, 8) == macs
    numbers = [layer.weight.numel() for layer in masked_layers(net).values()]
    assert len(numbers) == layers and sum(numbers) == weights and params - weights == rest
    assert tuple(sum(n - int((1 - k) * n) for n in numbers) for k in (0.1, 0.05, 0.01)) == kept


@pytest.mark.parametrize("name, kept, weights, layers", [
    ("DARTS_ORIG_120", 21_057, 2_098_476, 192), ("DARTS_V2", 33_251, 3_308_940, 440), ("DARTS_V1", 31_469, 3_132_036, 404)])
def test_weights_kept_at_one_percent(name, kept, weights, layers):
    numbers = maskable(derive(name))
    assert (sum(n - int(0.99 * n) for n in numbers), sum(numbers), len(numbers)) == (kept, weights, layers)


def test_freedarts_cells_as_logged():
    dagger, double = genotype("SYNFLOW_oneshot_20cells_seed1"), genotype("SYNFLOW_ImageNet_oneshot_seed3")
    first, fifth = genotype("SYNFLOW_oneshot_seed0"), genotype("SYNFLOW_oneshot_seed4")
    assert [derived_size(g) for g in (first, fifth, dagger, double)] == [3_605_518, 3_983_950, 3_290_806, 4_140_766]
    assert [derived_size(g, 48, 14, 1000, stem="imagenet") for g in (first, fifth, dagger, double)] == [5_097_184, 5_629_408, 4_741_504, 5_772_256]
    assert [derived_size(dagger, 38, classes=classes) for classes in (10, 100)] == [3_649_872, 3_704_682]
    assert derived_size(dagger, 50, 14, 1000, stem="imagenet") == 5_100_275
    assert multiply_accumulates(derive(dagger), 3, 32, 8) + 10 == 519_539_338


# ---------------------------------------------------------------------------- supernets

@pytest.mark.parametrize("name, params", [("darts", 1_930_618), ("fpdarts", 1_930_618), ("s1", 405_146), ("s2", 665_466), ("s3", 665_466), ("s4", 624_506)])
def test_supernet_sizes(name, params):
    net = supernet(name, layer_type="masked" if name == "s2" else "dense")
    assert size(net) == params and net.classifier.in_features * 90 + 90 == 23_130, "100 classes add 23,130"
    assert net.alphas["normal"].shape == net.alphas["reduce"].shape == (14, len(search_space(name).normal[0]))


@pytest.mark.parametrize("channels, layers, params, modules, side, macs", [
    (16, 8, 1_930_618, 1396, 32, 300_255_744), (8, 5, 394_210, 886, 16, 15_408_384), (4, 3, 72_854, 545, 16, 3_871_360), (16, 20, 4_548_730, 3436, None, None)])
def test_darts_supernets(channels, layers, params, modules, side, macs):
    net = supernet("darts", channels=channels, layers=layers)
    assert size(net) == params and len(maskable(net)) == modules
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == modules - 1
    if (channels, layers) == (16, 8):
        assert sum(maskable(net)) == 1_930_512 and size(net.stem[1]) == 96 and net.classifier.bias.numel() == 10
    if side: assert multiply_accumulates(net, 3, side, 8) == macs


def test_the_imagenet_supernet_is_the_released_one_to_the_digit():
    torch.manual_seed(0)
    net = supernet("darts", channels=48, layers=14, classes=1000, stem="imagenet")
    assert size(net) == 25_512_016 and round(net.classifier.bias.abs().sum().item(), 4) == 17.6584


def test_convolutions_of_a_plain_step():
    "A forward and a backward pass issue one call for every convolution: 885 at C8 L5, so 1,770 for weights and architecture."
    torch.manual_seed(0)
    net, calls = supernet("darts", channels=2, layers=5, in_channels=1), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d): module.register_full_backward_hook(lambda *_: calls.append(1))
    net(torch.randn(2, 1, 8, 8, requires_grad=True)).sum().backward()
    assert len(calls) == 885


@pytest.mark.parametrize("name", ["darts", "s1", "s4"])
def test_masked_supernet_that_keeps_all_is_the_dense_one(name):
    results = []
    for layer_type in ("dense", "masked"):
        torch.manual_seed(3)
        net = supernet(name, channels=4, layers=3, in_channels=1, layer_type=layer_type)
        torch.manual_seed(4)
        logits = net(torch.randn(4, 1, 8, 8))
        results.append((logits, *torch.autograd.grad(logits.square().sum(), [*net.alphas.values(), net.classifier.weight]), list(net.state_dict())))
    assert results[0][-1] == results[1][-1]
    for dense, masked in zip(results[0][:-1], results[1][:-1]): torch.testing.assert_close(dense, masked)


def test_supernet_is_a_sum_over_paths():
    "Brute force for one cell of two nodes: the node sums of all operations, each called alone."
    torch.manual_seed(0)
    net = supernet("s3", channels=4, layers=1, nodes=2, alpha_scale=1.0).double().eval()
    x, w, cell = torch.randn(2, 3, 8, 8, dtype=torch.float64), net.weights()["reduce"], net.cells[0]
    s = net.stem(x)
    states = [cell.preprocess0(s), cell.preprocess1(s)]
    for node, rows in ((0, (0, 1)), (1, (2, 3, 4))):
        states.append(sum(w[row, k] * cell._ops[row]._ops[k](states[source]) for source, row in enumerate(rows) for k in range(3)))
    logits = torch.cat(states[2:], 1).mean((2, 3)) @ net.classifier.weight.T + net.classifier.bias
    torch.testing.assert_close(net(x), logits, rtol=1e-12, atol=1e-12)


def test_alphas_stay_outside_the_weights_whatever_is_done_to_the_network():
    torch.manual_seed(0)
    net = supernet("darts", channels=2, layers=3, in_channels=1)
    alphas, optimiser = net.alphas, torch.optim.Adam(net.alphas.values(), lr=0.1)
    held = {id(a) for a in alphas.values()}
    for change in (lambda: net.double(), lambda: net.float(), lambda: net.to(memory_format=torch.channels_last), net.eval, net.train):
        change()
        assert {id(a) for a in net.alphas.values()} == held and all(a.is_leaf and a.requires_grad for a in net.alphas.values())
        assert not held & {id(p) for p in [*net.parameters(), *net.buffers()]}
    before = {name: a.detach().clone() for name, a in alphas.items()}
    net(torch.randn(2, 1, 8, 8)).sum().backward()
    optimiser.step()
    assert all(not torch.equal(net.alphas[name], before[name]) for name in before)
    other = supernet("darts", channels=2, layers=3, in_channels=1)
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(other.alphas[name], net.alphas[name]) for name in before) and not held & {id(a) for a in other.alphas.values()}
    assert not held & {id(a) for a in copy.deepcopy(net).alphas.values()}


def test_removed_operations_weigh_as_if_their_weight_were_zero():
    torch.manual_seed(0)
    net = supernet("fpdarts", channels=2, layers=3, in_channels=1).eval()
    x, weights = torch.randn(2, 1, 8, 8), {kind: w.detach() for kind, w in net.weights().items()}
    zeroed = {kind: w.clone() for kind, w in weights.items()}
    for kind, row, k in (("normal", 3, 2), ("reduce", 0, 5), ("reduce", 13, 0)):
        zeroed[kind][row, k] = 0
    expected = net(x, zeroed)
    for cell in net.cells:
        for kind, row, k in (("normal", 3, 2), ("reduce", 0, 5), ("reduce", 13, 0)):
            if cell.reduction == (kind == "reduce"): cell._ops[row]._ops[k] = None
    torch.testing.assert_close(net(x, weights), expected)


# ---------------------------------------------------------------------------- names

def test_names_are_those_of_the_released_layout():
    "Composed here by hand from the layout, not read off the modules."
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    relu_conv_bn = ["op.1.weight", *(f"op.2.{n}" for n in norm)]
    halving = ["conv_1.weight", "conv_2.weight", *(f"bn.{n}" for n in norm)]
    sep = ["op.1.weight", "op.2.weight", *(f"op.3.{n}" for n in norm), "op.5.weight", "op.6.weight", *(f"op.7.{n}" for n in norm)]
    dil = ["op.1.weight", "op.2.weight", *(f"op.3.{n}" for n in norm)]
    pair = ["1.weight", "2.weight", *(f"3.{n}" for n in norm)]
    g = Genotype(decode_cell("s30 sk1 d52 mp0"), (2, 3), decode_cell("sk0 ap1 sk2 c70"), (2, 3))
    expected = ["stem.0.weight", *(f"stem.1.{n}" for n in norm)]
    for i, (kind, first) in enumerate((("normal", relu_conv_bn), ("reduce", relu_conv_bn), ("reduce", halving))):
        expected += [f"cells.{i}.preprocess0.{n}" for n in first] + [f"cells.{i}.preprocess1.{n}" for n in relu_conv_bn]
        if kind == "normal": expected += [f"cells.{i}._ops.0.{n}" for n in sep] + [f"cells.{i}._ops.2.{n}" for n in dil]
        else: expected += [f"cells.{i}._ops.0.{n}" for n in halving] + [f"cells.{i}._ops.3.{n}" for n in pair]
    expected += [f"auxiliary_head.features.{n}" for n in ["2.weight", *(f"3.{m}" for m in norm), "5.weight", *(f"6.{m}" for m in norm)]]
    expected += [f"{n}.{m}" for n in ("auxiliary_head.classifier", "classifier") for m in ("weight", "bias")]
    assert list(derive(g, 4, 3, auxiliary=True).state_dict()) == expected

    net = supernet("darts", channels=4, layers=3)
    names = set(net.state_dict())
    assert {"cells.0._ops.13._ops.1.1.running_mean", "cells.0._ops.0._ops.4.op.6.weight", "cells.1._ops.0._ops.3.conv_2.weight",
            "cells.2.preprocess0.conv_1.weight", "classifier.bias", "alphas_normal", "alphas_reduce"} <= names
    assert "cells.0._ops.0._ops.4.op.3.weight" not in names and "cells.0._ops.0._ops.1.1.weight" not in names
    assert set(dict(net.named_parameters())) == {n for n in names if not n.startswith("alphas") and "running" not in n and "tracked" not in n}


def test_an_injected_class_reaches_every_layer():
    class Conv(nn.Conv2d): pass
    class Linear(nn.Linear): pass
    built = Layers(Conv, Linear)
    for net in (derive("NASNet", 4, 4, auxiliary=True, layer_type=built), derive("AmoebaNet", 4, 3, stem="imagenet", layer_type=built),
                supernet("darts", channels=4, layers=3, layer_type=built)):
        assert {type(m) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))} == {Conv, Linear}


# ---------------------------------------------------------------------------- genotypes

def reference_parse(rows, names):
    "Two edges a node by a plain loop: scan sources upwards, take the strictly strongest twice."
    cell = []
    for node in range(4):
        best = []
        for source in range(node + 2):
            row = rows[node * (node + 3) // 2 + source]
            k_best = None
            for k in range(len(names)):
                if names[k] != "none" and (k_best is None or row[k] > row[k_best]): k_best = k
            best.append((row[k_best], source, names[k_best]))
        for _ in range(2):
            top = best[0]
            for candidate in best[1:]:
                if candidate[0] > top[0]: top = candidate
            best.remove(top)
            cell.append((top[2], top[1]))
    return tuple(cell)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=14, max_size=14))
def test_parsing_breaks_ties_as_defined(levels):
    weights = torch.tensor(levels, dtype=torch.float64) / 8
    assert parse_cell(weights, (DARTS_OPERATIONS,) * 14) == reference_parse(weights.tolist(), DARTS_OPERATIONS)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 223), st.sampled_from([0.0, math.nan, math.inf, -math.inf, 3e38])), max_size=30))
def test_the_low_level_parser_is_total(seed, changes):
    values = torch.randn(224, generator=torch.Generator().manual_seed(seed))
    for place, value in changes: values[place] = value
    normal, reduce = values.view(2, 14, 8)
    cell = parse_alphas(normal, reduce)
    for kind in ("normal", "reduce"):
        assert all(name in DARTS_OPERATIONS[1:] for name, _, _ in cell.edges(kind)) and cell.concat(kind) == (2, 3, 4, 5)
        assert all(len({source for _, source, target in cell.edges(kind) if target == node}) == 2 for node in range(2, 6))
    if not (normal.isfinite().all() and reduce.isfinite().all()):
        with pytest.raises(NumericalError): derive_genotype(normal, reduce)


def test_known_ties_and_degenerate_alphas():
    pattern = torch.tensor([[((8 * r + c) % 7) / 7 for c in range(8)] for r in range(14)])
    assert encode_cell(derive_genotype(pattern, pattern).normal) == "d30 s51 s30 sk1 d32 s53 s30 sk1"
    dead = "mp0 mp1 mp0 mp1 mp0 mp1 mp0 mp1"
    for value in (0.0, 1e-3, math.nan, math.inf):
        flat = torch.full((14, 8), value)
        assert encode_cell(parse_alphas(flat, flat).reduce) == dead
        with pytest.raises((CollapseError, NumericalError)): derive_genotype(pattern, flat)
        with pytest.raises((CollapseError, NumericalError)): derive_genotype(flat, pattern)
    none_wins = torch.zeros(14, 8)
    none_wins[:, 0] = 5
    assert encode_cell(derive_genotype(none_wins, pattern).normal) == dead, "an edge on which only the absent edge stands out"
    assert parse_cell(torch.tensor([[1.], [1.]]), (("none",), ("sep_conv_3x3",))) == (("sep_conv_3x3", 1),), "an edge without choice is left out"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["darts", "s1", "s2", "s3", "s4", "fpdarts"]), st.integers(1, 5))
def test_random_genotypes_are_valid_and_survive_writing(seed, space, nodes):
    nodes = 4 if space == "s1" else nodes
    g = random_genotype(torch.Generator().manual_seed(seed), space, nodes)
    assert g == random_genotype(torch.Generator().manual_seed(seed), space, nodes)
    assert g == parse_genotype(str(g)) == Genotype.from_json(g.to_json()) and hash(g) == hash(parse_genotype(repr(g)))
    rows = search_space(space, nodes)
    for kind in ("normal", "reduce"):
        assert decode_cell(encode_cell(getattr(g, kind))) == getattr(g, kind)
        for target in range(2, nodes + 2):
            incoming = [(name, source) for name, source, end in g.edges(kind) if end == target]
            assert len(incoming) == 2 and incoming[0][1] < incoming[1][1] < target
            assert all(name != "none" and name in getattr(rows, kind)[edge_index(target - 2, source)] for name, source in incoming)


an_edge = st.tuples(st.sampled_from(sorted(LEARNING)), st.integers(0, 4), st.integers(2, 5)).filter(lambda edge: edge[1] < edge[2])
edge_lists = st.lists(an_edge, min_size=1, max_size=9)

@settings(max_examples=25, deadline=None)
@given(edge_lists)
def test_free_topologies_build_and_count(edges):
    kept, nodes = active_edges(edges)
    reached = {0, 1}
    for _ in range(5): reached |= {target for _, source, target in edges if source in reached}
    assert set(nodes) == reached - {0, 1} and kept == tuple(edge for edge in edges if edge[1] in reached)
    if not nodes: return
    g = Genotype(kept, range(2, 6), kept, nodes)
    assert g.normal_concat == g.reduce_concat == nodes
    net = derive(g, 2, 3, in_channels=1)
    assert size(net) == derived_size(g, 2, 3, in_channels=1) and net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    reordered = Genotype(kept[::-1], range(2, 6), kept, nodes)
    assert derived_size(reordered, 2, 3, in_channels=1) == size(net)


def test_bad_genotypes_are_refused():
    good = decode_cell("s30 s31")
    bad = [(decode_cell("s30 s32"), (2,), "leads from 2 to 2"), (good, (3,), "names nodes \\[3\\]"), (good, (), "is empty"), ((), (2,), "is empty")]
    for edges, concat, text in bad:
        with pytest.raises(ParameterError, match=text): Genotype(edges, concat, good, (2,))
        with pytest.raises(ParameterError, match=text): Genotype(good, (2,), edges, concat)


# ---------------------------------------------------------------------------- operations and networks

@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(operations)), st.integers(1, 4), st.integers(1, 2), st.booleans(), st.integers(2, 9), st.integers(2, 9), st.booleans())
def test_operations_halve_any_even_map_and_count_their_parameters(name, half, stride, affine, height, width, masked):
    channels = 2 * half
    op = operations[name](channels, stride, affine, MASKED if masked else DENSE)
    assert size(op) == operation_size(name, channels, stride, affine)
    x = torch.randn(2, channels, height, width)
    if name == "skip_connect" and stride == 2 and (height % 2 or width % 2):
        with pytest.raises(ShapeError, match=f"even height and width.*got {height}x{width}"): op(x)
    else:
        assert op(x).shape == (2, channels, -(-height // stride), -(-width // stride))
        if name in ("none", "noise"): assert torch.equal(op(x * 0 + 7) * 0, torch.zeros_like(op(x)))


def test_networks_take_multiples_of_four_and_explain_the_rest():
    net, search = derive("DARTS_V2", 2, 5, in_channels=1), supernet("s2", channels=2, layers=5, in_channels=1)
    for height in (4, 5, 6, 8, 12, 14):
        for width in (4, 10, 12, 13):
            x = torch.zeros(2, 1, height, width)
            for model in (net, search):
                if height % 4 or width % 4:
                    with pytest.raises(ShapeError, match="even height and width"): model(x)
                else: assert model(x).shape == (2, 10)


def test_head_tells_which_images_it_takes():
    net = derive("DARTS_V2", 2, 5, auxiliary=True)
    for side in (32, 36, 40): assert len(net(torch.zeros(2, 3, side, side))) == 2
    for side in (8, 28, 44):
        with pytest.raises(ShapeError, match="auxiliary head takes maps of 8 to 10 pixels"): net(torch.zeros(2, 3, side, side))
        assert net.eval()(torch.zeros(2, 3, side, side)).shape == (2, 10)
        net.train()


def test_drop_path_statistics():
    torch.manual_seed(0)
    for p in (0.0, 0.1, 0.5, 0.9):
        y = drop_path(torch.ones(20_000, 1, 1, 1), p).flatten()
        dropped = (y == 0).sum().item()
        assert abs(dropped - 20_000 * p) <= 5 * (20_000 * p * (1 - p)) ** 0.5
        torch.testing.assert_close(y[y > 0], torch.full((20_000 - dropped,), 1 / (1 - p)))


def test_drop_path_spares_identities_and_evaluation():
    "A cell of identities and one pooling: an image differs from the plain output in none or in all of the pooling's share."
    torch.manual_seed(0)
    cell = Cell(decode_cell("sk02 ap12"), (2,), 4, 4, 4, False, False, DENSE)
    x = torch.randn(400, 4, 4, 4)
    plain = cell(x, x, 0.0)
    skip = cell.preprocess0(x)
    pooled = plain - skip
    for image, base, share in zip(cell(x, x, 0.25), skip, pooled):
        dropped = torch.allclose(image, base, atol=1e-5)
        assert dropped or torch.allclose(image, base + share / 0.75, atol=1e-5)
    cell.eval()
    assert torch.equal(cell(x, x, 0.25), cell(x, x))


def test_derived_networks_train_from_a_seed_and_trace():
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = []
    for _ in range(2):
        torch.manual_seed(1)
        net = derive("PC_DARTS", 4, 3, in_channels=1, drop_path_prob=0.3)
        logits.append(net(x))
    assert torch.equal(*logits)
    traced = torch.fx.symbolic_trace(net.eval())
    assert torch.equal(traced(x), net(x))
    with pytest.raises(ShapeError): traced(x[:, :, :7])
    traced = torch.fx.symbolic_trace(net.train())
    torch.manual_seed(2)
    expected = net(x)
    torch.manual_seed(2)
    torch.testing.assert_close(traced(x), expected)


def test_cost_agrees_with_the_hooks():
    net = derive("DARTS_V2", 8, 5, in_channels=1)
    assert cost(net, (1, 16, 16)).macs == multiply_accumulates(net, 1, 16) == multiply_accumulates(net, 1, 16, 8)
    assert cost(net, (1, 16, 16)).params == derived_size(genotype("DARTS_V2"), 8, 5, in_channels=1)


def test_halving_reads_both_grids():
    torch.manual_seed(0)
    halve, x = FactorizedReduce(3, 4, False, DENSE).double(), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    halve.bn = nn.Identity()
    first, second = (torch.einsum("bihw,oi->bohw", x.relu()[:, :, i::2, i::2], conv.weight[:, :, 0, 0]) for i, conv in enumerate((halve.conv_1, halve.conv_2)))
    torch.testing.assert_close(halve(x), torch.cat([first, second], 1))


@pytest.mark.parametrize("layers", range(1, 21))
def test_stacks_of_any_height(layers):
    plan = stack_plan(4, layers)
    reductions = [i for i, (_, reduction, _) in enumerate(plan) if reduction]
    assert set(reductions) == {layers // 3, 2 * layers // 3} and plan[-1][0] == 4 * 2 ** len(reductions)
    if layers <= 4: assert size(derive("DASS", 4, layers, auxiliary=True)) == derived_size(genotype("DASS"), 4, layers, auxiliary=True)


def test_mixed_edges_of_every_operation_take_gradients():
    torch.manual_seed(0)
    for stride in (1, 2):
        edge, x = MixedOp(DARTS_OPERATIONS, 4, stride, DENSE).double(), torch.randn(3, 4, 8, 8, dtype=torch.float64)
        w = torch.rand(8, dtype=torch.float64, requires_grad=True)
        g, = torch.autograd.grad((edge(x, w) * (probe := torch.randn(3, 4, 8 // stride, 8 // stride, dtype=torch.float64))).sum(), w)
        torch.testing.assert_close(g, torch.stack([(op(x) * probe).sum() for op in edge._ops]), rtol=1e-10, atol=1e-10)
