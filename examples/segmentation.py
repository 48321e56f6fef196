"""Compress a segmentation network: torchvision's LR-ASPP on drawn shapes.

Any task works as classification does: DeepTwist asks for a loop and an example input alone.

Run it: ``python examples/segmentation.py``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import deeptwist as dt

SIZE, STEPS, BATCH = 64, 40, 8
WIDE = dt.Layers(min_in_channels=64)


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, H, W) of a disc and a square on noise, and each pixel's class."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(count, 2, 2, 1, 1, generator=generator) * 32 + 16  # (B, shape, axis)
    rows, columns = torch.arange(SIZE).view(1, -1, 1), torch.arange(SIZE)
    from_disc, from_square = (
        torch.stack(torch.broadcast_tensors(rows - place[:, 0], columns - place[:, 1])).float()
        for place in places.unbind(1)
    )
    classes = (from_square.abs().amax(0) < 10).long()
    classes[from_disc.norm(dim=0) < 12] = 2
    images = 0.4 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return images + functional.one_hot(classes, 3).movedim(3, 1), classes


def train(model: nn.Module, twist: dt.DeepTwist | None = None) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for step in range(STEPS):
        images, classes = draw(BATCH, seed=step)
        functional.cross_entropy(model(images)["out"], classes).backward()
        optimizer.step()
        optimizer.zero_grad()
        if twist is not None:
            twist.step()


@torch.no_grad()
def mean_iou(model: nn.Module) -> float:
    """Return the mean over classes of intersection ÷ union on other images."""
    images, classes = draw(32, seed=10**6)
    guessed = model.eval()(images)["out"].argmax(1)
    pairs = [(guessed == label, classes == label) for label in range(3)]
    return sum(float((a & b).sum() / (a | b).sum()) for a, b in pairs) / 3


def main() -> None:
    torch.manual_seed(0)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # its 0.01 is for long trainings
    train(model)
    example = draw(2, seed=0)[0]
    plan = dt.plan(model, dt.SVD(), ratio=2, example_input=example, layers=WIDE)
    dense, untrained = mean_iou(model), mean_iou(dt.decompose(model, plan))

    twist = dt.DeepTwist(model, plan, interval=15)
    train(model, twist)
    small = twist.finish()
    print(f"dense      {dense:.1%} mean IoU  {plan.dense_parameters:,} parameters")
    print(f"untrained  {untrained:.1%}  {plan.parameters:,}")
    print(f"DeepTwist  {mean_iou(small):.1%}  {plan.parameters:,}")


if __name__ == "__main__":
    main()
