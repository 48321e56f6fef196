"""Batches of a split: in memory, or read and augmented by worker processes.

What is random about an image is drawn from the seed, the epoch and the image's row, so that the
number of workers or processes, and where a training was cut, change nothing.
"""

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deeptwist.app.data.dataset import ImageData, ImageFiles, Mix, Split, Transform, augment
from deeptwist.errors import DeepTwistError, first_line

logger = logging.getLogger("deeptwist")

_ORDER, _AUGMENTATION, _MIX = range(3)  # streams of random numbers
Batch = tuple[Tensor, Tensor]
_Key = tuple[int, int]  # an epoch and a row


def batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
) -> Iterator[Batch]:
    """Return the batches of one pass over a split, as evaluation sees its images.

    Args:
        split: the images and labels.
        batch_size: images in each batch.
        generator: on the CPU; draws the order, at the call. Without it the order is the stored one.
        drop_last: whether to leave out a last batch that would be smaller.

    Returns:
        Batches of images, uint8 (B, C, H, W), and labels, int64 (B,), on the split's device.

    Raises:
        DeepTwistError: if `batch_size` is not positive; as they are drawn, if an image cannot be
            decoded.
    """
    if batch_size < 1:
        raise DeepTwistError(f"batch_size must be at least 1, not {batch_size}")
    count = len(split.labels)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    chunks = order[: count - count % batch_size if drop_last else count].split(batch_size)
    if not isinstance(images := split.images, Tensor):
        items = _Items(split, images.transform)
        return _read(
            items, ([(0, row) for row in rows.tolist()] for rows in chunks), images.workers
        )
    return ((images[rows], split.labels[rows]) for rows in chunks if len(rows))


def train_batches(
    data: ImageData,
    batch_size: int,
    *,
    seed: int,
    steps: range,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Return the batches of a training's steps, shuffled anew in every epoch and augmented.

    Args:
        data: see `ImageData`.
        batch_size: images in a step, of all processes together.
        seed: of the order and the augmentation.
        steps: which of the training's steps; an epoch's incomplete last batch is left out.
        share: (rank, world): which of as many equal parts of each batch.
        device: where they are augmented, if they are in memory, and end.

    Returns:
        Batches of images, uint8 (B, C, H, W), and labels, int64 (B,), or float32 (B, classes)
        where pairs of images are mixed.

    Raises:
        DeepTwistError: as they are drawn, if an image cannot be decoded.
    """
    split = data.train
    epochs = _epochs(len(split.labels), batch_size, seed, steps, share)
    if data.transform is None:
        return _in_memory(data, epochs, seed, device)
    keys = ([(epoch, row) for row in rows.tolist()] for epoch, rows in epochs)
    return _read(_Items(split, data.transform, seed, data.mix), keys, data.workers, device)


def _generator(*numbers: int) -> torch.Generator:
    """Return random numbers of a seed, a stream and a place in it."""
    return torch.Generator().manual_seed(_state(*numbers))


def _state(*numbers: int) -> int:
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state) - 2**63


def _epochs(
    count: int, batch_size: int, seed: int, steps: range, share: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield each step's epoch, and the rows of this process's share of its batch."""
    rank, world = share
    order, of_epoch = torch.empty(0), -1
    for step in steps:
        epoch, number = divmod(step, count // batch_size)
        if epoch != of_epoch:
            of_epoch = epoch
            order = torch.randperm(count, generator=_generator(seed, _ORDER, epoch))
        batch = order[number * batch_size : (number + 1) * batch_size]
        yield epoch, batch.tensor_split(world)[rank]


def _in_memory(
    data: ImageData, epochs: Iterable[tuple[int, Tensor]], seed: int, device: torch.device | str
) -> Iterator[Batch]:
    images, labels = data.train.images, data.train.labels
    assert isinstance(images, Tensor)
    draws, of_epoch = torch.empty(0), -1
    for epoch, rows in epochs:
        if epoch != of_epoch:
            of_epoch, random = epoch, _generator(seed, _AUGMENTATION, epoch)
            draws = torch.rand(len(labels), 3, generator=random, dtype=torch.float64)
        stored = rows.to(images.device, non_blocking=True)
        chosen = images[stored].to(device, non_blocking=True)
        yield (
            augment(chosen, draws[rows], padding=data.padding, flip=data.flip),
            labels[stored].to(device, non_blocking=True),
        )


@dataclass(frozen=True, eq=False)
class _Items(Dataset[tuple[_Key, Tensor | DeepTwistError]]):
    """A split's images one by one, in a worker process or not."""

    split: Split
    transform: Transform
    seed: int | None = None
    mix: Mix | None = None

    def __getitem__(self, key: _Key) -> tuple[_Key, Tensor | DeepTwistError]:
        epoch, row = key
        try:
            image = self.split.images[row]
        except DeepTwistError as error:
            return key, error
        if self.seed is None:
            return key, self.transform(image)
        with _seeded(self.seed, _AUGMENTATION, epoch, row):
            return key, self.transform(image)

    def collate(self, items: list[tuple[_Key, Tensor | DeepTwistError]]) -> Batch | DeepTwistError:
        """Return a batch, or an error: raised in a worker, it would be many lines long."""
        keys = [key for key, image in items if isinstance(image, Tensor)]
        errors = [image for _, image in items if isinstance(image, DeepTwistError)]
        files = self.split.images
        if errors and not (keys and isinstance(files, ImageFiles) and files.skip_unreadable):
            return errors[0]
        for error in errors:
            logger.warning("left out: %s", error)
        whole = [image for _, image in items if isinstance(image, Tensor)]
        if len({image.shape for image in whole}) > 1:
            return DeepTwistError("images differ in size: give them one, --image-size 32 say")
        images = torch.stack(whole)
        labels = self.split.labels[[row for _, row in keys]]
        return (images, labels) if self.mix is None else self._mixed(keys, images, labels)

    def _mixed(self, keys: list[_Key], images: Tensor, labels: Tensor) -> Batch:
        """Mix neighbours: pairs stay whole in every process's share of a batch."""
        assert self.mix is not None
        assert self.seed is not None
        parts = []
        pairs = zip(keys[::2], images.split(2), labels.split(2), strict=True)
        for (epoch, row), pair, targets in pairs:
            with _seeded(self.seed, _MIX, epoch, row):
                parts.append(self.mix(pair.float(), targets))
        mixed, shares = map(torch.cat, zip(*parts, strict=True))
        return mixed.round().to(torch.uint8), shares


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Draw torch's global random numbers, which transforms use, from these for a while."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_state(*numbers))
        yield


def _read(
    items: _Items, keys: Iterable[list[_Key]], workers: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    loader: DataLoader[Batch | DeepTwistError] = DataLoader(
        items,  # type: ignore[arg-type]
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=items.collate,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # else it draws from the numbers that dropout draws from
    )
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if workers and threading.current_thread() is threading.main_thread():
        # Torch's handler would raise the death of a worker anywhere; waiting for a batch finds it.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    while True:
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            if not workers or "Caught" in str(error):  # of a transform
                raise
            raise DeepTwistError(
                f"a process that reads images has died ({first_line(error).rstrip('. ')}), for "
                "want of memory perhaps: go on with --resume, or --data.workers 0 to do without"
            ) from error
        if batch is None:
            return
        if isinstance(batch, DeepTwistError):
            del batches  # its workers end now, not when the error's traceback is forgotten
            raise batch
        images, labels = batch
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
