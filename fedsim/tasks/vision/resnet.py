"""ResNet18 (He et al. 2016): names, arithmetic and draws of initial weights are torchvision's.

Importing torchvision takes a processor 1.5 s, which on a real node every message would wait for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


def _convolution(inputs: int, outputs: int, *, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(
        inputs, outputs, kernel_size=size, stride=stride, padding=size // 2, bias=False
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is projected where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        # First of all: it draws before the others, and is registered after them.
        projection = None
        if stride != 1 or inputs != outputs:
            projection = nn.Sequential(
                _convolution(inputs, outputs, size=1, stride=stride), norm_layer(outputs)
            )
        self.conv1 = _convolution(inputs, outputs, size=3, stride=stride)
        self.bn1 = norm_layer(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(outputs, outputs, size=3, stride=1)
        self.bn2 = norm_layer(outputs)
        self.downsample = projection

    def forward(self, x: Tensor) -> Tensor:
        """Give (batch, outputs, height / stride, width / stride)."""
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        rectified: Tensor = self.relu(out)
        return rectified


class ResNet18(nn.Module):
    """Four stages of two blocks.

    Parameters
    ----------
    classes : int
        Width of the head.
    norm_layer : callable
        Makes a normalisation of so many channels.
    """

    def __init__(self, classes: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._stage(64, 64, 1, norm_layer)
        self.layer2 = self._stage(64, 128, 2, norm_layer)
        self.layer3 = self._stage(128, 256, 2, norm_layer)
        self.layer4 = self._stage(256, 512, 2, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, inputs: int, outputs: int, stride: int, norm: NormLayer) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(inputs, outputs, stride, norm), BasicBlock(outputs, outputs, 1, norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give logits, shape (batch, classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
