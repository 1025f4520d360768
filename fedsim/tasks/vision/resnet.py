"""ResNet18 (He et al. 2016): names, arithmetic and draws of initial weights are torchvision's.

Importing torchvision takes a processor 1.5 s, which on a real node every message would wait for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]
Convolution = type[nn.Conv2d]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is projected where shapes differ."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        norm_layer: NormLayer,
        convolution: Convolution,
    ) -> None:
        super().__init__()
        # First of all: it draws before the others, and is registered after them.
        projection = None
        if stride != 1 or inputs != outputs:
            projection = nn.Sequential(
                convolution(inputs, outputs, 1, stride=stride, bias=False), norm_layer(outputs)
            )
        self.conv1 = convolution(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = convolution(outputs, outputs, 3, padding=1, bias=False)
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
    convolution : type
        `nn.Conv2d`, or what draws the same weights and does other arithmetic.
    """

    def __init__(
        self, classes: int, norm_layer: NormLayer, convolution: Convolution = nn.Conv2d
    ) -> None:
        super().__init__()
        self.conv1 = convolution(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, 1, norm_layer, convolution)
        self.layer2 = _stage(64, 128, 2, norm_layer, convolution)
        self.layer3 = _stage(128, 256, 2, norm_layer, convolution)
        self.layer4 = _stage(256, 512, 2, norm_layer, convolution)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Give logits, shape (batch, classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(
    inputs: int, outputs: int, stride: int, norm: NormLayer, convolution: Convolution
) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, norm, convolution),
        BasicBlock(outputs, outputs, 1, norm, convolution),
    )
