"""Training across notebooks: the public face, real networks on real data, and what a step must not do."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsedarts as sd


@pytest.fixture(scope="module")
def digits():
    return sd.load_data("digits")


def test_resnet20_learns_digits(digits):
    torch.manual_seed(0)
    model = sd.resnet(20, in_channels=1)
    model.stages[0].eval()
    before = sd.evaluate(model, digits)
    result = sd.train(model, digits.merged(), epochs=4, evaluate_every=1)
    assert before["accuracy"] < 25 and result.metrics["test_accuracy"] > 50
    assert sd.evaluate(model, digits)["accuracy"] == pytest.approx(result.metrics["test_accuracy"], abs=0.12)
    assert model.training and not model.stages[0].training and not model.stages[0][0].bn1.training
    assert len(result.history) == 4 and result.history["test_accuracy"].notna().all()


def test_vgg_takes_one_step_where_images_are_large_enough(digits):
    with pytest.raises(sd.core.ShapeError, match="at least 32x32, got 8x8"):
        sd.train(sd.vgg(11, in_channels=1, width=0.1), digits, steps=1)
    large = sd.load_data("digits", size=32)
    result = sd.train(sd.vgg(11, in_channels=1, width=0.1), large, steps=1, batch_size=8, evaluate_on=())
    assert result.metrics["step"] == 1 and "test_accuracy" not in result.metrics


def test_same_seed_same_bits(digits):
    def state(seed):
        torch.manual_seed(0)
        model = sd.resnet(8, in_channels=1, width=0.25)
        return sd.train(model, digits, steps=15, seed=seed, label_smoothing=0.1).model.state_dict()
    one, same, other = state(3), state(3), state(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


class Reads(TorchDispatchMode):
    "Counts how often a number is read from a tensor (`.item()`, `if tensor`): on an accelerator each is a wait."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_a_number(digits):
    def reads(steps):
        torch.manual_seed(0)
        model = sd.resnet(8, in_channels=1, width=0.25)
        with Reads() as mode: sd.train(model, digits, steps=steps, clip=1.0, evaluate_on=(), progress=False)
        return mode.count
    assert len(digits.train) // 64 == 7, "both runs must end inside one epoch's steps"
    assert 0 < reads(6) == reads(3)


def test_gradients_that_a_phase_before_left_do_not_count_in_the_norm():
    "A frozen parameter may still hold a gradient; clipping must not see it, or phases in one process and phases one by one would differ."
    data, ends = sd.load_data("digits"), []
    for left in (False, True):
        torch.manual_seed(0)
        net = sd.resnet(8, 10, width=0.25, in_channels=1)
        frozen = net.stem.conv.weight.requires_grad_(False)
        if left: frozen.grad = torch.full_like(frozen, 100.)
        sd.train(net, data, steps=2, lr=0.1, clip=0.5, seed=0, progress=False)
        ends.append({name: value.clone() for name, value in net.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
