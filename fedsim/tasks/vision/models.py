"""The models that clients train, and their initial weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fedsim.core.rng import torch_seed
from fedsim.tasks.vision.resnet import NormLayer, ResNet18

GROUPS = 32
"""Groups of ``norm = group`` where a layer has at least as many channels (Wu & He 2018)."""


def build_model(name: str, *, classes: int, norm: str, seed: int) -> nn.Module:
    """Build a model with initial weights that follow from the seed alone.

    Parameters
    ----------
    name : {"resnet18", "resnet18-cifar", "cnn"}
        ``resnet18`` is torchvision's (He et al. 2016) with a new head; ``resnet18-cifar`` has
        a 3x3 stem and no max-pooling; ``cnn`` has three convolutions.
    classes : int
        Width of the classifier.
    norm : {"batch", "group"}
        Normalisation layers.
    seed : int
        Seeds torch's generator before the first weight is drawn.

    Returns
    -------
    torch.nn.Module
        On the CPU, in training mode, float32; input is (batch, 3, 32, 32).
    """
    norm_layer: NormLayer = nn.BatchNorm2d if norm == "batch" else _group_norm
    with torch_seed(seed):
        return _BUILDERS[name](classes, norm_layer)


def needs_two_samples(name: str, norm: str) -> bool:
    """Say whether the model cannot train on a batch of one sample.

    At 32x32 the last stage of ``resnet18`` works on 1x1 maps, where a batch of one gives
    batch normalisation a single value per channel.
    """
    return name == "resnet18" and norm == "batch"


class LiveTapConv2d(nn.Conv2d):
    """A convolution that, where its output is one pixel, multiplies by its live taps only.

    At 32x32 the last stage of ResNet18 works on 1x1 maps: eight of the nine taps of its 3x3
    kernels meet nothing but padding. A matrix product with the others gives the same outputs
    and gradients up to rounding, zeros included, in 0.8 of the time of a step on a CPU, where
    the general backward pass rearranges whole kernels. Parameters are those of `nn.Conv2d`.

    Takes the place of convolutions without bias, groups or dilation, padded with zeros.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Convolve (batch, channels, height, width)."""
        taps = []
        for axis, size in enumerate(input.shape[2:]):
            padding = int(self.padding[axis])
            # One output whose window holds all of the input: the taps that meet it.
            one = (size + 2 * padding - self.kernel_size[axis]) // self.stride[axis] == 0
            if not one or padding + size > self.kernel_size[axis]:
                return super().forward(input)
            taps.append(slice(padding, padding + size))
        live = self.weight[:, :, taps[0], taps[1]]
        return nn.functional.linear(input.flatten(1), live.flatten(1))[:, :, None, None]


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(GROUPS, channels), channels)


def _resnet18(classes: int, norm_layer: NormLayer) -> nn.Module:
    # A head of 1000 classes is drawn first and replaced: a published run did so, and skipping
    # it would change the numbers that follow.
    model = ResNet18(1000, norm_layer, LiveTapConv2d)
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model


def _resnet18_cifar(classes: int, norm_layer: NormLayer) -> nn.Module:
    model = ResNet18(classes, norm_layer)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _cnn(classes: int, norm_layer: NormLayer) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return [convolution, norm_layer(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 32), nn.Flatten(), nn.Linear(32 * 4 * 4, classes)
    )


_BUILDERS: dict[str, Callable[[int, NormLayer], nn.Module]] = {
    "resnet18": _resnet18,
    "resnet18-cifar": _resnet18_cifar,
    "cnn": _cnn,
}
ARCHS = tuple(_BUILDERS)
"""The names of the models."""
NORMS = ("batch", "group")
"""The names of the normalisation layers."""
