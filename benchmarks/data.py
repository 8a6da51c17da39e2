"""What augmentation costs: images in memory, augmented a batch at a time, against torchvision transforms in DataLoader workers.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--images 10000] [--batch-size 128] [--workers 2] [--rounds 5] [--device auto] [--json]

Both prepare the same CIFAR-shaped images (random pixels, 3x32x32): crop with padding 4, flip, normalise; with --cutout also a blanked square.
One pass of each makes a round, in an order that alternates; a ratio is the median over rounds of (DataLoader / ours) within a round, so what else
the machine does touches both. The DataLoader keeps its workers between passes and gets one untimed pass to start them. Images per second of
wall time are printed as well, and CPU seconds of the main process and the workers together (the ratio that no idle core can hide).
"""
import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.utils.data import DataLoader, Dataset

from sparsedarts.core import get_device
from sparsedarts.data.augment import AUGMENTATION, channel_statistics
from sparsedarts.data.batches import Memory
from sparsedarts.data.splits import Split
from sparsedarts.vision import import_torchvision


class Classic(Dataset):
    "The usual way: one image after the other through PIL and torchvision."
    def __init__(self, images, labels, mean, std, cutout):
        transforms = import_torchvision().transforms
        steps = [transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                 transforms.Normalize(mean, std)]
        if cutout: steps.append(transforms.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)))
        self.images, self.labels, self.transform = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist(), transforms.Compose(steps)

    def __len__(self): return len(self.labels)
    def __getitem__(self, index): return self.transform(self.images[index]), self.labels[index]


def children_seconds(loader_iterator) -> float:
    "CPU seconds that the workers of a DataLoader have used so far (Linux; 0 elsewhere)."
    seconds = 0.0
    for worker in getattr(loader_iterator, "_workers", []):
        try: fields = open(f"/proc/{worker.pid}/stat").read().rsplit(")", 1)[1].split()
        except OSError: return 0.0
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def one_pass(batches, device, count):
    "Wall and CPU seconds of one pass; the CPU seconds of workers are added by the caller."
    wall, cpu, seen = time.perf_counter(), time.process_time(), 0
    for x, y in batches:
        seen += len(y.to(device))
        x.to(device)
    if device.type == "cuda": torch.cuda.synchronize()
    assert seen == count, (seen, count)
    return time.perf_counter() - wall, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="images in the set (default 10000)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the DataLoader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cutout", action="store_true")
    parser.add_argument("--device", default="cpu", help="where batches are wanted: cpu, cuda, auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args()
    device, generator = get_device(options.device), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (options.images,), generator=generator)
    mean, std = channel_statistics(images)
    settings = {**AUGMENTATION, "pad": 4, "flip": True, "cutout": 16 if options.cutout else 0}
    ours = Split(Memory(images.to(device), labels), torch.arange(options.images), mean, std, settings)
    loader = DataLoader(Classic(images, labels, mean, std, options.cutout), options.batch_size, shuffle=True, num_workers=options.workers,
                        persistent_workers=options.workers > 0, pin_memory=device.type == "cuda")

    def run_ours(number): return one_pass(ours.batches(options.batch_size, augment=True, seed=number, epochs=1), device, options.images)
    def run_classic(number):
        before = children_seconds(loader._iterator)
        wall, cpu = one_pass(loader, device, options.images)
        return wall, cpu + children_seconds(loader._iterator) - before

    run_classic(0), run_ours(0)
    rounds = []
    for number in range(1, options.rounds + 1):
        order = [("ours", run_ours), ("classic", run_classic)][::1 if number % 2 else -1]
        rounds.append({name: run(number) for name, run in order})
    ratios = {kind: [r["classic"][i] / r["ours"][i] for r in rounds] for i, kind in enumerate(("wall", "cpu"))}
    speeds = {name: options.images / statistics.median(r[name][0] for r in rounds) for name in ("ours", "classic")}
    result = {"ratio_wall": statistics.median(ratios["wall"]), "ratio_wall_range": [min(ratios["wall"]), max(ratios["wall"])],
              "ratio_cpu": statistics.median(ratios["cpu"]), "images_per_second": speeds, "settings": vars(options),
              "torch": torch.__version__, "threads": torch.get_num_threads()}
    if options.json: return print(json.dumps(result))
    print(f"{options.images:,} images 3x32x32, batches of {options.batch_size}, crop (pad 4) + flip + normalise{' + cutout' if options.cutout else ''}, "
          f"{options.rounds} rounds, device {device}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"  in memory, a batch at a time       {speeds['ours']:>9,.0f} images/s")
    print(f"  torchvision, DataLoader {options.workers} workers  {speeds['classic']:>9,.0f} images/s")
    print(f"  DataLoader / ours: wall {result['ratio_wall']:.1f}x (rounds {min(ratios['wall']):.1f} to {max(ratios['wall']):.1f}), "
          f"CPU time {result['ratio_cpu']:.1f}x")


if __name__ == "__main__":
    main()
