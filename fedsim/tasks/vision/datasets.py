"""Image datasets as whole uint8 tensors, mapped from one cache file by every process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import tempfile
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsim.core.cache import cache_root
from fedsim.core.columns import map_columns, save_columns, sha256_of
from fedsim.core.errors import InputError
from fedsim.core.own_data import OwnData, check_classes
from fedsim.core.rng import Purpose, generator
from fedsim.core.task import Column, Columns, tensors_of
from fedsim.core.units import parse_count
from fedsim.tasks.vision import IMAGE_SHAPE

_CACHE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What is known of a dataset before it is loaded: a `DataSpec` of images and classes.

    Parameters
    ----------
    name : str
        The configuration's ``dataset``.
    classes : int
        Number of classes.
    mean, std : tuple of float
        Per channel, of pixels scaled to [0, 1].
    train_size, test_size : int
        Samples in the two splits.
    flip : bool
        Whether a mirrored image keeps its class.
    official_sha256 : str or None
        Fingerprint of what is the same for everybody.
    """

    name: str
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_size: int
    test_size: int
    flip: bool
    official_sha256: str | None = None

    @property
    def columns(self) -> dict[str, Column]:
        """The pixels and the class of each image."""
        return {
            "images": Column(dtype="uint8", shape=IMAGE_SHAPE),
            "labels": Column(dtype="int64", values=self.classes),
        }

    @property
    def label(self) -> str:
        """The column that images are dealt by."""
        return "labels"

    @property
    def facts(self) -> dict[str, Any]:
        """How pixels are normalised."""
        return {"mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset in memory, or mapped from a file.

    Parameters
    ----------
    spec : DatasetSpec
        Sizes and normalisation.
    train_images, test_images : Tensor of uint8, shape (samples, 3, 32, 32)
        Pixels.
    train_labels, test_labels : Tensor of int64, shape (samples,)
        Classes.
    """

    spec: DatasetSpec
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def train(self) -> Columns:
        """Give ``images`` and ``labels`` of the training split."""
        return {"images": self.train_images, "labels": self.train_labels}

    def test(self) -> Columns:
        """Give ``images`` and ``labels`` of the test split."""
        return {"images": self.test_images, "labels": self.test_labels}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of both splits: images, labels of training, then of test, as raw bytes."""
        return sha256_of(tensors_of(self))

    def check_official(self) -> None:
        """Refuse what has the name of a public dataset and not its samples.

        A cache file that was altered together with its own hash is found here alone.

        Raises
        ------
        InputError
            Naming the cache file.
        """
        name, known = self.spec.name, self.spec.official_sha256
        if known is not None and self.fingerprint != known:
            raise InputError(
                f"{_cache_file(name, 0)} is not the official {name}: its samples have sha256 "
                f"{self.fingerprint[:16]}..., not {known[:16]}...; remove the file and try again"
            )

    def with_own(self, own: OwnData) -> Dataset:
        """Put a node's own samples in place of the training split, mapped from the cache.

        Raises
        ------
        InputError
            When they have another number of classes than the dataset.
        """
        check_classes(len(own.classes), self.spec.classes, self.spec.name)
        with safe_open(own.file, framework="pt") as file:
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
        spec = dataclasses.replace(self.spec, train_size=own.samples)
        return dataclasses.replace(self, spec=spec, train_images=images, train_labels=labels)


_CIFAR100 = DatasetSpec(
    name="cifar100",
    classes=100,
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    train_size=50_000,
    test_size=10_000,
    flip=True,
    official_sha256="283e80e15e3841cce98044da5929d8557a88969bfd2d77d1c1db7bb78ba419f7",
)
# Held to the MD5 of its files.
_CIFAR10 = DatasetSpec(
    name="cifar10",
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    train_size=50_000,
    test_size=10_000,
    flip=True,
)
# A mirrored digit is no digit: digits are cropped, not flipped.
_DIGITS = DatasetSpec(
    name="digits",
    classes=10,
    mean=(0.3059, 0.3059, 0.3059),
    std=(0.3763, 0.3763, 0.3763),
    train_size=1_438,
    test_size=359,
    flip=False,
    official_sha256="2424bc720d76768867b002c30f5d7cfae5f33e810064ccf0d1e05b8049476456",
)


def parse_name(text: str) -> DatasetSpec:
    """Read ``digits``, ``cifar10``, ``cifar100`` or ``synthetic[:SAMPLES[:CLASSES]]``.

    ``synthetic`` has 10,000 training samples of 10 classes, and a fifth as many test samples.

    Raises
    ------
    ValueError
        With the allowed forms, when `text` is not one of them.
    """
    for spec in (_DIGITS, _CIFAR10, _CIFAR100):
        if text == spec.name:
            return spec
    name, *numbers = text.split(":")
    if name == "synthetic" and len(numbers) <= 2:
        counts = [parse_count(n) or 0 for n in numbers]
        samples, classes = counts + [10_000, 10][len(counts) :]
        if classes >= 2 and samples >= 5 * classes:
            return DatasetSpec(
                name=text,
                classes=classes,
                mean=(0.5, 0.5, 0.5),
                std=(0.25, 0.25, 0.25),
                train_size=samples,
                test_size=samples // 5,
                flip=True,
            )
    raise ValueError(
        "digits, cifar10, cifar100, synthetic or synthetic:SAMPLES[:CLASSES] with at least "
        "2 classes and 5 samples of each"
    )


def load_dataset(name: str, *, data_root: str | None, seed: int, download: bool = True) -> Dataset:
    """Load a dataset, converting it into the cache on first use.

    Every process maps the same cache file, so its pages are in memory once.

    Parameters
    ----------
    name : str
        The configuration's ``dataset``.
    data_root : str or None
        Folder that holds or receives the CIFAR archives; None means ``FEDSIM_DATA_ROOT`` or,
        without that, the cache.
    seed : int
        ``synthetic`` is generated from it.
    download : bool
        Whether CIFAR may be downloaded into `data_root` where it is not there.

    Raises
    ------
    InputError
        When CIFAR is neither found nor downloadable, or is damaged, or the cache cannot be written.
    """
    spec = parse_name(name)
    path = _cache_file(name, seed)
    if (cached := map_columns(path, spec)) is not None:
        return Dataset(spec=spec, **cached)
    try:
        tensors = _LOADERS[name.partition(":")[0]](spec, data_root, seed, download)
    except InputError as error:
        if not path.exists():
            raise
        raise InputError(f"the dataset cache {path} is damaged, and {error}") from None
    return store_dataset(name, tensors, seed=seed)


def _cache_file(name: str, seed: int) -> Path:
    suffix = f"-seed{seed}" if name.startswith("synthetic") else ""
    return cache_root() / f"{name.replace(':', '-')}{suffix}-v{_CACHE_VERSION}.safetensors"


def store_dataset(name: str, tensors: Mapping[str, Tensor], *, seed: int) -> Dataset:
    """Put a dataset into the cache, and map it from there.

    Parameters
    ----------
    name : str
        The configuration's ``dataset``.
    tensors : mapping of str to Tensor
        The four of `Dataset` by name.
    seed : int
        As for `load_dataset`.

    Raises
    ------
    InputError
        When the cache cannot be written, or a public dataset has other samples than is known.
    """
    path, spec = _cache_file(name, seed), parse_name(name)
    given = Dataset(spec=spec, **tensors)
    known, found = spec.official_sha256, given.fingerprint
    if known is not None and found != known:
        raise InputError(
            f"dataset = {name!r} cannot be used: its samples have sha256 {found[:16]}..., and the "
            f"official ones {known[:16]}..."
        )
    try:
        save_columns(path, tensors_of(given))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the dataset cache {path.parent} cannot be written ({_first_line(error)}); "
            "set FEDSIM_CACHE to a folder that can"
        ) from None
    mapped = map_columns(path, spec)
    if mapped is None:
        raise InputError(f"the dataset cache {path} cannot be read back; remove it and try again")
    return Dataset(spec=spec, **mapped)


def _tensors(
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
) -> dict[str, Tensor]:
    return {
        "train_images": torch.from_numpy(np.ascontiguousarray(train[0])),
        "train_labels": torch.from_numpy(train[1].astype(np.int64)),
        "test_images": torch.from_numpy(np.ascontiguousarray(test[0])),
        "test_labels": torch.from_numpy(test[1].astype(np.int64)),
    }


def _load_digits(
    spec: DatasetSpec, data_root: str | None, seed: int, download: bool
) -> dict[str, Tensor]:
    """Bring scikit-learn's 8x8 digits to 3x32x32; every fifth sample is a test sample."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    large = grey.repeat(4, axis=1).repeat(4, axis=2)
    images = np.broadcast_to(large[:, None], (len(large), *IMAGE_SHAPE))
    test = np.arange(len(images)) % 5 == 4
    return _tensors((images[~test], digits.target[~test]), (images[test], digits.target[test]))


def _load_cifar(
    spec: DatasetSpec, data_root: str | None, seed: int, download: bool
) -> dict[str, Tensor]:
    """Read CIFAR (Krizhevsky 2009) through torchvision, once its files have their official MD5."""
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[
        spec.name
    ]
    given = data_root or os.environ.get("FEDSIM_DATA_ROOT")
    if given and Path(given).is_file():
        raise InputError(
            f"{given} is a file; expected the folder {kind.base_folder} or its parent as "
            "--data-root or FEDSIM_DATA_ROOT"
        )
    folder = _cifar_folder(Path(given) if given else cache_root(), kind)
    files, archive = _cifar_files(kind), folder.with_name(kind.filename)
    told = f"dataset = {spec.name!r} was not found in {folder}"
    advice = (
        "put the official files there or name their folder with --data-root or FEDSIM_DATA_ROOT"
    )
    wrong = _wrong_files(folder, files)
    there = any(os.path.lexists(folder / name) for name in files)
    if wrong and not there and os.path.lexists(archive):
        bad = _wrong_files(folder.parent, {archive.name: kind.tgz_md5})
        wrong, there = bad or wrong, bool(bad)
    if wrong and there:
        told = f"dataset = {spec.name!r} cannot be read from {folder}: {wrong}"
        # Nothing in a folder of the user's is overwritten.
        if given or not download:
            raise InputError(f"{told}; {advice}")
    if wrong and not download:
        raise InputError(f"{told} and is not downloaded for a recorded run; {advice}")
    try:
        if wrong:
            _download_cifar(kind, folder, None if there or not archive.exists() else archive)
        # torchvision knows a folder by its official name; a user's may have another.
        named = type(kind.__name__, (kind,), {"base_folder": folder.name})
        splits = [named(root=str(folder.parent), train=train) for train in (True, False)]
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"{told} and could not be downloaded ({_first_line(error)}); {advice}"
        ) from None
    train, test = ((s.data.transpose(0, 3, 1, 2), np.asarray(s.targets)) for s in splits)
    return _tensors(train, test)


def _download_cifar(kind: Any, folder: Path, archive: Path | None) -> None:
    """Put the official files into a folder, each whole or not at all.

    Parameters
    ----------
    kind : type
        torchvision's class of the dataset.
    folder : Path
        Where they belong.
    archive : Path or None
        The official archive, where somebody put it there.
    """
    from torchvision.datasets.utils import extract_archive

    home = folder.parent
    made = [path for path in (home, *home.parents) if not path.exists()]
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fedsim-", dir=home) as unfinished:
            if archive is None:
                kind(root=unfinished, train=False, download=True)
            else:
                extract_archive(str(archive), unfinished)
            folder.mkdir(exist_ok=True)
            for name in _cifar_files(kind):
                Path(unfinished, kind.base_folder, name).replace(folder / name)
    except BaseException:
        # Of what could not be had nothing is left.
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _cifar_files(kind: Any) -> dict[str, str]:
    """List the official files with their MD5 sums."""
    return {**dict(kind.train_list + kind.test_list), kind.meta["filename"]: kind.meta["md5"]}


def _cifar_folder(root: Path, kind: Any) -> Path:
    """Find the folder of the files: `root` itself, or the one of the official name in it."""
    inner = root / str(kind.base_folder)
    if inner.exists():
        return inner
    # One file alone may be anything: CIFAR-100's are called train, test and meta.
    holds = sum((root / name).is_file() for name in _cifar_files(kind)) >= 2
    return root if holds or root.name == kind.base_folder else inner


def _wrong_files(folder: Path, files: Mapping[str, str]) -> str:
    """Say which of the files are missing, unreadable or damaged; empty where none is."""
    missing, damaged = [], []
    for name, md5 in files.items():
        path = folder / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
                size = file.tell()
        except FileNotFoundError:
            missing.append(name)
        except OSError as error:
            damaged.append(f"{name} cannot be opened ({error.strerror})")
        else:
            if found.hexdigest() != md5:
                damaged.append(f"{name} is damaged ({size:,} bytes, not of the official MD5)")
    if missing:
        damaged.append(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return ", ".join(damaged)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _make_synthetic(
    spec: DatasetSpec, data_root: str | None, seed: int, download: bool
) -> dict[str, Tensor]:
    """Draw images that are a smooth pattern of their class plus noise."""
    # Images are bytes, patterns eight of them.
    entries = spec.train_size + spec.test_size + 8 * spec.classes
    needed = entries * math.prod(IMAGE_SHAPE)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory // 2:
        raise InputError(
            f"dataset = {spec.name!r} needs {needed / 1e9:.1f} GB of images; expected at most half "
            f"of this machine's memory, {memory / 2e9:.1f} GB"
        )
    draw = generator(seed, Purpose.SYNTHETIC_DATA)
    coarse = draw.uniform(64, 192, size=(spec.classes, 3, 4, 4))
    patterns = coarse.repeat(8, axis=2).repeat(8, axis=3)

    def split(size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels = draw.permutation(np.arange(size) % spec.classes)
        images = np.empty((size, *IMAGE_SHAPE), dtype=np.uint8)
        # In blocks: the noise of a large dataset would be eight times the images.
        for start in range(0, size, 4096):
            block = slice(start, min(start + 4096, size))
            noise = draw.normal(0, 48, size=(block.stop - block.start, *IMAGE_SHAPE))
            images[block] = np.clip(patterns[labels[block]] + noise, 0, 255)
        return images, labels

    return _tensors(split(spec.train_size), split(spec.test_size))


_LOADERS: dict[str, Callable[[DatasetSpec, str | None, int, bool], dict[str, Tensor]]] = {
    "digits": _load_digits,
    "cifar10": _load_cifar,
    "cifar100": _load_cifar,
    "synthetic": _make_synthetic,
}
