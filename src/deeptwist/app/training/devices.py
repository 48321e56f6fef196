"""Where a training runs: Lightning Fabric's processes and precision, and images on a GPU."""

import atexit
import logging
import math
import os
import time
from dataclasses import replace

import torch
from torch import distributed

from deeptwist.app.data import ImageData, Split
from deeptwist.app.training.fabric import Fabric, MixedPrecision
from deeptwist.app.training.recipe import Recipe


def make_fabric(recipe: Recipe) -> Fabric:
    """Launch Fabric, with one process or with all those that ``torchrun`` started."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Fabric logs its precision, through whichever of the Lightnings was imported last.
    for name in ("lightning_fabric", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Fabric turns fp16 on a processor to bf16, which torch has not needed since 2.3.
    fp16_on_cpu = recipe.precision == "16-mixed" and not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    fabric = Fabric(
        accelerator="auto",
        devices=local,
        num_nodes=processes // local,
        strategy="ddp" if processes > 1 else "auto",
        precision=None if fp16_on_cpu else recipe.precision,
        plugins=[MixedPrecision("16-mixed", "cpu")] if fp16_on_cpu else None,
    )
    fabric.launch()
    if processes > 1:
        atexit.register(_leave_processes)
    return fabric


def _leave_processes() -> None:
    """End the process group, once its threads have let go of the last tensors.

    To drop a tensor they need the interpreter's lock; a thread of Gloo that asks for it while
    Python shuts down aborts the process. Sleeping hands it over.
    """
    if distributed.is_initialized():
        time.sleep(0.1)
        distributed.destroy_process_group()


def images_on(
    device: torch.device, data: ImageData, validation: Split | None
) -> tuple[ImageData, Split | None]:
    """Return the images on a GPU, if they are augmented there and it has room for them twice."""
    if device.type != "cuda" or data.transform is not None:
        return data, validation
    splits = [s for s in (data.train, data.test, validation) if s is not None]
    free, _ = torch.cuda.mem_get_info(device)
    if 2 * sum(math.prod(split.images.shape) for split in splits) > free:
        return data, validation
    train, test, *held_out = (split.to(device) for split in splits)
    return replace(data, train=train, test=test), held_out[0] if held_out else None
