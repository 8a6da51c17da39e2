"""Pictures and folders as people have them: links, transparency, orientation, odd formats and names, bombs, and checkpoints that know their images."""
import io
import os
import struct
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sparsedarts.core import CheckpointError, DataError, ParameterError
from sparsedarts.data.augment import channel_statistics
from sparsedarts.data.batches import Memory
from sparsedarts.data.folders import LARGEST_FILE, Files, find_images
from sparsedarts.data.images import ImageFormat, decode, image_form, open_image
from sparsedarts.data.layout import split_member, walk_folder
from sparsedarts.data.loading import load_data
from sparsedarts.data.sources import ImageSet, Request, imagenet16
from sparsedarts.training.checkpoints import data_signature
from sparsedarts.training.engine import train


def pixels(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def encoded(image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def contents(train: int = 4, test: int = 2, first: int = 0, classes=("ant", "bee")) -> dict[str, bytes]:
    names = [f"{part}/{kind}/{i}.png" for part, count in (("train", train), ("test", test)) for kind in classes for i in range(count)]
    return {name: encoded(Image.fromarray(pixels(first + seed))) for seed, name in enumerate(names)}


def write_folder(root: Path, files: dict) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items(): archive.writestr(name, content)
    return path


def write_set(place: Path, files: dict, zipped: bool) -> Path:
    return write_zip(place / "set.zip", files) if zipped else write_folder(place / "set", files)


def load(path, **options): return load_data(f"imagefolder:{path}", workers=0, valid=0, **options)


# --- links ---

@pytest.mark.parametrize("ups", [["train/cat/up"], ["train/cat/up", "train/cat/up2"], ["train/cat/up", "train/dog/up", "test/cat/x"]])
@pytest.mark.parametrize("target", ["..", "../..", ".", "/"])
def test_links_upwards_add_nothing(tmp_path, ups, target):
    path = write_folder(tmp_path, contents(classes=("cat", "dog")))
    for up in ups: (path / up).symlink_to(target)
    with pytest.warns(UserWarning, match="leads back to a folder above it"): found = find_images(path)
    assert {part: len(files) for part, files in found.parts.items()} == {"train": 8, "test": 4}
    assert found.classes == ("cat", "dog") and found.parts["train"].labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("link, target", [
    ("train/kitty", "cat"), ("val", "train"), ("val", "test"), ("train/zoo", "../test"), ("test/cat/more", "../../train/cat"),
    ("train/dog/more", "../cat"), ("test/dog/9.png", "../../train/dog/0.png"), ("train/dog/9.png", "../cat/0.png"), ("train/a_first", "cat"),
])
def test_links_into_a_second_class_or_part_are_refused(tmp_path, link, target):
    path = write_folder(tmp_path, contents(classes=("cat", "dog")))
    (path / link).symlink_to(target)
    with pytest.raises(DataError, match="are the same by a link") as caught: find_images(path)
    assert link.split("/")[0] in str(caught.value) and str(path) in str(caught.value)


def test_linked_data_is_read_once(tmp_path):
    "A part, a class and a file that lie elsewhere; the real path wins over the link, whatever their names."
    plain = write_folder(tmp_path / "plain", contents(classes=("cat", "dog")))
    linked = tmp_path / "linked"
    (linked / "train/cat").mkdir(parents=True)
    (linked / "test").symlink_to(plain / "test")
    (linked / "train/dog").symlink_to(plain / "train/dog")
    for i in range(4): (linked / f"train/cat/{i}.png").symlink_to(plain / f"train/cat/{i}.png")
    assert torch.equal(load(linked).train.images, load(plain).train.images) and len(load(linked).test) == 4
    (linked / "train/cat/a.png").symlink_to("0.png")  # the same file again, in its own class
    os.link(plain / "train/cat/1.png", linked / "train/cat/hard.png")  # an ordinary file
    with pytest.warns(UserWarning, match="train/cat/a.png is train/cat/0.png again|train/cat/0.png is train/cat/a.png again"): found = find_images(linked)
    assert len(found.parts["train"]) == 9
    (linked / "val").symlink_to(plain / "test")  # the folder of test/, by a second link
    with pytest.raises(DataError, match="same by a link"): find_images(linked)


@pytest.mark.parametrize("names", [("train/cat/0.png", "train/dog/0.png"), ("train/cat/0.png", "test/cat/0.png")])
def test_one_outside_file_linked_twice(tmp_path, names):
    path, outside = write_folder(tmp_path / "set", contents(classes=("cat", "dog"))), tmp_path / "blob"
    outside.write_bytes(encoded(Image.fromarray(pixels(99))))
    for name in names:
        (path / name).unlink()
        (path / name).symlink_to(outside)
    with pytest.raises(DataError, match="same by a link"): find_images(path)


@pytest.mark.parametrize("folder, refused", [("test/cat/all", True), ("train/cat/all", False)])
def test_a_file_and_its_folder_linked(tmp_path, folder, refused):
    "One link leads to a file, another to the folder that holds it; found by the property test below."
    path, outside = write_folder(tmp_path / "set", contents(classes=("cat", "dog"))), write_folder(tmp_path / "out", {"0.png": encoded(Image.fromarray(pixels(99)))})
    (path / "train/cat/a.png").symlink_to(outside / "0.png")
    (path / folder).symlink_to(outside)
    if refused:
        with pytest.raises(DataError, match="same by a link"): find_images(path)
    else:
        with pytest.warns(UserWarning, match="train/cat/a.png is train/cat/all/0.png again"): assert len(find_images(path).parts["train"]) == 9


@pytest.mark.parametrize("link, target", [("train/cat/x.png", "nowhere.png"), ("train/cat/x.png", "x.png"), ("train/fox", "/nowhere/fox"), ("train/cat/loop", "loop"),
                                          ("val", "nowhere"), ("val", "val")])
def test_broken_links_are_refused_by_name(tmp_path, link, target):
    path = write_folder(tmp_path, contents(classes=("cat", "dog")))
    (path / link).symlink_to(target)
    with pytest.raises(DataError, match=f"{link} is a link to .*, which does not exist"): find_images(path)


def test_a_web_of_links_ends(tmp_path):
    "Folders that all link to one another: each is entered once."
    path = write_folder(tmp_path / "set", contents(classes=("cat", "dog")))
    for i in range(12):
        (tmp_path / f"out/{i}").mkdir(parents=True)
        (tmp_path / f"out/{i}/{i}.png").write_bytes(encoded(Image.fromarray(pixels(i))))
        for j in range(12): (tmp_path / f"out/{i}/to{j}").symlink_to(f"../{j}")
    (path / "train/cat/out").symlink_to(tmp_path / "out/0")
    with pytest.warns(UserWarning, match="133 x link or special file"): found = find_images(path)
    assert len(found.parts["train"]) == 8 + 12 and found.parts["train"].labels.tolist() == [0] * 16 + [1] * 4


PLACES = ["set", "set/train", "set/test", *(f"set/{part}/{kind}" for part in ("train", "test") for kind in ("cat", "dog")), "set/train/cat/deep", "out", "out/deep"]


@settings(max_examples=60, deadline=None)
@given(links=st.lists(st.tuples(st.sampled_from(PLACES[3:]), st.sampled_from("abz"), st.sampled_from([*PLACES, "out/0.png", "set/train/cat/0.png", "out/deep/0.png"])), max_size=5))
def test_any_links(tmp_path_factory, links):
    "Whatever links to whatever: refused, or every real file is met once, under one class, and the real ones under their own."
    root = tmp_path_factory.mktemp("links").resolve()
    for place in PLACES[3:]:
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "0.png").write_bytes(b"x")
    for holder, name, target in links:
        link = root / holder / (name + Path(target).suffix)
        if not link.is_symlink(): link.symlink_to(root / target)
    try: found = walk_folder(root / "set").members
    except DataError as error:
        assert "the same by a link" in str(error)
        return
    files = [member for member in found if member.endswith(".png")]
    real = [os.path.realpath(root / "set" / member) for member in files]
    assert len(set(real)) == len(files)
    for member, path in zip(files, real):
        if path.startswith(f"{root}/set/"): assert split_member(member) == split_member(os.path.relpath(path, root / "set"))
    assert {path for path in real if "/set/" in path} == {str(root / place / "0.png") for place in PLACES[3:] if place.startswith("set")}


def test_special_files_do_not_hang(tmp_path):
    path = write_folder(tmp_path, contents())
    os.mkfifo(path / "train/ant/pipe.png")
    (path / "train/ant/zero.png").symlink_to("/dev/zero")
    with pytest.warns(UserWarning, match="2 x link or special file"): assert len(find_images(path).parts["train"]) == 8


def test_links_inside_a_zip_are_named(tmp_path):
    path = write_zip(tmp_path / "set.zip", contents())
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("train/ant/link.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "0.png")
    with pytest.warns(UserWarning, match="train/ant/link.png is a link inside a zip"): assert len(find_images(path).parts["train"]) == 8


# --- transparency and depth ---

def drawn(mode: str, seed: int) -> Image.Image:
    "A black drawing on transparent."
    ink = Image.fromarray(pixels(seed, channels=1))  # opacity
    if mode == "P":
        image = Image.fromarray((pixels(seed, channels=1) // 128)).convert("P")
        image.putpalette([0] * 6)
        image.info["transparency"] = 0
        return image
    image = Image.new(mode, ink.size)
    image.putalpha(ink)
    return image


@pytest.mark.parametrize("mode, kind", [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("P", "PNG"), ("P", "GIF")])
@pytest.mark.parametrize("memory", [2 ** 30, 0])
def test_black_drawings_are_seen_on_white(tmp_path, mode, kind, memory):
    options = dict(transparency=0) if mode == "P" else dict(lossless=True, exact=True) if kind == "WEBP" else {}
    files = {name: encoded(drawn(mode, seed), kind, **options) for seed, name in enumerate(contents())}
    path = write_folder(tmp_path, {f"{name[:-4]}.{kind.lower()}": content for name, content in files.items()})
    data = load(path, memory=memory)
    seen = next(data.test.batches(9, shuffle=False, epochs=1))[0] * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)
    seen = (seen * 255).round()
    ink = pixels(8, channels=1).astype(float)
    expected = np.where(ink >= 128, 0, 255) if mode == "P" else 255 - ink
    assert np.abs(seen[0, 0].numpy() - expected).max() <= 1 and (seen[:, 0] == seen[:, -1]).all()
    assert data.shape[0] == (1 if mode == "LA" else 3)
    with pytest.raises(DataError, match=r"one and the same colour \(0( 0 0)? of 255\).*background='black'"): load(path, memory=memory, background="black")


def test_white_drawings_need_a_black_background(tmp_path):
    def white(seed): return Image.merge("LA", (Image.new("L", (8, 8), 255), Image.fromarray(pixels(seed, channels=1))))
    path = write_folder(tmp_path, {name: encoded(white(seed)) for seed, name in enumerate(contents())})
    with pytest.raises(DataError, match="give background='black'"): load(path)
    assert np.array_equal(load(path, background="black").train.images[0, 0], pixels(0, channels=1))
    with pytest.raises(ParameterError, match="background must be a colour"): load(path, background="blck")


@pytest.mark.parametrize("alpha", [0, 77, 255])
def test_constant_transparency_is_dropped(alpha):
    image = Image.fromarray(np.dstack([pixels(1), np.full((8, 8), alpha, dtype=np.uint8)]))
    assert np.array_equal(open_image(encoded(image), "a"), pixels(1))


def test_a_colour_that_stands_for_transparent():
    "The tRNS chunk of grey, coloured and 16-bit PNG files."
    grey = np.array([[0, 9, 200]], dtype=np.uint8)
    assert np.asarray(open_image(encoded(Image.fromarray(grey), transparency=9), "a")).tolist() == [[0, 255, 200]]
    colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert np.asarray(open_image(encoded(colour, transparency=(4, 5, 6)), "a")).tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("kind, order", [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">"), ("PPM", "<")])
def test_sixteen_bits_are_scaled(kind, order):
    values = np.array([[0, 128, 129, 257, 25_700, 40_000, 65_535]], dtype=f"{order}u2")
    if order == ">": image = Image.frombytes("I;16B", (7, 1), values.tobytes())
    else: image = Image.fromarray(values)
    content = encoded(image, kind)
    result = np.asarray(open_image(content, "a"))
    assert result.tolist() == [[0, 0, 1, 1, 100, 156, 255]] and image_form(content, "a") == (1, 7, True)


@pytest.mark.parametrize("values, right", [([0.0, 0.25, 1.0], [0, 64, 255]), ([0.0, 17.0, 255.0], None), ([-0.1, 0.5, 1.0], None), ([np.nan, 0.5, 1.0], None)])
def test_floating_point_pixels(values, right):
    content = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    if right: assert np.asarray(open_image(content, "a")).tolist() == [right]
    else:
        with pytest.raises(DataError, match="scan.tif has pixels of 32 bits"): open_image(content, "scan.tif")
    with pytest.raises(DataError, match="from 0 to 70000"): open_image(encoded(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)), "TIFF"), "a")


def test_other_colour_spaces():
    red = Image.new("RGB", (4, 4), (200, 30, 20))
    for mode, kind, off in (("CMYK", "JPEG", 4), ("CMYK", "TIFF", 0), ("YCbCr", "JPEG", 4), ("YCbCr", "TIFF", 4), ("P", "PNG", 0), ("P", "GIF", 0), ("P", "BMP", 0)):
        image = red.convert(mode) if mode != "P" else red.convert("P", palette=Image.Palette.ADAPTIVE)
        assert np.abs(np.asarray(open_image(encoded(image, kind), f"{mode} {kind}")).astype(int) - (200, 30, 20)).max() <= off
    bits = Image.fromarray(np.array([[True, False, True]]))
    for kind in ("PNG", "BMP", "TIFF", "PPM", "GIF"): assert np.asarray(open_image(encoded(bits, kind), kind).convert("L")).tolist() == [[255, 0, 255]]


@pytest.mark.parametrize("count", [1, 3, 7, 1000])
@pytest.mark.parametrize("value", range(0, 256, 5))
def test_constant_channels_have_no_tiny_deviation(count, value):
    assert channel_statistics(torch.full((count, 1, 3, 3), value, dtype=torch.uint8))[1] == (1.0,)


def test_a_training_set_without_variance_is_refused(tmp_path):
    grey = {name: encoded(Image.new("RGB", (8, 8), (7, 8, 9))) for name in contents()}
    for memory in (2 ** 30, 0):
        with pytest.raises(DataError, match=r"one and the same colour \(7 8 9 of 255\)"): load(write_folder(tmp_path / "a", grey), memory=memory)
    red = {name: encoded(Image.merge("RGB", [Image.fromarray(pixels(i, channels=1)), *[Image.new("L", (8, 8))] * 2])) for i, name in enumerate(contents())}
    assert load(write_folder(tmp_path / "b", red)).std[1:] == (1.0, 1.0)  # one channel that varies is enough


# --- classes and parts ---

@pytest.mark.parametrize("zipped", [False, True])
def test_one_class_is_refused_with_what_was_found(tmp_path, zipped):
    files = {name.replace("train/", "train/images/").replace("test/", "test/images/"): content for name, content in contents(classes=("cat", "dog")).items()}
    with pytest.raises(DataError, match="one class only, 'images', .* train/images holds the folders cat, dog: .* move them up, to train/cat"):
        find_images(write_set(tmp_path, files, zipped))
    with pytest.raises(DataError, match="one class only, 'cat', .* give each class a folder of its own"):
        find_images(write_set(tmp_path / "one", {name: content for name, content in contents(classes=("cat",)).items()}, zipped) if not zipped
                    else write_zip(tmp_path / "one.zip", contents(classes=("cat",))))
    with pytest.raises(ParameterError, match="classes must be a whole number of at least 2"): load_data("digits", classes=1)


def test_the_folder_inside_is_named(tmp_path):
    write_folder(tmp_path / "down/pets", contents())
    with pytest.raises(DataError, match=f"pets in it does: give {tmp_path / 'down' / 'pets'}"): find_images(tmp_path / "down")


@pytest.mark.parametrize("zipped", [False, True])
def test_classes_of_the_parts(tmp_path, zipped):
    with pytest.raises(DataError, match=r"class 'Ant' of .* is in test/ but not in train/; did you mean 'ant'\?"):
        find_images(write_set(tmp_path, {**contents(), "test/Ant/0.png": encoded(Image.fromarray(pixels(0)))}, zipped))
    fewer = {name: content for name, content in contents().items() if not name.startswith("test/bee")}
    path = write_zip(tmp_path / "fewer.zip", fewer) if zipped else write_folder(tmp_path / "fewer", fewer)
    with pytest.warns(UserWarning, match="test/ has no images of 1 of 2 classes, such as bee"): assert find_images(path).classes == ("ant", "bee")


@pytest.mark.parametrize("zipped", [False, True])
def test_nothing_is_left_out_without_a_word(tmp_path, zipped):
    picture = encoded(Image.fromarray(pixels(0)))
    silent = {f"train/{name}": b"x" for name in ("ant/Thumbs.db", "ant/.DS_Store", ".ipynb_checkpoints/0.png", "ant/.ipynb_checkpoints/0.png", "ant/@eaDir/0.png",
                                                 "__MACOSX/ant/._0.png", "desktop.ini")}
    told = {"train/ant/a.heic": b"x", "train/ant/b.HEIC": b"x", "test/bee/c.svg": b"x", "train/readme.txt": b"x", "train/bee/noname": b"x", "train/0.png": picture}
    path = write_set(tmp_path, {**contents(), **silent}, zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_images(path).classes == ("ant", "bee") and len(find_images(path).parts["train"]) == 8
    path = write_set(tmp_path / "told", {**contents(), **silent, **told}, False) if not zipped else write_zip(tmp_path / "told.zip", {**contents(), **silent, **told})
    with pytest.warns(UserWarning) as caught: assert len(find_images(path).parts["train"]) == 8
    assert len(caught) == 1
    for text in ("2 x .heic (such as train/ant/", "1 x .svg (such as test/bee/c.svg)", "2 x file beside the class folders", "1 x file without suffix", ".jfif"):
        assert text in str(caught[0].message)


@pytest.mark.parametrize("zipped", [False, True])
def test_every_stated_ending_is_read(tmp_path, zipped):
    made = {".jpg": "JPEG", ".JPEG": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".GIF": "GIF", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".TIFF": "TIFF",
            ".ppm": "PPM", ".pnm": "PPM", ".png": "PNG"}
    from PIL import features
    if features.check("avif"): made[".avif"] = "AVIF"
    smooth = Image.fromarray(np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8).convert("RGB")
    files = {f"train/{kind}/0{suffix}": encoded(smooth, format) for suffix, format in made.items() for kind in ("a", "b")}
    files |= {"test/a/0.png": encoded(smooth), "train/a/directory.jpg/1.png": encoded(smooth)}
    with pytest.warns(UserWarning, match="test/ has no images of 1 of 2"): data = load(write_set(tmp_path, files, zipped))
    assert len(data.train) == 2 * len(made) + 1
    assert max((image.float() - data.test.images[0].float()).abs().mean() for image in data.train.images) < 4


def test_a_phones_picture_of_two_frames(tmp_path):
    "Phones write JPEG files with a second picture inside, which PIL calls MPO."
    frames = [Image.fromarray(pixels(i)) for i in range(2)]
    content = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert np.array_equal(open_image(content, "a"), open_image(encoded(frames[0], "JPEG"), "a"))


def test_the_first_frame_counts():
    frames = [Image.fromarray(pixels(i) // 64 * 64) for i in range(3)]
    for kind, options in (("GIF", {}), ("TIFF", {}), ("WEBP", dict(lossless=True)), ("PNG", {})):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.abs(np.asarray(open_image(content, "a")).astype(int) - np.asarray(frames[0])).max() <= 1, kind


# --- orientation ---

@pytest.mark.parametrize("turn", range(1, 10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_photographs_stand_upright(turn, kind):
    note = Image.Exif()
    note[0x0112] = turn
    content = encoded(Image.fromarray(pixels(1, 8, 16)), kind, exif=note)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(open_image(content, "a"), expected) and image_form(content, "a")[:2] == expected.size[::-1]
    assert expected.size == ((8, 16) if 5 <= turn <= 8 else (16, 8))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("memory", [2 ** 30, 0])
def test_orientation_in_every_reader(tmp_path, zipped, memory):
    note = Image.Exif()
    note[0x0112] = 6
    up = Image.fromarray(pixels(1, 16, 8))
    lying = up.transpose(Image.Transpose.ROTATE_90)
    files = {f"{part}/{kind}/{i}.png": encoded(up) if i else encoded(lying, exif=note) for part in ("train", "test") for kind in ("a", "b") for i in range(2)}
    data = load(write_set(tmp_path, files, zipped), memory=memory)
    assert data.shape == (3, 16, 8)
    x, _ = next(data.train.batches(4, shuffle=False, epochs=1))
    assert all(torch.equal(image, x[0]) for image in x)


def test_a_damaged_note_does_not_stop_a_picture():
    content = encoded(Image.fromarray(pixels(1)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x02\0\xff\xff\xff\xff\x01")
    assert open_image(content, "a").size == (8, 8)


# --- decoders, sizes, broken files ---

@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "IM", "JPEG2000", "DDS", "XBM"])
def test_other_decoders_are_not_started(tmp_path, kind, monkeypatch):
    import subprocess
    def refuse(*args, **options): raise AssertionError("a program was started")
    monkeypatch.setattr(subprocess, "check_call", refuse)
    image = Image.fromarray(pixels(1)) if kind != "XBM" else Image.new("1", (8, 8))
    path = write_folder(tmp_path, {**contents(), "train/ant/0.jpg": encoded(image, kind)})
    with pytest.raises(DataError, match="train/ant/0.jpg is not a readable image .*formats: JPEG, PNG"): load(path)


def huge_headers():
    "Files of some bytes that claim 50,000 x 50,000 pixels."
    side, small = 50_000, Image.new("RGB", (4, 4))
    png = encoded(small)
    import zlib
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    yield png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    bmp = encoded(small, "BMP")
    yield bmp[:18] + struct.pack("<ii", side, side) + bmp[26:]
    yield b"P6 50000 50000 255\n" + bytes(100)
    gif = encoded(small, "GIF")
    yield gif[:6] + struct.pack("<HH", side, side) + gif[10:]


@pytest.mark.parametrize("content", list(huge_headers()), ids=["PNG", "BMP", "PPM", "GIF"])
@pytest.mark.parametrize("limit", ["as it is", None])
def test_huge_images_are_refused_before_decoding(content, limit, monkeypatch):
    if limit is None: monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a user who has turned PIL's own check off
    for read in (open_image, image_form):
        with pytest.raises(DataError, match="big.jpg "): read(content, "big.jpg")


def test_a_zip_bomb_is_not_decompressed(tmp_path, monkeypatch):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in contents().items(): archive.writestr(name, content)
        with archive.open("train/ant/bomb.bmp", "w") as file:
            for _ in range(40): file.write(bytes(2 ** 20))
    bomb = find_images(path).parts["train"]
    index = [i for i in range(len(bomb)) if "bomb.bmp" in bomb.where(i)][0]
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nothing may be opened
    with pytest.raises(DataError, match=r"train/ant/bomb.bmp claims 41,943,040 bytes in [\d,]+ compressed ones"): bomb.read(index)


def lying_zip(path: Path, says: int) -> Path:
    "A zip whose directory gives another size for one member than its data has."
    files = {**contents(), "train/ant/lies.bmp": bytes(3 * 2 ** 20)}
    raw = bytearray(write_zip(path, files).read_bytes())
    at = raw.rindex(b"train/ant/lies.bmp") - 46
    raw[at + 24:at + 28] = struct.pack("<I", says)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("says, message", [(1000, "cannot be read"), (2 ** 31, "claims 2,147,483,648 bytes"), (4 * 2 ** 20, "cannot be read")])
def test_a_zip_that_lies_about_a_size(tmp_path, says, message):
    with pytest.raises(DataError, match=f"train/ant/lies.bmp {message}"): load(lying_zip(tmp_path / "set.zip", says))


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    path = write_folder(tmp_path, contents())
    with open(path / "train/ant/0.png", "r+b") as file: file.truncate(LARGEST_FILE + 1)  # a hole, no bytes on disk
    with pytest.raises(DataError, match="train/ant/0.png claims 536,870,913 bytes"): load(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("memory", [2 ** 30, 0])
def test_truncated_files_are_named(tmp_path, kind, keep, memory):
    whole = encoded(Image.fromarray(pixels(1, 40, 40)), kind)
    path = write_folder(tmp_path, {name: encoded(Image.fromarray(pixels(i, 40, 40))) for i, name in enumerate(contents())})
    (path / "train/bee/3.png").write_bytes(whole[:int(keep * len(whole))])
    with pytest.raises(DataError, match="train/bee/3.png is not a readable image"): list(load(path, memory=memory).train.batches(8, epochs=1))


def test_mixed_sizes_and_colours(tmp_path):
    path = write_folder(tmp_path, {**contents(), "train/ant/2.png": encoded(Image.fromarray(pixels(1, 9, 8)))})
    with pytest.raises(DataError, match="train/ant/2.png is 9x8, other images of this set are 8x8; give size="): load(path)
    (path / "train/ant/2.png").write_bytes(encoded(Image.fromarray(pixels(1, channels=1))))
    assert load(path).shape == (3, 8, 8)


# --- names ---

RAW = os.fsdecode(b"train/ant/caf\xe9 \xff.png")


@pytest.mark.parametrize("memory", [2 ** 30, 0])
def test_names_of_any_bytes(tmp_path, memory, capsys):
    path = tmp_path / os.fsdecode(b"se\xe9t")
    try: write_folder(path, {**contents(), RAW: encoded(Image.fromarray(pixels(50))), os.fsdecode(b"train/z\xe9/0.png"): encoded(Image.fromarray(pixels(51)))})
    except OSError: pytest.skip("this file system takes UTF-8 only")
    with pytest.warns(UserWarning, match="test/ has no images of 1 of 3"): data = load(path, memory=memory)
    assert len(data.train) == 10 and data.classes == ("ant", "bee", r"z\xe9") and torch.equal(data.train.labels[:5], torch.zeros(5).long())
    for text in (repr(data), data_signature(data), *data.classes): text.encode()
    files = find_images(path).parts["train"]
    assert any(r"caf\xe9 \xff.png" in files.where(i) for i in range(len(files)))
    (path / RAW).write_bytes(b"no image")
    with pytest.raises(DataError) as caught: list(load(path, memory=memory).train.batches(10, epochs=1))
    assert r"caf\xe9 \xff.png is not a readable image" in str(caught.value) and str(caught.value).encode()


def test_names_of_any_bytes_in_a_checkpoint(tmp_path):
    path = tmp_path / os.fsdecode(b"se\xe9t")
    try: write_folder(path, contents())
    except OSError: pytest.skip("this file system takes UTF-8 only")
    for _ in range(2): trained(load(path), tmp_path / "run.pt")
    for damage in ("test", "train"):
        (path / damage).rename(path / "hidden")
        with pytest.raises(DataError) as caught: load(path)
        str(caught.value).encode()
        (path / "hidden").rename(path / damage)


@pytest.mark.parametrize("zipped", [False, True])
def test_two_spellings_are_one_class(tmp_path, zipped):
    one, other = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    files = {**contents(classes=("ant", one)), f"train/{other}/7.png": encoded(Image.fromarray(pixels(77))), f"train/{other}/0.png": encoded(Image.fromarray(pixels(78)))}
    path = write_set(tmp_path, files, zipped)
    if not zipped and len(os.listdir(path / "train")) < 3: pytest.skip("this file system has one spelling only")
    found = find_images(path)
    assert found.classes == ("ant", one) and found.parts["train"].labels.tolist() == [0] * 4 + [1] * 6
    assert torch.equal(load(path).train.images, load(path).train.images) and len({found.parts["train"].read(i) for i in range(10)}) == 10


def test_names_in_a_zip_without_a_stated_encoding(tmp_path):
    "macOS writes UTF-8 without saying so; others wrote the code page of DOS."
    for raw, name in (("café".encode(), "café"), (b"caf\x82", "café"), (unicodedata.normalize("NFD", "café").encode(), "café")):
        placeholder = "x" * len(raw)
        path = write_zip(tmp_path / "set.zip", contents(classes=("ant", placeholder)))
        path.write_bytes(path.read_bytes().replace(placeholder.encode(), raw))
        assert find_images(path).classes == ("ant", name) and len(load(path).train) == 8


def test_backslashes_and_a_leading_dot_in_a_zip(tmp_path):
    for number, change in enumerate((lambda name: name.replace("/", "\\"), lambda name: f"./{name}")):
        path = write_zip(tmp_path / f"{number}.zip", {change(name): content for name, content in contents().items()})
        assert len(load(path).train) == 8


def test_case_makes_two_classes(tmp_path):
    path = write_zip(tmp_path / "set.zip", contents(classes=("Cat", "cat")))
    assert find_images(path).classes == ("Cat", "cat")


# --- arrays ---

def test_labels_out_of_range_and_empty_parts():
    def store(*labels): return Memory(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64))
    for bad in ((0, 2), (-1, 1)):
        with pytest.raises(DataError, match="the test part has labels from"): ImageSet({"train": store(0, 1), "test": store(*bad)}, ("a", "b"))
    with pytest.raises(DataError, match="the test part of this set holds no images"): ImageSet({"train": store(0, 1), "test": store()}, ("a", "b"))


@pytest.mark.parametrize("record", [{"data": np.zeros((2, 768), np.uint8), "labels": [1, 1001]}, {"data": np.zeros((2, 768), np.uint8), "labels": [[1], [2]]},
                                    {"data": np.zeros((2, 767), np.uint8), "labels": [1, 2]}, {"data": np.zeros((0, 768), np.uint8), "labels": []},
                                    {"data": np.zeros((2, 768), np.uint8), "labels": [0, 2]}, [1, 2], {"data": "no", "labels": "no"}])
def test_batches_of_wrong_content(tmp_path, record):
    import pickle
    (tmp_path / "train_data_batch_1").write_bytes(pickle.dumps(record))
    with pytest.raises(DataError, match="train_data_batch_1"): imagenet16(Request(path=str(tmp_path)))


# --- checkpoints ---

def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))


def trained(data, path, **options): return train(net(), data, steps=2, batch_size=4, lr=0.01, checkpoint=path, progress=False, **options)


@pytest.mark.parametrize("memory", [2 ** 30, 0])
def test_a_training_checkpoint_knows_its_images(tmp_path, memory):
    "Other pictures under the same names, with the same labels."
    path = write_folder(tmp_path / "set", contents())
    trained(load(path, memory=memory), tmp_path / "run.pt")
    before = data_signature(load(path, memory=memory))
    trained(load(path, memory=memory), tmp_path / "run.pt")  # the same images: accepted
    for part in ("train", "test"):
        old = (path / part / "bee/1.png").read_bytes()
        changed = pixels(1000)
        (path / part / "bee/1.png").write_bytes(encoded(Image.fromarray(changed)))
        data = load(path, memory=memory)
        assert data_signature(data) != before
        with pytest.raises(CheckpointError, match=rf"run.pt belongs to another run: data was .*{part} \d labels (\w+) images \w+.*, now .*{part} \d labels \1 images "):
            trained(data, tmp_path / "run.pt")
        (path / part / "bee/1.png").write_bytes(old)
    trained(load(path, memory=memory), tmp_path / "run.pt")


def test_one_pixel_is_another_set():
    data = load_data("synthetic")
    before = data_signature(data)
    images = data.train.store.images
    assert data_signature(load_data("synthetic")) == before
    images[int(data.valid.indices[0]), 0, 0, 0] ^= 1
    try: assert data_signature(data) != before
    finally: images[int(data.valid.indices[0]), 0, 0, 0] ^= 1
    assert data_signature(data) == before
    assert data_signature(load_data("synthetic", seed=1)) != before != data_signature(data.merged())


def test_a_checkpoint_from_before_is_refused(tmp_path):
    from sparsedarts.files import load_checkpoint, save_checkpoint
    data = load_data("synthetic", size=8)
    def again(): return train(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), data, steps=2, checkpoint=tmp_path / "run.pt", progress=False)
    again()
    state = load_checkpoint(tmp_path / "run.pt")
    state["configuration"]["data"] = "synthetic, 500 training images of (3, 8, 8), labels 1a2b3c4d, augmentation {}"
    save_checkpoint(tmp_path / "run.pt", state)
    with pytest.raises(CheckpointError, match="data was synthetic, 500 training images"): again()


def two_sets(place: Path) -> list:
    "The same name, sizes and labels; other pictures."
    import dataclasses
    sets = [load_data(f"imagefolder:{write_folder(place / str(seed), contents(train=8, first=seed))}") for seed in (0, 100)]
    assert torch.equal(sets[0].train.labels, sets[1].train.labels)
    return [dataclasses.replace(data, name="pictures") for data in sets]


def runs():
    import sparsedarts as sd
    from sparsedarts.training.regimes import iterative_magnitude
    small = dict(channels=4, layers=3, batch_size=4, progress=False, device="cpu")
    def pruned(data, path):
        model = net()
        sd.sparsify(model, mode="hard")
        return iterative_magnitude(model, data, "0.5", rate=0.5, steps=2, batch_size=4, progress=False, device="cpu", checkpoint=path)
    yield "training", lambda data, path: trained(data, path, device="cpu")
    yield "retraining", lambda data, path: sd.retrain("DARTS_V2", data, "laptop", epochs=1, checkpoint=path, **small)
    yield "search", lambda data, path: sd.search("darts", data, steps=1, order="first", checkpoint=path, **small)
    yield "random", lambda data, path: sd.search("random", data, steps=1, candidates=1, checkpoint=path, **small)
    yield "phases", lambda data, path: sd.search("dass", data, pretrain_epochs=1, prune_epochs=0, finetune_epochs=0, keep="0.5", order="first", checkpoint=path, **small)
    yield "regime", pruned


@pytest.mark.parametrize("name, run", list(runs()), ids=[name for name, _ in runs()])
def test_every_checkpoint_knows_its_images(tmp_path, name, run):
    mine, other = two_sets(tmp_path)
    for _ in range(2): run(mine, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"belongs to another run: data was train \d+ labels (\w+) images \w+.*, now train \d+ labels \1 images"): run(other, tmp_path / "run")
