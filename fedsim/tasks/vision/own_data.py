"""A node's own data: images in folders of classes, or arrays in one safetensors file.

Without torch, so that a node can say what it holds at the cost of a look at its files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedsim.core.cache import cache_root
from fedsim.core.errors import InputError, shorten
from fedsim.core.inputs import open_regular, parse_json
from fedsim.core.own_data import MOST_NAME, OwnData
from fedsim.tasks.vision import IMAGE_SHAPE

_VERSION = 2
_SUFFIXES = (".png", ".jpg", ".jpeg")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
"""Kinds of images, as Pillow names them, that have 8 bits a channel or fewer."""
_MOST_IMAGE_BYTES = 2**20
"""Of the file of one image of 32x32 pixels."""


def find(folder: Path) -> OwnData:
    """Find the data of a node, converting it into the cache when it is new or has changed.

    Parameters
    ----------
    folder : Path
        It has ``train/<class>/*.png`` (or ``.jpg``, ``.jpeg``), one folder for each class of the
        federation, empty where the node has no sample of it; or ``train.safetensors`` with
        ``images``, ``labels`` and, in its metadata, ``classes``: the names as a JSON list.

    Raises
    ------
    InputError
        When there is neither, or something in it cannot be used.
    """
    file, classes = folder / "train.safetensors", folder / "train"
    try:
        if file.exists() == classes.exists():
            raise ValueError("it must have either a folder train or a file train.safetensors")
        names, paths = ([], [file]) if file.exists() else _listed(classes)
        prepared = cache_root() / f"own-{_key(folder, names, paths)}-v{_VERSION}.safetensors"
        found = _described(prepared)
        if found is None:
            images, labels, names = (
                _arrays_of(file) if file.exists() else _images_of(classes, names, paths)
            )
            _save(prepared, images, labels, names)
            found = _described(prepared)
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        name = getattr(error, "filename", None)
        raise _error(folder, f"{name}: {reason}" if name else reason) from None
    if found is None:
        raise _error(folder, f"{prepared} cannot be read back; remove it and try again")
    return found


def _error(folder: Path, why: str) -> InputError:
    return InputError(f"data = {str(folder)!r} cannot be used: {why}")


def _listed(root: Path) -> tuple[list[str], list[Path]]:
    names = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    paths = []
    for name in names:
        for path in sorted((root / name).iterdir()):
            if path.suffix.lower() not in _SUFFIXES:
                raise ValueError(f"{path} is not an image; expected {', '.join(_SUFFIXES)}")
            paths.append(path)
    return names, paths


def _key(folder: Path, names: list[str], paths: list[Path]) -> str:
    """Name what is there by sizes and times, which change when the content does."""
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), names]).encode())
    for path in paths:
        status = path.lstat()
        row = [str(path.relative_to(folder)), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:32]


def _images_of(
    root: Path, names: list[str], paths: list[Path]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    images = np.empty((len(paths), *IMAGE_SHAPE), np.uint8)
    for position, path in enumerate(paths):
        images[position] = _image(path)
    labels = [names.index(path.parent.name) for path in paths]
    return images, np.array(labels, np.int64), names


def _image(path: Path) -> NDArray[np.uint8]:
    with os.fdopen(_open(path), "rb") as file:
        content = file.read(_MOST_IMAGE_BYTES)
    try:
        image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has millions of pixels; expected 32x32") from None
    # Each of Pillow's decoders has exceptions of its own.
    except Exception:
        raise ValueError(f"{path} is not an image that can be read") from None
    if image.size != IMAGE_SHAPE[:0:-1]:
        width, height = image.size
        raise ValueError(f"{path} has {width}x{height} pixels; expected 32x32")
    if image.mode not in _MODES:
        # Pillow would clip what has 16 bits at 255: all of it white.
        raise ValueError(
            f"{path} has pixels of kind {image.mode}; expected 8 bits a channel, in "
            f"Pillow's kinds {', '.join(_MODES)}"
        )
    try:
        return np.asarray(image.convert("RGB"), np.uint8).transpose(2, 0, 1)
    except Exception:
        raise ValueError(f"{path} is not an image that can be read") from None


def _open(path: Path) -> int:
    try:
        return open_regular(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


_ARRAYS = {
    "images": ("U8", IMAGE_SHAPE, "uint8 of shape (N, 3, 32, 32)"),
    "labels": ("I64", (), "int64 of shape (N,)"),
}
"""Dtype, shape of one sample, and both as a person would say it."""


def _arrays_of(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    os.close(_open(path))
    with safe_open(path, framework="np") as file:
        names = _names_of(file.metadata() or {})
        if names is None:
            raise ValueError(f"{path} has no classes in its metadata, a JSON list of names")
        if {*file.keys()} != {*_ARRAYS}:
            raise ValueError(f"{path} has {sorted(file.keys())}; expected images and labels")
        # Before they are read: of some dtypes numpy has none.
        for key, (dtype, shape, allowed) in _ARRAYS.items():
            part = file.get_slice(key)
            found = tuple(part.get_shape())
            if part.get_dtype() != dtype or found != (*found[:1], *shape) or not found:
                raise ValueError(
                    f"{path}: {key} are {part.get_dtype()} of shape {found}; expected {allowed}"
                )
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
    if len(labels) != len(images):
        raise ValueError(f"{path} has {len(images)} images and {len(labels)} labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(f"{path}: labels lie outside 0 to {len(names) - 1}, the classes")
    return images, labels, names


def _names_of(metadata: dict[str, str]) -> list[str] | None:
    try:
        names = parse_json(metadata.get("classes", "").encode())
    except ValueError:
        return None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return None


def _save(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], names: list[str]
) -> None:
    if not len(labels):
        raise ValueError("it holds no sample")
    for name in names:
        if len(name) > MOST_NAME or name.encode(errors="ignore").decode() != name:
            raise ValueError(
                f"a class is called {shorten(name)}; expected names in UTF-8 of at most "
                f"{MOST_NAME} characters"
            )
    classes = json.dumps(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    about = {"classes": classes, "sha256": _sha256(classes, images, labels)}
    try:
        save_file({"images": images, "labels": labels}, partial, metadata=about)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(classes: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(classes.encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()


def _described(path: Path) -> OwnData | None:
    """Say what a prepared file holds; None where it is not there, or not what was written."""
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError):
        return None
    if about.get("sha256") != _sha256(about.get("classes", ""), images, labels):
        return None
    return OwnData(
        file=path,
        samples=len(labels),
        classes=tuple(json.loads(about["classes"])),
        sha256=about["sha256"],
    )
