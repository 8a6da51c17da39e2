"""Every kind of layer that carries masks, in both modes, through everything a mask goes through; what has none is named once; scores agree between processes."""
import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import sparsedarts as sd
from sparsedarts.core import ParameterError, count_kept
from sparsedarts.pruning.ablations import random_masks, shuffle
from sparsedarts.pruning.diagnosis import diagnose, effective
from sparsedarts.pruning.scored import from_scored, scored_masks, to_scored
from sparsedarts.sparse.kinds import DenseWarning, by_unit, maskable_weights, unit_shape
from sparsedarts.sparse.layers import masked_layers
from sparsedarts.sparse.norms import norms_after, silence


class Attends(nn.Module):
    "Self-attention, then attention to something of other sizes, then the mean."
    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

    def forward(self, x):
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.other(x, x[..., :4], x[..., :6])[0].mean(1)


def vit():
    "A small transformer for 16 patches of 12 numbers."
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(12, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64, 4))


KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)), (12,)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.Tanh(), nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular"), nn.Flatten()), (4, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3, stride=2), nn.Flatten()), (3, 9, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.Tanh(), nn.Conv3d(4, 3, 2, dilation=2), nn.Flatten()), (2, 5, 5, 5)),
    "transposed1d": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Tanh(), nn.ConvTranspose1d(6, 3, 2, stride=2, output_padding=1)), (4, 5)),
    "transposed2d": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(6, 3, 2, dilation=2)), (4, 5, 5)),
    "transposed3d": (lambda: nn.Sequential(nn.ConvTranspose3d(4, 4, 2), nn.Tanh(), nn.ConvTranspose3d(4, 2, 2)), (4, 3, 3, 3)),
    "attention": (Attends, (5, 8)),
    "transformer": (vit, (4, 12)),
}
CASES = [pytest.param(kind, mode, id=f"{kind}-{mode}") for kind in KINDS for mode in ("soft", "hard")]


def made(kind, seed=0):
    "A network of this kind and a batch for it."
    torch.manual_seed(seed)
    build, shape = KINDS[kind]
    return build(), torch.randn(6, *shape)


def pruned(kind, mode, sparsity=0.5, **options):
    net, x = made(kind)
    masks = sd.prune(net, sparsity, mode=mode, **options)
    return net, x, masks


def leaks(net):
    "Removed weights of hard layers that are not zero."
    return sum(int(layer.weight[layer.mask == 0].count_nonzero()) for layer in masked_layers(net).values() if layer.mode == "hard")


@pytest.mark.parametrize("kind, mode", CASES)
def test_count_training_state_and_copies(kind, mode):
    net, x, masks = pruned(kind, mode)
    assert masks.kept == count_kept(masks.total, "0.5") and masks.total == sum(w.numel() for w in maskable_weights(net).values())
    assert list(net.state_dict()) == list(made(kind)[0].state_dict())
    plain = sd.densify(copy.deepcopy(net))
    assert {type(module) for module in plain.modules()} == {type(module) for module in made(kind)[0].modules()}
    for training in (True, False):
        torch.testing.assert_close(net.train(training)(x), plain.train(training)(x), atol=1e-5, rtol=1e-4)
        with torch.no_grad(): torch.testing.assert_close(net(x), plain(x), atol=1e-5, rtol=1e-4)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    if mode == "hard": sd.hold(net, optimizer)
    before = {name: layer.weight.detach().clone() for name, layer in masked_layers(net).items()}
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        assert not any(bool(layer.weight.grad[layer.mask == 0].any()) for layer in masked_layers(net).values())
        optimizer.step()
    assert leaks(net) == 0 and sd.masks_of(net) == masks
    assert all((layer.weight != before[name])[layer.mask == 1].any() for name, layer in masked_layers(net).items() if layer.mask.any())
    fresh = sd.apply_masks(made(kind, 1)[0], masks, mode)
    fresh.load_state_dict(net.state_dict(), strict=True)
    twin = copy.deepcopy(net)
    for other in (fresh, twin):
        assert torch.equal(other.train()(x), net.train()(x)) and sd.masks_of(other) == masks and leaks(other) == 0


@pytest.mark.parametrize("kind, mode", CASES)
def test_compile_export_trace_and_fx(kind, mode):
    net, x, masks = pruned(kind, mode)
    expected = net(x)
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)
    compiled(x).square().mean().backward()
    gradients = {name: layer.weight.grad.clone() for name, layer in masked_layers(net).items()}
    net.zero_grad()
    net(x).square().mean().backward()
    for name, layer in masked_layers(net).items(): torch.testing.assert_close(gradients[name], layer.weight.grad, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
    net.eval()
    with torch.no_grad(): expected = net(x)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.trace(net, x)(x), expected, atol=1e-5, rtol=1e-4)
    if kind == "transformer": return  # torch.fx cannot write a program of PyTorch's encoders, masked or not, unless it leaves them whole
    program = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(program(x), expected, atol=1e-5, rtol=1e-4)
    net.zero_grad()
    program(x).square().mean().backward()   # the program has the same parameters: removed weights learn nothing there either
    assert not any(bool(layer.weight.grad[layer.mask == 0].any()) for layer in masked_layers(net).values())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "taylor-unit", "fpgm", "force", "obd"])
def test_scores(kind, score):
    "Scores of every kind are finite, of the weight's shape, and those of units are the same within a unit."
    net, x = made(kind)
    data = (x, torch.arange(len(x)) % 2)
    if score == "synflow": data = KINDS[kind][1]
    elif score != "fpgm": data = sd.Examples([data], loss=lambda output, y: F.cross_entropy(output.flatten(1), y))
    masks = sd.prune(net, 0.5, score, data=data, granularity="unit" if score in ("taylor-unit", "fpgm") else "weight")
    if score not in ("taylor-unit", "fpgm"): assert masks.kept == count_kept(masks.total, "0.5")
    else: assert all(by_unit(layer.mask, layer).flatten(1).float().std(1).eq(0).all() for layer in masked_layers(net).values())


@pytest.mark.parametrize("kind", ["transposed1d", "transposed2d", "transposed3d"])
@pytest.mark.parametrize("granularity", ["unit", "channel", "kernel", "block", "1:2"])
def test_transposed_units_are_outputs(kind, granularity):
    "Granularities of a transposed convolution are those of the convolution with the same weights, outputs first."
    net, x, masks = pruned(kind, "hard", granularity=granularity)
    twins = nn.ModuleDict({str(i): nn.Linear(1, 1) for i in (0, 2)})
    source = made(kind)[0]
    for i in (0, 2):
        shape, rank = unit_shape(source[i]), len(source[i].kernel_size)
        twins[str(i)] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](shape[1] * source[i].groups, shape[0], shape[2:], groups=source[i].groups, bias=False)
        with torch.no_grad(): twins[str(i)].weight.copy_(by_unit(source[i].weight, source[i]))
    expected = sd.prune(twins, 0.5, granularity=granularity)
    assert all(torch.equal(by_unit(masks[name], net[int(name[0])]), mask) for name, mask in expected.items())
    if granularity == "unit":
        for layer in (net[0], net[2]):
            gone = by_unit(layer.mask, layer).flatten(1).eq(0).all(1)
            put_out = nn.Module.__call__(layer, torch.randn(2, layer.in_channels, *[4] * len(layer.kernel_size))) - layer.bias.view(-1, *[1] * len(layer.kernel_size))
            assert torch.equal(put_out.transpose(0, 1).flatten(1).eq(0).all(1), gone)


def test_transposed_elsewhere():
    "Shuffles within units, unit-local allocation, wanda, silent units, effective paths: all of them mean output units."
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=True), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten())
    x = torch.randn(4, 4, 4, 4)
    assert norms_after(net, x)["0.weight"] == "1"
    masks = sd.prune(net, 0.5, allocation="unit-local")
    counts = by_unit(masks["0.weight"], net[0]).flatten(1).sum(1)
    assert int(counts.max() - counts.min()) <= 1
    mixed = shuffle(masks, within="unit", layers=masked_layers(net))
    assert torch.equal(by_unit(mixed["0.weight"], net[0]).flatten(1).sum(1), counts) and mixed != masks
    assert random_masks(net, 0.5).kept == masks.kept
    net = sd.densify(net)
    data = sd.Examples([(x, torch.arange(4) % 2)], loss=lambda output, y: output.square().mean())
    sd.prune(net, 0.5, "wanda", data=data)
    cut = copy.deepcopy(net[0].mask)
    by_unit(cut, net[0])
    cut.view(2, 2, 3, 3, 3)[0, :, 1] = 0        # output 1, of the first group
    sd.apply_masks(net, {"0.weight": cut})
    assert silence(net, {"0.weight": cut}, x)["0.weight"].tolist() == [False, True, False, False, False, False]
    with torch.no_grad(): assert not net.eval()[:3](x)[:, 1].any()
    assert not by_unit(effective(net, (4, 4, 4))["0.weight"], net[0])[1].any()


def test_attention_in_reports():
    "What lies on a path through an attention; a head without values is dead; an attention without output projection cuts."
    net, x, masks = pruned("attention", "hard")
    found = diagnose(net, (5, 8))
    assert {row["layer"] for row in found.rows} == set(masks) and found.connected and found.total("kept") == masks.kept
    in_proj = masks["own.in_proj_weight"].clone()
    in_proj[16:20] = 0                          # the values of the first head
    sd.apply_masks(net, {"own.in_proj_weight": in_proj})
    assert effective(net, (5, 8))["own.out_proj.weight"].sum() <= masks["own.out_proj.weight"].sum()
    blocked = sd.apply_masks(nn.Sequential(Attends(), nn.Linear(8, 2)), {"0.other.out_proj.weight": torch.zeros(8, 8)}, "hard")
    report = diagnose(blocked, (5, 8))
    assert not report.connected and report.cut == ("0.other.out_proj.weight",)
    net = nn.Sequential(net, nn.Linear(8, 2))
    small = sd.compact(net, x)
    with torch.no_grad(): torch.testing.assert_close(small.eval()(x), net.eval()(x), atol=1e-5, rtol=1e-4)


def test_wanda_refuses_projections():
    net, x = made("attention")
    with pytest.raises(ParameterError, match=r"'own.in_proj_weight'\): use another score, or exclude=\['other', 'own'\]"):
        sd.prune(net, 0.5, "wanda", data=(x, torch.arange(len(x)) % 2))
    assert not masked_layers(net) and type(net.own) is nn.MultiheadAttention


def test_soft_masks_in_fused_kernels():
    "Inference of attention and encoders, with padding too, honours soft masks; hard masks keep the fused kernel."
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    sd.prune(encoder, 0.5, mode="soft")
    plain = sd.densify(copy.deepcopy(encoder))
    for mask in (None, hidden):
        for net in (encoder, plain): net.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = [net(x, src_key_padding_mask=mask) for net in (encoder, plain)]
        torch.testing.assert_close(outputs[0][1, :3], outputs[1][1, :3], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=1e-5, rtol=1e-4)
    masked = masked_layers(encoder)["layers.1.linear1.weight"]
    for path in encoder.layers: path.linear1.mode = path.linear2.mode = path.self_attn.mode = path.self_attn.out_proj.mode = "hard"
    assert encoder.layers[0].activation_relu_or_gelu and encoder.use_nested_tensor
    masked.mode = "soft"                        # by hand, and seen at once
    assert not encoder.layers[1].activation_relu_or_gelu and not encoder.use_nested_tensor and encoder.layers[0].activation_relu_or_gelu
    own = to_scored(copy.deepcopy(layer), keep="0.5", exclude="self_attn").eval()
    with torch.no_grad(): torch.testing.assert_close(own(x), from_scored(copy.deepcopy(own), "plain")(x), atol=1e-5, rtol=1e-4)


def told(call):
    "What a call warns about dense layers."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, DenseWarning)], [one.filename for one in caught if issubclass(one.category, DenseWarning)]


class Doubled(nn.Linear):
    def forward(self, input): return 2 * super().forward(input)


class Quiet(nn.Linear): "A subclass with the forward of its parent."


ODD = {"lstm": lambda: nn.LSTM(8, 8), "gru": lambda: nn.GRU(8, 8), "rnn": lambda: nn.RNN(8, 8), "embedding": lambda: nn.Embedding(30, 8),
       "bilinear": lambda: nn.Bilinear(4, 4, 4), "weight_norm": lambda: weight_norm(nn.Linear(8, 8)), "spectral_norm": lambda: spectral_norm(nn.Linear(8, 8)),
       "hooked": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "subclass": lambda: Doubled(8, 8), "quiet": lambda: Quiet(8, 8)}


@pytest.mark.parametrize("kind", list(ODD))
def test_what_stays_dense_is_named_once(kind):
    def net(): return nn.ModuleDict({"odd": ODD[kind](), "head": nn.Linear(8, 4), "norm": nn.LayerNorm((4, 4)), "act": nn.PReLU(4)})
    def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.1)
    calls = {"sparsify": lambda model, **o: sd.sparsify(model, **o), "prune": lambda model, **o: sd.prune(model, 0.5, **o),
             "Pruner": lambda model, **o: sd.Pruner(model, sgd(model), 0.5, steps=10, **o), "hard": lambda model, **o: sd.Pruner(model, sgd(model), 0.5, steps=10, mode="hard", **o),
             "DynamicPruner": lambda model, **o: sd.DynamicPruner(model, sgd(model), 0.5, steps=100, every=10, **o), "to_scored": lambda model, **o: to_scored(model, keep=0.5, **o)}
    for name, call in calls.items():
        model = net()
        texts, files = told(lambda: call(model))
        assert len(texts) == 1 and "odd (" in texts[0] and "norm" not in texts[0].replace("weight_norm", "").partition(";")[0] and "%" in texts[0], name
        assert files == [__file__], name
        assert told(lambda: call(net(), exclude="odd"))[0] == [], name
    model = net()
    sd.prune(model, 0.5, exclude="odd")
    assert list(masked_layers(model)) == ["head.weight"]


def test_no_word_where_nothing_is_left():
    for build in (lambda: sd.resnet(8, classes=4), vit, Attends): assert told(lambda: sd.prune(build(), 0.5))[0] == []
    assert told(lambda: sd.prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 0.5, exclude="1"))[0] == []


def test_faults_of_skipped_layers():
    "Convolutions in one dimension count; the share of the whole network stands beside the pruned layers'."
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    masks = sd.prune(net, 0.9)
    assert list(masks) == ["0.weight", "1.weight", "3.weight"] and masks.kept == count_kept(48 + 192 + 128, "0.9")
    alone = sd.prune(nn.Sequential(nn.Conv1d(2, 8, 3), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)), 0.9, exclude=nn.Conv1d)
    assert repr(alone) == "Masks: 13 of 128 weights kept in 1 layer, density 0.1016; whole network 273 of 388 parameters (0.7036)"
    model = vit()
    masks = sd.prune(model, "0.9")
    kept = sum(int(p.count_nonzero()) for name, p in model.named_parameters() if name in masks) + sum(p.numel() for n, p in model.named_parameters() if n not in masks)
    assert masks.whole == (kept, sum(p.numel() for p in model.parameters())) and sd.masks_of(model).whole == masks.whole


def test_pruners_pass_their_mode_on():
    "A subclass of an encoder layer may hide a fused kernel: hard masks are right there, soft ones refused, in both pruners."
    class Own(nn.TransformerEncoderLayer): pass
    def net(): return nn.Sequential(nn.Linear(12, 16), Own(16, 2, 32, batch_first=True), nn.Linear(16, 4))
    model = net()
    pruner = sd.Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.9, steps=40, mode="hard")
    assert pruner.masks.total == sum(weight.numel() for weight in maskable_weights(model).values()) and "whole network" in repr(pruner)
    model = net()
    assert "whole network" in repr(sd.DynamicPruner(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.9, steps=40, every=5))
    model = net()
    with pytest.raises(ParameterError, match="use mode='hard'"): sd.Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.9, steps=40)
    assert not masked_layers(model)


def test_already_pruned_is_said():
    def optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.1)
    for mode in ("soft", "hard"):
        model = made("linear")[0]
        sd.prune(model, "0.9", mode=mode)
        before = copy.deepcopy(model)
        text = r"already pruned to 10.0%.*densify\(model\) it, or take a fresh network"
        if mode == "hard":
            with pytest.raises(ParameterError, match=text): sd.prune(model, "0.95", steps=10)
        for pruner in (sd.Pruner, sd.DynamicPruner):
            with pytest.raises(ParameterError, match=text): pruner(model, optimizer(model), "0.95", steps=100, every=5)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values())) and sd.masks_of(model) == sd.masks_of(before)
    assert sd.prune(model, "0.95").kept == count_kept(180, "0.95")   # one round is meant, and possible


@pytest.mark.parametrize("kind", ["linear", "conv2d", "attention"])
def test_inference_mode(kind):
    "Everything that makes masks inside inference mode makes tensors that can be trained."
    def train(net, x):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    calls = {"prune": lambda net, x: sd.prune(net, 0.5), "soft": lambda net, x: sd.prune(net, 0.5, mode="soft"), "sparsify": lambda net, x: sd.sparsify(net),
             "pruner": lambda net, x: sd.Pruner(net, torch.optim.SGD(net.parameters(), lr=0.1), 0.5, steps=10, mode="hard"),
             "dynamic": lambda net, x: sd.DynamicPruner(net, torch.optim.SGD(net.parameters(), lr=0.1), 0.5, steps=100, every=10),
             "snip": lambda net, x: sd.prune(net, 0.5, "snip", data=sd.Examples([(x, torch.arange(len(x)) % 2)], loss=lambda output, y: output.square().mean())),
             "densify": lambda net, x: sd.densify(sd.sparsify(net)), "apply": lambda net, x: sd.apply_masks(net, sd.Masks.ones_like(net))}
    if kind != "attention": calls["scored"] = lambda net, x: to_scored(net, keep=0.5)
    for name, call in calls.items():
        net, x = made(kind)
        with torch.inference_mode(): call(net, x.clone())
        train(net, x)
    net, x, _ = pruned(kind, "hard", 0.9)
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(net(x).flatten(1).shape[1], 2))
    with torch.inference_mode(): small = sd.compact(net, x)
    train(small, x)
    with torch.inference_mode(): assert sd.prune(KINDS[kind][0](), 0.5).density == 0.5      # for inference alone
    with torch.inference_mode(): frozen = KINDS[kind][0]()
    for call in (lambda: sd.prune(frozen, 0.5), lambda: sd.sparsify(frozen)):
        with pytest.raises(ParameterError, match="made inside torch.inference_mode"): call()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("attention", "transformer")])
def test_scored_kinds(kind):
    net, x = made(kind)
    to_scored(net, keep="0.5", initial="scaled", allocation="global")
    masks = scored_masks(net)
    assert masks.kept == count_kept(masks.total, "0.5")
    output = net(x)
    output.square().mean().backward()
    assert all(bool(module.scores.grad.any()) for module in net if hasattr(module, "scores"))
    fixed = from_scored(copy.deepcopy(net), "hard")
    torch.testing.assert_close(fixed(x), output)
    assert sd.masks_of(fixed) == masks and list(fixed.state_dict()) == list(made(kind)[0].state_dict())


def test_lazy_layers_are_refused():
    with pytest.raises(ParameterError, match="run one batch through the network first"): sd.sparsify(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))


WORKER = """
import sys, warnings, torch, torch.distributed as dist
from torch import nn
import sparsedarts as sd
rank, folder = int(sys.argv[1]), sys.argv[2]
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
torch.manual_seed(9)
X, Y = torch.randn(64, 20), torch.randint(0, 4, (64,))
mine = slice(rank, None, 2)
def same(masks, name):
    for key, mask in masks.items():
        first = mask.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, mask), (name, key)
for score in ("snip", "grasp", "obd", "wanda", "random", "magnitude", "synflow"):
    data = None if score in ("random", "magnitude") else (20,) if score == "synflow" else (X[mine], Y[mine])
    same(sd.prune(net(), 0.5, score, data=data, steps=2), score)
def own(model, layers, data=None, generator=None): return {name: layer.weight.detach().abs() + torch.randn(layer.weight.shape).abs() * rank for name, layer in layers.items()}
same(sd.prune(net(), 0.5, own, data=(X[mine], Y[mine])), "own")
together = sd.prune(net(), 0.5, "snip", data=(X[mine], Y[mine]))
alone = sd.prune(net(), 0.5, "snip", data=sd.Examples([(X, Y)], alone=True))
assert together.distance(alone) < 0.01, together.distance(alone)   # the mean of the halves is the whole
first = sd.prune(net(), 0.5, "snip", data=sd.Examples([(X[mine], Y[mine])], alone=True))
assert first.distance(alone) > 0.01                                 # what it would be without
for grow in ("gradient", "random"):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sd.DynamicPruner(model, optimizer, 0.8, steps=40, every=5, grow=grow)
    for _ in range(11):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[mine]), Y[mine]).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
        pruner.step()
    same(pruner.masks, grow)
dist.destroy_process_group()
print("done")
"""


def test_processes_agree(tmp_path):
    "Each process has data of its own, and all of them the same masks."
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    running = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(outputs)
