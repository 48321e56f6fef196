"""DeepTwist in timm's own loop: its network, optimizer, scheduler and average of weights.

Run it: ``python examples/timm_loop.py``.
"""

import timm
import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import nn
from torch.nn import functional

import deeptwist as dt
from deeptwist.app.data import ImageData, batches, load_data, normalize

EPOCHS, BATCH = 4, 64


def train(model: nn.Module, data: ImageData, twist: dt.DeepTwist | None = None) -> nn.Module:
    """Train a network; return its average over the steps."""
    optimizer = create_optimizer_v2(model.train(), "lamb", lr=0.02, weight_decay=0.02)
    per_epoch = len(data.train.labels) // BATCH
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=EPOCHS,
        warmup_epochs=1,
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )
    average = ModelEmaV3(model, decay=0.9)
    generator, step = torch.Generator().manual_seed(0), 0
    for _ in range(EPOCHS):
        for images, labels in batches(data.train, BATCH, generator=generator, drop_last=True):
            x = normalize(images, data.mean, data.std)
            functional.cross_entropy(model(x), labels, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            scheduler.step_update(step)
            average.update(model)
            if twist is not None:
                twist.step()
    return average.module


def main() -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    example = torch.zeros(2, 1, 8, 8)
    plan = dt.plan(model, dt.SpatialSVD(), ratio=3, example_input=example)
    train(model, data)
    dense, untrained = (accuracy(n, data) for n in (model, dt.decompose(model, plan)))

    twist = dt.DeepTwist(model, plan, interval=10)
    average = train(model, data, twist)
    # Between distortions weights are not of low rank, nor is their average: it is decomposed.
    print(f"average    {accuracy(dt.decompose(average, plan), data):.1%}  {plan.parameters:,}")
    print(f"dense      {dense:.1%}  {plan.dense_parameters:,} parameters")
    print(f"untrained  {untrained:.1%}  {plan.parameters:,}")
    print(f"DeepTwist  {accuracy(twist.finish(), data):.1%}  {plan.parameters:,}")


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    x = normalize(data.test.images, data.mean, data.std)
    return float((model.eval()(x).argmax(1) == data.test.labels).float().mean())


if __name__ == "__main__":
    main()
