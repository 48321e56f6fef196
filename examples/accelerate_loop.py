"""DeepTwist in a loop of Accelerate, which accumulates gradients and writes checkpoints.

Run it: ``python examples/accelerate_loop.py``.
"""

from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import deeptwist as dt
from deeptwist.app.data import ImageData, load_data, normalize

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


def train(network: nn.Module, data: ImageData, twist: dt.DeepTwist | None = None) -> None:
    examples = TensorDataset(normalize(data.train.images, data.mean, data.std), data.train.labels)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    model, optimizer, loader = accelerator.prepare(
        network.train(),
        torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
        DataLoader(examples, BATCH, shuffle=True, drop_last=True),
    )
    if twist is not None:
        accelerator.register_for_checkpointing(twist)
    with TemporaryDirectory() as checkpoint:
        for _ in range(EPOCHS):
            for x, labels in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(functional.cross_entropy(model(x), labels))
                    optimizer.step()
                    optimizer.zero_grad()
                was_taken = (
                    accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped
                )
                if twist is not None and was_taken:
                    twist.step()
            accelerator.save_state(checkpoint)  # `load_state` goes on from here
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # gives `network` its own forward back


def main() -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = build_network()
    example = torch.zeros(2, 1, 8, 8)
    plan = dt.plan(model, dt.SpatialSVD(), ratio=3, example_input=example)

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
