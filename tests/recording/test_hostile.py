"""Run directories from strangers: whatever is in them, an answer is one sentence."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim import cli, load_run, simulate
from fedsim.core.config import RunConfig, read_config_file
from fedsim.core.errors import InputError, shorten
from fedsim.core.inputs import (
    MOST_JSON_BYTES,
    MOST_JSON_CONTAINERS,
    open_regular,
    parse_json,
    read_text_bytes,
)
from fedsim.flower import simulation
from fedsim.flower.run_config import config_from_run_config
from fedsim.flower.server_app import versions
from fedsim.recording import rows
from fedsim.recording.checksums import checksum_line, read_checksums
from fedsim.recording.files import Checksum, json_line, text_lines, write_tensors
from fedsim.recording.layout import RunLayout
from fedsim.recording.recovery import check_continuable, find_recovery
from fedsim.recording.tensor_files import TensorFile
from fedsim.recording.verify import verify
from fedsim.recording.writer import RunWriter
from fedsim.tasks.vision.datasets import load_dataset
from tests import fuzz
from tests.installed import needs
from tests.recording.rows import client_row, round_row

FILES = [
    "run.json",
    "rounds.jsonl",
    "clients.jsonl",
    "checksums.jsonl",
    "partition.safetensors",
    "rounds/0000/global.safetensors",
    "rounds/0001/aggregate.safetensors",
    "rounds/0001/clients/0000/delta.safetensors",
    "rounds/0001/clients/0000/steps.jsonl",
    "rounds/0001/clients/0000/gradients-00000.safetensors",
]
SHARD = FILES[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round: clients 0 and 1 of three, all steps captured. Never write into it."""
    path = tmp_path_factory.mktemp("hostile") / "made"
    fuzz.make_run(
        path, {"capture": "all", "local-steps": 3, "participants": [[0, 1], [0, 1]]}, seed=3
    )
    return path


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is resumed is opened for it, and no client is started."""
    monkeypatch.setattr(simulation, "simulate", fuzz.reopen_only)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def outside(made: Path, tmp_path: Path) -> Path:
    """The same run, but not in the run."""
    return Path(shutil.copytree(made, tmp_path / "outside"))


def reseal(run: Path) -> None:
    fuzz.reseal(run)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(json.dumps(value).encode())


def edit_line(path: Path, number: int, change: Callable[[Any], None]) -> None:
    lines = path.read_bytes().splitlines()
    value = json.loads(lines[number])
    change(value)
    lines[number] = json.dumps(value, separators=(",", ":")).encode()
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def command(*arguments: str | Path) -> int:
    return cli.run([str(a) for a in arguments])


COMMANDS: list[list[str]] = [
    ["inspect", "{run}"],
    ["export", "breaching", "{run}", "--round=1", "--client=0", "--step=0", "--output={out}"],
    ["export", "notebook", "{run}", "--round=1", "--output={out}"],
]


def be_link(path: Path, run: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside / path.relative_to(run))


def be_pipe(path: Path, run: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def be_socket(path: Path, run: Path, outside: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as made:
        # The name of a socket is limited to a hundred characters.
        there = os.open(path.parent, os.O_RDONLY)
        try:
            made.bind(f"/proc/self/fd/{there}/{path.name}")
        finally:
            os.close(there)


def be_device(path: Path, run: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def be_folder(path: Path, run: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def be_terabyte(path: Path, run: Path, outside: Path) -> None:
    os.truncate(path, 2**40)


def be_behind_a_link(path: Path, run: Path, outside: Path) -> None:
    folder = path.parent if path.parent != run else run / "rounds"
    shutil.rmtree(folder)
    folder.symlink_to(outside / folder.relative_to(run))


@needs("export")
@pytest.mark.parametrize(
    "damage",
    [be_link, be_pipe, be_socket, be_device, be_folder, be_terabyte, be_behind_a_link],
)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_the_run_is_named_at_once_and_not_followed(
    damage: Callable[[Path, Path, Path], None],
    name: str,
    run: Path,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    damage(run / name, run, outside)
    before = fuzz.snapshot(tmp_path)
    assert command("verify", run, "--jobs=1") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"fedsim: {run} is not what was recorded: ")
    assert err.count("\n") == 1
    named = "symbolic link" if damage is be_behind_a_link else Path(name).name
    assert any(named in violation for violation in verify(run, jobs=1).violations)
    for arguments in COMMANDS:
        out = str(tmp_path / "written")
        code = command(*(a.format(run=run, out=out) for a in arguments))
        err = capsys.readouterr().err
        assert code in (0, 2)
        assert (err[:8], err.count("\n")) == (("fedsim: ", 1) if code else ("", 0))
        for written in tmp_path.glob("written*"):
            shutil.rmtree(written) if written.is_dir() else written.unlink()
    assert fuzz.snapshot(tmp_path) == before
    beyond = fuzz.snapshot(outside)
    # After round 0, where it is round 1 that is damaged.
    if command("resume", run) == 2:
        assert fuzz.snapshot(tmp_path) == before
    assert fuzz.snapshot(outside) == beyond


# --- the sentence


def nested(depth: int) -> bytes:
    return b'{"x":' + b"[" * depth + b"]" * depth + b"}\n"


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("run.json", lambda m: m.update(status=7), "status = 7 cannot be used: "),
        (
            "run.json",
            lambda m: m.update(format=1.0),
            "{run} has format 1.0; this version reads 1 and 2",
        ),
        ("run.json", lambda m: m.update(format=10**4000), "has format 1000000"),
        ("run.json", lambda m: m.pop("dataset"), "run.json has no dataset"),
        ("run.json", lambda m: m["model"].pop("buffers"), "run.json has no model.buffers"),
        (
            "run.json",
            lambda m: m["model"]["parameters"][0].update(shape=[-1]),
            "run.json: model.parameters.0.shape.0 = -1 cannot be used: Input should be greater",
        ),
        ("run.json", lambda m: m["partition"].update(sizes=[]), "partition.sizes = [] cannot be"),
        ("run.json", lambda m: m["config"].update(clients="x"), "clients = 'x' cannot be used"),
        (
            "rounds.jsonl",
            lambda r: r.update(round=-1),
            "rounds.jsonl: line 2: round = -1 cannot be used: Input should be greater than or",
        ),
        ("rounds.jsonl", lambda r: r.pop("seconds"), "rounds.jsonl: line 2 has no seconds"),
        ("rounds.jsonl", lambda r: r.update(participants={}), "participants = {} cannot be used"),
        ("rounds.jsonl", lambda r: r.update(global_loss=True), "global_loss = True cannot be used"),
        (
            "clients.jsonl",
            lambda r: r.update(num_steps=10**12),
            "clients.jsonl: line 2: Value error, num_steps, loss_history and batch_sizes speak of",
        ),
        (
            "clients.jsonl",
            lambda r: r["files"].update({"../../x": {"bytes": 1, "xxh3_128": "0" * 32}}),
            "clients.jsonl: line 2: files.../../x.[key] = '../../x' cannot be used: ",
        ),
        ("clients.jsonl", lambda r: r.update(partition=10**30), "partition = 1000"),
        ("clients.jsonl", lambda r: r.update(status="lost"), "status = 'lost' cannot be used"),
    ],
)
def test_what_has_another_shape_is_named(
    name: str,
    change: Callable[[Any], Any],
    sentence: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "run.json":
        edit(run / name, change)
    else:
        edit_line(run / name, 1, change)
    assert command("inspect", run) == 2
    err = capsys.readouterr().err
    assert sentence.replace("{run}", str(run)) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        nested(100_000),
        b'{"round":NaN}\n',
        b'{"round":' + b"9" * 5000 + b"}\n",
        b'{"round":"\\ud800"}\n',
        b'{"round":"\xff"}\n',
        b'{"round":1\n',
        b'{"a":1}{"b":2}\n',
        b"\n",
        b"[]" * 2 + b"\n",
    ],
    ids=lambda line: str(line[:20]),
)
def test_what_is_not_json_is_named(line: bytes, run: Path) -> None:
    path = run / "rounds.jsonl"
    path.write_bytes(line + path.read_bytes())
    with pytest.raises(InputError) as caught:
        load_run(run).rounds()
    assert str(caught.value) == f"{path} holds a line that is not JSON"


def test_of_a_key_that_is_there_twice_the_last_counts(run: Path) -> None:
    assert parse_json(b'{"a":1,"a":2}') == {"a": 2}


def test_a_text_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    long = tmp_path / "long"
    os.truncate(os.open(long, os.O_CREAT | os.O_WRONLY), 2**40)
    for ask in (lambda: list(text_lines(long)), lambda: read_text_bytes(long)):
        with pytest.raises(OSError, match="more than 33,554,432 bytes"):
            ask()
    with pytest.raises(ValueError, match="more than 33,554,432 bytes"):
        parse_json(b" " * (MOST_JSON_BYTES + 1))
    with pytest.raises(ValueError, match="more than 1,048,576 objects and lists"):
        parse_json(b"[" + b"[]," * MOST_JSON_CONTAINERS + b"[]]")


# --- tensors


def safetensors_file(path: Path, header: Any, data: bytes, claimed: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry("F31")}, 4),
        ({"a": entry(["F32"])}, 4),
        ({"a": entry(shape=[2])}, 4),
        ({"a": entry(shape=[-1], end=-4)}, 4),
        ({"a": entry(shape=[2**62])}, 4),
        ({"a": entry(shape=[True])}, 4),
        ({"a": entry(shape=[1.0])}, 4),
        ({"a": entry(shape=[1] * 9)}, 4),
        ({"a": entry(shape=[0, 2**63], end=0)}, 0),
        ({"a": entry(shape="1")}, 4),
        ({"a": entry(begin=4, end=8)}, 8),
        ({"a": entry(begin=-4, end=0)}, 4),
        ({"a": entry(), "b": entry()}, 4),
        ({"a": entry(), "b": entry(begin=8, end=12)}, 12),
        ({"a": entry()}, 5),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4),
        ({"a": None}, 4),
        ([1], 4),
        (b"{", 4),
        (b'{"a":' + b"[" * 10**5, 4),
        (b"\xff" * 9, 4),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_header_that_does_not_fit_its_data_is_refused(
    header: Any, data: int, tmp_path: Path
) -> None:
    path = safetensors_file(tmp_path / "x.safetensors", header, bytes(data))
    content = memoryview(bytearray(path.read_bytes()))
    for ask in (lambda: TensorFile(path), lambda: TensorFile(path, content)):
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value).startswith(f"{path} is not a whole safetensors file: ")


@pytest.mark.parametrize("claimed", [2**64 - 1, 2**63, 2**40, 10**8, 70])
def test_a_header_longer_than_the_file_is_refused(claimed: int, tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "x.safetensors", {"a": entry()}, bytes(4), claimed)
    with pytest.raises(InputError, match=f"a header of {claimed} bytes does not fit"):
        TensorFile(path)
    os.truncate(path, 2**40)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        TensorFile(path)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(["float32", "float64", "int64", "int16", "uint8", "float16"]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=5,
    )
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_the_library_writes_is_read_as_the_library_reads_it(
    tmp_path: Path, described: dict[str, tuple[str, list[int]]]
) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        name: draw.integers(0, 100, size=shape).astype(dtype)
        for name, (dtype, shape) in described.items()
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x")
    expected = safetensors.numpy.load_file(tmp_path / "x")
    content = memoryview(bytearray((tmp_path / "x").read_bytes()))
    for file in (TensorFile(tmp_path / "x"), TensorFile(tmp_path / "x", content)):
        assert {*file} == {*expected}
        for name, tensor in file.items():
            assert tensor.numpy().dtype == expected[name].dtype
            assert tensor.shape == expected[name].shape
            assert tensor.numpy().tobytes() == expected[name].tobytes()


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    arrays = {name: tensor.numpy().copy() for name, tensor in TensorFile(path).items()}
    change(arrays)
    write_tensors(path, arrays)


def test_kernels_of_any_size_cost_nothing(run: Path, tmp_path: Path) -> None:
    # One tap on the disk that run.json makes a trillion of.
    def change(manifest: Any) -> None:
        (kernel,) = [p for p in manifest["model"]["parameters"] if p["name"] == "0.weight"]
        kernel["shape"] = [*kernel["shape"][:2], 10**6, 10**6]

    def pack(arrays: dict[str, Any]) -> None:
        for name in [name for name in arrays if name.endswith("/0.weight")]:
            arrays[name] = arrays[name].reshape(*arrays[name].shape[:2], -1).transpose(2, 0, 1)[:1]
        arrays["support/0.weight"] = np.zeros(1, np.int64)

    edit(run / "run.json", change)
    rewrite(run / SHARD, pack)
    reseal(run)
    found = load_run(run).round(1).client(0)
    for ask in (lambda: found.gradient(0), lambda: found.layer("0.weight"), lambda: found.shards):
        with pytest.raises(InputError, match=r"0\.weight is not there as run\.json describes it"):
            ask()
    assert command("verify", run) == 1


@needs("export")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.update({"x/13.bias": a["000000/13.bias"]}), "x/13.bias is not a gradient"),
        (lambda a: a.update({"0000000/13.bias": a["000000/13.bias"]}), "0000000/13.bias is no"),
        (lambda a: a.update({"000000/no": a["000000/13.bias"]}), "000000/no is not a gradient"),
        (lambda a: a.pop("000000/13.bias"), "holds steps with some of their gradients only"),
        (
            lambda a: a.update({"000000/13.bias": a["000000/13.bias"].astype(np.int32)}),
            "000000/13.bias holds no floating-point numbers",
        ),
        (lambda a: a.update({"000000/13.bias": a["000000/13.bias"][1:]}), "has shape"),
    ],
)
def test_a_shard_of_other_gradients_is_refused(
    change: Callable[[dict[str, Any]], Any],
    sentence: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewrite(run / SHARD, change)
    reseal(run)
    assert command("verify", run, "--recompute=1") == 1
    assert "Error" not in capsys.readouterr().err
    for form in (["breaching", "--client=0", "--step=0"], ["notebook"]):
        code = command("export", form[0], run, "--round=1", *form[1:], f"--output={tmp_path}/out")
        assert code == 2
        assert sentence in capsys.readouterr().err
    assert command("verify", run) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@needs("export")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.update({"0": a["0"].astype(np.int32)}), "0 is not a list of positions"),
        (lambda a: a.update({"0": a["0"][None]}), "0 is not a list of positions"),
        (lambda a: a.update({"00": a.pop("0")}), "has other names than the clients from 0 on"),
        (lambda a: a.update({"0": a["0"] + 10**6}), "has positions outside 0 to 59"),
        (lambda a: a.update({"0": a["0"] - 60}), "has positions outside 0 to 59"),
        (lambda a: a.update({"0": a["0"][1:]}), "deals 59 samples to 3 clients; expected as"),
    ],
)
def test_a_partition_of_something_else_is_refused(
    change: Callable[[dict[str, Any]], Any],
    sentence: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewrite(run / "partition.safetensors", change)
    reseal(run)
    for arguments in (["resume", "{run}"], COMMANDS[1]):
        assert command(*(a.format(run=run, out=tmp_path / "out") for a in arguments)) == 2
        assert sentence in capsys.readouterr().err
    assert command("verify", run) == 1


@needs("export")
@pytest.mark.parametrize(
    "values",
    [
        {"dataset": "synthetic:100000000:3"},
        {"dataset": "synthetic:60:10", "min-samples": 2},
        {"clients": 30, "min-samples": 2},
    ],
)
def test_a_configuration_that_asks_for_more_than_the_files_hold_is_not_followed(
    values: dict[str, Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run / "run.json", lambda manifest: manifest["config"].update(values))
    reseal(run)
    for arguments in (["resume", "{run}"], COMMANDS[1]):
        assert command(*(a.format(run=run, out=tmp_path / "out") for a in arguments)) == 2
        assert "expected" in capsys.readouterr().err
    assert command("verify", run, "--recompute=1") == 1


@pytest.mark.parametrize(
    "values", [{"local-epochs": 10**9, "local-steps": None}, {"local-steps": 10**9}]
)
def test_a_number_of_steps_alone_costs_nothing(values: dict[str, Any], run: Path) -> None:
    edit(run / "run.json", lambda manifest: manifest["config"].update(values))
    reseal(run)
    assert any("steps, not" in violation for violation in verify(run).violations)


def test_where_a_run_says_that_its_data_was_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not downloaded for a recorded run"):
        load_dataset("cifar10", data_root=str(tmp_path / "theirs"), seed=1, download=False)
    assert not (tmp_path / "theirs").exists()


def test_a_round_number_alone_costs_nothing(run: Path) -> None:
    edit_line(run / "rounds.jsonl", 1, lambda row: row.update(round=10**9))
    with pytest.raises(InputError, match=r"finished are 0, 1000000000$"):
        load_run(run).round(7)


# --- continuing


DEVICE = {"type": "cpu", "cpu_capability": "NONE", "worker_threads": 1}


def unfinished(run: Path) -> None:
    """Let the run have a second round to go, as one that was killed in it."""
    config = load_run(run).config.to_mapping() | {"rounds": 2}
    partition = list(load_run(run).partition.values())
    writer = RunWriter.reopen(run, config, partition, find_recovery(run), versions(), DEVICE)
    (run / "rounds/0002").mkdir()
    (run / "rounds/0002/half").write_text("half")
    writer.close()


def link_to(target: str) -> Callable[[Path, Path], None]:
    def make(path: Path, outside: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(outside / target)

    return make


def be_text(path: Path, outside: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.write_text("text")


def be_fifo(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def flip_last(path: Path, outside: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path, outside: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def forget_rounds(path: Path, outside: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if b"rounds.jsonl" in line)
    path.write_bytes(b"".join([*lines[: first + 1], lines[-1]]))


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("rounds", link_to("rounds"), "{run}/rounds is not a file or folder that a run writes"),
        ("rounds/0002", link_to("rounds"), "{run}/rounds/0002 is not a file or folder that"),
        ("rounds/0002", be_text, "{run}/rounds/0002 is not a file or folder that a run writes"),
        ("rounds/0003", link_to("rounds"), "{run}/rounds/0003 is not a file or folder that"),
        ("lock", link_to("lock"), "{run}/lock is not a file or folder that a run writes"),
        ("lock", be_fifo, "{run}/lock is not a file or folder that a run writes"),
        ("run.json.1.partial", link_to("secret"), "{run}/run.json.1.partial is not a file or"),
        ("rounds.jsonl", link_to("rounds.jsonl"), "{run}/rounds.jsonl is not a file or folder"),
        ("clients.jsonl", link_to("clients.jsonl"), "{run}/clients.jsonl is not a file or folder"),
        ("rounds/0001", link_to("rounds/0001"), "{run}/rounds/0001 is not a file or folder that"),
        ("run.json", cut, "{run}/run.json is not what was written"),
        ("partition.safetensors", cut, "{run}/partition.safetensors is not a whole safetensors"),
        ("checksums.jsonl", flip_last, "{run}/checksums.jsonl: line 6 is not what was written"),
        (
            "checksums.jsonl",
            forget_rounds,
            "{run}/rounds.jsonl has lines that checksums.jsonl does not list; expected a run",
        ),
    ],
)
def test_a_run_that_is_not_continued_is_not_changed(
    name: str,
    damage: Callable[[Path, Path], None],
    sentence: str,
    run: Path,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    unfinished(run)
    check_continuable(load_run(run))
    damage(run / name, outside)
    before = fuzz.snapshot(tmp_path)
    assert command("resume", run) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fedsim: {sentence.format(run=run)}")
    assert err.count("\n") == 1
    assert fuzz.snapshot(tmp_path) == before


def test_a_writer_looks_at_the_places_itself(run: Path, outside: Path, tmp_path: Path) -> None:
    unfinished(run)
    recovery = find_recovery(run)
    shutil.rmtree(run / "rounds/0002")
    (run / "rounds/0002").symlink_to(outside)
    before = fuzz.snapshot(tmp_path)
    with pytest.raises(InputError, match="0002 is not a file or folder that a run writes"):
        RunWriter.reopen(run, {}, [], recovery, versions(), DEVICE)
    assert fuzz.snapshot(tmp_path) == before


def test_a_forged_row_is_no_round_to_go_on_after(run: Path) -> None:
    edit_line(run / "rounds.jsonl", 1, lambda row: row.update(state_sha256="0" * 64))
    reseal(run)
    with pytest.raises(InputError, match="is not the state that round 1 ended with"):
        find_recovery(run)


def test_a_manifest_that_was_edited_is_not_continued(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run / "run.json", lambda manifest: manifest["config"].update({"learning-rate": 9.0}))
    assert command("resume", run) == 2
    assert capsys.readouterr().err == f"fedsim: {run}/run.json is not what was written\n"


# --- names and terminals


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "..", "a\0b"])
def test_a_name_that_leads_out_is_no_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leads out of the run directory"):
        RunLayout(tmp_path).inside(name)


def test_a_listed_name_that_leads_out_is_a_violation(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (run / "way").symlink_to(tmp_path)
    for name in ("../secret", str(tmp_path / "secret"), "way/secret"):
        line = checksum_line({name: Checksum.of_file(tmp_path / "secret")})
        with (run / "checksums.jsonl").open("ab") as file:
            file.write(line)
    assert sorted(verify(run).violations) == sorted(
        [
            "../secret leads out of the run directory",
            f"{tmp_path}/secret leads out of the run directory",
            f"{run}/way is a symbolic link; a run directory has none",
        ]
    )


def test_a_text_of_a_run_does_not_command_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m"
    edit(
        run / "run.json",
        lambda manifest: manifest.update(created=evil, status="failed", error=evil),
    )
    assert command("inspect", run) == 0
    edit(run / "run.json", lambda manifest: manifest.update(status=evil))
    assert command("inspect", run) == 2
    streams = capsys.readouterr()
    assert not {*"\x1b\x07\x9b"} & {*streams.out, *streams.err}
    assert streams.out.count("\N{REPLACEMENT CHARACTER}") >= 8


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a symbolic link"):
        open_regular(tmp_path / "link")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="it is not a regular file"):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(OSError, match="zero byte"):
        open_regular(tmp_path / "a\0b")
    assert read_text_bytes(tmp_path / "link", follow=True) == b"text"


# --- anything at all


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
BOUNDED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def refusal(ask: Callable[..., Any]) -> str | None:
    """Give the sentence of an InputError, if there is one; let any other error through."""
    try:
        ask()
    except InputError as error:
        return str(error)
    return None


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), JSON))
@BOUNDED
def test_what_was_written_as_json_is_read_to_the_bit(value: dict[str, Any]) -> None:
    assert parse_json(json_line(value)) == json.loads(json_line(value)) == value


@given(
    st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | JSON.map(json.dumps).map(str.encode)
)
@BOUNDED
def test_any_bytes_are_rows_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content + b"\n")
    for model in (rows.RoundRow, rows.StepRow, None):
        with pytest.raises(InputError):
            rows.read_rows(path, model)
    with pytest.raises(InputError):
        list(read_checksums(path))


@given(st.sampled_from([*client_row(1, 0)]), JSON)
@BOUNDED
def test_any_value_of_a_row_is_as_described_or_named(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "clients.jsonl"
    for whole, model in ((client_row(1, 0), None), (round_row(1, [0]), rows.RoundRow)):
        if key in whole:
            path.write_bytes(json_line({**whole, key: value}))
            said = refusal(lambda p=path, m=model: rows.read_rows(p, m))
            if said is None:
                assert rows.read_rows(path, model)[0][key] == value
            else:
                assert said.startswith((f"{path}: line 1: ", f"{path}: line 1 has no "))


@given(st.text(max_size=60) | st.binary(max_size=60))
@BOUNDED
def test_any_text_is_a_configuration_or_refused(tmp_path: Path, content: str | bytes) -> None:
    for name in ("x.toml", "x.json"):
        path = tmp_path / name
        path.write_bytes(
            content if isinstance(content, bytes) else content.encode(errors="replace")
        )
        said = refusal(lambda p=path: read_config_file(p))
        assert said is None or said.startswith(f"config = {str(path)!r} ")


@given(st.sampled_from([name.replace("_", "-") for name in RunConfig.model_fields]), JSON)
@BOUNDED
def test_any_value_of_a_key_is_allowed_or_refused(key: str, value: Any) -> None:
    assert "\n" not in (refusal(lambda: RunConfig.from_mapping({key: value})) or "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 10_000 + "]" * 10_000, "its values are nested too deeply"),
        ("x = " + "9" * 5000, "Exceeds the limit"),
        ("rounds = 0x" + "f" * 5000, "rounds = <int too large to print> cannot be used"),
        ("local-steps = 1000000000000", "local-steps = 1000000000000 cannot be used"),
        ('dataset = "synthetic:' + "9" * 400 + '"', "expected digits, cifar10"),
        ("#" * (3 * 2**20), "it has more than 2,097,152 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_configuration_is_one_sentence(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.toml").write_text(text)
    assert command("plan", tmp_path / "x.toml") == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_configuration_that_is_a_pipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "x.toml")
    assert command("plan", tmp_path / "x.toml") == 2
    assert capsys.readouterr().err.endswith("cannot be read: it is not a regular file\n")


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[fuzz.Fuzzer]:
    with fuzz.fuzzer(seed=20) as made:
        yield made


@pytest.mark.matrix
@pytest.mark.parametrize("part", range(3))
def test_of_random_damage_every_command_says_one_sentence(part: int, fuzzed: fuzz.Fuzzer) -> None:
    """As ``python -m tests.fuzz`` does by the thousand."""
    report = fuzzed.run(range(100 * part, 100 * part + 100))
    assert report.failures == []


def test_a_resealed_row_without_its_end_is_no_row(run: Path) -> None:
    rows = (run / "rounds.jsonl").read_bytes()
    (run / "rounds.jsonl").write_bytes(rows[:-1])
    reseal(run)
    with pytest.raises(InputError, match=r"rounds\.jsonl ends within a line"):
        find_recovery(run)


# --- code

CODE = """\
from pathlib import Path
from flwr.serverapp.strategy import FedAvg
Path(__file__).with_name("it-ran").touch()
class Theirs(FedAvg):
    def __init__(self, trust=1.0, **others):
        super().__init__(**others)
"""


@pytest.fixture
def named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run that names a class, of a module that lies in it and in the current folder."""
    for folder in (run, tmp_path):
        (folder / "planted.py").write_text(CODE)
    strategy = {"name": "planted:Theirs", "trust": 0.5}
    edit(run / "run.json", lambda manifest: manifest["config"].update(strategy=strategy))
    reseal(run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield run
    sys.modules.pop("planted", None)


def ran(folder: Path) -> list[Path]:
    return sorted(folder.rglob("it-ran"))


NAMED = """\
fedsim: strategy = 'planted:Theirs' of {where} is code, which is never taken from a run; \
`--strategy '{{"name" = "planted:Theirs", "trust" = 0.5}}'` says that you mean your own class of \
that name
"""


@needs("compare")
def test_a_class_that_a_run_names_is_taken_from_the_command_line_alone(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = named / "run.json"
    for where, arguments in (
        (named, ["resume", named, "--rounds=2"]),
        (manifest, ["run", manifest, f"--output={tmp_path}/out"]),
        (manifest, ["plan", manifest]),
        (manifest, ["compare", manifest, "--seeds=1,2", f"--output={tmp_path}/out"]),
    ):
        assert command(*arguments) == 2
        assert capsys.readouterr().err == NAMED.format(where=where)
    assert ran(tmp_path) == []
    # What it says is what to type.
    flag = shlex.split(NAMED.split("`")[1].format())
    assert command("resume", named, "--rounds=2", "--strategy", "planted:Theirs") == 2
    assert "expected {'name': 'planted:Theirs', 'trust': 0.5}" in capsys.readouterr().err
    assert ran(tmp_path) == []
    assert command("resume", named, "--rounds=2", *flag) == 0
    assert command("plan", manifest, *flag) == 0
    assert ran(tmp_path) == [tmp_path / "it-ran"]


def test_from_inside_of_a_run_directory_no_code_can_come(
    named: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its modules would come before all others in Ray's workers, which start in the folder."""
    flag = shlex.split(NAMED.split("`")[1].format())
    for folder in (named, named / "rounds/0001"):
        monkeypatch.chdir(folder)
        for arguments in (["resume", named, "--rounds=2"], ["plan", named / "run.json"]):
            assert command(*arguments, *flag) == 2
            assert capsys.readouterr().err == (
                f"fedsim: the current folder lies in the run directory {named}, from which no code "
                "may be loaded; run it from another folder\n"
            )
    assert ran(named) == []


def test_nor_does_flower_or_python_take_a_class_from_a_run(named: Path, tmp_path: Path) -> None:
    recorded = load_run(named).config.to_mapping()
    with pytest.raises(InputError, match="is code, which is never taken from a run"):
        config_from_run_config({"resume": str(named), "rounds": 2}, recorded)
    with pytest.raises(InputError, match="is code, which is never taken from a run"):
        config_from_run_config({"config": str(named / "run.json")})
    with pytest.raises(InputError, match="is code, which is never taken from a run"):
        simulate(named / "run.json")
    mine = {"resume": str(named), "strategy": "{name = 'planted:Theirs', trust = 0.5}"}
    assert config_from_run_config(mine, recorded).strategy.name == "planted:Theirs"
    assert ran(tmp_path) == []


# --- copies


@needs("remote")
@pytest.mark.parametrize("damage", [be_link, be_pipe, be_terabyte])
@pytest.mark.parametrize("name", FILES)
def test_a_copy_there_and_back_follows_no_link_and_waits_for_nothing(
    name: str,
    damage: Callable[[Path, Path, Path], None],
    run: Path,
    outside: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy, back = tmp_path / "copy", tmp_path / "back"
    assert command("push", run, copy) == 0
    for place, arguments in ((run, ["push", run, tmp_path / "new"]), (copy, ["fetch", copy, back])):
        damage(place / name, place, outside)
        beyond = fuzz.snapshot(outside)
        capsys.readouterr()
        assert command(*arguments) in (1, 2)
        err = capsys.readouterr().err
        assert (err[:8], err.count("\n")) == ("fedsim: ", 1)
        assert Path(name).name in err
        assert fuzz.snapshot(outside) == beyond
    # A copy has its run.json last.
    assert not (tmp_path / "new/run.json").exists()
    assert not back.exists()


@needs("remote")
@pytest.mark.parametrize("name", ["rounds", "rounds/0001", "rounds/0001/clients"])
def test_a_copy_leads_through_no_folder_that_is_a_link(
    name: str, run: Path, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, other = tmp_path / "copy", tmp_path / "other"
    assert command("push", run, copy) == 0
    (other / name).parent.mkdir(parents=True)
    (other / name).symlink_to(outside / name)
    (tmp_path / "back.partial" / name).parent.mkdir(parents=True)
    (tmp_path / "back.partial" / name).symlink_to(outside / name)
    before = fuzz.snapshot(outside)
    assert command("push", run, other) == 1
    assert command("fetch", copy, tmp_path / "back") == 2
    for place in (run, copy):
        shutil.rmtree(place / name)
        (place / name).symlink_to(outside / name)
    assert command("push", run, tmp_path / "new") == 2
    assert command("fetch", copy, tmp_path / "back2") == 1
    assert capsys.readouterr().err.count("\n") == 4
    assert fuzz.snapshot(outside) == before


@needs("remote")
def test_what_lies_where_a_fetched_file_is_made_is_not_written_through(
    run: Path, outside: Path, tmp_path: Path
) -> None:
    unfinished = tmp_path / "back.partial"
    before = fuzz.snapshot(outside)
    for name in FILES:
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).symlink_to(outside / name)
        (unfinished / f"{name}.{os.getpid()}.partial").symlink_to(outside / name)
    assert command("fetch", run, tmp_path / "back") == 0
    assert verify(tmp_path / "back").violations == []
    assert fuzz.snapshot(outside) == before


@needs("remote")
def test_a_mirror_that_a_run_names_is_written_only_where_it_is_given_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = f"{tmp_path}/its place"
    edit(run / "run.json", lambda manifest: manifest["config"].update(mirror=there))
    reseal(run)
    before = fuzz.snapshot(tmp_path)
    said = (
        f"mirror = {shorten(there)} of {run} is a destination that a run alone may not choose; "
        f"`--mirror '{there}'` goes on copying there, `--mirror none` does not"
    )
    assert command("resume", run, "--rounds=2") == 2
    assert capsys.readouterr().err == f"fedsim: {said}\n"
    recorded = load_run(run).config.to_mapping()
    with pytest.raises(InputError, match="is a destination that a run alone may not choose"):
        config_from_run_config({"resume": str(run), "mirror": ""}, recorded)
    assert fuzz.snapshot(tmp_path) == before
    for said_again, mirror in ((there, there), ("none", None)):
        values = {"resume": str(run), "mirror": said_again}
        assert config_from_run_config(values, recorded).mirror == mirror
        assert command("resume", run, "--rounds=2", "--mirror", said_again) == 0
        assert load_run(run).config.mirror == mirror
    assert command("resume", run, "--rounds=2") == 0


@needs("cluster")
def test_a_cluster_that_a_run_names_is_not_asked_for_anything(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        head.setblocking(False)
        address = f"127.0.0.1:{head.getsockname()[1]}"
        manifest = run / "run.json"
        edit(manifest, lambda manifest: manifest["config"].update({"ray-address": address}))
        reseal(run)
        assert command("plan", manifest) == 0
        # Given, it comes after all that is checked here.
        assert command("resume", run, "--ray-address", address, "--rounds=1") == 2
        assert "rounds = 1 cannot be used" in capsys.readouterr().err
        assert command("resume", run, "--rounds=2") == 0
        with pytest.raises(BlockingIOError):
            head.accept()
    assert load_run(run).config.ray_address == "local"
