"""NAS-Bench-201 against published numbers, brute force and random input."""
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedarts.core import CollapseError, NumericalError, ParameterError, ShapeError
from sparsedarts.space.cells import derive
from sparsedarts.space.darts import supernet
from sparsedarts.space.nasbench201 import (NB201_EDGES, NB201_OPERATIONS, UNIQUE_RULES, derive_nb201, format_nb201, nb201_cell, nb201_cells,
                                           nb201_flops, nb201_index, nb201_size, nb201_table, parse_nb201, parse_nb201_alphas, random_nb201,
                                           stack_size, unique_form)
from sparsedarts.sparse.cost import cost

N, S, C1, C3, A = NB201_OPERATIONS
NAMED = [  # operations, number, parameters and FLOPs on CIFAR-10
    ((N,) * 6, 1651, 73_306, 7_783_050), ((S,) * 6, 1835, 73_306, 7_783_050), ((A,) * 6, 7581, 73_306, 7_783_050),
    ((C1,) * 6, 4317, 241_306, 31_376_010), ((C3,) * 6, 1462, 1_531_546, 220_119_690), ((C3, C3, C3, S, C3, C1), 6111, 1_073_466, 153_272_970),
    ((C3, C3, C3, S, C3, C3), 9930, 1_288_506, 184_730_250), ((C1, C1, C3, S, C3, C3), 857, 858_426, 121_815_690),
    ((C3, N, C3, S, N, S), 11472, 559_386, 78_561_930), ((A, C1, S, C1, S, S), 0, 129_306, 15_647_370)]

CELLS = st.tuples(*[st.sampled_from(NB201_OPERATIONS)] * 6)


def size(module): return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("names, number, params, flops", NAMED)
def test_named_cells(names, number, params, flops):
    text = format_nb201(names)
    assert nb201_index(text) == number and nb201_cell(number) == text and parse_nb201(text) == names
    assert (nb201_size(text), nb201_flops(text)) == (params, flops)
    with torch.device("meta"): assert size(derive(text)) == params


def test_order_is_a_permutation_and_leaves_the_generator_alone():
    nb201_cells.cache_clear()
    random.seed(5)
    before = random.getstate()
    cells = nb201_cells()
    assert random.getstate() == before and sorted(cells) == sorted(map(format_nb201, itertools.product(NB201_OPERATIONS, repeat=6)))
    assert all(nb201_index(cell) == number for number, cell in enumerate(cells))


@pytest.mark.parametrize("classes, side, params, flops, a, b", [
    (10, 32, 73_306, 7_783_050, 35_389_440, 3_932_160), (100, 32, 79_156, 7_788_900, 35_389_440, 3_932_160),
    (120, 16, 80_456, 1_953_400, 8_847_360, 983_040)])
def test_closed_forms_of_all_cells(classes, side, params, flops, a, b):
    table = nb201_table(classes, side)
    n3 = np.array([parse_nb201(cell).count(C3) for cell in table.cell])
    n1 = np.array([parse_nb201(cell).count(C1) for cell in table.cell])
    assert (table.params == params + 243_040 * n3 + 28_000 * n1).all() and (table.flops == flops + a * n3 + b * n1).all()
    assert (table[list(NB201_OPERATIONS)].sum(axis=1) == 6).all() and table.params.dtype == table.flops.dtype == np.int64


@settings(max_examples=10, deadline=None)
@given(CELLS, st.integers(1, 6), st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3))
def test_closed_forms_of_any_size(names, channels, layers, classes, in_channels, quarter):
    text = format_nb201(names)
    found = cost(derive(text, channels, layers, classes, in_channels=in_channels), (in_channels, 4 * quarter, 4 * quarter))
    assert found.params == nb201_size(text, channels, layers, classes, in_channels)
    assert found.macs + classes == nb201_flops(text, channels, layers, classes, in_channels, 4 * quarter)


def test_unique_counts():
    counts = {rule: len({unique_form(cell, rule) for cell in nb201_cells()}) for rule in UNIQUE_RULES[:3]}
    assert counts == dict(skips=12_751, official=6_466, nonzero=5_390)


def fingerprint(names, orders):
    "Sorted values of a cell on a number, over all ways to hand out random functions to its edges; the pooling is one linear map."
    states = [np.full(len(orders), 0.7312)]
    for node in (1, 2, 3):
        total = np.zeros(len(orders))
        for k, (name, (target, source)) in enumerate(zip(names, NB201_EDGES)):
            if target != node or name == N: continue
            x = states[source]
            if name == C3: x = np.where(x == 0, 0, np.tanh(x * (0.31 + 0.173 * orders[:, k]) + 0.057 * orders[:, k] ** 2 + 0.2))
            if name == C1: x = np.where(x == 0, 0, np.exp(-x * (0.23 + 0.119 * orders[:, k]) - 0.041 * orders[:, k] ** 2))
            total = total + (0.637 * x if name == A else x)
        states.append(total)
    return tuple(np.unique(states[3].round(9)))


def test_exact_forms_are_functions():
    "Two cells have the same form exactly if the same numbers come out of them."
    orders = np.array(list(itertools.permutations(range(6))))
    forms, values = {}, {}
    for cell in nb201_cells():
        names = parse_nb201(cell)
        forms.setdefault(unique_form(cell, "exact"), []).append(cell)
        values.setdefault(fingerprint(names, orders), []).append(cell)
    assert len(forms) == len(values) == 5_044 and sorted(forms.values()) == sorted(values.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), min_size=6, max_size=6))
def test_the_first_of_equal_alphas_wins(rows):
    alpha = torch.tensor(rows, dtype=torch.float32)
    wanted = []
    for row in rows:
        best = 0
        for k in range(5):
            if row[k] > row[best]: best = k
        wanted.append(NB201_OPERATIONS[best])
    assert parse_nb201_alphas(alpha) == format_nb201(wanted)
    if all(len(set(row)) == 1 for row in rows):
        with pytest.raises(CollapseError): derive_nb201(alpha)
    else: assert derive_nb201(alpha) == format_nb201(wanted)


def test_undefined_alphas():
    alpha = torch.eye(5)[[1, 2, 3, 4, 0, 1]]
    alpha[2, 4] = float("nan")
    assert parse_nb201(parse_nb201_alphas(alpha))[2] == A
    with pytest.raises(NumericalError, match="1 of 30 alphas"): derive_nb201(alpha)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="|~+01 2noexskip_c", max_size=60) | CELLS.map(lambda names: format_nb201(names)[:-1]))
def test_no_other_text_is_a_cell(text):
    with pytest.raises(ParameterError): parse_nb201(text)


def test_supernet():
    with torch.device("meta"): net = supernet("nasbench201")
    assert size(net) == 1_686_106 == stack_size(6, 6, affine=False) and len(net.cells) == 17
    torch.manual_seed(3)
    net = supernet("nasbench201", channels=4, layers=1, alpha_scale=1)
    torch.manual_seed(3)
    again = supernet("nasbench201", channels=4, layers=1, alpha_scale=1, layer_type="masked")
    assert net.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x), again(x)) and net.genotype() == again.genotype()
    with pytest.raises(ShapeError, match="multiples of 4"): net(torch.randn(2, 3, 10, 10))
    with pytest.raises(ShapeError, match="built for 3 channels"): net(torch.randn(2, 1, 8, 8))


def test_supernet_gradient_of_alpha():
    torch.manual_seed(0)
    net = supernet("nasbench201", channels=2, layers=1, classes=3, alpha_scale=1).double()
    alpha, x = net.alphas["cell"], torch.randn(2, 3, 8, 8, dtype=torch.float64)
    def value(a): return net.eval()(x, {"cell": a.softmax(dim=-1)}).pow(2).sum()
    assert torch.equal(value(alpha), net(x).pow(2).sum())
    assert torch.autograd.gradcheck(value, alpha.detach().clone().requires_grad_(), eps=1e-6, atol=1e-6)


def test_a_removed_operation_adds_nothing():
    net = supernet("nasbench201", channels=4, layers=1).eval()
    x, weights = torch.randn(2, 3, 8, 8), net.weights()["cell"].detach().clone()
    weights[:, 3] = 0
    wanted = net(x, {"cell": weights})
    for cell in net.cells:
        for mixed in getattr(cell, "_ops", ()): mixed._ops[3] = None
    assert torch.equal(net(x), wanted)


def test_random_cells_reach_every_operation():
    generator = torch.Generator().manual_seed(0)
    drawn = [parse_nb201(random_nb201(generator)) for _ in range(200)]
    assert all({names[k] for names in drawn} == set(NB201_OPERATIONS) for k in range(6))


@pytest.mark.parametrize("seed, number, loss", [(0, 5721, 10.7902), (3, 1160, 12.4616)])
def test_modules_are_made_in_the_released_order(seed, number, loss):
    "What FreeDARTS scores highest, one image of ones, all weights made positive: depends on every initial weight."
    torch.manual_seed(seed)
    net = supernet("nasbench201")
    with torch.no_grad():
        for parameter in net.parameters(): parameter.abs_()
    alpha = net.alphas["cell"].detach().abs().requires_grad_()
    value = net(torch.ones(1, 3, 32, 32), {"cell": alpha}).sum()
    gradient, = torch.autograd.grad(value, alpha)
    assert value.item() == pytest.approx(loss, abs=1e-3)
    assert nb201_index(derive_nb201((alpha * gradient).abs())) == number
