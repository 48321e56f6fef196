"""The paper's networks for CIFAR, and the demo's.

Module names follow github.com/akamaster/pytorch_resnet_cifar10 and, for VGG,
github.com/chengyangfu/pytorch-vgg-cifar10, so that their weights load.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Option A: every `stride`-th position, the new channels zero; it has no weights.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out; half of the new ones stand before the old, half after.
        stride: the step along height and width.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, in, h, w) to (b, out, ⌈h / stride⌉, ⌈w / stride⌉)."""
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else PadShortcut(in_channels, out_channels, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, in, h, w) to (b, out, ⌈h / stride⌉, ⌈w / stride⌉)."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """A CIFAR ResNet of depth 6n + 2: three stages of n blocks, 16, 32 and 64 channels wide.

    Source: He et al. 2015 (arXiv:1512.03385, section 4.2), with option-A shortcuts.

    Args:
        blocks: n, the blocks of each stage.
        num_classes: logits that come out.
        in_channels: channels of the images.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, num_classes) for normalized images (b, in_channels, h, w)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class VGG19(nn.Module):
    """Sixteen 3×3 convolutions in five pooled stages, then a small classifier.

    Source: Simonyan & Zisserman 2014 (arXiv:1409.1556); without batch norm it is the network of
    the paper's table 2.

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


def digits_net(num_classes: int, in_channels: int) -> nn.Module:
    """Return the demo's network: five 3×3 convolutions of up to 256 channels, for images of 8×8."""
    layers: list[nn.Module] = []
    for before, after in pairwise((in_channels, 64, 128, 128, 256, 256)):
        stride = 2 if (before, after) == (128, 256) else 1
        layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes)
    )


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _features(in_channels: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, convolutions in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
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
