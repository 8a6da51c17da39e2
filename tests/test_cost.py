"""The cost of networks against an independent count by hooks on layers; folded batches, odd inputs, masks, fused kernels, errors on the way."""
import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune, rnn

import sparsedarts as sd
from sparsedarts.core import ParameterError, ShapeError
from sparsedarts.sparse.cost import UncountedWarning, cost, latency, watch
from sparsedarts.sparse.layers import masked_layers


def leading(made):
    "The first tensor of what a layer returns."
    while not isinstance(made, torch.Tensor): made = made[0]
    return made


def attention_count(layer, query, key, value):
    "Projections of queries, keys, values and the output, and the two products between them, over the whole batch."
    width, tokens = layer.embed_dim, key.numel() // layer.kdim
    pairs = tokens * query.shape[1 if layer.batch_first else 0]
    own = query.numel() * width + tokens * (layer.kdim + layer.vdim) * width
    return own + query.numel() * width + 2 * pairs * width


def by_hand(layer, given, made):
    "Multiply-accumulates of one call of a layer over the whole batch, from the sizes of what went in and what came out."
    out = leading(made)
    if isinstance(layer, nn.Linear): return out.numel() * layer.in_features
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return given[0].numel() * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return out.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, nn.RNNBase):
        ends = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        return out.numel() // ends * sum(p.numel() for name, p in layer.named_parameters() if p.dim() > 1)
    if isinstance(layer, nn.RNNCellBase): return out.numel() // layer.hidden_size * (layer.weight_ih.numel() + layer.weight_hh.numel())
    if isinstance(layer, nn.Bilinear): return out.numel() * layer.in1_features * layer.in2_features
    return attention_count(layer, *given[:3]) if isinstance(layer, nn.MultiheadAttention) else 0


def hook_count(model, *args, batch=1, **kwargs):
    "The count for one input, by hooks."
    found, model = [], copy.deepcopy(model).eval()
    inside = {inner for module in model.modules() if isinstance(module, nn.MultiheadAttention) for inner in module.modules() if inner is not module}
    def note(layer, given, made): found.append(by_hand(layer, given, made))
    for module in model.modules():
        if module not in inside: module.register_forward_hook(note)
    with torch.enable_grad(): model(*args, **kwargs)
    assert sum(found) % batch == 0
    return sum(found) // batch


class Residual(nn.Module):
    "x + f(x)."
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x): return x + self.body(x)


class Attend(nn.Module):
    "Attention of tokens among themselves."
    def __init__(self, width, heads):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x): return self.inner(x, x, x)[0]


class ViT(nn.Module):
    "Patches, a class token, blocks of attention."
    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.zeros(1, 17, 16))
        blocks = [(Residual(nn.LayerNorm(16), Attend(16, 4)), Residual(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))) for _ in range(2)]
        self.blocks, self.head = nn.Sequential(*(part for block in blocks for part in block)), nn.Linear(16, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.blocks(x)[:, 0])


class Windows(nn.Module):
    "Swin: windows are folded into the batch, attention runs inside each, and patches are merged between stages."
    def __init__(self):
        super().__init__()
        self.patches, self.block, self.merge, self.head = nn.Conv2d(3, 8, 2, 2), Attend(8, 2), nn.Linear(32, 16, bias=False), nn.Linear(16, 10)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        x = self.block(x).view(b, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(b, h, w, c)
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.head(self.merge(x).mean((1, 2)))


class UNet(nn.Module):
    "Down, up by a transposed convolution, and a skip."
    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        high = F.relu(self.down(x))
        return self.last(torch.cat([high, self.up(F.relu(self.deep(high)))], 1))


class Tagger(nn.Module):
    "Words, two layers of LSTM in both directions, labels; time first."
    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(30, 6), nn.LSTM(6, 5, 2, bidirectional=True, dropout=0.5), nn.Linear(10, 4)

    def forward(self, text): return self.head(self.lstm(self.words(text))[0])


class TwoInputs(nn.Module):
    "An image and a vector."
    def __init__(self):
        super().__init__()
        self.image, self.vector, self.both = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Bilinear(4, 4, 2)

    def forward(self, image, vector): return self.both(self.image(image).mean((2, 3)), self.vector(vector))


class Text(nn.Module):
    "Tokens, a transformer encoder with PyTorch's fused inference path, classes."
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(40, 12)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2)
        self.head = nn.Linear(12, 2)

    def forward(self, x): return self.head(self.encoder(self.tokens(x)).mean(1))


def mobile():
    "Depthwise and pointwise convolutions."
    def block(c, out, stride): return nn.Sequential(nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU6(), nn.Conv2d(c, out, 1, bias=False), nn.BatchNorm2d(out))
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), block(8, 16, 1), block(16, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def audio():
    "Strided and dilated convolutions in one dimension."
    return nn.Sequential(nn.Conv1d(1, 8, 9, 4), nn.ReLU(), nn.Conv1d(8, 8, 3, dilation=2, groups=2), nn.ConvTranspose1d(8, 4, 4, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))


def video():
    "Three dimensions."
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, (1, 3, 3), (1, 2, 2)), nn.ConvTranspose3d(4, 2, 2, 2), nn.Flatten(), nn.LazyLinear(3))


def ran(model, *args):
    "A network whose lazy layers have their sizes."
    model(*args)
    return model


TEXT, TIMED = torch.randint(40, (3, 7)), torch.randint(30, (7, 4))
PAIR = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
ARCHITECTURES = {
    "resnet": (lambda: sd.resnet(8, shape=(3, 16, 16), shortcut="B"), (3, 16, 16), None, (torch.zeros(1, 3, 16, 16),)),
    "mobilenet": (mobile, torch.zeros(3, 3, 16, 16), None, (torch.zeros(3, 3, 16, 16),)),
    "vit": (ViT, (3, 16, 16), None, (torch.zeros(1, 3, 16, 16),)),
    "swin": (Windows, torch.zeros(2, 3, 16, 16), None, (torch.zeros(2, 3, 16, 16),)),
    "unet": (UNet, (3, 16, 16), None, (torch.zeros(1, 3, 16, 16),)),
    "tagger": (Tagger, TIMED, 4, (TIMED,)),
    "audio": (audio, (1, 80), None, (torch.zeros(1, 1, 80),)),
    "video": (lambda: ran(video(), torch.zeros(1, 2, 4, 8, 8)), (2, 4, 8, 8), None, (torch.zeros(1, 2, 4, 8, 8),)),
    "two inputs, tuple": (TwoInputs, PAIR, None, PAIR),
    "two inputs, dictionary": (TwoInputs, {"vector": PAIR[1], "image": PAIR[0]}, None, PAIR),
    "two inputs, shapes": (TwoInputs, [(3, 8, 8), (5,)], None, (torch.zeros(1, 3, 8, 8), torch.zeros(1, 5))),
    "tokens": (Text, TEXT, None, (TEXT,)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_agree_with_hooks(name):
    make, example, batch, args = ARCHITECTURES[name]
    torch.manual_seed(0)
    model, inputs = make().train(), batch or len(args[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted = cost(model, example, batch)
    assert counted.macs == counted.kept_macs == hook_count(model, *args, batch=inputs) > 0
    assert counted.params == sum(p.numel() for p in model.parameters()) and counted.uncounted == () and counted.density == 1
    assert all(module.training for module in model.modules()) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert latency(model, example, batch, repeats=2, warmup=0).median > 0


def test_folded_batches():
    "The case that counted one use where there are twelve; and masks on it."
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(16, 50, bias=False))
    assert cost(model, (12, 16)).macs == 9600
    sd.prune(model, 0.9)
    assert cost(model, (12, 16)).kept_macs == cost(model, torch.zeros(5, 12, 16)).kept_macs == 960
    frames = nn.Sequential(nn.Flatten(0, 1), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2), nn.Unflatten(0, (-1, 6)))  # six frames of a film
    assert cost(frames, (6, 3, 8, 8)).macs == cost(frames, torch.zeros(2, 6, 3, 8, 8)).macs == 6 * (36 * 4 * 27 + 4 * 36 * 2)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_kept_macs_of_every_masked_layer(mode):
    "Kept MACs are the uses of a weight times how many are kept, in folded, functional and grouped layers."
    torch.manual_seed(0)
    for model, example in ((UNet(), (3, 16, 16)), (mobile(), torch.zeros(3, 3, 16, 16)), (Windows(), torch.zeros(2, 3, 16, 16)), (TwoInputs(), PAIR), (audio(), (1, 80))):
        attention = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
        dense = {row["layer"]: row["macs"] for row in cost(model, example).rows}
        sd.sparsify(model, mode=mode, exclude=attention if attention and "block.inner.out_proj" not in dict(model.named_modules()) else None)
        sd.apply_masks(model, {name: torch.rand(layer.weight.shape) < 0.3 for name, layer in masked_layers(model).items()})
        owners = {}
        for name, layer in masked_layers(model).items(): owners.setdefault(name.rpartition(".")[0], []).append(layer)
        for row in cost(model, example).rows:
            layers = owners.get(row["layer"], [])
            assert row["macs"] == dense[row["layer"]]
            assert row["kept_macs"] * sum(l.weight.numel() for l in layers) == row["macs"] * sum(int(l.mask.sum()) for l in layers) or not layers and row["kept_macs"] == row["macs"]


RECURRENT = [nn.LSTM(4, 5), nn.LSTM(4, 5, 3, bidirectional=True), nn.LSTM(4, 6, proj_size=2), nn.LSTM(4, 6, 2, proj_size=2, bidirectional=True), nn.GRU(4, 5, 2),
             nn.GRU(4, 5, bidirectional=True, bias=False), nn.RNN(4, 5), nn.RNN(4, 5, 2, nonlinearity="relu")]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("layer", RECURRENT, ids=repr)
def test_recurrent_layers(layer):
    "Fused or not, in any precision, packed and unbatched."
    x = torch.randn(6, 3, 4)
    wanted = hook_count(layer, x, batch=3)
    assert cost(layer, x, batch=3).macs == wanted == hook_count(layer, x[:, 0], batch=1) == cost(layer, x[:, 0], batch=1).macs > 0
    assert cost(copy.deepcopy(layer).double(), x, batch=3).macs == wanted
    packed = rnn.pack_padded_sequence(x, torch.tensor([6, 4, 2]))
    assert cost(layer, packed).macs == hook_count(layer, packed, batch=3) == wanted * 12 // 18
    first = copy.deepcopy(layer)
    first.batch_first = True
    assert cost(first, (6, 4)).macs == wanted


@pytest.mark.parametrize("layer", [nn.LSTMCell(4, 5), nn.GRUCell(4, 5), nn.RNNCell(4, 5)], ids=repr)
def test_recurrent_cells(layer):
    x = torch.randn(3, 4)
    assert cost(layer, x).macs == hook_count(layer, x, batch=3) == cost(layer, x[0], batch=1).macs > 0


ATTENTIONS = [dict(), dict(bias=False), dict(kdim=6, vdim=10), dict(add_bias_kv=False, dropout=0.5)]


@pytest.mark.parametrize("options", ATTENTIONS, ids=repr)
@pytest.mark.parametrize("first", [True, False])
def test_attention(options, first):
    "Other keys than queries, frozen weights (the fused path), evaluation, inference mode."
    layer = nn.MultiheadAttention(8, 2, batch_first=first, **options)
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 7, layer.kdim), torch.randn(3, 7, layer.vdim)
    given = (q, k, v) if first else tuple(x.transpose(0, 1).contiguous() for x in (q, k, v))
    wanted = attention_count(layer, *given) // 3
    for model in (layer, layer.eval(), copy.deepcopy(layer).requires_grad_(False)): assert cost(model, given, 3).macs == wanted
    with torch.inference_mode(): assert cost(layer, given, 3).macs == wanted
    assert torch.backends.mha.get_fastpath_enabled()


class Functional(nn.Module):
    "Weights without layers, and one function after the other."
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(4, 1, 3))
        self.vector, self.left, self.right = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):  # (B, 8)
        a = F.linear(x, self.linear)                            # 48
        b = F.linear(x, self.right @ self.left)                 # 48, and 96 for the product of weights, whatever the batch
        c = x @ self.left.T @ self.right.T                      # 16 + 12
        d = F.conv1d(x[:, None], self.conv)                     # 4 * 3 * 6
        return a + b + c, d, x @ self.vector                    # 8


def test_functional_operations():
    "Each product belongs to the module that owns the weight; work that does not grow with the batch is shared by its inputs."
    counted = cost(Functional(), (8,))
    assert counted.macs == 48 + 48 + 96 + 28 + 72 + 8 and cost(Functional(), torch.zeros(4, 8)).macs == counted.macs - 96 + 96 // 4
    assert {row["layer"]: row["macs"] for row in counted.rows} == {"(model)": counted.macs - 48, "(elsewhere)": 48}  # what is made of two weights is nobody's
    x = torch.zeros(2, 3, 8)

    class One(nn.Module):
        def __init__(self, operation):
            super().__init__()
            self.weight, self.operation = nn.Parameter(torch.randn(8, 6)), operation

        def forward(self, x): return self.operation(x, self.weight)

    for operation, wanted in ((lambda x, w: x @ w, 3 * 48), (lambda x, w: F.linear(x, w.T), 3 * 48), (lambda x, w: torch.einsum("bti,io->bto", x, w), 3 * 48),
                              (lambda x, w: torch.tensordot(x, w, 1), 3 * 48), (lambda x, w: torch.bmm(x, w.expand(len(x), 8, 6)), 3 * 48),
                              (lambda x, w: torch.baddbmm(torch.zeros(6), x, w.expand(len(x), 8, 6)), 3 * 48), (lambda x, w: torch.addmm(w[0], x[:, 0], w), 48),
                              (lambda x, w: F.conv1d(x.transpose(1, 2), w.T[..., None]), 3 * 48), (lambda x, w: torch.stack([w.T @ y[0] for y in x]), 48),
                              (lambda x, w: F.scaled_dot_product_attention(x, x, x), 2 * 9 * 8), (lambda x, w: x @ x.mT, 9 * 8),
                              (lambda x, w: F.bilinear(x, x, w.T[..., None].expand(6, 8, 8)), 3 * 6 * 64)):
        model = One(operation)
        assert cost(model, x).macs == cost(model, (3, 8)).macs == wanted
        own = operation(x, torch.full((8, 6), torch.nan)).isnan().any()   # does the weight matter?
        assert cost(model, x).rows[0]["macs"] == (wanted if own else 0)


def test_weights_made_of_other_parameters():
    "Weight norm, spectral norm, pruning hooks and low rank: the layer that runs has the MACs."
    for spoil in (parametrizations.weight_norm, parametrizations.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
        spoil(model[0])
        spoil(model[2])
        macs = {row["layer"]: row["macs"] for row in cost(model, (3, 8, 8)).rows}
        assert macs["0"] == 36 * 4 * 27 and macs["2"] == 288


def test_twice_and_shared():
    layer = nn.Linear(4, 4, bias=False)
    other = nn.Linear(4, 4, bias=False)
    other.weight = layer.weight
    model = nn.Sequential(layer, layer, other)
    sd.apply_masks(model, {"0.weight": torch.eye(4)})
    counted = cost(model, (5, 4))
    assert (counted.params, counted.kept, counted.macs, counted.kept_macs) == (16, 4, 3 * 5 * 16, 3 * 5 * 4)
    assert [(row["layer"], row["macs"], row["calls"]) for row in counted.rows] == [("0", 160, 2), ("2", 80, 1)]


class Strange(nn.Module):
    "Fails, keeps state, replaces a buffer."
    def __init__(self, fail):
        super().__init__()
        self.fail, self.layer, self.drop = fail, nn.Linear(4, 4), nn.Dropout()
        self.register_buffer("seen", torch.zeros(()))
        self.drop.eval()

    def forward(self, x):
        self.seen = self.seen + 1
        if self.fail: raise RuntimeError("no")
        return self.drop(self.layer(x))


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_everything_is_put_back(fail, inference):
    model, state = Strange(fail), torch.get_rng_state()
    buffer = model.seen
    with torch.inference_mode(inference):
        if fail:
            with pytest.raises(ShapeError, match="cannot process an input of shape"): cost(model, (4,))
        else: assert cost(model, (4,)).macs == 16
    assert model.training and model.layer.training and not model.drop.training
    assert model.seen is buffer and model.seen == 0 and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and torch.backends.mha.get_fastpath_enabled()
    assert not torch.utils._python_dispatch._len_torch_dispatch_stack()


def test_models_of_inference_mode_and_without_storage():
    with torch.inference_mode(): made = ViT()
    assert cost(made, (3, 16, 16)).macs == cost(ViT(), (3, 16, 16)).macs
    with torch.device("meta"): huge = nn.Sequential(nn.Linear(100_000, 100_000), nn.BatchNorm1d(100_000))
    assert cost(huge, (100_000,)).macs == 10**10


def test_scripted_and_compiled():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    wanted = cost(model, (3, 8, 8)).macs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for other in (torch.jit.script(model), torch.jit.trace(model.eval(), torch.zeros(1, 3, 8, 8))): assert cost(other, (3, 8, 8)).macs == wanted
    assert cost(torch.compile(model, backend="eager"), (3, 8, 8)).macs == wanted
    assert cost(nn.Sequential(torch.compile(model, backend="eager"), nn.Linear(2, 3)), (3, 8, 8)).macs == wanted + 6


def test_what_cannot_be_counted_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, x): return torch.cdist(x, self.weight)

    with pytest.warns(UncountedWarning, match=r"Sequential multiplies where nothing could be counted \(1: aten._cdist_forward.default\)"):
        counted = cost(nn.Sequential(nn.Linear(4, 4), Odd()), (4,))
    assert counted.macs == 16 and counted.uncounted == ("1: aten._cdist_forward.default",) and "not counted: 1: aten._cdist_forward" in repr(counted)
    quantised = torch.ao.quantization.quantize_dynamic if hasattr(torch.ao.quantization, "quantize_dynamic") else None
    if quantised is not None and "fbgemm" in torch.backends.quantized.supported_engines:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = quantised(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
        with pytest.warns(UncountedWarning, match="quantized"): cost(model, (4,))


@pytest.mark.parametrize("example, batch, words", [
    (torch.zeros(4), None, "Say it as batch="), ((torch.zeros(2, 4), torch.zeros(3, 4)), None, "Say it as batch="), ((3, 0, 8), None, "shape must be a whole number"),
    ((), None, "cannot process"), ((3.5,), None, "shape must be a whole number"), ("3x8x8", None, "must be a shape"), (None, None, "must be a shape"),
    (torch.zeros(4, 4), 0, "batch must be"), ({}, None, "must be a shape"), (torch.zeros(2, 5), None, "cannot process an input of shape (2, 5)"),
    ((torch.zeros(2, 4), torch.zeros(2, 4)), None, "cannot process inputs of shapes (2, 4), (2, 4)")])
def test_wrong_examples(example, batch, words):
    with pytest.raises((ParameterError, ShapeError)) as caught: cost(nn.Linear(4, 2), example, batch)
    assert words in str(caught.value)


def test_lazy_layers_are_refused():
    with pytest.raises(ParameterError, match="run the network once"): cost(nn.Sequential(nn.LazyLinear(3)), (4,))


# Random networks of these layers

SIZES = st.integers(1, 6)


@st.composite
def networks(draw):
    "A network, its input (B, C, length) and how many inputs that is; the length, time or the groups may be folded into the batch on the way."
    batch, channels, length = draw(st.integers(1, 3)), draw(SIZES), draw(st.integers(5, 9))
    x = torch.zeros(batch, channels, length)
    layers, shape = [], tuple(x.shape)
    for kind in draw(st.lists(st.sampled_from(["conv", "up", "linear", "fold", "lstm", "gru", "attention", "depthwise", "twice"]), min_size=1, max_size=5)):
        b, c, n = shape
        out = draw(SIZES)
        if kind == "conv" and n >= 3: layers.append(nn.Conv1d(c, out, 3, stride=draw(st.integers(1, 2)), padding=1, bias=draw(st.booleans())))
        elif kind == "depthwise": layers.append(nn.Conv1d(c, 2 * c, 1, groups=c))
        elif kind == "up" and n < 20: layers.append(nn.ConvTranspose1d(c, out, 2, 2, groups=1))
        elif kind == "linear": layers.append(nn.Linear(n, out, bias=draw(st.booleans())))
        elif kind == "fold": layers += [nn.Flatten(0, 1), nn.Unflatten(0, (b * c, 1))]
        elif kind in ("lstm", "gru"): layers.append(First({"lstm": nn.LSTM, "gru": nn.GRU}[kind](n, out, draw(st.integers(1, 2)), bidirectional=draw(st.booleans()), batch_first=draw(st.booleans()))))
        elif kind == "attention": layers.append(Attend(n, 1))
        elif kind == "twice":
            layer = nn.Linear(n, n)
            layers += [layer, nn.Tanh(), layer]
        else: continue
        with torch.no_grad(): shape = tuple(nn.Sequential(*layers)(x).shape)
    return nn.Sequential(*layers, nn.ReLU()), x, batch


class First(nn.Module):
    "The sequence that a recurrent layer returns."
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x): return self.layer(x)[0]


@settings(max_examples=60, deadline=None)
@given(networks(), st.sampled_from([0.0, 0.4, 0.9]))
def test_random_networks_agree_with_hooks(made, sparsity):
    model, x, batch = made
    wanted = hook_count(model, x, batch=1)
    given, seen, uncounted = watch(model, x)
    assert sum(tally.macs for tally in seen.values()) == sum(tally.kept for tally in seen.values()) == wanted and not uncounted
    counted = cost(model, x)
    assert abs(counted.macs * batch - wanted) <= batch * len(counted.rows) and (batch > 1 or counted.macs == wanted)
    linear = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    if not linear: return
    sd.sparsify(model, include=linear, mode="soft" if sparsity < 0.5 else "hard")
    sd.apply_masks(model, {name: torch.rand(layer.weight.shape) >= sparsity for name, layer in masked_layers(model).items()})
    uses = {}
    for name in linear:
        layer = model.get_submodule(name)
        uses[layer] = seen[layer].macs // layer.weight.numel()
    removed = sum(count * int((layer.mask == 0).sum()) for layer, count in uses.items())
    _, masked, _ = watch(model, x)
    assert sum(tally.macs for tally in masked.values()) == wanted and sum(tally.kept for tally in masked.values()) == wanted - removed
