"""Image sets from real files: bad input, resuming, worker processes, and the whole way from a zip to a batch."""
import io
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsedarts.core import CheckpointError, DataError, ParameterError, UnknownName
from sparsedarts.data.loading import load_data
from sparsedarts.files import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def picture(seed: int, height: int = 8, width: int = 8, mode: str = "RGB", kind: str = "PNG") -> bytes:
    "The bytes of a random image."
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def contents(train: int = 6, test: int = 2, **options) -> dict[str, bytes]:
    "Names and bytes of a small set of three classes."
    names = [f"{part}/{kind}/{i}.png" for part, count in (("train", train), ("test", test)) for kind in ("ant", "bee", "cow") for i in range(count)]
    return {name: picture(seed, **options) for seed, name in enumerate(names)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items(): archive.writestr(name, content)
    return path


def same(first, second) -> bool:
    "Are two lists of batches equal to the last bit?"
    first, second = list(first), list(second)
    return len(first) == len(second) and all(torch.equal(a, b) for one, two in zip(first, second) for a, b in zip(one, two))


def test_folder_zip_and_two_zips_are_the_same_set(tmp_path):
    files = contents()
    paths = [write_folder(tmp_path / "folder", files), write_zip(tmp_path / "all.zip", files), tmp_path / "zips"]
    paths[2].mkdir()
    for part in ("train", "test"):
        write_zip(paths[2] / f"set-{part}.zip", {name: content for name, content in files.items() if name.startswith(part)})
    sets = [load_data(f"imagefolder:{path}", memory=memory, workers=0) for path in paths for memory in (2 ** 30, 0)]
    for data in sets:
        assert data.classes == ("ant", "bee", "cow") and data.mean == sets[0].mean and data.std == sets[0].std
        assert same(data.train.batches(4, augment=True, epochs=2), sets[0].train.batches(4, augment=True, epochs=2))
        assert same(data.test.batches(4, shuffle=False, epochs=1), sets[0].test.batches(4, shuffle=False, epochs=1))


@pytest.mark.parametrize("damage, message", [
    (lambda files: files.update({"train/bee/3.png": files["train/bee/3.png"][:60]}), "train/bee/3.png is not a readable image"),
    (lambda files: files.update({"train/bee/3.jpg": picture(0, 64, 64, kind="JPEG")[:900]}), "train/bee/3.jpg is not a readable image"),
    (lambda files: files.update({"test/cow/0.png": b""}), "test/cow/0.png is not a readable image"),
    (lambda files: files.update({"train/ant/9.png": picture(0, 9, 8)}), "train/ant/9.png is 9x8, other images of this set are 8x8; give size="),
    (lambda files: files.update({"train/dog/readme.txt": b"none yet"}), "class folder train/dog of"),
    (lambda files: files.update({"test/dog/0.png": picture(0)}), "class 'dog' of"),
    (lambda files: [files.pop(name) for name in list(files) if name.startswith("test")], "neither test/<class>/ nor val/<class>/"),
    (lambda files: [files.pop(name) for name in list(files) if name.startswith("train")], "has no images at train/<class>/"),
])
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_sets_name_the_file(tmp_path, damage, message, zipped):
    files = contents()
    damage(files)
    path = write_zip(tmp_path / "set.zip", files) if zipped else write_folder(tmp_path / "set", files)
    with pytest.raises(DataError) as caught: load_data(f"imagefolder:{path}")
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_bad_places(tmp_path):
    (tmp_path / "text.zip").write_text("not a zip")
    for path, message in ((tmp_path / "text.zip", "is not a readable zip"), (tmp_path / "none", "no folder or zip"),
                          (tmp_path, "is not a readable zip"), (ROOT / "tests", "no train/ folder and no zip")):
        with pytest.raises(DataError, match=message): load_data(f"imagefolder:{path}")
    with pytest.raises(DataError, match="train_data_batch_10 and val_data"): load_data(f"imagenet16:{tmp_path}")
    with pytest.raises(UnknownName, match="did you mean 'cifar10'"): load_data("cifar-10")
    with pytest.raises(ParameterError, match="imagefolder:PATH"): load_data("imagefolder:")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser can read everything")
def test_unreadable_folder(tmp_path):
    path = write_folder(tmp_path / "set", contents())
    (path / "train" / "bee").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be read"): load_data(f"imagefolder:{path}")
    finally: (path / "train" / "bee").chmod(0o755)


def test_grey_and_colour(tmp_path):
    grey = write_folder(tmp_path / "grey", contents(mode="L"))
    assert load_data(f"imagefolder:{grey}").shape == (1, 8, 8) and load_data(f"imagefolder:{grey}", channels=3).shape == (3, 8, 8)
    write_folder(grey, {"train/ant/5.png": picture(1)})
    for memory in (2 ** 30, 0):
        with pytest.raises(DataError, match="train/ant/5.png is in colour"): list(load_data(f"imagefolder:{grey}", memory=memory, workers=0).merged().train.batches(9, epochs=1))
    assert load_data(f"imagefolder:{grey}", channels=1).shape == (1, 8, 8)
    mixed = write_folder(tmp_path / "mixed", {**contents(), "train/bee/0.png": picture(3, mode="L")})
    image = load_data(f"imagefolder:{mixed}").merged().train.images[6]
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


@pytest.mark.parametrize("memory, size", [(2 ** 30, None), (0, None), (0, 12)])
def test_resume_through_a_checkpoint_file(tmp_path, memory, size):
    "In memory, on disk, and on disk with random windows: the rest of the run is the same to the last bit."
    options = dict(height=20, width=31) if size else {}
    path = write_folder(tmp_path / "set", contents(**options))
    def open_stream():
        data = load_data(f"imagefolder:{path}", memory=memory, size=size, workers=1).with_augmentation(cutout=True)
        assert data.augmentation["resized_crop"] == bool(size)
        return data.merged().train.batches(5, augment=True, seed=11, epochs=3)
    whole = list(open_stream())
    for stop in (1, 5, 8):
        first = open_stream()
        head = [next(first) for _ in range(stop)]
        save_checkpoint(tmp_path / "position.pt", {"data": first.state_dict()})
        first.close()
        second = open_stream()
        second.load_state_dict(load_checkpoint(tmp_path / "position.pt")["data"])
        assert same([*head, *second], whole)
    other = load_data(f"imagefolder:{path}", memory=memory, size=size, seed=1).train.batches(5, augment=True, seed=11)
    with pytest.raises(CheckpointError, match="belongs to other batches"): other.load_state_dict(second.state_dict())


def test_spawned_workers(tmp_path):
    "Workers that start from nothing import what they need; the batches are those of memory."
    path = write_zip(tmp_path / "set.zip", contents())
    program = f"""
        import torch
        from sparsedarts.data.loading import load_data
        if __name__ == "__main__":
            expected = list(load_data("imagefolder:{path}").train.batches(4, augment=True, epochs=2))
            data = load_data("imagefolder:{path}", memory=0, workers=2)
            data.train.store.start_method = "spawn"
            got = list(data.train.batches(4, augment=True, epochs=2))
            assert len(got) == len(expected)
            print(all(torch.equal(a, b) for one, two in zip(got, expected) for a, b in zip(one, two)))
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.strip() == "True", done.stderr


def test_stopped_workers_end(tmp_path):
    "Closing an endless iterator leaves no process behind."
    import multiprocessing
    data = load_data(f"imagefolder:{write_folder(tmp_path / 'set', contents())}", memory=0, workers=2)
    before = set(multiprocessing.active_children())
    batches = data.train.batches(2)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert not set(multiprocessing.active_children()) - before
    assert same([next(batches)], [list(data.train.batches(2, epochs=1))[1]])  # and it goes on where it stood
    batches.close()


def test_a_pickle_that_runs_a_program_does_not(tmp_path):
    class Intruder:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'intruded'}",)
    (tmp_path / "train_data_batch_1").write_bytes(pickle.dumps({"data": Intruder(), "labels": [1]}))
    with pytest.raises(DataError, match="system, which images do not need"): load_data(f"imagenet16:{tmp_path}")
    assert not (tmp_path / "intruded").exists()


def test_small_imagenet_to_batches(tmp_path):
    random = np.random.default_rng(0)
    for name in [*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]:
        record = {"data": random.integers(0, 256, (60, 768), dtype=np.uint8), "labels": list(range(1, 61))}
        (tmp_path / name).write_bytes(pickle.dumps(record))
    data = load_data(f"imagenet16:{tmp_path}", classes=50)
    assert (len(data.train), len(data.valid), len(data.test)) == (250, 250, 50) and data.augmentation["pad"] == 2 and data.augmentation["flip"]
    x, y = next(data.train.batches(100, augment=True))
    assert x.shape == (100, 3, 16, 16) and int(y.max()) < 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_gives_the_batches_of_the_processor():
    options = dict(augment=True, seed=3, epochs=2)
    here = load_data("digits").with_augmentation(cutout=True).train.batches(64, **options)
    there = load_data("digits", device="cuda").with_augmentation(cutout=True).train.batches(64, **options)
    for (x, y), (expected_x, expected_y) in zip(there, here, strict=True):
        torch.testing.assert_close(x.cpu(), expected_x, rtol=0, atol=1e-6)
        assert torch.equal(y.cpu(), expected_y)


def test_digits_are_what_the_documentation_says():
    data = load_data("digits")
    assert [len(split) for split in data.splits().values()] == [450, 450, 897]
    everything = torch.cat([data.merged().train.images, data.test.images]).flatten(1)
    from sklearn.datasets import load_digits
    raw = torch.from_numpy(load_digits().data * 255 / 16).round().to(torch.uint8)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, raw.tolist()))
    assert data.augmentation == {"pad": 1, "flip": False, "cutout": 0, "resized_crop": False}
    assert data.with_augmentation(cutout=True).augmentation["cutout"] == 4
