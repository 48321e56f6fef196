"""A run's last checkpoints: tensors and plain values, each file there in full or not at all."""

import io
import logging
from pathlib import Path
from typing import Any

import torch

from deeptwist.errors import DeepTwistError
from deeptwist.files import write_bytes

logger = logging.getLogger("deeptwist")

_FORMAT = 2
_KEPT = 2  # the one before the last is for when the last turns out to be damaged
_PATTERN = "checkpoint-*.pt"


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint and remove those before the last two.

    Args:
        folder: of the run.
        step: optimizer steps so far.
        state: tensors in plain containers.

    Raises:
        DeepTwistError: if it cannot be written, on a full disk say; the last good one stays.
    """
    content = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, content)
    path = folder / f"checkpoint-{step:09}.pt"
    try:
        write_bytes(path, content.getbuffer())
    except OSError as error:
        raise DeepTwistError(
            f"cannot write '{path}' ({error.strerror}): the checkpoint before it is whole, "
            "make room and go on with --resume"
        ) from error
    for old in sorted(folder.glob(_PATTERN))[:-_KEPT]:
        old.unlink()


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the last checkpoint that can be read, `None` if there is none at all.

    One that is damaged or foreign is named in a warning, and the one before it taken.

    Raises:
        DeepTwistError: if there are checkpoints, and none can be read.
    """
    paths = sorted(folder.glob(_PATTERN), reverse=True)
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes surface as a dozen types
            logger.warning("'%s' is damaged (%s): not used", path, type(error).__name__)
            continue
        if isinstance(state, dict) and state.get("format") == _FORMAT:
            return state
        logger.warning("'%s' is not a checkpoint of this version of deeptwist: not used", path)
    if paths:
        raise DeepTwistError(f"no checkpoint in {folder} can be read: remove them to start anew")
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove a finished run's checkpoints."""
    for path in folder.glob(_PATTERN):
        path.unlink()
