"""The optimizers that a recipe may name: torch's, and timm's where it is installed."""

import inspect

import torch

from deeptwist.errors import require_extra, unknown_name_error

_NOT_FOR_ALL = ("Muon", "SparseAdam", "LBFGS")  # take matrices, sparse gradients, closures only
TORCH_OPTIMIZERS = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
    and name not in _NOT_FOR_ALL
}


def check_optimizer(name: str) -> None:
    """Check that an optimizer is known, torch's by its name or timm's as ``timm/NAME``.

    Raises:
        DeepTwistError: if it is not, naming the nearest; if timm is needed and not installed.
    """
    if name.startswith("timm/"):
        with require_extra("timm"):
            from timm.optim import list_optimizers  # type: ignore[attr-defined]
        known = [f"timm/{optimizer}" for optimizer in list_optimizers()]
    else:
        known = [*TORCH_OPTIMIZERS, "timm/NAME"]
    if name not in known or name == "timm/NAME":
        raise unknown_name_error("optimizer", name, known)
