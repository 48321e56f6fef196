"""Where and how a training runs: Fabric's processes and precision, a GPU's images and graphs."""

import atexit
import copy
import logging
import math
import os
import sys
import time
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from deeptwist.app.data import ImageData
from deeptwist.app.training.recipe import Recipe
from deeptwist.errors import DeepTwistError, unknown_name_error

# To learn torchmetrics' version, Fabric imports it, and with it transformers and scipy where they
# are installed: half of the seconds that a training takes to start.
_modules: dict[str, Any] = sys.modules
_IS_NEW = "torchmetrics" not in _modules
if _IS_NEW:
    _modules["torchmetrics"] = None  # Python's own way to say that there is no such module
try:
    from lightning_fabric import Fabric as Fabric
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
    from lightning_fabric.plugins.precision import MixedPrecision as MixedPrecision
finally:
    if _IS_NEW:
        del _modules["torchmetrics"]


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


def own_device() -> torch.device:
    """Return this process's GPU, of those that Fabric deals out under ``torchrun``, if any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _leave_processes() -> None:
    """End the process group, once its threads have let go of the last tensors.

    To drop a tensor they need the interpreter's lock; a thread of Gloo that asks for it while
    Python shuts down aborts the process. Sleeping hands it over.
    """
    if distributed.is_initialized():
        time.sleep(0.1)
        distributed.destroy_process_group()


def images_on(device: torch.device, data: ImageData) -> ImageData:
    """Return the images on a GPU, if they are augmented there and it has room for them twice."""
    if device.type != "cuda" or data.transform is not None:
        return data
    splits = [s for s in (data.train, data.test, data.validation) if s is not None]
    free, _ = torch.cuda.mem_get_info(device)
    if 2 * sum(math.prod(split.images.shape) for split in splits) > free:
        return data
    train, test, *held_out = (split.to(device) for split in splits)
    return replace(data, train=train, test=test, validation=held_out[0] if held_out else None)


def checkpoint_gradients(model: nn.Module) -> None:
    """Have a network compute activations again in the backward pass.

    Raises:
        DeepTwistError: if it does not offer that.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise DeepTwistError(
            f"{type(model).__name__} offers no gradient checkpointing: leave out "
            "checkpoint_gradients, or choose one of timm's networks that does"
        )
    switch()


def step_network(
    fabric: Fabric, wrapped: nn.Module, model: nn.Module, example: Tensor, recipe: Recipe
) -> nn.Module:
    """Return what a training step calls: the network, compiled or recorded where asked.

    Args:
        fabric: launched.
        wrapped: the network as Fabric set it up, which shares its weights.
        model: the network itself.
        example: an input like every one to come.
        recipe: says `compile` and `cuda_graphs`, which a processor has not.

    Raises:
        DeepTwistError: if there is no such backend, or there are several processes to record.
    """
    as_graphs = recipe.cuda_graphs and fabric.device.type == "cuda"
    if as_graphs and fabric.world_size > 1:
        raise DeepTwistError("cuda_graphs is for one process: leave it out of the recipe")
    if recipe.compile is not None:
        if recipe.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise unknown_name_error("backend of torch.compile", recipe.compile, known)
        options: dict[str, Any] | None = {"triton.cudagraphs": True} if as_graphs else None
        return cast(nn.Module, torch.compile(wrapped, backend=recipe.compile, options=options))
    if not as_graphs:
        return wrapped
    with fabric.autocast():
        return replay_as_cuda_graphs(model, example)


def replay_as_cuda_graphs(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a module that runs a model in training mode, forward and backward, as CUDA graphs.

    Args:
        model: on a GPU; what its state dict holds is not changed.
        x: like every input to come, of the same shape, type and memory format.
    """
    state = copy.deepcopy(model.state_dict())  # its batch norms see the recording's passes
    torch.set_autocast_cache_enabled(False)  # a cached cast would not be part of the graph
    # In a module of its own: the graphs take the place of its `forward`, not of the model's.
    replayed = nn.Sequential(model).train()
    torch.cuda.make_graphed_callables(replayed, (x,), allow_unused_input=True)
    model.load_state_dict(state)
    return replayed
