"""Data sets: what is read, and that nothing but seed, epoch and row decides how it is augmented."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from deeptwist.app.data import (
    ImageData,
    Split,
    augment,
    batches,
    load_data,
    normalize,
    train_batches,
)

ErrorOf = Callable[..., str]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded(seed))


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, dtype=torch.float64, generator=seeded(seed))


# --- splits


def test_a_split_is_uint8_images_and_one_label_each(error_of: ErrorOf) -> None:
    images, labels = random_images(4, 3, 2, 2), torch.arange(4)
    assert Split(images, labels).images is images
    assert "float32 (4, 3, 2, 2)" in error_of(Split, images.float(), labels)
    assert "(3, 2, 2)" in error_of(Split, images[0], labels)
    assert "one per image" in error_of(Split, images, labels[:3])
    assert "int32" in error_of(Split, images, labels.int())


@given(total=st.integers(1, 60), count=st.integers(0, 70), classes=st.integers(1, 10))
def test_images_spread_over_a_split_are_of_all_its_classes(
    total: int, count: int, classes: int
) -> None:
    labels = torch.arange(total) * classes // total  # class after class, as a folder has them
    spaced = Split(labels.to(torch.uint8).view(-1, 1, 1, 1), labels).subsample(count)
    assert isinstance(spaced.images, Tensor)
    assert torch.equal(spaced.images.flatten(), spaced.labels)
    counts, whole = spaced.labels.bincount(minlength=classes), labels.bincount(minlength=classes)
    assert counts.sum() == min(count, total)
    share = whole * len(spaced.labels) / total
    assert (counts - share).abs().max() < 1


# --- augmentation by batch


def every_crop(image: Tensor, padding: int, flip: bool) -> list[Tensor]:
    """All that `augment` may make of one image (C, H, W), by loops."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image
    side = range(2 * padding + 1)
    crops = [padded[:, top : top + height, left : left + width] for top in side for left in side]
    return crops + [crop.flip(2) for crop in crops] if flip else crops


@given(
    count=st.integers(1, 5),
    channels=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_each_image_becomes_one_of_its_own_crops(
    count: int, channels: int, height: int, width: int, padding: int, flip: bool, seed: int
) -> None:
    images = random_images(count, channels, height, width, seed=seed)
    untouched = images.clone()
    out = augment(images, draws(count, seed), padding=padding, flip=flip)
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    assert torch.equal(images, untouched)
    for image, made in zip(images, out, strict=True):
        assert any(torch.equal(made, crop) for crop in every_crop(image, padding, flip))


def test_all_crops_and_both_directions_are_equally_likely() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    made = augment(image.repeat(3600, 1, 1, 1), draws(3600), padding=1, flip=True)
    crops = every_crop(image, padding=1, flip=True)
    counts = [int((made == crop).flatten(1).all(1).sum()) for crop in crops]
    assert len(counts) == 18
    assert sum(counts) == 3600
    assert min(counts) > 140  # 200 each; the standard deviation is 14
    assert max(counts) < 260


def test_normalize_against_its_formula() -> None:
    images = random_images(4, 3, 5, 5)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = normalize(images, mean, std)
    assert out.dtype == torch.float32
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(out[:, channel].double(), expected, rtol=1e-5, atol=1e-6)


# --- batches


def numbered_split(count: int) -> Split:
    """Each image's one pixel is its label."""
    labels = torch.arange(count)
    return Split(labels.to(torch.uint8).view(-1, 1, 1, 1), labels)


@given(
    count=st.integers(0, 40),
    batch_size=st.integers(1, 45),
    shuffled=st.booleans(),
    drop_last=st.booleans(),
)
@settings(deadline=None)
def test_a_pass_gives_each_image_once_with_its_label(
    count: int, batch_size: int, shuffled: bool, drop_last: bool
) -> None:
    generator = seeded(0) if shuffled else None
    passed = list(
        batches(numbered_split(count), batch_size, generator=generator, drop_last=drop_last)
    )
    sizes = [len(labels) for _, labels in passed]
    whole, rest = divmod(count, batch_size)
    assert sizes == [batch_size] * whole + [rest] * (rest > 0 and not drop_last)
    assert all(torch.equal(images.flatten().long(), labels) for images, labels in passed)
    seen = [int(label) for _, labels in passed for label in labels]
    assert len(set(seen)) == len(seen)
    assert shuffled or seen == list(range(len(seen)))


def test_an_empty_batch_is_refused_at_once(error_of: ErrorOf) -> None:
    assert "not 0" in error_of(batches, numbered_split(3), 0, generator=None)


# --- digits, and names


def test_digits_are_the_digits_that_their_labels_say() -> None:
    data = load_data("digits")
    assert isinstance(data.train.images, Tensor)
    assert isinstance(data.test.images, Tensor)
    assert (data.train.images.shape, data.shape) == ((1437, 1, 8, 8), (1, 8, 8))
    assert (data.classes, data.padding, data.flip) == (tuple("0123456789"), 1, False)
    pixels = normalize(data.train.images, data.mean, data.std)
    assert abs(pixels.mean()) < 2e-3
    assert abs(pixels.std() - 1) < 2e-3
    train, test = (images_of(split).flatten(1).float() for split in (data.train, data.test))
    nearest = torch.cdist(test, train).argmin(1)
    assert (data.train.labels[nearest] == data.test.labels).float().mean() > 0.97


def test_names(error_of: ErrorOf) -> None:
    assert error_of(load_data, "digts").endswith("did you mean 'digits'?")
    assert error_of(load_data, "cifar-10").endswith("did you mean 'cifar10'?")
    assert "no folder of images at" in error_of(load_data, "./digts")
    assert "fixed image size" in error_of(load_data, "digits", image_size=32)
    assert '"imagnet" for [data][preset]' in error_of(load_data, "digits", preset="imagnet")
    assert '"2.0" for [data][crop_pct]' in error_of(load_data, "digits", crop_pct=2)


def test_cifar10_without_a_network(
    error_of: ErrorOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("DEEPTWIST_CACHE", str(tmp_path))
    message = error_of(load_data, "cifar10")
    assert "cannot download CIFAR-10" in message
    assert "train/CLASS/*.png" in message


@pytest.mark.parametrize(
    ("spec", "module", "extra"),
    [
        ("digits", "sklearn", "cli"),
        (".", "torchvision.datasets", "cli"),
        ("hf/.", "datasets", "huggingface"),
    ],
)
def test_a_missing_package_says_how_to_get_it(
    error_of: ErrorOf,
    spec: str,
    module: str,
    extra: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    message = error_of(load_data, spec)
    assert module in message
    assert f"pip install '.[{extra}]' in" in message


# --- image folders


def save_image(path: Path, seed: int, height: int = 9, width: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_images(height, width, 3, seed=seed).numpy()
    Image.fromarray(pixels).save(path)


def make_folder(root: Path, height: int = 9, width: int = 9) -> Path:
    """Two classes, six images each for training and two for testing, all different."""
    for number, (split, count) in enumerate((("train", 6), ("test", 2))):
        for label, category in enumerate(("cat", "dog")):
            for index in range(count):
                seed = 100 * number + 10 * label + index
                save_image(root / split / category / f"{index}.png", seed, height, width)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pets")


def test_class_folders_are_split_always_alike(
    tmp_path: Path, error_of: ErrorOf, caplog: pytest.LogCaptureFixture
) -> None:
    for label, (category, count) in enumerate((("cat", 10), ("dog", 3))):
        for index in range(count):
            save_image(tmp_path / "pets" / category / f"{index}.png", 10 * label + index)
    root = str(tmp_path / "pets")
    data, again = load_data(root, workers=0), load_data(root, workers=0)
    assert "(10 to train on, 3 to test)" in caplog.text
    assert data.classes == ("cat", "dog")
    assert data.train.labels.bincount().tolist() == [8, 2]
    assert data.test.labels.bincount().tolist() == [2, 1]
    assert torch.equal(images_of(data.test), images_of(again.test))
    both = torch.cat([images_of(data.train), images_of(data.test)])
    assert len(both.unique(dim=0)) == len(both) == 13  # none is in both
    whole = {
        (label, tuple(pixels_of(path).flatten().tolist()))
        for label, category in enumerate(("cat", "dog"))
        for path in (tmp_path / "pets" / category).iterdir()
    }
    for split in (data.train, data.test):
        for x, label in zip(images_of(split), split.labels.tolist(), strict=True):
            assert (label, tuple(x.flatten().tolist())) in whole
    save_image(tmp_path / "pets" / "emu" / "0.png", 99)
    assert load_data(root, workers=0).train.labels.bincount().tolist() == [8, 2, 1]
    for index in range(9):
        (tmp_path / "pets" / "cat" / f"{index}.png").unlink()
    shutil.rmtree(tmp_path / "pets" / "dog")
    assert "nothing is left to test on" in error_of(load_data, root)


def pixels_of(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def images_of(split: Split) -> Tensor:
    return torch.cat([images for images, _ in batches(split, 5, generator=None)])


@pytest.mark.parametrize(("height", "width"), [(9, 9), (6, 10)])
def test_a_folder_is_read_as_it_is(tmp_path: Path, height: int, width: int) -> None:
    root = make_folder(tmp_path / "pets", height, width)
    data = load_data(str(root), workers=0)
    assert (data.name, data.classes) == ("pets", ("cat", "dog"))
    assert (data.mean, data.padding, data.flip) == ((0.485, 0.456, 0.406), 1, True)
    for split, part in ((data.train, "train"), (data.test, "test")):
        assert isinstance(split.images, Tensor)  # they are small
        paths = sorted((root / part).rglob("*.*"))
        for path, image, label in zip(paths, split.images, split.labels, strict=True):
            assert torch.equal(image, pixels_of(path)), path
            assert data.classes[label] == path.parent.name
    counts = [split.labels.bincount().tolist() for split in (data.train, data.test)]
    assert counts == [[6, 6], [2, 2]]


def test_images_of_several_sizes_need_one(folder: Path, error_of: ErrorOf) -> None:
    save_image(folder / "test" / "dog" / "7.png", seed=1, height=30, width=40)
    assert "--image-size" in error_of(load_data, str(folder), workers=0)
    data = load_data(str(folder), image_size=32, workers=0)
    assert (data.shape, data.padding) == ((3, 32, 32), 4)


@pytest.mark.parametrize(("height", "width"), [(90, 90), (130, 187)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_s_preparation_is_torchvision_s(
    tmp_path: Path, height: int, width: int, interpolation: Any
) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    root = make_folder(tmp_path, height, width)
    data = load_data(
        str(root),
        image_size=64,
        preset="imagenet",
        eval_size=80,
        crop_pct=0.8,
        interpolation=interpolation,
        mean=(0.5,) * 3,
        workers=0,
    )
    assert (data.shape, data.mean) == ((3, 80, 80), (0.5, 0.5, 0.5))
    mode = transforms.InterpolationMode(interpolation)
    expected = transforms.Compose(
        [transforms.Resize(100, mode), transforms.CenterCrop(80), transforms.PILToTensor()]
    )
    image = Image.open(root / "test" / "cat" / "0.png")
    assert torch.equal(images_of(data.test)[0], expected(image))
    images, _ = next(train_batches(data, 4, seed=0, steps=range(1)))
    assert images.shape == (4, 3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpeg" if mode == "CMYK" else "png"
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        image = Image.fromarray(random_images(9, 9, 3).numpy()).convert(mode)
        image.save(tmp_path / split / "only" / f"0.{suffix}")
    path = tmp_path / "train" / "only" / f"0.{suffix}"
    assert torch.equal(images_of(load_data(str(tmp_path), workers=0).train)[0], pixels_of(path))


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "32-bit tif"])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path: Path, kind: str) -> None:
    values = np.linspace(0, 65535, 9 * 9).round().astype(np.uint16).reshape(9, 9)
    image = Image.fromarray(values.astype(np.int32) if kind == "32-bit tif" else values)
    if kind == "big-endian tif":
        image = Image.frombytes("I;16B", (9, 9), values.astype(">u2").tobytes())
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        image.save(tmp_path / split / "only" / f"0.{kind[-3:]}")
    grey = images_of(load_data(str(tmp_path), workers=0).train)[0].numpy()
    assert (grey == (values / 257).round().astype(np.uint8)).all()


def test_what_is_missing_is_named(error_of: ErrorOf, folder: Path, tmp_path: Path) -> None:
    load = str(folder)
    assert "/absent'" in error_of(load_data, str(tmp_path / "absent"))
    shutil.copytree(folder / "test", folder / "val")
    (folder / "test" / "dog").rename(folder / "test" / "fox")
    assert "dog, fox" in error_of(load_data, load)
    (folder / "test" / "empty").mkdir()
    assert "empty" in error_of(load_data, load)
    shutil.rmtree(folder / "test")
    assert len(load_data(load, workers=0).test.labels) == 4  # val/ stands in for test/
    shutil.rmtree(folder / "val")
    assert "/val'" in error_of(load_data, load)
    shutil.rmtree(folder / "train")
    assert "/train'" in error_of(load_data, load)


@pytest.mark.parametrize(
    ("damage", "workers"), [("text", 0), ("empty", 0), ("truncated", 0), ("truncated", 1)]
)
def test_a_damaged_image_is_named_or_left_out(
    error_of: ErrorOf, folder: Path, damage: str, workers: int
) -> None:
    path = folder / "train" / "dog" / "1.png"
    whole = path.read_bytes()
    path.write_bytes({"text": b"not an image", "empty": b"", "truncated": whole[:-60]}[damage])
    assert str(path) in error_of(load_data, str(folder), workers=workers)
    lazily = {"preset": "imagenet", "image_size": 8, "workers": workers}
    data = load_data(str(folder), **lazily)
    assert str(path) in error_of(list, train_batches(data, 4, seed=0, steps=range(3)))
    data = load_data(str(folder), skip_unreadable=True, **lazily)
    for passed in (
        train_batches(data, 4, seed=0, steps=range(3)),
        batches(data.train, 4, generator=None),
    ):
        sizes = [(len(images), len(labels)) for images, labels in passed]
        assert sorted(sizes) == [(3, 3), (4, 4), (4, 4)]
    (folder / "train" / "cat" / "0.png").write_bytes(b"")  # that tells the images' size
    data = load_data(str(folder), skip_unreadable=True, workers=workers)
    assert data.train.images.shape == (10, 3, 9, 9)


# --- whatever runs them, the same images

WAYS: dict[str, dict[str, Any]] = {
    "memory": {},
    "cifar": {"auto_augment": "trivial", "erase": 0.5},
    "imagenet": {"preset": "imagenet", "image_size": 8},
    "mixed": {"preset": "imagenet", "image_size": 8, "mixup": 0.2, "cutmix": 1.0},
    "rand": {"preset": "imagenet", "image_size": 8, "auto_augment": "rand", "flip": False},
}


def passed(data: ImageData, steps: range, share: tuple[int, int] = (0, 1)) -> list[Tensor]:
    stream = train_batches(data, 4, seed=3, steps=steps, share=share)
    return [tensor for batch in stream for tensor in batch]


@pytest.mark.parametrize("way", WAYS)
def test_workers_processes_and_interruptions_change_nothing(way: str, folder: Path) -> None:
    data = load_data(str(folder), workers=0, **WAYS[way])
    state = torch.random.get_rng_state()
    whole = passed(data, range(7))  # two epochs of three steps, and one
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (data.transform is None) == (way == "memory")
    assert not any(torch.equal(whole[0], other) for other in whole[2:-1:2])
    cut = passed(data, range(2)) + passed(replace(data, workers=2), range(2, 7))
    shares = [passed(data, range(7), (rank, 2)) for rank in range(2)]
    joined = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    for other in (cut, joined):
        assert len(other) == len(whole)
        assert all(torch.equal(first, second) for first, second in zip(whole, other, strict=True))


def test_mixed_labels_are_the_shares_of_the_pixels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for value, category in ((0, "black"), (255, "white")):
            for index in range(4):
                path = tmp_path / split / category / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), value).save(path)
    for option in ("mixup", "cutmix"):
        data = load_data(str(tmp_path), preset="imagenet", image_size=8, workers=0, **{option: 1.0})
        images, labels = next(train_batches(data, 8, seed=0, steps=range(1)))
        assert torch.allclose(labels.sum(1), torch.ones(8))
        white = images.float().mean((1, 2, 3)) / 255
        assert torch.allclose(white, labels[:, 1], atol=3e-3)
        assert len(labels[:, 1].unique()) > 2


# --- Hugging Face's data sets


def test_a_hugging_face_folder_gives_the_same_images(folder: Path, error_of: ErrorOf) -> None:
    datasets = pytest.importorskip("datasets")
    parquet = folder.with_name("parquet")
    for split in ("train", "test"):
        made = datasets.load_dataset("imagefolder", data_dir=str(folder / split), split="train")
        parquet.mkdir(exist_ok=True)
        made.to_parquet(parquet / f"{split}-00000-of-00001.parquet")
    expected = load_data(str(folder), workers=0)
    for source in (folder, parquet):
        data = load_data(f"hf/{source}", workers=0)
        assert data.classes == expected.classes
        for read, known in ((data.train, expected.train), (data.test, expected.test)):
            assert torch.equal(images_of(read), images_of(known))
            assert torch.equal(read.labels, known.labels)
    (parquet / "test-00000-of-00001.parquet").unlink()
    assert "it needs train, test" in error_of(load_data, f"hf/{parquet}")
    assert "cannot load data set" in error_of(load_data, f"hf/{folder / 'absent'}")


# --- memory

MEMORY = """
import resource, sys, torch
from deeptwist.app.data import load_data, train_batches
torch.set_num_threads(1)
for root in sys.argv[1:]:
    data = load_data(root, preset="imagenet", image_size=8, workers=1)
    for images, labels in train_batches(data, 100, seed=0, steps=range(20)):
        assert images.shape == (100, 3, 8, 8)
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    resident = sum(resource.getrusage(kind).ru_maxrss for kind in kinds)
    print(len(data.train.labels), resident // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """11,000 images take at most 10 MB more than 1,000: a kilobyte each."""
    roots = [make_folder(tmp_path / str(count)) for count in (1_000, 11_000)]
    for root in roots:
        image = root / "train" / "cat" / "0.png"
        for index in range(int(root.name)):
            os.link(image, f"{image.parent}/image-{index:06}.png")
    command = [sys.executable, "-c", MEMORY, *map(str, roots)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (few, before), (many, after) = (map(int, line.split()) for line in printed.splitlines())
    assert (few, many) == (1_012, 11_012)
    assert after - before < 10
