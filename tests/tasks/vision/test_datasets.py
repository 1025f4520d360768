from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import xxhash
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from fedsim.core.errors import InputError
from fedsim.tasks.vision import datasets
from fedsim.tasks.vision.datasets import cache_root, load_dataset, parse_name, store_dataset

TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDSIM_CACHE", str(folder))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.delenv("FEDSIM_DATA_ROOT", raising=False)


def load(name="digits", data_root=None, seed=42):
    return load_dataset(name, data_root=data_root, seed=seed)


def test_digits_has_1438_training_and_359_test_samples(digits):
    assert digits.train_images.shape == (1438, 3, 32, 32)
    assert digits.test_images.shape == (359, 3, 32, 32)
    assert digits.train_labels.shape == (1438,)
    assert digits.test_labels.shape == (359,)
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert (digits.spec.train_size, digits.spec.test_size, digits.spec.classes) == (1438, 359, 10)


def test_digits_pixels_are_sklearns_enlarged_four_times(digits):
    # Sample 0 starts with the greys 0 0 5 13 9 1 0 0 of 16.
    first_row = [grey for grey in (0, 0, 80, 207, 143, 16, 0, 0) for _ in range(4)]
    for channel in range(3):
        for row in range(4):
            assert digits.train_images[0, channel, row].tolist() == first_row


def test_every_fifth_digit_is_a_test_sample(digits):
    source = load_digits()
    large = np.rint(source.images * 255 / 16).repeat(4, axis=1).repeat(4, axis=2)
    train = [n for n in range(1797) if n % 5 != 4]
    for found, labels, chosen in (
        (digits.train_images, digits.train_labels, train),
        (digits.test_images, digits.test_labels, list(range(4, 1797, 5))),
    ):
        for channel in range(3):
            assert np.array_equal(found[:, channel].numpy(), large[chosen])
        assert labels.tolist() == source.target[chosen].tolist()


def test_digits_mean_and_deviation_are_the_training_splits(digits):
    pixels = digits.train_images.numpy() / 255
    assert pixels.mean(axis=(0, 2, 3)).round(4).tolist() == list(digits.spec.mean)
    assert pixels.std(axis=(0, 2, 3)).round(4).tolist() == list(digits.spec.std)


def test_digits_are_not_flipped_and_photographs_are():
    flips = {n: parse_name(n).flip for n in ("digits", "cifar10", "cifar100", "synthetic")}
    assert flips == {"digits": False, "cifar10": True, "cifar100": True, "synthetic": True}


def test_sha256_is_over_the_raw_bytes_of_both_splits(digits):
    digest = hashlib.sha256()
    for tensor in (
        digits.train_images,
        digits.train_labels,
        digits.test_images,
        digits.test_labels,
    ):
        digest.update(tensor.numpy().tobytes())
    assert digits.fingerprint == digest.hexdigest()
    assert digits.fingerprint == "2424bc720d76768867b002c30f5d7cfae5f33e810064ccf0d1e05b8049476456"


def test_the_cache_file_is_made_once(own_cache):
    first = load()
    (path,) = own_cache.iterdir()
    made = path.stat()
    second = load()
    assert list(own_cache.iterdir()) == [path]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert first.fingerprint == second.fingerprint


def mapped_file(tensor):
    """Find the file behind the memory of a tensor."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in bounds.split("-"))
        if start <= address < end:
            return path[0] if path else None
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_loads_map_the_one_cache_file_instead_of_copying_it(own_cache):
    first, second = load(), load()
    (path,) = own_cache.iterdir()
    for data in (first, second):
        assert mapped_file(data.train_images) == str(path)
        assert mapped_file(data.test_images) == str(path)
    assert mapped_file(first.train_images.clone()) != str(path)


@pytest.mark.parametrize("kept", [0, 7, 60, -1])
def test_a_truncated_cache_file_is_rebuilt(own_cache, kept):
    whole = load().fingerprint
    (path,) = own_cache.iterdir()
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:kept])
    assert load().fingerprint == whole
    assert list(own_cache.iterdir()) == [path]
    assert path.stat().st_size == len(content)


def test_a_cache_file_of_other_sizes_is_rebuilt(own_cache):
    whole = load()
    expected = whole.fingerprint
    (path,) = own_cache.iterdir()
    path.unlink()
    save_file(
        {
            "train_images": whole.train_images[:-1].clone(),
            "train_labels": whole.train_labels[:-1].clone(),
            "test_images": whole.test_images,
            "test_labels": whole.test_labels,
        },
        path,
    )
    assert load().fingerprint == expected


def test_a_cache_that_cannot_be_a_folder_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError) as caught:
        load()
    assert str(tmp_path / "file") in str(caught.value)
    assert "FEDSIM_CACHE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", "/named")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/named")
    monkeypatch.delenv("FEDSIM_CACHE")
    assert cache_root() == Path("/xdg/fedsim")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root() == Path("/home/someone/.cache/fedsim")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_without_a_network_is_one_sentence(name, own_cache, no_network, tmp_path):
    with pytest.raises(InputError) as caught:
        load(name, data_root=str(tmp_path / "data"))
    text = str(caught.value)
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    assert str(tmp_path / "data" / folder) in text
    assert "no route to host" in text
    assert "--data-root" in text
    assert "FEDSIM_DATA_ROOT" in text
    assert "\n" not in text
    assert not own_cache.exists()


def test_data_root_goes_before_the_environment_and_that_before_the_cache(
    own_cache, no_network, tmp_path, monkeypatch
):
    def folder_looked_in(data_root):
        with pytest.raises(InputError) as caught:
            load("cifar100", data_root=data_root)
        return str(caught.value).partition("not found in ")[2].partition("/cifar-100")[0]

    assert folder_looked_in(None) == str(own_cache)
    monkeypatch.setenv("FEDSIM_DATA_ROOT", str(tmp_path / "environment"))
    assert folder_looked_in(None) == str(tmp_path / "environment")
    assert folder_looked_in(str(tmp_path / "given")) == str(tmp_path / "given")


def corrupt(path, at=-1):
    """Change one byte of a file that others may have mapped."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["digits", "synthetic:50:5"])
@pytest.mark.parametrize("at", [-1, -5000], ids=["image", "label"])
def test_a_cache_file_with_another_pixel_is_rebuilt(name, at, own_cache):
    whole = load(name).fingerprint
    (path,) = own_cache.iterdir()
    content = path.read_bytes()
    corrupt(path, at)
    assert load(name).fingerprint == whole
    assert path.read_bytes() == content


def test_a_cache_file_of_other_samples_with_a_hash_of_its_own_is_not_official(own_cache):
    whole = load()
    (path,) = own_cache.iterdir()
    arrays = {name: getattr(whole, name).clone() for name in TENSORS}
    arrays["train_images"][0] ^= 1
    digest = xxhash.xxh3_128(b"".join(arrays[name].numpy().tobytes() for name in TENSORS))
    path.unlink()
    save_file(arrays, path, metadata={"xxh3_128": digest.hexdigest()})
    altered = load()
    assert altered.fingerprint != whole.fingerprint
    with pytest.raises(InputError, match=f"^{path} is not the official digits: .* remove the file"):
        altered.check_official()
    whole.check_official()
    load("synthetic:50:5").check_official()


def test_samples_that_are_not_the_official_ones_are_not_put_into_the_cache(own_cache):
    arrays = {name: getattr(load(), name).clone() for name in TENSORS}
    (path,) = own_cache.iterdir()
    before = path.read_bytes()
    arrays["test_labels"][3] += 1
    with pytest.raises(InputError, match="dataset = 'digits' cannot be used: its samples have"):
        store_dataset("digits", arrays, seed=0)
    assert path.read_bytes() == before


FILES = {
    "cifar100": ("cifar-100-python", ["train", "test", "meta"]),
    "cifar10": (
        "cifar-10-batches-py",
        [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"],
    ),
}


@pytest.fixture
def small_cifar(monkeypatch):
    """Let torchvision's MD5 sums be those of small files of the official layout."""

    def write(name, folder):
        folder.mkdir(parents=True)
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
        sums = {}
        for file in FILES[name][1]:
            rows = 50 if file == "train" else 10
            labels = "labels" if name == "cifar10" else "fine_labels"
            entry = {"data": np.zeros((rows, 3072), np.uint8), labels: [0] * rows}
            if "meta" in file:
                entry = {"label_names": ["a"], "fine_label_names": ["a"]}
            (folder / file).write_bytes(pickle.dumps(entry))
            sums[file] = hashlib.md5(
                (folder / file).read_bytes(), usedforsecurity=False
            ).hexdigest()
        *train, test, meta = FILES[name][1]
        monkeypatch.setattr(kind[name], "train_list", [[file, sums[file]] for file in train])
        monkeypatch.setattr(kind[name], "test_list", [[test, sums[test]]])
        monkeypatch.setattr(
            kind[name], "meta", {**kind[name].meta, "filename": meta, "md5": sums[meta]}
        )
        spec = f"_{name.upper()}"
        small = replace(getattr(datasets, spec), train_size=50, test_size=10, official_sha256=None)
        monkeypatch.setattr(datasets, spec, small)
        return folder

    return write


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["parent", "itself", "itself under another name"])
def test_the_folder_of_cifar_and_its_parent_are_accepted(
    name, where, small_cifar, own_cache, no_network, tmp_path
):
    official = FILES[name][0]
    folder = small_cifar(name, tmp_path / "data" / ("c" if "another" in where else official))
    data = load(name, data_root=str(folder.parent if where == "parent" else folder))
    assert data.train_images.shape == (50, 3, 32, 32)
    assert [path.name for path in own_cache.iterdir()] == [f"{name}-v1.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("download", [True, False])
def test_what_is_wrong_with_cifar_is_named_and_left_as_it_is(
    name, download, small_cifar, own_cache, no_network, tmp_path
):
    folder = small_cifar(name, tmp_path / "data" / FILES[name][0])
    first, *_, meta = FILES[name][1]

    def refusal(root=folder.parent):
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises(InputError) as caught:
            load_dataset(name, data_root=str(root), seed=0, download=download)
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert after == before
        assert not own_cache.exists()
        return str(caught.value)

    whole = (folder / first).read_bytes()
    (folder / first).write_bytes(whole[:1000])
    told = f"dataset = {name!r} cannot be read from {folder}: "
    truncated = f"{first} is damaged (1,000 bytes, not of the official MD5)"
    assert refusal().startswith(f"{told}{truncated}; put the official files there")
    assert refusal(folder).startswith(f"{told}{truncated}; put")
    (folder / meta).unlink()
    assert refusal().startswith(f"{told}{truncated}, {meta} is missing; put")
    (folder / first).write_bytes(whole)
    corrupt(folder / first)
    assert f"{told}{first} is damaged ({len(whole):,} bytes, not of the" in refusal()
    (folder / first).unlink()
    assert refusal().startswith(f"{told}{first} and {meta} are missing; put")
    (folder / first).mkdir()
    assert f"{first} cannot be opened (Is a directory), {meta} is missing;" in refusal()


@pytest.fixture
def archived(small_cifar, monkeypatch, tmp_path):
    """Give an archive of small files that is the official one to torchvision."""
    folder = small_cifar("cifar100", tmp_path / "made" / "cifar-100-python")
    path = tmp_path / "made" / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5", digest)
    return path


def test_an_archive_that_somebody_put_there_is_unpacked(archived, own_cache, no_network, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(archived, root)
    load("cifar100", data_root=str(root))
    assert sorted(path.name for path in root.iterdir()) == [
        "cifar-100-python",
        "cifar-100-python.tar.gz",
    ]
    assert {path.name for path in (root / "cifar-100-python").iterdir()} == {
        "train",
        "test",
        "meta",
    }


@pytest.mark.parametrize("kept", [0, 0.5, 1])
def test_a_download_is_there_whole_or_not_at_all(kept, archived, own_cache, monkeypatch, tmp_path):
    content = archived.read_bytes()

    class Response(io.BytesIO):
        url = None
        length = len(content)

    part = content[: int(kept * len(content))]
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Response(part))
    root = tmp_path / "new" / "data"
    if kept == 1:
        # Beside what else lies there.
        (root / "cifar-100-python").mkdir(parents=True)
        (root / "cifar-100-python" / "notes.txt").write_text("mine")
        load("cifar100", data_root=str(root))
        assert [path.name for path in root.iterdir()] == ["cifar-100-python"]
        assert (root / "cifar-100-python" / "notes.txt").read_text() == "mine"
        return
    with pytest.raises(InputError, match="could not be downloaded"):
        load("cifar100", data_root=str(root))
    assert not (tmp_path / "new").exists()


def test_a_damaged_download_of_our_own_is_made_again_or_named(archived, own_cache, monkeypatch):
    monkeypatch.delenv("FEDSIM_DATA_ROOT", raising=False)
    folder = own_cache / "cifar-100-python"
    shutil.copytree(archived.parent / "cifar-100-python", folder)
    corrupt(folder / "train")

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError) as caught:
        load("cifar100")
    size = (folder / "train").stat().st_size
    assert str(caught.value).startswith(
        f"dataset = 'cifar100' cannot be read from {folder}: train is damaged ({size:,} bytes, not "
        "of the official MD5) and could not be downloaded (<urlopen error no route to host>); put"
    )

    class Response(io.BytesIO):
        url = None
        length = 1

    monkeypatch.setattr(
        urllib.request, "urlopen", lambda *args, **kwargs: Response(archived.read_bytes())
    )
    load("cifar100")


def test_a_damaged_archive_is_named(own_cache, no_network, tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"half")
    with pytest.raises(InputError) as caught:
        load("cifar100", data_root=str(tmp_path))
    assert "cifar-100-python.tar.gz is damaged (4 bytes, not of the official MD5)" in str(
        caught.value
    )


def test_a_damaged_cache_without_its_source_is_said(small_cifar, own_cache, no_network, tmp_path):
    folder = small_cifar("cifar10", tmp_path / "data" / FILES["cifar10"][0])
    load("cifar10", data_root=str(folder))
    (path,) = own_cache.iterdir()
    corrupt(path)
    with pytest.raises(InputError) as caught:
        load("cifar10", data_root=str(tmp_path / "elsewhere"))
    assert str(caught.value).startswith(
        f"the dataset cache {path} is damaged, and dataset = 'cifar10' was not found in {tmp_path}"
    )
    load("cifar10", data_root=str(folder))


def test_a_download_with_the_wrong_md5_is_an_input_error(own_cache, tmp_path, monkeypatch):
    class Response(io.BytesIO):
        url = None
        length = 4

    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: Response(b"evil"))
    with pytest.raises(InputError) as caught:
        load("cifar100", data_root=str(tmp_path))
    assert "corrupted" in str(caught.value)
    assert not own_cache.exists()


def test_cifar100_is_torchvisions(cifar100, cifar_root):
    for train, images, labels in (
        (True, cifar100.train_images, cifar100.train_labels),
        (False, cifar100.test_images, cifar100.test_labels),
    ):
        source = torchvision.datasets.CIFAR100(root=cifar_root, train=train)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), source.data)
        assert labels.tolist() == source.targets
    assert (
        cifar100.fingerprint == "283e80e15e3841cce98044da5929d8557a88969bfd2d77d1c1db7bb78ba419f7"
    )


def test_cifar100s_mean_and_deviation_are_the_training_splits(cifar100):
    pixels = cifar100.train_images[::10].numpy() / np.float32(255)
    assert pixels.mean(axis=(0, 2, 3)) == pytest.approx(list(cifar100.spec.mean), abs=3e-3)
    assert pixels.std(axis=(0, 2, 3)) == pytest.approx(list(cifar100.spec.std), abs=3e-3)


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("synthetic", 10_000, 2_000, 10),
        ("synthetic:500", 500, 100, 10),
        ("synthetic:503:5", 503, 100, 5),
        ("synthetic:10:2", 10, 2, 2),
    ],
)
def test_synthetic_sizes_follow_from_its_name(name, train, test, classes, own_cache):
    spec = parse_name(name)
    assert (spec.name, spec.train_size, spec.test_size, spec.classes) == (
        name,
        train,
        test,
        classes,
    )
    data = load(name)
    assert data.train_images.shape == (train, 3, 32, 32)
    assert data.test_images.shape == (test, 3, 32, 32)
    counts = torch.bincount(data.train_labels, minlength=classes)
    assert len(counts) == classes
    assert counts.max() - counts.min() <= 1


def test_synthetic_follows_from_the_seed_alone(own_cache, monkeypatch, tmp_path):
    hashes = [load("synthetic:500:5", seed=seed).fingerprint for seed in (42, 43)]
    assert hashes == [
        "c170eedd6a61b13f50f9ae54517b97ee2298cbd990c0a8d897f6bc16df8a59bf",
        "d754e59423ac879c1eb450dcb55d98e163b67fdc64e10c83846fbceb7a2e04e3",
    ]
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "another"))
    assert load("synthetic:500:5").fingerprint == hashes[0]


def test_synthetic_classes_can_be_told_apart_in_every_block(own_cache):
    data = load("synthetic:5000:10")
    train = data.train_images.flatten(1).float()
    means = torch.stack([train[data.train_labels == c].mean(dim=0) for c in range(10)])
    assert torch.cdist(means, means).fill_diagonal_(torch.inf).min() > 500
    nearest = torch.cdist(data.test_images.flatten(1).float(), means).argmin(dim=1)
    assert (nearest == data.test_labels).float().mean() > 0.99
    nearest = torch.cdist(train[4096:], means).argmin(dim=1)
    assert (nearest == data.train_labels[4096:]).float().mean() > 0.99


@pytest.mark.parametrize(
    "text",
    [
        *("", "mnist", "Digits", "digits:5", "cifar100 ", "cifar", "synthetics", "synthetic:"),
        *("synthetic:x", "synthetic:-100", "synthetic:1e3", "synthetic:100:", "synthetic::5"),
        *("synthetic:100:1", "synthetic:49:10", "synthetic:49", "synthetic:100:5:2"),
    ],
)
def test_an_unknown_dataset_is_refused_with_the_allowed_ones(text):
    with pytest.raises(ValueError, match=r"^digits, cifar10, cifar100, synthetic or synthetic:SA"):
        parse_name(text)


def test_nothing_is_written_but_the_cache(own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load("synthetic:50:5")
    assert list(tmp_path.iterdir()) == [own_cache]
    assert list(own_cache.iterdir()) == [own_cache / "synthetic-50-5-seed42-v1.safetensors"]


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("/proc", str(tmp_path / "file" / "cache")):
        monkeypatch.setenv("FEDSIM_CACHE", place)
        with pytest.raises(InputError, match="set FEDSIM_CACHE to a folder that can"):
            load_dataset("digits", data_root=None, seed=0)


def test_a_cache_of_another_dtype_is_rebuilt(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    load_dataset("digits", data_root=None, seed=0)
    (path,) = tmp_path.iterdir()
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    assert load_dataset("digits", data_root=None, seed=0).train_images.dtype == torch.uint8


def test_a_file_as_the_data_root_is_named(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "train"
    file.touch()
    with pytest.raises(InputError, match="train is a file; expected the folder "):
        load("cifar100", data_root=str(file))
