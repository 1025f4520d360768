from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from fedsim.core.errors import InputError
from fedsim.core.own_data import find_own_data


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path) -> None:
    """Three classes: two images, none, one."""
    for name, seeds in (("cat", [1, 2]), ("dog", []), ("owl", [3])):
        (folder / "train" / name).mkdir(parents=True)
        for seed in seeds:
            Image.fromarray(pixels(seed, 32, 32, 3)).save(folder / "train" / name / f"{seed}.png")


def write_arrays(folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    arrays = {"images": pixels(5, 4, 3, 32, 32), "labels": np.array([0, 2, 2, 1])}
    metadata = {"classes": changes.pop("classes", '["a", "b", "c"]')}
    save_file({**arrays, **changes}, folder / "train.safetensors", metadata=metadata)


def write_raw(folder: Path, dtype: str, item: int) -> None:
    """Images of a dtype that numpy does not have."""
    size = 3 * 32 * 32 * item
    header = {
        "__metadata__": {"classes": '["a"]'},
        "images": {"dtype": dtype, "shape": [1, 3, 32, 32], "data_offsets": [0, size]},
        "labels": {"dtype": "I64", "shape": [1], "data_offsets": [size, size + 8]},
    }
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(size + 8)
    (folder / "train.safetensors").write_bytes(content)


def bomb() -> bytes:
    """A PNG that says that it has 60,000 times 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1500])


def test_a_folder_of_images_is_read_class_by_class(tmp_path: Path) -> None:
    write_images(tmp_path / "own")
    own = find_own_data(tmp_path / "own")
    assert (own.samples, own.classes) == (3, ("cat", "dog", "owl"))
    found = load_file(own.file)
    assert found["labels"].tolist() == [0, 0, 2]
    for image, seed in zip(found["images"], (1, 2, 3), strict=True):
        np.testing.assert_array_equal(image, pixels(seed, 32, 32, 3).transpose(2, 0, 1))
    digest = hashlib.sha256(b'["cat", "dog", "owl"]')
    digest.update(found["images"].tobytes() + found["labels"].tobytes())
    assert own.sha256 == digest.hexdigest()


def test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    write_arrays(tmp_path / "own")
    own = find_own_data(tmp_path / "own")
    assert (own.samples, own.classes) == (4, ("a", "b", "c"))
    found = load_file(own.file)
    np.testing.assert_array_equal(found["images"], pixels(5, 4, 3, 32, 32))
    assert found["labels"].tolist() == [0, 2, 2, 1]


def test_it_is_converted_once_and_again_when_it_changed(tmp_path: Path, cache: Path) -> None:
    write_images(tmp_path / "own")
    first = find_own_data(tmp_path / "own")
    made = first.file.stat().st_mtime_ns
    assert find_own_data(tmp_path / "own") == first
    assert first.file.stat().st_mtime_ns == made
    Image.fromarray(pixels(9, 32, 32, 3)).save(tmp_path / "own/train/dog/9.png")
    second = find_own_data(tmp_path / "own")
    assert (second.samples, second.sha256 == first.sha256) == (4, False)
    assert sorted(os.listdir(cache)) == sorted([first.file.name, second.file.name])  # noqa: PTH208


def test_it_is_converted_again_where_the_conversion_was_damaged(tmp_path: Path) -> None:
    write_images(tmp_path / "own")
    first = find_own_data(tmp_path / "own")
    whole = first.file.read_bytes()
    for position in (-1, len(whole) // 2):
        content = bytearray(whole)
        content[position] ^= 1
        first.file.unlink()
        first.file.write_bytes(content)
        assert find_own_data(tmp_path / "own") == first
        assert first.file.read_bytes() != bytes(content)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda own: None, "it must have either a folder train or a file train.safetensors"),
        (lambda own: (write_images(own), write_arrays(own)), "it must have either a folder train"),
        (
            lambda own: (write_images(own), (own / "train/cat/notes.txt").write_text("")),
            "train/cat/notes.txt is not an image; expected .png, .jpg, .jpeg",
        ),
        (
            lambda own: (write_images(own), (own / "train/cat/x.png").write_text("no")),
            "train/cat/x.png is not an image that can be read",
        ),
        (
            lambda own: (
                write_images(own),
                Image.fromarray(pixels(1, 28, 30, 3)).save(own / "train/dog/x.png"),
            ),
            "train/dog/x.png has 30x28 pixels; expected 32x32",
        ),
        (
            lambda own: (write_images(own), (own / "train/dog/x.png").symlink_to("/etc/passwd")),
            "train/dog/x.png cannot be read: it is a symbolic link",
        ),
        (
            lambda own: (write_images(own), os.mkfifo(own / "train/dog/x.png")),
            "train/dog/x.png cannot be read: it is not a regular file",
        ),
        (
            lambda own: os.mkfifo(own / "train.safetensors"),
            "own/train.safetensors cannot be read: it is not a regular file",
        ),
        (
            lambda own: (write_images(own), (own / "train/dog/x.png").write_bytes(bomb())),
            "train/dog/x.png has millions of pixels; expected 32x32",
        ),
        (
            lambda own: (write_images(own), cut(own / "train/cat/1.png")),
            "train/cat/1.png is not an image that can be read",
        ),
        (lambda own: (own / "train/cat").mkdir(parents=True), "it holds no sample"),
        (
            lambda own: write_arrays(own, images=np.zeros((4, 3, 28, 28), np.uint8)),
            "images are U8 of shape (4, 3, 28, 28); expected uint8 of shape (N, 3, 32, 32)",
        ),
        (
            lambda own: write_arrays(own, labels=np.array([0, 1], np.int64)),
            "train.safetensors has 4 images and 2 labels",
        ),
        (
            lambda own: write_arrays(own, labels=np.array(1)),
            "labels are I64 of shape (); expected int64 of shape (N,)",
        ),
        (
            lambda own: write_raw(own, "BF16", 2),
            "images are BF16 of shape (1, 3, 32, 32); expected uint8 of shape (N, 3, 32, 32)",
        ),
        (
            lambda own: write_raw(own, "F8_E4M3", 1),
            "images are F8_E4M3 of shape (1, 3, 32, 32); expected uint8",
        ),
        (lambda own: write_arrays(own, classes="no JSON"), "has no classes in its metadata"),
        (
            lambda own: write_arrays(own, labels=np.zeros(4, np.int32)),
            "labels are I32 of shape (4,); expected int64 of shape (N,)",
        ),
        (
            lambda own: write_arrays(own, labels=np.array([0, 1, 2, 3])),
            "labels lie outside 0 to 2, the classes",
        ),
        (
            lambda own: write_arrays(own, classes=json.dumps(["a", "b", "c" * 256])),
            "a class is called 'cccc",
        ),
        (
            lambda own: (write_images(own), (own / "train" / "caf\udce9").mkdir()),
            "a class is called 'caf\\udce9'; expected names in UTF-8 of at most 255",
        ),
        (lambda own: write_arrays(own, classes="3"), "has no classes in its metadata"),
        (
            lambda own: write_arrays(own, more=np.zeros(1)),
            "has ['images', 'labels', 'more']; expected images and labels",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, change: Any, told: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    change(own)
    with pytest.raises(InputError) as caught:
        find_own_data(own)
    assert str(caught.value).startswith(f"data = '{own}' cannot be used: ")
    assert told in str(caught.value)


def test_a_name_that_no_folder_has_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be used: .*File name too long"):
        find_own_data(tmp_path / ("x" * 300))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_8_bits_are_refused_and_not_clipped(tmp_path: Path, mode: str) -> None:
    write_images(tmp_path / "own")
    path = tmp_path / "own" / "train" / "dog" / "x.png"
    pixels16 = np.full((32, 32), 4000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    # What a file holds decides, whatever it is called.
    Image.fromarray(pixels16).save(path, format="PNG" if mode == "I;16" else "TIFF")
    with Image.open(path) as image:
        found = image.mode
    with pytest.raises(InputError) as caught:
        find_own_data(tmp_path / "own")
    assert str(caught.value).endswith(
        f"{path} has pixels of kind {found}; expected 8 bits a channel, in Pillow's kinds "
        "1, L, LA, P, RGB, RGBA, CMYK"
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_kind_of_8_bits_is_taken(tmp_path: Path, mode: str) -> None:
    write_images(tmp_path / "own")
    path = tmp_path / "own" / "train" / "dog" / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.fromarray(pixels(4, 32, 32, 3)).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    own = find_own_data(tmp_path / "own")
    np.testing.assert_array_equal(load_file(own.file)["images"][2], expected)


def test_names_of_classes_may_be_any_text(tmp_path: Path) -> None:
    write_arrays(tmp_path / "own", classes=json.dumps(["ä", "", "x/y"]))
    assert find_own_data(tmp_path / "own").classes == ("ä", "", "x/y")
