"""The demo's network: small, with work to save."""

from itertools import pairwise

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Five 3×3 convolutions of up to 256 channels with batch norm, for images of 8×8."""

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        widths = (in_channels, 64, 128, 128, 256, 256)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if number == 3 else 1
            layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, num_classes) for images (b, in_channels, h, w)."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits
