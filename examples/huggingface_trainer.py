"""DeepTwist in the Trainer of Hugging Face, by a callback.

Run it: ``python examples/huggingface_trainer.py``.
"""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

import deeptwist as dt
from deeptwist.app.data import ImageData, load_data, normalize
from deeptwist.integrations.transformers import DeepTwistCallback

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


class Classifier(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def fit(network: nn.Module, data: ImageData, *callbacks: TrainerCallback) -> None:
    images = normalize(data.train.images, data.mean, data.std)
    examples = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(images, data.train.labels, strict=True)
    ]
    with TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            dataloader_drop_last=True,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(
            Classifier(network),
            settings,
            train_dataset=examples,
            callbacks=list(callbacks),
            optimizers=(torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9), None),
        ).train()


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
