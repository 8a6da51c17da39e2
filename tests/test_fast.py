"""The fast path of the supernet against the plain one: values, all gradients, running statistics, and when it must not be taken."""
import copy
import gc
import importlib.util
import pickle
import re
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsedarts.core import ShapeError
from sparsedarts.pruning.scored import to_scored
from sparsedarts.sparse.layers import masks_of, sparsify, apply_masks, dense_gradients
from sparsedarts.sparse.masks import Masks
from sparsedarts.space import fast as fast_path, plan
from sparsedarts.space.darts import darts_supernet
from sparsedarts.space.fast import cell_plans
from sparsedarts.space.grouped import Fan, crop, fan_plain, pointwise
from sparsedarts.space.ops import Space
from sparsedarts.strategy import gradients, stopping
from sparsedarts.training.optim import make_optimizer

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def twins(space="darts", seed=0, prepare=None, dtype=torch.float64, **options):
    "The same supernet by the plain and by the fast path."
    torch.manual_seed(seed)
    usual = {"channels": 2, "layers": 3, "in_channels": 2, "nodes": 2, "alpha_scale": 0.5, "classes": 3, "path": "plain"}
    net = darts_supernet(space, **usual | options).to(dtype)
    if prepare: prepare(net)
    fast = copy.deepcopy(net)
    fast.path = "fast"
    return net, fast


def images(*shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).contiguous(memory_format=layout)


def learned(net): return [tensor for tensor in (*net.alphas.values(), *net.parameters()) if tensor.requires_grad]


def answers(net, x, weights=None):
    "Logits, gradients of everything that learns and of x, the draws used, and all buffers."
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    logits = net(x) if weights is None else net(x, weights)
    value = F.cross_entropy(logits, torch.arange(len(x)) % 3)
    inputs = [x, *learned(net)] + ([] if weights is None else [w for w in weights.values() if w.requires_grad])
    grads = torch.autograd.grad(value, inputs, materialize_grads=True)
    return logits.detach(), grads, torch.rand(1), [buffer.clone() for buffer in net.buffers()]


def seeded(net, x):
    torch.manual_seed(1)
    return net(x)


def agree(net, fast, x, taken=True, weights=None, tolerance=1e-9):
    "Assert that both paths answer the same and that the fast one was really taken, or was not."
    made = fast.weights() if weights is None else weights
    assert (cell_plans(fast, x, made) is not None) == taken
    (y, grads, draw, buffers), (y2, grads2, draw2, buffers2) = answers(net, x, weights), answers(fast, x, weights)
    assert (y - y2).abs().max() <= tolerance and draw == draw2 and len(grads) == len(grads2)
    for a, b in zip(grads, grads2): assert (a - b).abs().max() <= tolerance * max(1, a.abs().max())
    for a, b in zip(buffers, buffers2): assert torch.equal(a, b) if not a.is_floating_point() else (a - b).abs().max() <= tolerance
    if not taken: assert torch.equal(y, y2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("space,options", [("darts", {}), ("fpdarts", {"layers": 1}), ("s1", {"nodes": 4}), ("s2", {}), ("s3", {"nodes": 3}),
                                           ("s4", {})])
def test_every_space_in_training_and_evaluation(space, options, layout):
    net, fast = (one.to(memory_format=layout) for one in twins(space, **options))
    x = images(3, 2, 8, 8, layout=layout)
    agree(net, fast, x)  # moves the running statistics
    agree(net.eval(), fast.eval(), x)
    assert (seeded(net, x[:1]) - seeded(fast, x[:1])).abs().max() < 1e-9


@pytest.mark.parametrize("options,shape", [({"nodes": 4}, (2, 2, 4, 12)), ({"stem": "imagenet"}, (2, 2, 32, 32)),
                                           ({"stem": "imagenet", "nodes": 3}, (2, 2, 64, 32)), ({"channels": 16}, (2, 2, 8, 8)),
                                           ({"in_channels": 1}, (2, 1, 4, 4))])
def test_sizes(options, shape):
    agree(*twins(**options), images(*shape))


def test_kernels_that_are_not_joined(monkeypatch):
    monkeypatch.setattr(fast_path, "JOIN", 0)
    for size in (8, 4): agree(*twins(), images(2, 2, size, size))


@settings(max_examples=8, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), space=st.sampled_from(["darts", "s2", "s4", "mixed"]), layers=st.integers(1, 3),
       seed=st.integers(0, 99))
def test_any_shape_gives_the_same_or_the_same_error(h, w, space, layers, seed):
    if space == "mixed": space = Space("mine", *[(("dil_conv_5x5", "sep_conv_7x7", "avg_pool_3x3", "sep_conv_3x3"),) * 5] * 2)
    net, fast = twins(space, seed, layers=layers)
    x = images(2, 2, h, w, seed=seed)
    try: copy.deepcopy(net)(x)
    except (ShapeError, ValueError) as error:
        with pytest.raises(type(error), match=re.escape(str(error)[:30])): fast(x)
    else: agree(net, fast, x)


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), c=st.integers(1, 3), stride=st.integers(1, 2),
       kernels=st.lists(st.tuples(st.sampled_from([1, 3, 5, 7]), st.integers(1, 3)), min_size=1, max_size=3))
def test_depthwise_gradients_of_any_shape(h, w, c, stride, kernels):
    x = images(2, c, h, w).requires_grad_()
    ws = [crop(images(n * c, 1, k, k, seed=k), h - 1, w - 1).clone().requires_grad_() for k, n in kernels]
    found = []
    for function in (Fan.apply, fan_plain):
        y = torch.cat(function(x, stride, *ws), 1)
        found.append([y, *torch.autograd.grad((y * y.sin()).sum(), [x, *ws])])
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_small_outputs_refuse_like_the_plain_path():
    net, fast = twins("s2")
    for one in (net, fast):
        with pytest.raises(ValueError, match="more than 1 value per channel"): one(images(1, 2, 4, 4))
    agree(net.eval(), fast.eval(), images(1, 2, 4, 4))


def test_float32_logits():
    net, fast = twins(dtype=torch.float32, channels=16, alpha_scale=1e-3)
    x = images(4, 2, 8, 8, dtype=torch.float32)
    assert (net(x) - fast(x)).abs().max() < 1e-4
    with torch.no_grad(): assert (net.eval()(x) - fast.eval()(x)).abs().max() < 1e-4


def random_masks(net):
    generator = torch.Generator().manual_seed(3)
    apply_masks(net, Masks({name: torch.rand(mask.shape, generator=generator) < 0.5 for name, mask in Masks.ones_like(net).items()}), "soft")


def hard(net): random_masks(net), [setattr(layer, "mode", "hard") for layer in net.modules() if hasattr(layer, "effective_weight")]


def scored(net): to_scored(net, keep=0.3)


def half_scored(net): to_scored(net, keep=0.3, allocation="global", include=["cells.1*"])


@pytest.mark.parametrize("prepare", [random_masks, hard, scored, half_scored])
def test_masked_and_scored_layers(prepare):
    net, fast = twins(prepare=prepare)
    if prepare is scored: assert sum("scores" in name for name, _ in fast.named_parameters()) > 50
    x = images(2, 2, 8, 8)
    agree(net, fast, x)
    agree(net.eval(), fast.eval(), x)
    if prepare is random_masks:
        with dense_gradients(net), dense_gradients(fast): agree(net, fast, x)
        inside, other = twins(layer_type="masked")
        agree(inside, other, x)


def remove(net, everything=False):
    for cell in net.cells:
        for k, edge in enumerate(cell._ops):
            for o in range(len(edge._ops)):
                if (k * 3 + o) % 4 == 0 or k == 2 or everything: edge._ops[o] = None


@pytest.mark.parametrize("space", ["darts", "s4", "s3"])
def test_removed_operations(space):
    net, fast = twins(space, prepare=remove, nodes=3)
    agree(net, fast, images(2, 2, 8, 8))


def test_every_operation_removed_is_left_to_the_plain_path():
    net, fast = twins(prepare=lambda net: remove(net, True))
    agree(net, fast, images(2, 2, 8, 8), taken=False)


def test_a_state_that_sends_nothing():
    def prepare(net):
        for cell in net.cells:
            for row in (0, 2): cell._ops[row]._ops = nn.ModuleList([None] * 8)
            for row in (1, 3, 4): cell._ops[row]._ops = nn.ModuleList([op if k in (1, 3) else None for k, op in enumerate(cell._ops[row]._ops)])
    net, fast = twins(prepare=prepare)
    agree(net, fast, images(2, 2, 8, 8))


@pytest.mark.parametrize("kind", ["hot", "zero", "raw"])
def test_given_weights(kind):
    net, fast = twins()
    raw = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    w = {"hot": torch.eye(8)[[1, 4, 7, 3, 6]], "zero": torch.zeros(5, 8), "raw": raw}[kind].double()
    for learns in (True, False):
        weights = {name: w.clone().requires_grad_(learns) for name in ("normal", "reduce")}
        agree(net, fast, images(2, 2, 8, 8), weights=weights)


@pytest.mark.parametrize("who", ["weights", "alphas", "both", "some"])
def test_frozen_tensors(who):
    def prepare(net):
        for p in net.parameters(): p.requires_grad_(who in ("alphas", "some"))
        if who == "some":
            for name, p in net.named_parameters(): p.requires_grad_("._ops.4" in name)
        for alpha in net.alphas.values(): alpha.requires_grad_(who == "weights")
    agree(*twins(prepare=prepare), images(2, 2, 8, 8))


@pytest.mark.parametrize("change,taken", [(lambda norm: (setattr(norm, "momentum", 0.3), setattr(norm, "eps", 0.01)), True),
                                          (lambda norm: setattr(norm, "momentum", None), False), (lambda norm: norm.eval(), True)])
def test_norms_with_other_settings(change, taken):
    def prepare(net):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d): change(module)
    agree(*twins(prepare=prepare), images(2, 2, 8, 8), taken=taken)


class Doubled(nn.Conv2d):
    def forward(self, x): return 2 * super().forward(x)


def one_eval(net): net.cells[0]._ops[0]._ops[4].op[3].eval()
def one_eps(net): net.cells[0]._ops[3]._ops[1][1].eps = 0.1
def one_affine(net): net.cells[0]._ops[2]._ops[6].op[3] = nn.BatchNorm2d(4).double()
def no_statistics(net): net.cells[0]._ops[2]._ops[6].op[3] = nn.BatchNorm2d(4, affine=False, track_running_stats=False).double()
def other_activation(net): net.cells[0]._ops[0]._ops[4].op[0] = nn.SiLU()
def biased(net): net.cells[0]._ops[1]._ops[5].op[2] = nn.Conv2d(net.cells[0].channels, net.cells[0].channels, 1).double()
def subclassed(net): net.cells[0]._ops[1]._ops[5].op[2].__class__ = Doubled
def wrapped(net): net.cells[0]._ops[1]._ops[2] = nn.Sequential(net.cells[0]._ops[1]._ops[2], nn.Dropout(0.5))
def adapter(net): net.cells[0].preprocess0 = nn.Sequential(net.cells[0].preprocess0, nn.Tanh())
def shared(net): net.cells[0]._ops[1]._ops[5] = net.cells[0]._ops[0]._ops[5]
def kernel(net): net.cells[0]._ops[1]._ops[5].op[1].padding_mode = "circular"
def parametrized(net): nn.utils.parametrizations.weight_norm(net.cells[0]._ops[0]._ops[4].op[1])


@pytest.mark.parametrize("prepare", [one_eval, one_eps, one_affine, no_statistics, other_activation, biased, subclassed,
                                     wrapped, adapter, shared, kernel, parametrized])
def test_what_is_not_recognised_is_computed_plainly(prepare):
    agree(*twins(prepare=prepare, layers=1), images(2, 2, 8, 8), taken=False)


def test_stem_and_head_may_be_anything():
    def prepare(net): net.stem[1].eval(), setattr(net, "classifier", nn.Sequential(nn.Dropout(0.5), net.classifier)), net.stem.append(nn.Tanh())
    agree(*twins(prepare=prepare), images(2, 2, 8, 8))


def test_hooks_inside_are_called_and_outside_do_not_matter():
    net, fast = twins(layers=1)
    x, called = images(2, 2, 8, 8), []
    def note(*arguments): called.append(len(arguments))
    fast.register_forward_hook(note), fast.stem.register_forward_hook(note)
    agree(net, fast, x)
    assert len(called) == 2
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        called.clear()
        handle = getattr(fast.cells[0]._ops[0]._ops[4].op[1], register)(note)
        agree(net, fast, x, taken=False)
        assert len(called) == 3
        handle.remove()
        agree(net, fast, x)
    handle = nn.modules.module.register_module_forward_hook(note)
    try: assert cell_plans(fast, x, fast.weights()) is None
    finally: handle.remove()


def test_a_changed_network_gets_a_new_plan():
    net, fast = twins()
    x = images(2, 2, 8, 8)
    agree(net, fast, x)
    for one in (net, fast): one.cells[0]._ops[1]._ops[5] = None
    agree(net, fast, x)
    for one in (net, fast): one.cells[1]._ops[0]._ops = nn.ModuleList([*reversed(one.cells[1]._ops[0]._ops)])
    agree(net, fast, x)
    fresh = twins(seed=5)[0].cells[1]._ops[1]
    for one in (net, fast): one.cells[1]._ops[1]._ops[6] = copy.deepcopy(fresh._ops[6])
    agree(net, fast, x)
    for one in (net, fast): sparsify(one), to_scored_again(one)
    agree(net, fast, x)
    for one in (net, fast): one.cells[0]._ops[1]._ops[6].op[2].forward = torch.sin
    agree(net, fast, x, taken=False)


def to_scored_again(net):
    for name, mask in masks_of(net).items():
        net.get_submodule(name.rpartition(".")[0]).set_mask((torch.arange(mask.numel()) % 3 > 0).view(mask.shape))


def test_copies_pickles_types_and_names():
    net, fast = twins()
    x, names = images(2, 2, 8, 8), [*fast.state_dict()]
    agree(net, fast, x)
    assert [*fast.state_dict()] == names == [*net.state_dict()]
    twin, back = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
    assert twin.path == back.path == "fast"
    agree(net, twin, x)
    single, other = copy.deepcopy(net).float(), copy.deepcopy(twin).float()
    assert (single(x.float()) - other(x.float())).abs().max() < 1e-4 and other(x.float()).dtype == torch.float32
    cells = [weakref.ref(cell) for one in (fast, twin, back, other) for cell in one.cells]
    assert all(cell() in plan.known_cells for cell in cells[:3])
    del fast, twin, back, single, other
    gc.collect()
    assert not any(cell() for cell in cells), "plans do not keep cells alive"


def test_without_gradients():
    net, fast = twins()
    x = images(2, 2, 8, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for training in (True, False): assert (net.train(training)(x) - fast.train(training)(x)).abs().max() < 1e-9
    agree(net.train(), fast.train(), x)  # what was kept from inference mode can take part in training


def test_fall_back_where_functions_are_transformed():
    net, fast = twins("s3", dtype=torch.float32)
    x = images(2, 2, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16): assert cell_plans(fast, x, fast.weights()) is None and torch.equal(net(x), fast(x))
    tangent = torch.ones_like(x)
    for one in (net.eval(), fast.eval()): assert torch.func.jvp(lambda x: one(x), (x,), (tangent,))[1].shape == (2, 3)
    grads = [torch.func.grad(lambda x: one(x).sum())(x) for one in (net, fast)]
    assert torch.equal(*grads)
    exact = torch.func.functional_call(fast, {"classifier.bias": torch.ones(3)}, (x,))
    torch.testing.assert_close(exact, net(x) - net.classifier.bias + 1)
    with pytest.raises(ShapeError): fast(x[0])


def test_drop_path_takes_the_plain_path():
    net, fast = twins()
    net.drop_path_prob = fast.drop_path_prob = 0.5
    torch.manual_seed(0)
    wanted = net(images(2, 2, 8, 8))
    torch.manual_seed(0)
    assert torch.equal(wanted, fast(images(2, 2, 8, 8)))


def test_gradients_of_gradients():
    found = []
    for net in twins():
        x = images(2, 2, 8, 8).requires_grad_()
        everything = [x, *learned(net)]
        first = torch.autograd.grad(F.cross_entropy(net(x), torch.tensor([0, 1])), everything, create_graph=True)
        second = torch.autograd.grad(sum((g ** 2).sum() for g in first), everything, materialize_grads=True)
        found.append([*first, *second])
    for a, b in zip(*found): assert (a - b).abs().max() <= 1e-9 * max(1, a.abs().max())


@pytest.mark.parametrize("space", ["darts", "s4"])
def test_exact_order_and_eigenvalue(space):
    found = []
    for net in twins(space):
        optimizer = make_optimizer(net, "sgd", lr=0.025, momentum=0.9, nesterov=False, weight_decay=3e-4)
        batches = [(images(3, 2, 8, 8, seed=k), torch.tensor([0, 1, 2])) for k in (1, 2)]
        torch.manual_seed(4)
        orders = [gradients.first_order(net, batches[0], F.cross_entropy).gradients]
        orders += [gradients.second_order(net, *batches, F.cross_entropy, optimizer, exact=exact).gradients for exact in (False, True)]
        value = stopping.dominant_eigenvalue(net, batches[1], F.cross_entropy)
        found.append(([g for order in orders for g in order], value, [p.requires_grad for p in net.parameters()]))
    (grads, value, _), (grads2, value2, learns) = found
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(grads, grads2)) and abs(value - value2) < 1e-9 * max(1, abs(value)) and all(learns)


def test_threads_do_not_disturb_each_other():
    nets, results = [twins("s3", seed=k) for k in range(3)], {}
    def work(k):
        for _ in range(3): results[k] = answers(nets[k][1].eval(), images(2, 2, 8, 8))
    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    for k in range(3): assert (results[k][0] - nets[k][0].eval()(images(2, 2, 8, 8))).abs().max() < 1e-9


def test_groups_of_one_channel():
    x, w = images(2, 3, 4, 4), images(3, 1, 1, 1)
    torch.testing.assert_close(pointwise(x, w, 3), F.conv2d(x, w, groups=3))


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_of_the_supernet", Path(__file__).parents[1] / "benchmarks" / "supernet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, size in (("A", (1, 5, 2, 4)), ("B", (2, 3, 3, 8))): monkeypatch.setitem(module.CONFIGURATIONS, name, size)  # calls do not depend on size
    return module


def test_the_benchmark_compares_what_it_says(benchmark):
    reference = benchmark.Reference(*benchmark.scene("A"))
    seen, queue = set(), [reference.loss(reference.net, reference.train).grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen: continue
        seen.add(node)
        queue += [following for following, _ in node.next_functions]
    nodes = sum(node.name() == "ConvolutionBackward0" for node in seen)
    assert 2 * nodes == benchmark.CALLS["A"] == 1770, "the weight step and the first-order step each go through all of them"
    net, train, valid = benchmark.scene("B")
    net, train, valid = net.double(), *((x.double(), y) for x, y in (train, valid))
    assert torch.equal(benchmark.plain_forward(net, train[0]), net(train[0]))
    both = benchmark.Reference(net, train, valid), benchmark.Ours(copy.deepcopy(net), train, valid)
    for step in ("weights", "first", "unrolled"):
        for one in both: getattr(one, step)()
    mine = both[1].searches["first"].supernet
    for a, b in zip(learned(net), learned(mine)): assert (a - b).abs().max() < 1e-9
    for a, b in zip(net.buffers(), mine.buffers()): assert (a - b).abs().max() < 1e-9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("space", ["darts", "s1", "s4"])
def test_on_cuda(space):
    options = {"nodes": 4} if space == "s1" else {}
    net, fast = (one.cuda() for one in twins(space, **options))
    for x in (images(3, 2, 8, 8).cuda(), images(3, 2, 20, 20).cuda()):
        for training in (True, False):
            found = []
            for one in (net.train(training), fast.train(training)):
                torch.manual_seed(2)
                y = one(x)
                loss = F.cross_entropy(y, torch.tensor([0, 1, 2]).cuda())
                found.append([y, *torch.autograd.grad(loss, learned(one), materialize_grads=True), *one.buffers()])
            assert cell_plans(fast, x, fast.weights())
            for a, b in zip(*found): assert (a - b).abs().max() <= 1e-9 * max(1, a.abs().max())
