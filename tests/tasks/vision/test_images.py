from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import functional

from fedsim.tasks.vision.images import augment, normalise

# Every vertical offset, horizontal offset and coin.
CASES = list(itertools.product(range(9), range(9), (False, True)))


class ChosenDraws:
    """Stands in for a generator: gives out chosen offsets, and coins just off the middle."""

    def __init__(self, cases):
        self.cases = cases

    def integers(self, low, high, size):
        assert (low, high, size) == (0, 9, (2, len(self.cases)))
        return np.array([[top for top, _, _ in self.cases], [left for _, left, _ in self.cases]])

    def random(self, size):
        assert size == len(self.cases)
        return np.array([np.nextafter(0.5, 0) if flip else 0.5 for _, _, flip in self.cases])


def random_images(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def cropped_by_torchvision(image, top, left, flip):
    height, width = image.shape[-2:]
    image = functional.crop(functional.pad(image, [4, 4, 4, 4]), top, left, height, width)
    return functional.hflip(image) if flip else image


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 6, 9)])
def test_every_offset_and_coin_equals_torchvisions_pad_crop_and_flip(shape):
    images = random_images(len(CASES), *shape)
    found = augment(images, ChosenDraws(CASES), flip=True)
    expected = [cropped_by_torchvision(i, *case) for i, case in zip(images, CASES, strict=True)]
    assert torch.equal(found, torch.stack(expected))


def test_flip_false_crops_the_same_and_mirrors_nothing():
    images = random_images(len(CASES), 3, 32, 32)
    found = augment(images, ChosenDraws(CASES), flip=False)
    expected = [
        cropped_by_torchvision(image, top, left, flip=False)
        for image, (top, left, _) in zip(images, CASES, strict=True)
    ]
    assert torch.equal(found, torch.stack(expected))


def test_draws_depend_on_the_batch_size_alone():
    states = []
    for shape, flip in [((7, 3, 32, 32), True), ((7, 3, 32, 32), False), ((7, 1, 8, 8), True)]:
        draw = np.random.default_rng(5)
        augment(random_images(*shape), draw, flip=flip)
        states.append(draw.bit_generator.state)
    assert states[0] == states[1] == states[2]
    by_hand = np.random.default_rng(5)
    by_hand.integers(0, 9, size=(2, 7))
    by_hand.random(7)
    assert states[0] == by_hand.bit_generator.state


def seen_cases(images):
    """Read top, left and coin of each image whose two channels hold their row and column."""
    middle = images[:, :, 16, 16]
    step = images[:, 1, 16, 17] - middle[:, 1]
    top = middle[:, 0] - 16 + 4
    left = torch.where(step > 0, middle[:, 1] - 16, middle[:, 1] - 15) + 4
    return torch.stack([top, left, (step < 0).long()], dim=1)


def cell_counts(images):
    top, left, flip = seen_cases(images).T
    return np.bincount((top * 9 + left) * 2 + flip, minlength=len(CASES))


def test_crops_and_flips_are_distributed_like_torchvisions():
    number = 50 * len(CASES)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([rows, columns])
    ours = cell_counts(
        augment(image.expand(number, -1, -1, -1), np.random.default_rng(1), flip=True)
    )
    transform = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    )
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it seeds the generators of GPUs too, and those stay seeded.
        torch.default_generator.manual_seed(1)
        theirs = cell_counts(torch.stack([transform(image) for _ in range(number)]))
    assert ours.sum() == theirs.sum() == number
    # 222.2 is the 99.9th percentile of chi-square with 161 degrees of freedom.
    assert ((ours - 50) ** 2 / 50).sum() < 222.2
    assert ((ours - theirs) ** 2 / (ours + theirs)).sum() < 222.2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_dtype_shape_and_the_images_given_are_kept(dtype):
    images = random_images(4, 3, 32, 32).to(dtype)
    before = images.clone()
    found = augment(images, np.random.default_rng(0), flip=True)
    assert found.dtype == dtype
    assert found.shape == images.shape
    assert torch.equal(images, before)


def test_normalise_equals_torchvisions_to_tensor_and_normalize():
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    images = random_images(5, 3, 32, 32)
    before = images.clone()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([transform(i.permute(1, 2, 0).numpy()) for i in images])
    found = normalise(images, mean, std)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_normalise_takes_each_channels_own_mean_and_deviation():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    found = normalise(images, (0.5, 0.25, 0.2), (0.5, 0.25, 1.0))
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 3.0, 0.0]))
