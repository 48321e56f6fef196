"""DeepTwist in a plain PyTorch loop, with accumulated gradients and mixed precision.

Only steps that the optimizer takes count: not a batch whose gradients are accumulated, and not a
step that GradScaler skips because a gradient is infinite; it lowers its scale then.

Run it: ``python examples/plain_loop.py``.
"""

import torch
from torch import nn
from torch.nn import functional

import deeptwist as dt
from deeptwist.app.data import ImageData, batches, load_data, normalize

EPOCHS, BATCH, ACCUMULATE = 5, 32, 2


def build_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def train(model: nn.Module, data: ImageData, twist: dt.DeepTwist | None = None) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        epoch = batches(data.train, BATCH, generator=generator, drop_last=True)
        for number, (images, labels) in enumerate(epoch, start=1):
            x = normalize(images.to(device), data.mean, data.std)
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                loss = functional.cross_entropy(model(x), labels.to(device))
            scaler.scale(loss / ACCUMULATE).backward()
            if number % ACCUMULATE == 0:
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                was_skipped = scaler.get_scale() < scale
                if twist is not None and not was_skipped:
                    twist.step()


def main() -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = build_network()
    example = torch.zeros(2, 1, 8, 8)
    plan = dt.plan(model, dt.SpatialSVD(), ratio=3, example_input=example)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    train(model, data)
    dense, untrained = (accuracy(n, data) for n in (model, dt.decompose(model, plan)))

    twist = dt.DeepTwist(model, plan, interval=5)
    train(model, data, twist)
    small = twist.finish()

    print(f"dense      {dense:.1%}  {plan.dense_parameters:,} parameters")
    print(f"untrained  {untrained:.1%}  {plan.parameters:,}")
    print(f"DeepTwist  {accuracy(small, data):.1%}  {plan.parameters:,}")


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    x = normalize(data.test.images, data.mean, data.std).to(next(model.parameters()).device)
    return float((model.eval()(x).argmax(1).cpu() == data.test.labels).float().mean())


if __name__ == "__main__":
    main()
