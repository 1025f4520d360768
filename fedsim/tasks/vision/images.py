"""Augmentation and normalisation of whole batches, on the batch's device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PADDING = 4


def augment(images: Tensor, draw: np.random.Generator, *, flip: bool) -> Tensor:
    """Crop each image at random from its zero-padded self and mirror half of them.

    The same distribution as torchvision's ``RandomCrop(size, padding=4)`` followed by
    ``RandomHorizontalFlip()``, with draws from `draw` in place of the global generator.

    Parameters
    ----------
    images : Tensor, shape (batch, channels, height, width)
        Any dtype; uint8 is cheapest.
    draw : numpy.random.Generator
        Two offsets in 0..8 and one coin are taken per image, flip or not, so that the draws of
        a step depend on its batch size alone.
    flip : bool
        Whether mirroring keeps the class.

    Returns
    -------
    Tensor
        Same shape and dtype.
    """
    batch, channels, height, width = images.shape
    offsets = draw.integers(0, 2 * PADDING + 1, size=(2, batch))
    mirrored = draw.random(batch) < 0.5
    rows = offsets[0][:, None] + np.arange(height)
    columns = offsets[1][:, None] + np.arange(width)
    if flip:
        columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    stride = width + 2 * PADDING
    flat = torch.from_numpy(rows[:, :, None] * stride + columns[:, None, :])
    flat = flat.reshape(batch, 1, height * width).expand(-1, channels, -1).to(images.device)
    return padded.flatten(2).gather(2, flat).view(batch, channels, height, width)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 pixels to [0, 1], subtract the mean and divide by the deviation.

    Parameters
    ----------
    images : Tensor of uint8, shape (batch, 3, height, width)
    mean, std : sequence of float
        Per channel.

    Returns
    -------
    Tensor of float32
        Same shape and device.
    """
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, device=images.device).view(shape)
    spread = torch.tensor(std, device=images.device).view(shape)
    return images.float().div_(255).sub_(centre).div_(spread)
