"""Pruning where networks come from elsewhere: compiled networks, several processes, the usual torchvision models and a plain MLP."""
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import sparsedarts as sd
from sparsedarts.sparse.cost import cost

SCORES = {"magnitude": {}, "random": {}, "snip": {}, "grasp": {}, "synflow": dict(steps=5), "force": dict(steps=3, revive=True)}


def batch(shape, classes, size=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator)


def small():
    torch.manual_seed(0)
    return sd.resnet(8, width=0.25, in_channels=1)


@pytest.mark.parametrize("score", SCORES)
def test_compiled_networks_get_the_same_masks(score):
    "A network under torch.compile (aot_eager) is pruned as the plain one is, runs with its masks, and is compiled still."
    data, plain, inner = batch((1, 8, 8), 10), small(), small()
    compiled = torch.compile(inner, backend="aot_eager")
    compiled(data[0]), plain(data[0])
    masks = sd.prune(compiled, 0.8, score=score, data=data, **SCORES[score])
    assert masks == sd.prune(plain, 0.8, score=score, data=data, **SCORES[score]) == sd.masks_of(inner)
    plain.eval(), compiled.eval()
    torch.testing.assert_close(compiled(data[0]), plain(data[0]))


WORKER = """
    import sys, torch, torch.distributed as dist
    import sparsedarts as sd
    from torch.nn.parallel import DistributedDataParallel
    rank, folder, settings = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.rand(rank * 7)                       # the processes' own random streams differ
    data = sd.load_data("digits", seed=0)
    for number, (score, options) in enumerate(settings.items()):
        torch.manual_seed(0)
        net = DistributedDataParallel(sd.resnet(8, width=0.25, in_channels=1))
        torch.rand(rank * 7)
        sd.prune(net, 0.9, score=score, data=data, seed=3, **options).save(f"{folder}/{number}-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
"""


def test_every_rank_gets_the_same_masks(tmp_path, root):
    "Two processes, equal seeds: equal masks for every score, whatever else the processes draw."
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path), repr(SCORES)], cwd=root, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), errors
    found = [[sd.Masks.load(tmp_path / f"{number}-{rank}.safetensors") for rank in range(2)] for number in range(len(SCORES))]
    assert all(first == second for first, second in found)
    assert len({str(first.density) for first, _ in found}) == 1 and all(a[0] != b[0] for i, a in enumerate(found) for b in found[:i])


def foreign(name):
    torch.manual_seed(0)
    if name == "mlp": return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 10)), (3, 4, 4)
    from sparsedarts.vision import import_torchvision
    models = import_torchvision().models
    if name == "vit_b_16":  # its class, smaller; torchvision starts the head at zero, with which every gradient score is zero
        model = models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
        nn.init.normal_(model.heads.head.weight, std=0.02)
        return model, (3, 32, 32)
    return getattr(models, name)(num_classes=10), (3, 32, 32)


@pytest.mark.parametrize("name", ["mlp", "resnet18", "mobilenet_v2", "vit_b_16"])
def test_foreign_networks_from_pruning_to_report(name):
    "Prune, train a step under a hard mask, look at the report, bake the masks in: on networks that are not ours."
    model, shape = foreign(name)
    data = batch(shape, 10)
    before = cost(model, shape)
    masks = sd.prune(model, 0.9, score="snip", data=data)
    assert masks.total - masks.kept == (9 * masks.total + 5) // 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sd.hold(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    after = cost(model, shape)
    assert (after.params, after.macs) == (before.params, before.macs) and after.params - after.kept == masks.total - masks.kept
    model.eval()
    output = model(data[0])
    torch.testing.assert_close(sd.densify(model)(data[0]), output)
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if name in masks)
    assert zeros >= masks.total - masks.kept
