"""DeepTwist in other people's training loops; each adapter needs its own library.

``deeptwist.integrations.lightning`` and ``.transformers`` hold a callback each. A plain loop and
Accelerate's need none, see ``docs/integrations.md``.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.weights import get_weight
from deeptwist.twist import DeepTwist


def after_each_step(
    twist: DeepTwist, optimizers: Sequence[Optimizer], call: Callable[[], object]
) -> RemovableHandle:
    """Call a function after every step that moves the compressed weights.

    Gradients that are only accumulated make no step, nor do those that AMP skips because they are
    not finite.

    Args:
        twist: of the network that the optimizers train.
        optimizers: one of them holds the compressed weights; the last, where several do.
        call: without arguments, right after the weights have moved.

    Returns:
        The handle whose ``remove()`` ends it.

    Raises:
        DeepTwistError: if no optimizer holds the compressed weights.
    """

    def hook(optimizer: Optimizer, *_: Any) -> None:
        # GradScaler calls a fused optimizer with infinite gradients too; it skips them inside.
        if not getattr(optimizer, "found_inf", 0):
            call()

    names = [layer.name for layer in twist.plan.compressed]
    weights = {id(p) for name in names for p in get_weight(twist.model, name).parameters}
    for optimizer in reversed(optimizers):
        if weights & {id(p) for group in optimizer.param_groups for p in group["params"]}:
            return optimizer.register_step_post_hook(hook)
    raise DeepTwistError(
        f"no optimizer holds the weight of {names[0]!r}: make the twist of the network in training"
    )


def use_averages(optimizers: Sequence[Optimizer]) -> None:
    """Have schedule-free optimizers put what they average into the weights, as for evaluation."""
    for optimizer in optimizers:
        if any(group.get("train_mode") for group in optimizer.param_groups):
            optimizer.eval()  # type: ignore[attr-defined]
