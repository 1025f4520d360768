from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedsim.core import registry


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_sources", {})


def write(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_one_name_are_two_modules_with_two_hashes(tmp_path: Path) -> None:
    one, two = tmp_path / "one/rates.py", tmp_path / "two/rates.py"
    hashes = {f"{path}:Rate": write(path, f"class Rate:\n    at = {path.parent.name!r}\n")
              for path in (one, two)}  # fmt: skip
    assert [registry.load(name).at for name in hashes] == ["one", "two"]
    assert registry.sources(hashes) == hashes
    assert registry.load(f"{one}:Rate") is registry.load(f"{one}:Rate")


def test_the_file_that_defines_the_name_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    defining = write(tmp_path / "registry_test_defines.py", "def rate(context):\n    return None\n")
    importing = write(
        tmp_path / "imports.py",
        "import functools\nfrom registry_test_defines import rate\n"
        "half = functools.partial(rate, share=0.5)\n",
    )
    names = [f"{tmp_path}/imports.py:rate", f"{tmp_path}/imports.py:half", "builtins:print"]
    assert registry.sources(names) == {names[0]: defining, names[1]: importing}


def test_the_hash_is_of_what_was_loaded(tmp_path: Path) -> None:
    before = write(tmp_path / "rates.py", "def rate(context):\n    return None\n")
    name = f"{tmp_path}/rates.py:rate"
    assert registry.sources([name]) == {name: before}
    assert write(tmp_path / "rates.py", "def rate(context):\n    return 1\n") != before
    assert registry.load(name)(None) is None
    assert registry.sources([name]) == {name: before}
