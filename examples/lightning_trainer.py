"""DeepTwist in Lightning's Trainer, by a callback.

Run it: ``python examples/lightning_trainer.py``.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import deeptwist as dt
from deeptwist.app.data import ImageData, load_data, normalize
from deeptwist.integrations.lightning import DeepTwistCallback

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


class Classifier(L.LightningModule):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        return functional.cross_entropy(self.network(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(network: nn.Module, data: ImageData, *callbacks: L.Callback) -> None:
    examples = TensorDataset(normalize(data.train.images, data.mean, data.std), data.train.labels)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        callbacks=list(callbacks),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(examples, BATCH, shuffle=True, drop_last=True)
    trainer.fit(Classifier(network.train()), loader)


def main() -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = build_network()
    example = torch.zeros(2, 1, 8, 8)
    plan = dt.plan(model, dt.SpatialSVD(), ratio=3, example_input=example)

    fit(model, data)
    dense, untrained = (accuracy(n, data) for n in (model, dt.decompose(model, plan)))

    callback = DeepTwistCallback(dt.DeepTwist(model, plan, interval=5))
    fit(model, data, callback)
    small = callback.small

    print(f"dense      {dense:.1%}  {plan.dense_parameters:,} parameters")
    print(f"untrained  {untrained:.1%}  {plan.parameters:,}")
    print(f"DeepTwist  {accuracy(small, data):.1%}  {plan.parameters:,}")


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    x = normalize(data.test.images, data.mean, data.std).to(next(model.parameters()).device)
    return float((model.eval()(x).argmax(1).cpu() == data.test.labels).float().mean())


if __name__ == "__main__":
    main()
