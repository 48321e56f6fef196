import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from deeptwist.data import (
    ImageData,
    Split,
    augment,
    batches,
    dataset_signature,
    load_data,
    load_digits,
    load_image_folder,
    normalize,
)

ErrorOf = Callable[..., str]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded(seed))


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
    some = Split(labels.to(torch.uint8).view(-1, 1, 1, 1), labels).evenly_spaced(count)
    assert torch.equal(some.images.flatten(), some.labels)
    found, whole = some.labels.bincount(minlength=classes), labels.bincount(minlength=classes)
    assert found.sum() == min(count, total)
    share = whole * len(some.labels) / total
    assert (found - share).abs().max() < 1


# --- augmentation


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
    out = augment(images, padding=padding, flip=flip, generator=seeded(seed))
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    assert torch.equal(images, untouched)
    for image, made in zip(images, out, strict=True):
        assert any(torch.equal(made, crop) for crop in every_crop(image, padding, flip))


def test_all_crops_and_both_directions_are_equally_likely() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    made = augment(image.repeat(3600, 1, 1, 1), padding=1, flip=True, generator=seeded(0))
    crops = every_crop(image, padding=1, flip=True)
    counts = [int((made == crop).flatten(1).all(1).sum()) for crop in crops]
    assert len(counts) == 18
    assert sum(counts) == 3600
    assert min(counts) > 140  # 200 each; the standard deviation is 14
    assert max(counts) < 260


def test_augmentation_follows_its_generator() -> None:
    images = random_images(64, 3, 8, 8)
    first, again, other = (
        augment(images, padding=2, flip=True, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    global_state = torch.random.get_rng_state()
    augment(images, padding=2, flip=True, generator=seeded(1))
    assert torch.equal(torch.random.get_rng_state(), global_state)


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_a_batch_are_augmented_as_in_the_whole(world: int) -> None:
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)

    def augmented(some: Tensor, share: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return augment(some, padding=2, flip=True, generator=generator, share=share)

    whole = augmented(images, (0, 1))
    for rank in range(world):
        assert torch.equal(augmented(images[rank::world], (rank, world)), whole[rank::world])


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
    if shuffled:
        assert len(set(seen)) == len(seen)
    else:
        assert seen == list(range(len(seen)))


def test_the_order_follows_the_generator() -> None:
    def order(generator: torch.Generator) -> list[int]:
        passes = batches(numbered_split(50), 8, generator=generator)
        return [int(label) for _, labels in passes for label in labels]

    generator = seeded(3)
    first, second = order(generator), order(generator)
    assert first == order(seeded(3))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))


def test_an_empty_batch_is_refused_at_once(error_of: ErrorOf) -> None:
    assert "not 0" in error_of(batches, numbered_split(3), 0, generator=None)


# --- digits, and names


def test_digits() -> None:
    data, again = load_digits(), load_data("digits")
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert torch.equal(data.test.images, again.test.images)
    assert data.classes == tuple("0123456789")
    assert (data.padding, data.flip) == (1, False)
    for split in (data.train, data.test):
        assert split.images.amin() == 0
        assert split.images.amax() == 255
    tested, trained = data.test.labels.bincount(), data.train.labels.bincount()
    assert ((tested - 0.2 * (tested + trained)).abs() < 1).all()
    pixels = normalize(data.train.images, data.mean, data.std)
    assert abs(pixels.mean()) < 2e-3
    assert abs(pixels.std() - 1) < 2e-3


def test_digits_are_the_digits_that_their_labels_say() -> None:
    data = load_digits()
    train, test = (split.images.flatten(1).float() for split in (data.train, data.test))
    nearest = torch.cdist(test, train).argmin(1)
    assert (data.train.labels[nearest] == data.test.labels).float().mean() > 0.97


def test_names(error_of: ErrorOf) -> None:
    assert error_of(load_data, "digts").endswith("did you mean 'digits'?")
    assert error_of(load_data, "cifar-10").endswith("did you mean 'cifar10'?")
    assert "no folder of images at" in error_of(load_data, "./digts")
    assert "fixed image size" in error_of(load_data, "digits", image_size=32)


def test_cifar10_without_a_network(
    error_of: ErrorOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.delenv("no_proxy", raising=False)
    message = error_of(load_data, "cifar10", cache=tmp_path)
    assert "cannot download CIFAR-10" in message
    assert "train/CLASS/*.png" in message


@pytest.mark.parametrize(
    ("spec", "module"),
    [
        ("digits", "sklearn"),
        ("cifar10", "torchvision.datasets"),
        (".", "torchvision.datasets"),
    ],
)
def test_a_missing_package_says_how_to_get_it(
    error_of: ErrorOf, spec: str, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    message = error_of(load_data, spec)
    assert module in message
    assert "pip install 'deeptwist[cli]'" in message


# --- image folders


def save_image(path: Path, seed: int, height: int = 9, width: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_images(height, width, 3, seed=seed).numpy()
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three images each for training and two for testing, all 9 × 9 and different."""
    root = tmp_path / "pets"
    for number, (split, count) in enumerate((("train", 3), ("test", 2))):
        for label, category in enumerate(("cat", "dog")):
            for index in range(count):
                seed = 100 * number + 10 * label + index
                save_image(root / split / category / f"{index}.png", seed)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPTWIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels_of(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def assert_faithful(data: ImageData, root: Path) -> None:
    for split, part in ((data.train, "train"), (data.test, "test")):
        paths = sorted((root / part).rglob("*.*"))
        assert len(paths) == len(split.images)
        for path, image, label in zip(paths, split.images, split.labels, strict=True):
            assert torch.equal(image, pixels_of(path)), path
            assert data.classes[label] == path.parent.name


def test_a_folder_is_read_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    data = load_data("pets")
    assert data.name == "pets"
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (6, 3, 9, 9)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.mean == (0.485, 0.456, 0.406)
    assert (data.padding, data.flip) == (1, True)
    assert_faithful(data, folder)


@pytest.mark.parametrize(("size", "padding"), [(5, 1), (32, 4), (36, 4)])
def test_padding_is_an_eighth(folder: Path, size: int, padding: int) -> None:
    assert load_image_folder(folder, image_size=size).padding == padding


def test_val_stands_in_for_test(folder: Path) -> None:
    shutil.copytree(folder / "test", folder / "val")
    (folder / "val" / "cat" / "0.png").unlink()
    assert len(load_image_folder(folder).test.labels) == 4
    shutil.rmtree(folder / "test")
    assert len(load_image_folder(folder).test.labels) == 3


def test_a_second_load_decodes_nothing(folder: Path, cache: Path) -> None:
    first = load_image_folder(folder).train.images.clone()
    path = folder / "train" / "cat" / "0.png"
    stat = path.stat()
    path.write_bytes(b"x" * stat.st_size)  # no longer an image
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(load_image_folder(folder).train.images, first)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("change", ["content", "added", "removed", "renamed", "moved"])
def test_a_changed_folder_is_decoded_anew(folder: Path, change: str) -> None:
    load_image_folder(folder)
    path = folder / "train" / "cat" / "0.png"
    if change == "content":
        stat = path.stat()
        save_image(path, seed=999)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "added":
        save_image(path.with_name("9.png"), seed=999)
    elif change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(path.with_name("9.png"))
    else:
        path.rename(folder / "test" / "cat" / "9.png")
    assert_faithful(load_image_folder(folder), folder)


def test_a_new_order_is_a_change(tmp_path: Path) -> None:
    root = tmp_path / "bitmaps"
    for seed, name in enumerate(("train/x/0.bmp", "train/x/1.bmp", "test/x/0.bmp")):
        save_image(root / name, seed)
        os.utime(root / name, (0, 0))  # all of one time and, as bitmaps, of one size
    load_image_folder(root)
    (root / "train" / "x" / "0.bmp").rename(root / "train" / "x" / "9.bmp")
    assert_faithful(load_image_folder(root), root)


def test_each_image_size_has_its_own_cache(folder: Path) -> None:
    sizes = [load_image_folder(folder, image_size=s).train.images.shape[-1] for s in (4, 6, 4)]
    assert sizes == [4, 6, 4]


@pytest.mark.parametrize("kept", [0, 1, 60, 128, 500, -1])
def test_a_truncated_cache_is_rebuilt(folder: Path, cache: Path, kept: int) -> None:
    load_image_folder(folder)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    assert_faithful(load_image_folder(folder), folder)
    assert file.read_bytes() == whole


def test_a_cache_of_something_else_is_rebuilt(folder: Path, cache: Path) -> None:
    load_image_folder(folder)
    (file,) = cache.iterdir()
    for other in (
        np.zeros((9, 3, 9, 9), np.uint8),
        np.zeros((10, 3, 9, 9)),
        np.zeros((10, 3), np.uint8),
    ):
        np.save(file, other)
        assert_faithful(load_image_folder(folder), folder)


def test_images_are_mapped_and_safe_to_write_to(folder: Path, cache: Path) -> None:
    data = load_image_folder(folder)
    (file,) = cache.iterdir()
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) in maps.read_text()
    stored = file.read_bytes()
    data.train.images.zero_()
    assert file.read_bytes() == stored
    assert_faithful(load_image_folder(folder), folder)


def test_the_cache_can_be_given(folder: Path, tmp_path: Path, cache: Path) -> None:
    load_data(str(folder), cache=tmp_path / "elsewhere")
    assert not cache.exists()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


@pytest.mark.parametrize(("height", "width"), [(6, 10), (170, 130)])
def test_rectangles_stay_where_all_are_equal(tmp_path: Path, height: int, width: int) -> None:
    root = tmp_path / "rectangles"
    for seed in range(8):
        save_image(root / ("train", "test")[seed % 2] / "x" / f"{seed}.png", seed, height, width)
    data = load_image_folder(root)
    assert data.train.images.shape == (4, 3, height, width)
    assert_faithful(data, root)


def test_mixed_sizes_become_224(folder: Path) -> None:
    save_image(folder / "test" / "dog" / "7.png", seed=1, height=30, width=40)
    data = load_image_folder(folder)
    assert data.train.images.shape == (6, 3, 224, 224)
    assert data.test.images.shape == (5, 3, 224, 224)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (30, 47), (61, 22), (5, 8)])
def test_resizing_is_torchvisions(tmp_path: Path, height: int, width: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    for split in ("train", "test"):
        save_image(tmp_path / split / "only" / "0.png", seed=1, height=height, width=width)
    image = Image.open(tmp_path / "train" / "only" / "0.png")
    evaluation = transforms.Compose(
        [transforms.Resize(20), transforms.CenterCrop(20), transforms.PILToTensor()]
    )
    made = load_image_folder(tmp_path, image_size=20).train.images[0]
    assert torch.equal(made, evaluation(image))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpeg" if mode == "CMYK" else "png"
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        image = Image.fromarray(random_images(9, 9, 3).numpy()).convert(mode)
        image.save(tmp_path / split / "only" / f"0.{suffix}")
    path = tmp_path / "train" / "only" / f"0.{suffix}"
    assert torch.equal(load_image_folder(tmp_path).train.images[0], pixels_of(path))


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "32-bit tif"])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path: Path, kind: str) -> None:
    values = np.linspace(0, 65535, 9 * 9).round().astype(np.uint16).reshape(9, 9)
    image = Image.fromarray(values.astype(np.int32) if kind == "32-bit tif" else values)
    if kind == "big-endian tif":
        image = Image.frombytes("I;16B", (9, 9), values.astype(">u2").tobytes())
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        image.save(tmp_path / split / "only" / f"0.{kind[-3:]}")
    found = load_image_folder(tmp_path).train.images[0].numpy()
    assert (found == (values / 257).round().astype(np.uint8)).all()


def test_the_contents_of_a_data_set_are_its_classes_and_their_sizes(
    folder: Path, error_of: ErrorOf
) -> None:
    data, contents = load_data(str(folder)), dataset_signature(str(folder))
    for name, split in (("train", data.train), ("test", data.test)):
        assert contents[name] == dict(
            zip(data.classes, split.labels.bincount().tolist(), strict=True)
        )
    assert dataset_signature("digits") != contents
    assert "did you mean 'digits'?" in error_of(dataset_signature, "digist")


def test_what_is_missing_is_named(error_of: ErrorOf, folder: Path, tmp_path: Path) -> None:
    assert "/absent'" in error_of(load_image_folder, tmp_path / "absent")
    assert "not 0" in error_of(load_image_folder, folder, image_size=0)
    (folder / "test" / "dog").rename(folder / "test" / "fox")
    assert "dog, fox" in error_of(load_image_folder, folder)
    (folder / "test" / "empty").mkdir()
    assert "empty" in error_of(load_image_folder, folder)
    shutil.rmtree(folder / "test")
    assert "/val'" in error_of(load_image_folder, folder)
    (folder / "test").mkdir()
    assert "no images in" in error_of(load_image_folder, folder)
    shutil.rmtree(folder / "train")
    assert "/train'" in error_of(load_image_folder, folder)


@pytest.mark.parametrize("damage", ["text", "empty", "truncated"])
def test_a_damaged_image_is_named_and_nothing_is_cached(
    error_of: ErrorOf, folder: Path, cache: Path, damage: str
) -> None:
    path = folder / "test" / "dog" / "1.png"
    whole = path.read_bytes()
    path.write_bytes({"text": b"not an image", "empty": b"", "truncated": whole[:-60]}[damage])
    assert str(path) in error_of(load_image_folder, folder)
    assert list(cache.iterdir()) == []
    path.write_bytes(whole)
    assert_faithful(load_image_folder(folder), folder)


def test_a_cache_that_cannot_be_written_says_so(
    error_of: ErrorOf, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "DEEPTWIST_CACHE" in error_of(load_image_folder, folder, cache=cache)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_progress_shows_on_terminals_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_image(folder / "train" / "cat" / "7.png", seed=1, height=30, width=40)
    load_image_folder(folder, image_size=4)
    assert capfd.readouterr() == ("", "")

    master, slave = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        os.set_blocking(master, False)
        load_image_folder(folder)  # of mixed sizes, so it starts over once
        shown = os.read(master, 2**16).decode()
    os.close(master)
    assert "decoding 11 images" in shown
    assert capfd.readouterr().out == ""
