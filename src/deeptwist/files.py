"""Files that are complete or not there: written beside their place and renamed."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from deeptwist.errors import DeepTwistError, first_line

_SUFFIXES = {
    *(".onnx", ".pt2", ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tflite", ".engine"),
    *(".mlpackage", ".mlmodel", ".json", ".npz", ".h5"),
}


def check_suffix(path: Path, own: str = "") -> None:
    """Check that a file, or a folder, is not named as another format's.

    Args:
        path: what is to be written.
        own: the suffix of its format; none for a folder.

    Raises:
        DeepTwistError: if it is, with the name to give.
    """
    if path.suffix.lower() in _SUFFIXES - {own}:
        what = f"a {own} file" if own else "a folder"
        raise DeepTwistError(f"{path} is to be {what}: name it {path.with_suffix(own)}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it once it is written in full.

    Raises:
        OSError: if it cannot be written.
    """
    if not path.name:  # "." and "/": no neighbour can be named after them
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explaining_writes(path: Path) -> Iterator[None]:
    """Turn what fails inside into one line that says what cannot be written, and why.

    Raises:
        DeepTwistError: in place of the system's errors and safetensors'.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DeepTwistError(f"cannot write {path}: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, replacing an old one only when it is complete."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_state(path: Path, state: object) -> None:
    """Write what `torch.save` takes; it survives a loss of power, and replaces an old one then."""
    import torch  # late: the command line's help does not wait for it

    torch.save(state, content := io.BytesIO())  # of a full disk torch tells in words of its own
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())
        fsync(temporary)


def fsync(path: Path) -> None:
    """Flush a file's content to the disk, so that it survives a loss of power."""
    with path.open("ab") as file:
        os.fsync(file.fileno())
