from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fedsim.core import registry
from fedsim.core.errors import InputError


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
    write(tmp_path / "registry_test_defines.py", "def rate(context):\n    return None\n")
    importing = write(
        tmp_path / "imports.py",
        "import functools\nfrom registry_test_defines import rate\n"
        "half = functools.partial(rate, share=0.5)\n",
    )
    names = [f"{tmp_path}/imports.py:rate", f"{tmp_path}/imports.py:half", "builtins:print"]
    parts = [(tmp_path / name).read_bytes() for name in ("imports.py", "registry_test_defines.py")]
    both = hashlib.sha256(b"".join(parts)).hexdigest()
    assert registry.sources(names) == {names[0]: both, names[1]: importing}


def test_a_decorated_function_is_hashed_by_its_own_file(tmp_path: Path) -> None:
    text = "import torch\n\n@torch.no_grad()\ndef tell(*_):\n    return {}\n"
    name = f"{tmp_path}/rates.py:tell"
    made = write(tmp_path / "rates.py", text)
    assert registry.sources([name]) == {name: made}


def test_a_process_that_loads_other_code_than_the_server_did_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(tmp_path / "rates.py", "def rate(context):\n    return None\n")
    name = f"{tmp_path}/rates.py:rate"
    monkeypatch.setenv(registry.EXPECTED, json.dumps({name: "0" * 64}))
    with pytest.raises(InputError, match=f"{name} has changed since the run began: its source has"):
        registry.load(name)
    registry._sources.clear()
    monkeypatch.setenv(registry.EXPECTED, json.dumps({name: made}))
    assert registry.load(name)(None) is None


def test_the_hash_is_of_what_was_loaded(tmp_path: Path) -> None:
    before = write(tmp_path / "rates.py", "def rate(context):\n    return None\n")
    name = f"{tmp_path}/rates.py:rate"
    assert registry.sources([name]) == {name: before}
    assert write(tmp_path / "rates.py", "def rate(context):\n    return 1\n") != before
    assert registry.load(name)(None) is None
    assert registry.sources([name]) == {name: before}
