# SPDX-License-Identifier: Apache-2.0
"""Data sets, augmentation and iterators."""

from __future__ import annotations

import colorsys
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import unpacked, write_cifar10

from advmoe.config import DataConfig
from advmoe.data import Batches, DataError, augment, color_jitter, list_data, load, stream_generator
from advmoe.data.color import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation


@pytest.fixture()
def archive(tmp_path: Path) -> Path:
    write_cifar10(tmp_path)
    return tmp_path


def test_digits() -> None:
    data = load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 143, 360)
    assert data.train.images.shape[1:] == (3, 8, 8) and data.image_size == 8 and data.num_classes == 10
    assert data.epsilon == 0.15 and not data.train.flip
    everything = {i.numpy().tobytes() for s in (data.train, data.validation, data.test) for i in s.images}
    assert len(everything) == 1797  # no image is in two splits
    images, labels = data.train.batch(torch.arange(4))
    assert torch.equal((images * 255).round().to(torch.uint8), data.train.images[:4])
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1 and labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_validation_is_held_out_by_the_seed(archive: Path) -> None:
    first, again, other = (load("cifar10", archive, seed=s) for s in (0, 0, 1))
    assert len(first.train) == 90 and len(first.validation) == 10
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    train = {image.numpy().tobytes() for image in first.train.images}
    held_out = {image.numpy().tobytes() for image in first.validation.images}
    assert not train & held_out and len(train | held_out) == 100


def test_cifar10_reads_the_official_layout(archive: Path) -> None:
    for folder in (archive, archive / "cifar-10-batches-py"):
        data = load("cifar10", folder, train_limit=50, test_limit=7)
        assert (len(data.train), len(data.test), data.image_size, data.train.padding) == (50, 7, 32, 4)
    raw = pickle.loads((archive / "cifar-10-batches-py" / "test_batch").read_bytes())
    assert torch.equal(data.test.images[3], torch.from_numpy(raw[b"data"][3].reshape(3, 32, 32)))
    assert data.epsilon == pytest.approx(8 / 255)


def test_cifar10_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder given; pass --data-dir"):
        load("cifar10")
    with pytest.raises(DataError, match=r"has no data_batch_1, .*test_batch; pass --data-dir"):
        load("cifar10", tmp_path)


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 200), ("test", 100)):
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        fine = [(7 * i) % 100 for i in range(count)]
        content = {b"data": data, b"fine_labels": fine, b"coarse_labels": [f // 5 for f in fine]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    for where in (tmp_path, folder):
        dataset = load("cifar100", where, validation=20)
        assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (180, 20, 100)
    assert dataset.num_classes == 100 and dataset.test.labels.tolist() == [(7 * i) % 100 for i in range(100)]
    (folder / "test").write_bytes(pickle.dumps({b"data": data, b"fine_labels": [100] * 100}))
    with pytest.raises(
        DataError, match=r"cifar100: .*test has a label in 'fine_labels' that is not one of 0 .. 99: 100, of image 0"
    ):
        load("cifar100", tmp_path)
    (folder / "train").unlink()
    with pytest.raises(
        DataError, match=r"cifar-100-python has no train; pass --data-dir with the CIFAR-100 python version"
    ):
        load("cifar100", tmp_path)


class Malice:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo reached > reached",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\x80\x02}", "cannot be read"),
        (pickle.dumps({b"data": Malice()}), "cannot be read .*system, which no batch of images needs"),
        (pickle.dumps([1, 2]), "has no images and labels"),
        (pickle.dumps({b"data": np.zeros((2, 3), np.uint8), b"labels": [0, 1]}), "holds no uint8 array"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}), "holds no uint8 array"),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}),
            "has a label in 'labels' that is not .* 10, of image 1",
        ),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}),
            "has not one label for each of its 2 .*, but 1 of them",
        ),
    ],
    ids=["empty", "truncated", "malicious", "list", "shape", "dtype", "label", "labels"],
)
def test_cifar10_damaged(archive: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(archive)
    (archive / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=rf"cifar10: .*data_batch_3 {message}(?s:.*); unpack the archive again$"):
        load("cifar10", archive)
    assert not (archive / "reached").exists()


def test_cifar10_reads_pickles_of_python_2(archive: Path) -> None:
    """The official files are: byte strings, and numpy under its old module names."""
    pixels = bytes(i % 251 for i in range(2 * 3072))
    content = (
        b"\x80\x02}(U\x06labels]K\x07aK\x02aU\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + len(pixels).to_bytes(4, "little") + pixels + b"tbu."
    )
    content = content.replace(b"]K\x07aK\x02a", b"](K\x07K\x02e")
    (archive / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    test = load("cifar10", archive).test
    assert test.labels.tolist() == [7, 2]
    assert test.images.flatten().tolist() == list(pixels)


def test_a_torn_file_of_the_archive(archive: Path) -> None:
    path = archive / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"test_batch cannot be read .*; unpack the archive again$"):
        load("cifar10", archive)
    path.unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-py has no test_batch; pass --data-dir with the CIFAR-10"):
        load("cifar10", archive)


def check_the_real_cifar10(folder: str | Path) -> None:
    data = load("cifar10", folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (49_500, 500, 10_000)
    assert torch.equal(torch.bincount(data.test.labels), torch.full((10,), 1000))
    assert torch.equal(torch.bincount(torch.cat([data.train.labels, data.validation.labels])), torch.full((10,), 5000))
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.01)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)


def test_the_real_cifar10() -> None:
    folder = os.environ.get("ADVMOE_CIFAR10_DIR")
    if folder is None:
        pytest.skip("ADVMOE_CIFAR10_DIR, the folder of CIFAR-10, is not set")
    check_the_real_cifar10(folder)


@pytest.mark.nightly
def test_the_real_cifar10_unpacked(tmp_path: Path) -> None:
    check_the_real_cifar10(unpacked("cifar10", tmp_path))


def test_limits_and_names(archive: Path) -> None:
    with pytest.raises(ValueError, match="train_limit: cifar10 has 90 training images beside 10"):
        load("cifar10", archive, train_limit=91)
    with pytest.raises(ValueError, match="test_limit: expected at least 1, got 0"):
        load("digits", test_limit=0)
    with pytest.raises(ValueError, match="train_limit: expected at least 1, got -3"):
        load("digits", train_limit=-3)
    with pytest.raises(ValueError, match="validation: expected at least 0, got -1"):
        load("digits", validation=-1)
    with pytest.raises(ValueError, match="limit: expected at least 1, got -5"):
        load("digits").test.first(-5)
    assert len(load("digits", validation=0).train) == 1437
    with pytest.raises(ValueError, match=r"data: .*did you mean cifar10"):
        load("cifar")
    assert list_data() == ["cifar10", "cifar100", "digits", "tiny_imagenet", "imagenet"]


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_augment_is_crop_and_mirror_of_each_image(flip: bool, channels_last: bool) -> None:
    images = torch.rand(32, 3, 8, 8)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    out = augment(images, stream_generator(0), padding=2, flip=flip)
    assert torch.equal(out, augment(images, stream_generator(0), padding=2, flip=flip))
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    padded = F.pad(images, (2, 2, 2, 2))
    mirrored = 0
    for image, moved in zip(padded, out, strict=True):
        crops = [image[:, t : t + 8, left : left + 8] for t in range(5) for left in range(5)]
        plain = any(torch.equal(moved, crop) for crop in crops)
        mirrored += not plain
        assert plain or any(torch.equal(moved, crop.flip(2)) for crop in crops)
    assert (6 <= mirrored <= 26) if flip else mirrored == 0


def test_every_offset_and_both_mirrorings_are_as_likely() -> None:
    """Of an image whose pixels are all different; 3 x 2 pixels of padding make 25 offsets."""
    image = torch.arange(1.0, 1 + 7 * 5).view(1, 1, 7, 5)
    count = 5000
    out = augment(image.expand(count, 1, 7, 5), stream_generator(3), padding=2)
    assert out.shape == (count, 1, 7, 5)
    padded = F.pad(image[0], (2, 2, 2, 2))
    variants = [
        crop.flip(2) if mirrored else crop
        for top in range(5)
        for left in range(5)
        for crop in [padded[:, top : top + 7, left : left + 5]]
        for mirrored in (False, True)
    ]
    found = (out[:, None] == torch.stack(variants)).flatten(2).all(2)
    assert (found.sum(1) == 1).all()
    expected = count / 50
    assert ((found.sum(0) - expected).abs() < 5 * expected**0.5).all()


def test_augment_equals_a_loop_over_images() -> None:
    """The offsets and mirrorings drawn, applied to one image after the other."""
    images = torch.rand(16, 3, 6, 9)
    out = augment(images, stream_generator(1), padding=3)
    generator = stream_generator(1)
    top, left = torch.randint(0, 7, (2, 16, 1), generator=generator).squeeze(2).tolist()
    mirrored = (torch.rand((16, 1), generator=generator) < 0.5).squeeze(1).tolist()
    for i, image in enumerate(F.pad(images, (3, 3, 3, 3))):
        crop = image[:, top[i] : top[i] + 6, left[i] : left[i] + 9]
        assert torch.equal(out[i], crop.flip(2) if mirrored[i] else crop)


def test_no_padding_and_no_mirror_is_no_change() -> None:
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(augment(images, stream_generator(0), padding=0, flip=False), images)


@pytest.mark.parametrize("channels_last", [True, False])
def test_cutout_fills_one_square_of_each_image(channels_last: bool) -> None:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    images, fill = torch.rand(64, 3, 8, 9).contiguous(memory_format=memory), (0.25, 0.5, 0.75)
    plain = augment(images, stream_generator(0), padding=2)
    cut = augment(images, stream_generator(0), padding=2, cutout=3, fill=fill)
    assert cut.is_contiguous(memory_format=memory)
    changed = (cut != plain).any(1)
    assert torch.equal(changed, (cut == torch.tensor(fill).view(1, 3, 1, 1)).all(1))
    corners = set()
    for each in changed:
        rows, columns = each.any(1).nonzero().squeeze(1), each.any(0).nonzero().squeeze(1)
        assert each.sum() == 9 and len(rows) == len(columns) == 3
        corners.add((int(rows[0]), int(columns[0])))
    assert {t for t, _ in corners} == set(range(6)) and {left for _, left in corners} == set(range(7))
    part = torch.arange(5, 20)  # one of several processes: the same squares
    own = augment(images[part], stream_generator(0), 2, part=part, total=64, cutout=3, fill=fill)
    assert torch.equal(own, cut[part])
    with pytest.raises(ValueError, match="cutout: expected at most the images' 8 pixels, got 9"):
        augment(images, stream_generator(0), cutout=9)


def test_a_split_is_augmented_as_it_is_told(archive: Path) -> None:
    data = load("cifar10", archive)
    index, generator = torch.arange(16), stream_generator
    split = data.train.augmented(2, 8, data.mean)
    images, _ = split.batch(index, generator(0))
    raw, _ = data.train.batch(index)
    assert torch.equal(images, augment(raw, generator(0), 2, cutout=8, fill=data.mean))
    assert torch.equal(split.select(index).batch(index, generator(0))[0], images)
    assert torch.equal(split.batch(index)[0], raw)  # as they are where nothing is drawn
    same = data.train.augmented(None, 0, data.mean).batch(index, generator(0))[0]
    assert torch.equal(same, data.train.batch(index, generator(0))[0])
    with pytest.raises(ValueError, match="cutout: expected at most the images' 32 pixels, got 33"):
        data.train.augmented(None, 33, data.mean)


# --- colours ---


def pixels(*rows: tuple[float, float, float]) -> torch.Tensor:
    """One image of a row of pixels, ``[1, 3, 1, n]``."""
    return torch.tensor(rows).T[None, :, None]


def test_brightness_contrast_and_saturation_by_hand() -> None:
    image = pixels((0.2, 0.4, 0.6), (1.0, 0.5, 0.0))
    two = torch.cat([image, image])
    bright = adjust_brightness(two, torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(bright[:1], pixels((0.1, 0.2, 0.3), (0.5, 0.25, 0.0)))
    torch.testing.assert_close(bright[1:], pixels((0.3, 0.6, 0.9), (1.0, 0.75, 0.0)))
    # grey values .2989 R + .587 G + .114 B
    first, second = 0.05978 + 0.2348 + 0.0684, 0.2989 + 0.2935
    mean = (first + second) / 2
    contrast = adjust_contrast(two, torch.tensor([0.0, 1.25]))
    torch.testing.assert_close(contrast[:1], torch.full((1, 3, 1, 2), mean))
    far = [[min(max(1.25 * v - 0.25 * mean, 0.0), 1.0) for v in row] for row in ((0.2, 0.4, 0.6), (1.0, 0.5, 0.0))]
    torch.testing.assert_close(contrast[1:], pixels(*[(r, g, b) for r, g, b in far]))
    saturation = adjust_saturation(two, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(saturation[:1], pixels((first,) * 3, (second,) * 3))
    half = [[(v + grey) / 2 for v in row] for row, grey in (((0.2, 0.4, 0.6), first), ((1.0, 0.5, 0.0), second))]
    torch.testing.assert_close(saturation[1:], pixels(*[(r, g, b) for r, g, b in half]))


def test_hue_is_that_of_colorsys() -> None:
    """All sextants, grey and black pixels, ties of the largest channels; turns either way and round the circle."""
    generator = stream_generator("hue")
    colours = [tuple(c) for c in torch.rand(60, 3, generator=generator, dtype=torch.float64).tolist()]
    colours += [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (0.7, 0.7, 0.1), (0.1, 0.7, 0.7), (0.7, 0.1, 0.7)]
    image = torch.tensor(colours, dtype=torch.float64).T[None, :, None]
    turns = torch.tensor([-0.5, -0.3, 0.0, 0.1, 0.5], dtype=torch.float64)
    turned = adjust_hue(image.expand(5, -1, -1, -1), turns)
    for turn, found in zip(turns.tolist(), turned, strict=True):
        hsv = [colorsys.rgb_to_hsv(*colour) for colour in colours]
        expected = [colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv]
        torch.testing.assert_close(found[:, 0].T, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_color_jitter_equals_a_loop_over_images() -> None:
    """The orders and amounts drawn, applied to one image after the other; all 24 orders come up."""
    images = torch.rand(200, 3, 4, 5, generator=stream_generator("images"))
    out = color_jitter(images, stream_generator(1), 0.3)
    generator = stream_generator(1)
    orders = torch.rand((200, 4), generator=generator).argsort(1)
    amounts = 0.3 * (2 * torch.rand((200, 4), generator=generator) - 1)
    assert amounts.abs().max() <= 0.3 and amounts.max() > 0.28 and amounts.min() < -0.28
    assert len({tuple(order) for order in orders.tolist()}) == 24
    changes = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for i, order in enumerate(orders.tolist()):
        image = images[i : i + 1]
        for which in order:
            amount = amounts[i, which : which + 1]
            image = changes[which](image, amount if which == 3 else 1 + amount)
        torch.testing.assert_close(out[i : i + 1], image, rtol=0, atol=1e-6)
    assert out.min() >= 0 and out.max() <= 1
    torch.testing.assert_close(color_jitter(images, stream_generator(1), 0.0), images, rtol=0, atol=1e-6)
    part = torch.arange(5, 20)  # one of several processes: the same colours
    assert torch.equal(color_jitter(images[part], stream_generator(1), 0.3, part, 200), out[part])
    for strength in (0.6, -0.1):
        with pytest.raises(ValueError, match=f"color_jitter: expected a number from 0 to 0.5, got {strength}"):
            color_jitter(images, generator, strength)
    with pytest.raises(ValueError, match="color_jitter: expected images of 3 channels, got 1"):
        color_jitter(images[:, :1], generator, 0.1)


def test_colours_change_in_training_alone_and_before_the_cutout(archive: Path) -> None:
    data = load("cifar10", archive)
    index, generator = torch.arange(16), stream_generator
    split = data.train.augmented(None, 8, data.mean, 0.3)
    images, _ = split.batch(index, generator(0))
    raw, _ = data.train.batch(index)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(split.batch(index)[0], raw)
    drawn = generator(0)
    moved = augment(raw, drawn, 4)  # draws as before, the colours behind it, the squares last
    colours = color_jitter(moved, drawn, 0.3)
    assert not torch.equal(colours, moved)
    filled = (images == torch.tensor(data.mean).view(1, 3, 1, 1)).all(1)
    assert (filled.sum((1, 2)) >= 64).all() and ((images == colours).all(1) | filled).all()
    assert torch.equal(split.select(index).batch(index, generator(0))[0], images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"color_jitter": 0.6}, "color_jitter: expected a number from 0 to 0.5, got 0.6"),
        ({"color_jitter": float("nan")}, "color_jitter: expected a number from 0 to 0.5, got nan"),
        ({"color_jitter": 0.1, "augment": False}, "color_jitter: without effect with augment False"),
    ],
)
def test_settings_of_color_jitter(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig("digits", **settings)  # type: ignore[arg-type]


def test_streams_are_functions_of_their_key() -> None:
    draws = [
        torch.rand(4, generator=stream_generator(*key)) for key in ((0, "a"), (0, "a"), (0, "b"), (1, "a"), (0, "a", 0))
    ]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(d.tolist()) for d in draws}) == 4


def test_batches_visit_everything_once_an_epoch() -> None:
    batches = Batches(10, 3, 0, "a")
    epoch = [batches.next()[0] for _ in range(len(batches))]
    assert len(batches) == 3 and torch.cat(epoch).unique().numel() == 9
    following = [batches.next()[0] for _ in range(3)]
    assert not torch.equal(torch.cat(epoch), torch.cat(following)) and batches.epoch == 2


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 8])
def test_batches_resume_where_they_were(taken: int) -> None:
    unbroken, broken = Batches(10, 3, 0, "a"), Batches(10, 3, 0, "a")
    for _ in range(taken):
        unbroken.next()
        broken.next()
    resumed = Batches(10, 3, 0, "a")
    resumed.load_state_dict(broken.state_dict())
    for _ in range(5):
        (first, g1), (second, g2) = unbroken.next(), resumed.next()
        assert torch.equal(first, second)
        assert torch.equal(torch.rand(3, generator=g1), torch.rand(3, generator=g2))


def test_batches_of_other_names_are_independent() -> None:
    first, second = (torch.cat([b.next()[0] for _ in range(9)]) for b in (Batches(27, 3, 0, n) for n in "ab"))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="batch_size: expected at most the 2"):
        Batches(2, 3, 0, "a")
