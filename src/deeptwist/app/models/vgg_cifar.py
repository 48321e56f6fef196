"""VGG-19 for CIFAR: Simonyan & Zisserman 2014 (arXiv:1409.1556), with a small classifier.

Layer for layer the 'vgg19' of github.com/chengyangfu/pytorch-vgg-cifar10, so that its weights
load; without batch norm it is the network of the paper's table 2.
"""

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # (channels, convolutions)


class VGG19(nn.Module):
    """Sixteen 3×3 convolutions in five pooled stages, then three linear layers.

    Args:
        num_classes: logits that come out.
        in_channels: channels of the images.
        batch_norm: whether batch norm follows each convolution.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, *, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.features = _features(in_channels, batch_norm)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, num_classes) for normalized images (b, in_channels, h ≥ 32, w ≥ 32)."""
        features = F.adaptive_avg_pool2d(self.features(images), 1)
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


def _features(in_channels: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, convolutions in _STAGES:
        for _ in range(convolutions):
            conv = nn.Conv2d(in_channels, channels, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers.append(conv)
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU())
            in_channels = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
