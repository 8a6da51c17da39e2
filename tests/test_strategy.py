"""Searches: gradients for architectures, the order of steps, exact resume, stopping, random search."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedarts.core import CheckpointError, NumericalError, ParameterError, SparseDartsError, expect_error
from sparsedarts.data.loading import load_data
from sparsedarts.space.darts import supernet
from sparsedarts.strategy import bilevel, gradients, sampling, search as searching, setup, stopping
from sparsedarts.training.optim import make_optimizer


@pytest.fixture(scope="module")
def data(): return load_data("digits")


def tiny(space="s3", seed=0, **options):
    torch.manual_seed(seed)
    return supernet(space, **{"channels": 2, "layers": 3, "in_channels": 1, "nodes": 2, "alpha_scale": 0.3, **options})


def scene(space="s3", seed=0, steps=1, **options):
    "Supernet in float64, its optimiser after some steps, two batches."
    net = tiny(space, seed, **options).double()
    optimizer = make_optimizer(net, "sgd", lr=0.025, momentum=0.9, nesterov=False, weight_decay=3e-4)
    batches = [(torch.randn(6, 1, 8, 8).double(), torch.randint(10, (6,))) for _ in range(2)]
    for _ in range(steps):
        F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        for tensor in (*net.parameters(), *net.alphas.values()): tensor.grad = None
    return net, optimizer, *batches


def by_second_network(net, optimizer, train_batch, arch_batch, epsilon=0.01):
    "Second order with a deep copy, written as the formulas stand."
    def loss(of, batch): return F.cross_entropy(of(batch[0]), batch[1])
    weights, group = list(net.parameters()), optimizer.param_groups[0]
    g = torch.autograd.grad(loss(net, train_batch), weights, allow_unused=True)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for mine, its, d in zip(weights, other.parameters(), g):
            buffer = optimizer.state[mine].get("momentum_buffer") if mine in optimizer.state else None
            its -= group["lr"] * ((0 if buffer is None else group["momentum"] * buffer) + d + group["weight_decay"] * mine)
    count = len(other.alphas)
    both = torch.autograd.grad(loss(other, arch_batch), [*other.alphas.values(), *other.parameters()])
    v = both[count:]
    size = epsilon / math.sqrt(sum((x ** 2).sum().item() for x in v))
    def beside(sign):
        held = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, x in zip(weights, v): w += sign * size * x
        found = torch.autograd.grad(loss(net, train_batch), list(net.alphas.values()))
        with torch.no_grad():
            for w, x in zip(weights, held): w.copy_(x)
        return found
    return [d - group["lr"] * (p - m) / (2 * size) for d, p, m in zip(both, beside(1), beside(-1))]


def gap(first, second): return max((a - b).abs().max().item() for a, b in zip(first, second))


@pytest.mark.parametrize("space,steps,options", [("s3", 0, {}), ("s3", 2, {}), ("s4", 1, {}), ("fpdarts", 1, {}),
                                                 ("s2", 1, {"layer_type": "masked"})])
def test_second_order_equals_a_second_network(space, steps, options):
    net, optimizer, train_batch, arch_batch = scene(space, steps=steps, **options)
    if space == "s2": net.drop_path_prob = 0.3  # random numbers are drawn in the same order
    twin = copy.deepcopy((net, optimizer))
    weights, state = [p.detach().clone() for p in net.parameters()], copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(7)
    wanted = by_second_network(*twin, train_batch, arch_batch)
    torch.manual_seed(7)
    found = gradients.second_order(net, train_batch, arch_batch, F.cross_entropy, optimizer)
    assert gap(found.gradients, wanted) < 1e-10 and max(g.abs().max() for g in wanted) > 1e-4
    assert max((a.double() - b.double()).abs().max() for a, b in zip(net.buffers(), twin[0].buffers())) < 1e-12
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(net.parameters(), weights))
    for key, entry in state["state"].items(): assert torch.equal(entry["momentum_buffer"], optimizer.state_dict()["state"][key]["momentum_buffer"])


def test_second_order_is_the_total_derivative():
    "Move one alpha, take the virtual step anew, look at the validation loss."
    net, optimizer, train_batch, arch_batch = scene()
    exact = gradients.second_order(net, train_batch, arch_batch, F.cross_entropy, optimizer, exact=True).gradients
    first = gradients.first_order(net, arch_batch, F.cross_entropy).gradients
    h, values = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy((net, optimizer))
        with torch.no_grad(): moved[0].alphas["reduce"][4, 2] += sign * h
        g = torch.autograd.grad(F.cross_entropy(moved[0](train_batch[0]), train_batch[1]), list(moved[0].parameters()))
        gradients.virtual_step(moved[1], g)
        values.append(F.cross_entropy(moved[0](arch_batch[0]), arch_batch[1]).item())
    slope = (values[0] - values[1]) / (2 * h)
    assert abs(slope - exact[1][4, 2].item()) < 1e-6 * abs(slope) + 1e-9
    assert gap(first, exact) > 1e-4


def test_a_failing_loss_leaves_weights_and_buffers():
    net, optimizer, train_batch, arch_batch = scene()
    weights, calls = [p.detach().clone() for p in net.parameters()], []
    for failing in (2, 3, 4):
        def loss(logits, y):
            calls.append(1)
            if len(calls) == failing: raise RuntimeError("no")
            return F.cross_entropy(logits, y)
        calls.clear()
        with pytest.raises(RuntimeError): gradients.second_order(net, train_batch, arch_batch, loss, optimizer)
        assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights))


def test_no_gradient_no_shift():
    "Where the validation loss does not depend on the weights, second order is first order."
    net, optimizer, train_batch, arch_batch = scene()
    def loss(logits, y): return F.cross_entropy(logits, y) if y is train_batch[1] else logits.sum() * 0
    found = gradients.second_order(net, train_batch, arch_batch, loss, optimizer, penalty=lambda net: net.alphas["normal"].sum())
    assert torch.equal(found.gradients[0], torch.ones(5, 3).double()) and found.gradients[1].abs().max() == 0


def test_frozen_weights_stay(data):
    net = tiny()
    for p in net.stem.parameters(): p.requires_grad_(False)
    before = [p.clone() for p in net.stem.parameters()]
    bilevel.Search(net, data, steps=2, order="second", batch_size=32, device="cpu", progress=False).run()
    assert all(torch.equal(p, b) and not p.requires_grad for p, b in zip(net.stem.parameters(), before))


def test_alphas_are_outside_weight_step_and_clip(data):
    "A huge alpha gradient does not scale the weights' step, and weight decay of the weights does not shrink alphas."
    search = bilevel.Search(tiny(), data, steps=3, arch_lr=0.0, weight_decay=0.5, lr=0.5, clip=1e-3, batch_size=32, device="cpu",
                            penalty=lambda net: 1e6 * net.alphas["normal"].sum())
    before = bilevel.alpha_values(search.supernet)
    weights = [p.detach().clone() for p in search.supernet.parameters()]
    search.step()
    assert all(torch.equal(a.detach(), before[name]) for name, a in search.supernet.alphas.items())
    assert not all(torch.equal(p, w) for p, w in zip(search.supernet.parameters(), weights))
    assert all(a.requires_grad for a in search.supernet.alphas.values())
    shift = torch.cat([((p - w + 0.25 * w) / 0.5).flatten() for p, w in zip(search.supernet.parameters(), weights)])  # -clipped gradient
    assert abs(shift.norm() - 1e-3) < 2e-5


def test_learning_rate_per_epoch(data):
    search = bilevel.Search(tiny("s2"), data, epochs=3, batch_size=360, device="cpu", progress=False, order="first")
    seen = []
    search.heard["before_step"].append(lambda s: seen.append(s.optimizer.param_groups[0]["lr"]))
    result = search.run()
    each = search.steps_per_epoch
    wanted = [0.001 + 0.012 * (1 + math.cos(math.pi * e / 3)) for e in range(3)]
    assert seen == pytest.approx([w for w in wanted for _ in range(each)], rel=1e-12) and list(result.history["lr"]) == pytest.approx(wanted)
    assert f"{setup.epoch_lr(49, 50):.6e}" == "1.023679e-03"


@pytest.mark.parametrize("order,interrupt", [("first", 5), ("second", 7)])
def test_resume_bit_for_bit(data, tmp_path, order, interrupt):
    options = dict(order=order, epochs=2, batch_size=120, device="cpu", progress=False, checkpoint_every=3, stop="darts-es")
    def start(name, seed): return bilevel.Search(tiny("s4", seed), data, **options, checkpoint=tmp_path / name)
    whole = start("whole", 1).run()
    part = start("part", 1)
    for _ in range(interrupt):
        part.step()
        if part.steps_done % 3 == 0: bilevel.save_search(part)
    again = start("part", 2)
    assert again.steps_done == interrupt // 3 * 3
    ended = again.run()
    states = whole.model.state_dict(), ended.model.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert whole.history.drop(columns="seconds").equals(ended.history.drop(columns="seconds")) and "eigenvalue" in whole.history
    assert all(np.array_equal(whole.trajectory[k], ended.trajectory[k]) for k in whole.trajectory) and whole.genotype == ended.genotype
    with pytest.raises(CheckpointError): bilevel.Search(tiny("s4"), data, **{**options, "seed": 3}, checkpoint=tmp_path / "part")
    assert start("whole", 5).done, "a finished search is finished when built again"


def test_callers_state_is_kept(data):
    net = tiny("s4").eval()
    search = bilevel.Search(net, data, steps=2, batch_size=32, device="cpu", progress=False, stop="darts-es")
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    search.run()
    assert torch.equal(before, torch.get_rng_state()) and (np.random.get_state()[1] == numbers).all() and not net.training
    def broken(logits, y): raise RuntimeError("no")
    failing = bilevel.Search(tiny(), data, steps=2, batch_size=32, device="cpu", loss=broken)
    after = torch.get_rng_state()
    with pytest.raises(RuntimeError): failing.step()
    assert torch.equal(after, torch.get_rng_state()) and failing.steps_done == 0
    assert all(a.requires_grad for a in failing.supernet.alphas.values())


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 200), portion=st.floats(0.01, 0.99), batch=st.integers(1, 64))
def test_halves_part_the_images(count, portion, batch):
    from sparsedarts.data.batches import Memory
    from sparsedarts.data.splits import Split
    from types import SimpleNamespace
    store = Memory(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    even = torch.arange(count) % 2 == 0
    make = lambda chosen: Split(store, chosen.nonzero().flatten(), (0.,), (1.,), {"pad": 0})
    data = SimpleNamespace(train=make(even), valid=make(~even))
    size = math.floor(portion * count)
    if not size:
        expect_error(lambda: setup.search_parts(data, portion), SparseDartsError, "leaves one half empty")
        return
    first, second = setup.search_parts(data, portion)
    assert first.indices.tolist() == list(range(size)) and second.indices.tolist() == list(range(size, count))
    steps = setup.search_batches(first, batch, False, 0, torch.device("cpu")).steps_per_epoch
    assert steps == (size // batch if size > batch and size % batch == 1 else -(-size // batch))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10 ** 6), size=st.integers(1, 20))
def test_lanczos_on_random_matrices(seed, size):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator).double()
    matrix = matrix + matrix.T
    found = stopping.lanczos(lambda v: matrix @ v, torch.randn(size, generator=generator).double(), tolerance=1e-10)
    wanted = torch.linalg.eigvalsh(matrix)
    assert abs(found[-1] - wanted[-1]) < 1e-6 * wanted.abs().max() and found[0] >= wanted[0] - 1e-8 * wanted.abs().max()


def test_eigenvalue_against_the_full_hessian():
    net, _, (x, y), _ = scene("s3", 3)
    names, sizes = list(net.alphas), [a.numel() for a in net.alphas.values()]
    def loss(flat): return F.cross_entropy(net(x, {n: part.view(5, 3).softmax(-1) for n, part in zip(names, flat.split(sizes))}), y)
    hessian = torch.autograd.functional.hessian(loss, torch.cat([a.detach().flatten() for a in net.alphas.values()]))
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    assert abs(stopping.dominant_eigenvalue(net, (x, y), F.cross_entropy, 0.25, tolerance=1e-8) - largest - 0.25) < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=40), st.floats(1.0, 3.0))
def test_darts_es_rule(values, ratio):
    "Against a window of averages over the whole list."
    rule, means = stopping.DartsES(ratio=ratio), [sum(values[k:k + 5]) / 5 for k in range(len(values) - 4)]
    for k, value in enumerate(values):
        found, wanted = rule.observe(2 * k, value), None
        if k >= 8 and means[k - 4] > ratio * means[k - 8] and 2 * k - 12 >= 10: wanted = 2 * k - 12
        assert found == wanted


def test_digits_search_learns(data):
    "A real search, small: its losses fall and its alphas move."
    torch.manual_seed(0)
    net = supernet("darts", channels=4, layers=3, in_channels=1, nodes=2)
    result = bilevel.Search(net, data, steps=20, batch_size=32, lr=0.1, arch_lr=3e-3, device="cpu", progress=False).run()
    history = result.history
    assert len(history) == math.ceil(20 / 15) and history["train_loss"].iloc[-1] < history["train_loss"].iloc[0] - 0.3
    assert history["arch_loss"].iloc[-1] < history["arch_loss"].iloc[0] - 0.2
    assert np.abs(result.trajectory["normal"][-1] - result.trajectory["normal"][0]).max() > 0.02
    assert history["entropy_normal"].iloc[-1] < history["entropy_normal"].iloc[0] <= math.log(8) + 1e-9
    assert len(result.genotype.normal) == 4


def test_diverging_alphas_are_refused(data):
    class Poison:
        def after_step(self, search): search.supernet.alphas["normal"].data.fill_(float("nan"))
    search = bilevel.Search(tiny(), data, steps=1, device="cpu", callbacks=(Poison(),))
    expect_error(search.step, NumericalError, "15 of 15 alphas of the normal cell are not finite after step 1")


def test_search_by_name(data):
    small = dict(channels=2, layers=3, nodes=2, batch_size=64, device="cpu")
    found = searching.search("darts", data, space="s2", steps=2, order="second", progress=False, arch_lr=0.1, **small)
    drawn = searching.search("random", data, space="s2", candidates=2, steps=2, **small)
    for result in (found, drawn):
        assert result.genotype and result.seconds > 0 and len(result.history) and repr(result).startswith("SearchResult(")
    assert set(searching.strategies) >= {"darts", "random"}
    expect_error(lambda: searching.search("random", data, space="s9", device="cpu"), ParameterError, "unknown search space 's9'")


def test_a_paper_registers_itself(data):
    @searching.strategies.register("as the first draw")
    def first_draw(data, space, seed): return sampling.SearchResult(sampling.candidate(sampling.random_genotype, 0, seed), [], 0.0)
    try: assert searching.search("as the first draw", data, seed=3).genotype == sampling.candidate(sampling.random_genotype, 0, 3)
    finally: searching.strategies._entries.pop("as the first draw")


def test_fast_path_gives_the_same_second_order():
    pytest.importorskip("sparsedarts.space.fast")
    found = []
    for path in ("plain", "fast"):
        net, optimizer, train_batch, arch_batch = scene("darts", 2)
        net.path = path
        found.append(gradients.second_order(net, train_batch, arch_batch, F.cross_entropy, optimizer).gradients)
    assert gap(*found) < 1e-9
