"""Compress a detector: torchvision's RetinaNet, on a small backbone, finds drawn boxes.

A detector takes a list of images and, while it trains, their boxes; for the plan, a batch of images
in one tensor will do.

Run it: ``python examples/detection.py``.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

import deeptwist as dt

SIZE, STEPS, BATCH, CHANNELS = 64, 120, 8, 64
WIDE = dt.Layers(min_in_channels=16)
Target = dict[str, Tensor]


class Backbone(nn.Sequential):
    """Four convolutions, to an eighth of the images' size."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        pairs = pairwise((3, 16, 32, CHANNELS))
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.ReLU()) for a, b in pairs
        ]
        super().__init__(*layers, nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())


def draw(count: int, seed: int) -> tuple[list[Tensor], list[Target]]:
    """Return images (3, H, W) of a bright box on noise, and where it is."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        left, top = torch.randint(0, SIZE // 2, (2,), generator=generator).tolist()
        width, height = torch.randint(SIZE // 4, SIZE // 2, (2,), generator=generator).tolist()
        image = 0.3 * torch.rand(3, SIZE, SIZE, generator=generator)
        image[:, top : top + height, left : left + width] += 0.6
        box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.zeros(1, dtype=torch.long)})
    return images, targets


def train(model: nn.Module, twist: dt.DeepTwist | None = None) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS)
    for step in range(STEPS):
        losses = model(*draw(BATCH, seed=step))
        sum(losses.values()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if twist is not None:
            twist.step()


@torch.no_grad()
def overlap(model: nn.Module) -> float:
    """Return the mean IoU of the surest box with the drawn one, on other images."""
    images, targets = draw(32, seed=10**6)
    pairs = zip(model.eval()(images), targets, strict=True)
    ious = [box_iou(guess["boxes"][:1], target["boxes"]).sum() for guess, target in pairs]
    return float(torch.stack(ious).mean())


def main() -> None:
    torch.manual_seed(0)
    model = RetinaNet(
        Backbone(),
        num_classes=1,
        min_size=SIZE,
        max_size=SIZE,
        anchor_generator=AnchorGenerator(((16, 24, 32),), ((0.5, 1.0, 2.0),)),
        head=RetinaNetHead(CHANNELS, 9, 1, norm_layer=partial(nn.GroupNorm, 8)),
    )
    train(model)
    example = torch.stack(draw(2, seed=0)[0])
    plan = dt.plan(model, dt.SpatialSVD(), ratio=2, example_input=example, layers=WIDE)
    dense, untrained = overlap(model), overlap(dt.decompose(model, plan))

    twist = dt.DeepTwist(model, plan, interval=25)
    train(model, twist)
    small = twist.finish()
    print(f"dense      {dense:.1%} IoU  {plan.dense_parameters:,} parameters")
    print(f"untrained  {untrained:.1%}  {plan.parameters:,}")
    print(f"DeepTwist  {overlap(small):.1%}  {plan.parameters:,}")


if __name__ == "__main__":
    main()
