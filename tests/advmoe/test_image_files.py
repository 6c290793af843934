# SPDX-License-Identifier: Apache-2.0
"""Tiny-ImageNet and ImageNet from their folders: layouts, cuts, the cache, damaged files, and decoding ahead of time."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import unpacked

from advmoe import cli
from advmoe.data import Batches, BatchStream, DataError, FileSplit, TensorSplit, batches_in_order, load, stream_generator
from advmoe.data.color import color_jitter
from advmoe.data.imagenet import CACHE
from advmoe.data.loader import decoded

CLASSES = ("n02", "n01", "n03")  # wnids.txt need not be sorted


def write_image(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (8, 8, 3) if mode == "RGB" else (8, 8)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture()
def tiny(tmp_path: Path) -> Path:
    """Three classes of eight training and two test images; returns the folder that holds the data set's."""
    root = tmp_path / "tiny-imagenet-200"
    for c, wnid in enumerate(CLASSES):
        for i in range(8):
            write_image(
                root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=10 * c + i, mode="L" if i == 3 else "RGB"
            )
    (root / "wnids.txt").write_text("\n".join(CLASSES) + "\n")
    lines = []
    for i, wnid in enumerate(CLASSES * 2):
        write_image(root / "val" / "images" / f"val_{i}.JPEG", seed=100 + i)
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture()
def imagenet(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("val", 2)):
        for c, wnid in enumerate(("n07", "n05")):
            for i in range(count):
                write_image(tmp_path / split / wnid / f"{wnid}_{i}.JPEG", (300 + 20 * i, 280), seed=10 * c + i)
    return tmp_path


def test_tiny_imagenet_reads_its_own_layout(tiny: Path) -> None:
    for folder in (tiny, tiny / "tiny-imagenet-200"):
        data = load("tiny_imagenet", folder, validation=0)
        assert (len(data.train), len(data.test), data.num_classes, data.image_size) == (24, 6, 3, 64)
    assert data.epsilon == pytest.approx(2 / 255) and data.step_size < data.epsilon
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert data.test.labels.tolist() == [1, 0, 2] * 2  # n02, n01, n03 in the order of their names
    with Image.open(tiny / "tiny-imagenet-200" / "train" / "n02" / "images" / "n02_3.JPEG") as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert isinstance(data.train, TensorSplit) and torch.equal(data.train.images[11], expected)
    assert data.train.flip and data.train.padding == 4 and all(0.4 < m < 0.6 for m in data.mean)


def test_images_are_decoded_once(tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    root = tiny / "tiny-imagenet-200"
    first = load("tiny_imagenet", tiny)
    calls: list[object] = []
    monkeypatch.setattr("advmoe.data.imagenet.decoded", lambda split: calls.append(split) or decoded(split))
    again = load("tiny_imagenet", tiny)
    assert not calls and torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.images, again.test.images)
    write_image(root / "train" / "n01" / "images" / "n01_0.JPEG", seed=77)  # another file: made anew
    os.utime(root / "train" / "n01" / "images" / "n01_0.JPEG", ns=(1, 1))
    load("tiny_imagenet", tiny)
    assert len(calls) == 2
    (root / CACHE).write_bytes((root / CACHE).read_bytes()[:-5000])
    with caplog.at_level(logging.WARNING, "advmoe"):
        torn = load("tiny_imagenet", tiny)
    assert "cannot be read" in caplog.text and len(calls) == 4
    assert torch.equal(torn.test.images, first.test.images)
    assert not list(root.glob("*.tmp"))


def test_what_a_killed_process_left_of_a_cache_is_removed(tiny: Path) -> None:
    old, young = (tiny / "tiny-imagenet-200" / f"{CACHE}.{pid}.tmp" for pid in (1, 2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    load("tiny_imagenet", tiny)
    assert not old.exists() and young.exists()  # which another process may be writing


def test_a_cache_that_cannot_be_written_is_done_without(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(load("tiny_imagenet", tiny).test) == 6
    assert {each.name for each in (tiny / "tiny-imagenet-200").iterdir()} == {"train", "val", "wnids.txt"}


def _break(root: Path, what: str) -> None:
    image = root / "train" / "n01" / "images" / "n01_2.JPEG"
    annotations = root / "val" / "val_annotations.txt"
    if what == "truncated":
        image.write_bytes(image.read_bytes()[:700])
    elif what == "no image":
        image.write_text("<html>not found</html>")
    elif what == "size":
        write_image(image, (32, 64))
    elif what == "no class":
        for each in (root / "train" / "n03" / "images").iterdir():
            each.unlink()
    elif what == "no folder":
        (root / "train" / "n03").rename(root / "elsewhere")
    elif what == "annotations":
        annotations.unlink()
    elif what == "unknown":
        annotations.write_text(annotations.read_text() + "val_9.JPEG\tn99\t0\t0\t1\t1\n")
    elif what == "test image":
        (root / "val" / "images" / "val_4.JPEG").unlink()
    elif what == "wnids":
        (root / "wnids.txt").write_text("")
    elif what == "all":
        (root / "wnids.txt").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"n01_2.JPEG cannot be read as an image \(.*\); unpack the archive again"),
        ("no image", r"n01_2.JPEG cannot be read as an image \(cannot identify"),
        ("size", r"n01_2.JPEG has 32x64 pixels, expected 64x64"),
        ("no class", r"train/n03/images has no images"),
        ("no folder", r"train/n03/images cannot be read \(No such file"),
        ("annotations", r"val_annotations.txt cannot be read"),
        ("unknown", r"val_annotations.txt: expected a file and a class of wnids.txt in each line, got 'val_9.JPEG.tn99"),
        ("test image", r"val/images/val_4.JPEG and 0 more are not there"),
        ("wnids", r"wnids.txt names no class"),
        ("all", r"has no wnids.txt and train, nor has a tiny-imagenet-200 in it; pass --data-dir with Tiny-ImageNet"),
    ],
)
def test_damaged_tiny_imagenet(tiny: Path, what: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny / "tiny-imagenet-200"
    _break(root, what)
    with pytest.raises(DataError, match=rf"^tiny_imagenet: .*{message}"):
        load("tiny_imagenet", tiny)
    assert not (root / CACHE).exists() and not list(root.glob("*.tmp"))
    run = tiny / "run"
    assert cli.main(["train", "--data", "tiny_imagenet", "--data-dir", str(tiny), "--out", str(run)]) == 2
    assert "advmoe: tiny_imagenet: " in capsys.readouterr().err and not (run / "config.yaml").exists()


def test_imagenet_is_cut_from_files(imagenet: Path) -> None:
    data = load("imagenet", imagenet, validation=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (11, 1, 4)
    assert (data.num_classes, data.image_size, data.test.labels.tolist()) == (2, 224, [0, 1, 0, 1])
    images, labels = data.test.batch(torch.tensor([3, 0]))
    assert images.shape == (2, 3, 224, 224) and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [1, 0] and images.min() >= 0 and images.max() <= 1
    with Image.open(imagenet / "val" / "n07" / "n07_1.JPEG") as file:  # 320×280
        small = file.convert("RGB").resize((round(320 * 256 / 280), 256), Image.Resampling.BILINEAR)
    left = (small.width - 224) // 2
    expected = torch.from_numpy(np.array(small.crop((left, 16, left + 224, 240)))).permute(2, 0, 1).float() / 255
    assert (images[0] - expected).abs().mean() < 0.03


def test_the_first_test_images_are_of_all_classes(imagenet: Path) -> None:
    (imagenet / "val" / "n07" / "n07_1.JPEG").unlink()  # of the last class
    write_image(imagenet / "val" / "n05" / "n05_2.JPEG", (300, 280), seed=1)
    test = load("imagenet", imagenet).test
    assert test.labels.tolist() == [0, 1, 0, 0]
    assert [Path(file).stem for file in test.files] == ["n05_0", "n07_0", "n05_1", "n05_2"]


def test_training_cuts_are_a_function_of_the_generator(imagenet: Path) -> None:
    train = load("imagenet", imagenet, validation=0).train
    index = torch.arange(6)
    first, again, other = (train.batch(index, stream_generator(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_files_have_their_colours_changed_in_training(imagenet: Path) -> None:
    train = load("imagenet", imagenet, validation=0).train
    index, part, generator = torch.arange(6), torch.tensor([1, 4]), stream_generator
    changed = train.augmented(None, 0, (0.0,) * 3, 0.3)
    drawn = generator(0)
    plain = train.batch(index, drawn)[0]  # draws as before, the colours behind it
    expected = color_jitter(plain, drawn, 0.3)
    images = changed.batch(index, generator(0))[0]
    assert torch.equal(images, expected) and not torch.equal(images, plain)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(changed.batch(index, generator(0), part)[0], expected[part])
    assert torch.equal(changed.select(index).batch(index, generator(0))[0], expected)
    assert torch.equal(changed.batch(index)[0], train.batch(index)[0])  # as they are where nothing is drawn
    for given, name in (((2, 0), "shift"), ((None, 8), "cutout")):
        with pytest.raises(ValueError, match=f"{name}: of images in memory; FileSplit reads files"):
            train.augmented(*given, (0.0,) * 3, 0.3)


def test_a_cut_is_where_it_says(tmp_path: Path) -> None:
    """A ramp from left to right and one from top to bottom, in two channels."""
    down, across = np.mgrid[0:256, 0:256].astype(np.uint8)
    Image.fromarray(np.stack([across, down, across * 0], 2)).save(tmp_path / "ramp.png")
    split = FileSplit("ramp", tmp_path, np.array(["ramp.png"]), torch.zeros(1, dtype=torch.int64), 128, resize=256)
    middle = split.pixels(torch.tensor([0]))[0].int()
    assert middle[0, 0, :2].tolist() == [64, 64] and middle[127, 127, :2].tolist() == [191, 191]
    mirrored = 0
    for seed in range(40):
        cut = split.pixels(torch.tensor([0]), stream_generator(seed))[0].int()
        u, v, mirror = torch.rand(3, generator=stream_generator(seed)).tolist()
        row = cut[0, :, 0] if mirror >= 0.5 else cut[0, :, 0].flip(0)
        mirrored += mirror < 0.5
        assert abs(int(row[0]) - 128 * u) <= 1 and int(row[127] - row[0]) in (126, 127, 128)
        assert abs(int(cut[0, 0, 1]) - 128 * v) <= 1
    assert 10 < mirrored < 30


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named(imagenet: Path, workers: int) -> None:
    (imagenet / "val" / "n05" / "n05_1.JPEG").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(
        DataError, match=r"^imagenet: .*n05_1.JPEG cannot be read as an image \([^\n]*\); unpack the archive again$"
    ):
        list(batches_in_order(load("imagenet", imagenet).test, 1, workers))


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (("train", "val"), "has no folder train and no val; pass --data-dir with the folder that holds"),
        (("val",), "has no folder val;"),
        (("val/n05",), "val/n05 cannot be read"),
        (("train/n05", "train/n07"), "has no classes"),
    ],
)
def test_missing_folders_of_imagenet(imagenet: Path, remove: tuple[str, ...], message: str) -> None:
    for each in remove:
        (imagenet / each).rename(imagenet / each.replace("/", "-").replace("train", "gone-t").replace("val", "gone-v"))
    with pytest.raises(DataError, match=message):
        load("imagenet", imagenet)
    with pytest.raises(DataError, match="no folder given"):
        load("imagenet")


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_change_nothing(imagenet: Path, workers: int) -> None:
    train = load("imagenet", imagenet, validation=0).train
    here, ahead = (BatchStream(train, Batches(12, 4, 0, "a"), True, n) for n in (0, workers))
    for _ in range(5):
        for a, b in zip(here.next(), ahead.next(), strict=True):
            assert torch.equal(a, b)
        assert here.state_dict() == ahead.state_dict()  # what was taken, not what was made
    place = here.state_dict()
    expected = here.next()[0]
    ahead.next()
    ahead.load_state_dict(place)  # back by one
    assert torch.equal(ahead.next()[0], expected)
    ahead.close()
    parts = [torch.cat([images for images, _ in batches_in_order(train, 5, n)]) for n in (0, workers)]
    assert torch.equal(*parts) and len(parts[0]) == 12


def test_decoding_in_processes_keeps_the_order(tiny: Path) -> None:
    images = load("tiny_imagenet", tiny, validation=0).train.images
    root = tiny / "tiny-imagenet-200"
    files = np.array([f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in sorted(CLASSES) for i in range(8)])
    many = FileSplit("many", root, np.tile(files, 60), torch.zeros(1440, dtype=torch.int64), 64)
    assert torch.equal(decoded(many, 2).permute(0, 3, 1, 2), images.repeat(60, 1, 1, 1))


def test_trained_and_evaluated_from_files(imagenet: Path, tmp_path: Path) -> None:
    """The command on images in files, decoded here or in another process."""
    common = ["--arch", "resnet18", "--width", "4", "--kind", "s_dense", "--data", "imagenet", "--data-dir",
    str(imagenet),
              "--method", "standard", "--batch-size", "4", "--epochs", "1", "--workers", "1"]  # fmt: skip
    assert cli.main(["train", *common, "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["train", *common[:-1], "0", "--out", str(tmp_path / "same")]) == 0
    a, b = (torch.load(tmp_path / name / "last.pt")["model"] for name in ("run", "same"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert cli.main(["evaluate", str(tmp_path / "run"), "--attack", "pgd1", "--limit", "3"]) == 0


@pytest.mark.nightly
def test_twenty_classes_of_the_real_tiny_imagenet(tmp_path: Path) -> None:
    data = load("tiny_imagenet", unpacked("tiny_imagenet", tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (9_500, 500, 1_000)
    assert torch.equal(torch.bincount(data.test.labels), torch.full((20,), 50))
    assert data.mean == pytest.approx((0.4802, 0.4481, 0.3975), abs=0.03)  # of all 200 classes
    assert data.std == pytest.approx((0.2770, 0.2691, 0.2821), abs=0.02)
