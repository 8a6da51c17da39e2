"""No result and no file holds a number that is none, whichever way it was made."""
import functools
import json
import math
import warnings

import pytest
import torch
from torch import nn

import sparsedarts as sd
from sparsedarts.core import CheckpointError, NumericalError, ParameterError, RunError, not_finite
from sparsedarts.files import load_checkpoint, read_results, save_checkpoint, write_results
from sparsedarts.training.calibration import recalibrate
from sparsedarts.training.checkpoints import checksum
from sparsedarts.training.recipes import edge_popup, hydra, movement, ramp
from sparsedarts.training.regimes import iterative_magnitude, rigl

QUIET = dict(progress=False, device="cpu")


@pytest.fixture(scope="module")
def data(): return sd.load_data("digits", classes=4)


def small_net(seed=0):
    torch.manual_seed(seed)
    return sd.resnet(8, width=0.25, in_channels=1, classes=4)


def spoiled(net, at, value=math.nan):
    "The gradient of the classifier is NaN in one step, as a broken kernel or memory cell would make it."
    count = [0]
    def hook(gradient):
        count[0] += 1
        return torch.full_like(gradient, value) if count[0] == at else gradient
    net.head.weight.register_hook(hook)
    return net


def bits(model): return checksum(*model.state_dict().values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_poisoned_step_is_no_result_and_its_file_is_not_written(data, tmp_path, value):
    whole = bits(sd.train(small_net(), data, steps=10, **QUIET).model)
    with pytest.raises(NumericalError, match="after step 10 of 10, the network: .*head.weight.* NaN or infinite"):
        sd.train(spoiled(small_net(), 10, value), data, steps=10, **QUIET)
    options = dict(steps=10, checkpoint=tmp_path / "run.pt", checkpoint_every=1, **QUIET)
    with pytest.raises(NumericalError, match=r"after step 10 of 10.*lower lr \(now 0.1\).*The good checkpoint of step 9 in .*run.pt is kept"):
        sd.train(spoiled(small_net(), 10, value), data, **options)
    assert load_checkpoint(tmp_path / "run.pt")["step"] == 9
    assert bits(sd.train(small_net(), data, **options).model) == whole, "a healthy start goes on and ends as if nothing had been"


def test_the_momentum_is_looked_at_too(data, tmp_path):
    "Weights that are finite beside a momentum that is not are NaN one step later."
    class Break:
        def after_step(self, run):
            if run.step == 4: run.optimizer.state[run.model.head.bias]["momentum_buffer"][0] = math.inf
    with pytest.raises(NumericalError, match="the optimiser's head.bias.momentum_buffer.*step 3"):
        sd.train(small_net(), data, steps=6, callbacks=(Break(),), checkpoint=tmp_path / "run.pt", checkpoint_every=1, **QUIET)


@pytest.mark.parametrize("lr", [1e19, 3e38, 1e8])
@pytest.mark.parametrize("measured", [("test",), ()])
def test_an_absurd_rate_ends_in_finite_numbers_or_an_error(data, lr, measured):
    net = small_net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try: result = sd.train(net, data, steps=1, lr=lr, evaluate_on=measured, **QUIET)
        except NumericalError as error: assert "NaN" in str(error) or "nan" in str(error) or "inf" in str(error)
        else:
            assert not not_finite(dict(net.state_dict())) and not not_finite(result.metrics)
            if measured and result.metrics["test_loss"] > 1e4: assert any("the network has diverged" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("place", ["head.weight", "stages.0.0.conv1.weight", "stem.1.running_var", "stem.1.running_mean"])
def test_evaluate_refuses_what_is_no_loss(data, place):
    net = small_net()
    names = dict(net.named_parameters()) | dict(net.named_buffers())
    if place not in names: place = next(name for name in names if name.endswith(place.rpartition(".")[2]))
    names[place].data.view(-1)[0] = math.nan
    with pytest.raises(NumericalError, match="the mean loss on .* images is nan: 1 of"): sd.evaluate(net, data)
    with pytest.raises(NumericalError, match="before its training"): sd.train(net, data, steps=1, **QUIET)


def test_infinity_on_purpose_is_allowed(data, tmp_path):
    "An attention window is a buffer of minus infinity."
    net = small_net()
    net.register_buffer("window", torch.full((4, 4), -math.inf).triu(1))
    options = dict(checkpoint=tmp_path / "run.pt", checkpoint_every=1, **QUIET)
    assert sd.train(net, data, steps=2, **options).metrics["step"] == 2
    assert sd.train(net, data, steps=2, **options).metrics["step"] == 2, "and read again"


def test_a_poisoned_file_of_an_earlier_version_says_so(data, tmp_path):
    options = dict(steps=4, checkpoint=tmp_path / "run.pt", checkpoint_every=2, **QUIET)
    sd.train(small_net(), data, **options)
    state = load_checkpoint(tmp_path / "run.pt")
    state["parts"]["model"]["head.weight"].fill_(math.nan)
    save_checkpoint(tmp_path / "run.pt", state)
    net = small_net()
    before = bits(net)
    with pytest.raises(CheckpointError, match="run.pt, saved after step 4: .*head.weight.*delete it to start again"): sd.train(net, data, **options)
    assert bits(net) == before


def infinite_at(step):
    class Break:
        def after_step(self, run):
            if run.step == step: next(p for p in run.model.parameters() if p.dim() > 1 and p.requires_grad).data.view(-1)[0] = math.inf
    return Break()


RECIPES = {
    "ramp": functools.partial(ramp, sparsity=0.5, steps=3), "rigl": functools.partial(rigl, sparsity=0.5, steps=3, every=1),
    "iterative": functools.partial(iterative_magnitude, sparsity=0.4, rate=0.4, steps=3),
    "hydra": functools.partial(hydra, keep=0.5, pretrain_epochs=1, prune_epochs=1, finetune_epochs=1),
    "edge-popup": functools.partial(edge_popup, keep=0.5, epochs=1), "movement": functools.partial(movement, sparsity=0.5, epochs=1),
}


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_returns_what_is_not_finite(data, name):
    with pytest.raises(NumericalError): RECIPES[name](small_net(), data, batch_size=32, callbacks=(infinite_at(3),), **QUIET)


def test_nothing_is_written_of_a_network_that_is_not_finite(tmp_path):
    from sparsedarts.sparse.packed import save_packed
    from sparsedarts.strategy.found import save_stage
    from sparsedarts.training.recipes import write_dense
    net = small_net()
    net.head.bias.data[1] = math.inf
    for save in (lambda: save_packed(net, tmp_path / "packed"), lambda: write_dense(tmp_path / "dense.pt", net),
                 lambda: save_stage(tmp_path / "stage.pt", net, "pretrain", {})):
        with pytest.raises(NumericalError, match="1 of 4 values of head.bias are NaN or infinite"): save()
    assert not list(tmp_path.iterdir())


def test_no_retraining_and_no_calibration(data):
    with pytest.raises(NumericalError): sd.retrain("DARTS_V2", data, "laptop", epochs=1, channels=2, layers=3, batch_size=200, callbacks=(infinite_at(1),), **QUIET)
    net = small_net()
    before = bits(net)
    net.stem[0].weight.data.mul_(1e30) if isinstance(net.stem, nn.Sequential) else next(net.parameters()).data.mul_(1e30)
    poisoned = bits(net)
    with pytest.raises(NumericalError, match="the old ones are back"): recalibrate(net, data)
    assert bits(net) == poisoned != before


class Late:
    "The supernet's weights become infinite after the losses of a step are known."
    def after_step(self, search):
        step = getattr(search, "steps_done", None) or getattr(search, "step", 0)
        model = getattr(search, "supernet", None) or search.model
        if step == 2: next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = math.inf


SEARCHES = {
    "darts": dict(channels=2, layers=3, nodes=2, batch_size=64, steps=2),
    "dass": dict(channels=2, layers=3, nodes=2, batch_size=50, pretrain_epochs=1, prune_epochs=0, finetune_epochs=0, order="first"),
    "random": dict(channels=2, layers=3, candidates=2, batch_size=64, steps=2),
}


@pytest.mark.parametrize("strategy", SEARCHES)
def test_no_search_returns_or_saves_what_is_not_finite(data, tmp_path, strategy):
    options = SEARCHES[strategy] | dict(callbacks=(Late(),), **QUIET)
    with pytest.raises(NumericalError, match="candidate 0, " if strategy == "random" else "the supernet: 1 of|loss became nan"):
        sd.search(strategy, data, checkpoint=tmp_path / "search", **options)
    states = [load_checkpoint(path) for path in tmp_path.rglob("*.pt")] + [load_checkpoint(path) for path in tmp_path.glob("search") if path.is_file()]
    assert not any(not_finite(state.get("parts", {}).get("model", {})) for state in states)


# records of runs and trials

@pytest.mark.parametrize("metrics", [dict(accuracy=math.nan), dict(best=dict(loss=[1.0, math.inf])), dict(x=torch.tensor([math.nan])), dict(x=-math.inf)])
def test_a_record_without_a_number_is_refused(tmp_path, metrics):
    with pytest.raises(NumericalError, match="the metrics of a run: .* NaN or infinite; give None where there is no value"):
        write_results(tmp_path, paper="toy", parameters={}, metrics=metrics)
    assert not list(tmp_path.iterdir())
    write_results(tmp_path, paper="toy", parameters={}, metrics=dict(accuracy=None))
    assert read_results(tmp_path)["metrics"] == dict(accuracy=None)


def test_a_record_lists_only_figures_of_its_folder(tmp_path):
    for name in ("../x.png", "/x.png", ""):
        with pytest.raises(ParameterError, match="is not a file inside"): write_results(tmp_path, paper="toy", parameters={}, metrics={}, figures=[name])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ParameterError, match="'link.png' is not a file inside"): write_results(tmp_path / "run", paper="toy", parameters={}, metrics={}, figures=["link.png"])


def test_a_trial_that_diverged_is_a_failure(tmp_path):
    from sparsedarts.reporting.trials import Trials
    def trial(seed): return dict(accuracy=math.nan if seed == 1 else 50.0)
    with pytest.raises(RunError, match="1 of 3 trials failed; the first, seed=1: NumericalError: the result of the trial: accuracy is NaN"):
        Trials(tmp_path, echo=lambda line: None).map(trial, [dict(seed=s) for s in range(3)], workers=1)
    assert len([path for path in (tmp_path / "trials").glob("*.json") if json.loads(path.read_text()).get("result")]) == 2


def test_masks_are_zeros_and_ones(tmp_path):
    for bad in (torch.tensor([0.5, 1]), torch.tensor([math.nan, 1]), torch.tensor([math.inf, 1]), torch.tensor([2, 1]), torch.tensor([-1, 1])):
        with pytest.raises(ParameterError, match="mask of 'w'"): sd.Masks({"w": bad})
    path = sd.Masks({"w": torch.ones(3, 2)}).save(tmp_path / "m.safetensors")
    layer = nn.Module()
    layer.w = nn.Linear(2, 4, bias=False)
    with pytest.raises((ParameterError, sd.core.ShapeError)): sd.apply_masks(nn.Sequential(layer.w), {"0.weight": sd.Masks.load(path)["w"]})
