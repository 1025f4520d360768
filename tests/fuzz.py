"""Broken and hostile run directories and configurations, by the thousand.

``python -m tests.fuzz --inputs 10000 --seed 1 --jobs 2`` damages small runs at random, gives each
to a command, and checks that the answer is an exit code of 0, 1 or 2 with at most one line on
stderr, within five seconds and 500 MB, and that nothing outside of the run, or of what it is
copied to, was opened, listed or changed. An input depends on the seed and its number only;
``--only K`` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fedsim import cli
from fedsim.core.config import RunConfig
from fedsim.core.errors import InputError
from fedsim.core.inputs import read_text_bytes
from fedsim.core.plan import RunPlan
from fedsim.flower import simulation
from fedsim.flower.client_app import app
from fedsim.flower.machine import device_of, versions
from fedsim.flower.server_app import execute
from fedsim.recording.checksums import checksum_line, read_checksums
from fedsim.recording.files import Checksum
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import Recovery
from fedsim.recording.writer import RunWriter
from tests.local_grid import LocalGrid
from tests.observers import Memory

MOST_SECONDS = 5.0
MOST_GROWTH = 500 * 10**6
MARKER = "a-secret-outside-of-the-run"
FORMS: list[dict[str, Any]] = [
    {"capture": "all", "capture-encoding": "dense"},
    {"capture": "all", "local-steps": 3},
    {"capture": "sketch:16"},
]
NODES = "nodes"
"""Beside a run whose clients recorded on disks of their own: a folder for each."""


def make_run(path: Path, form: dict[str, Any], seed: int, *, nodes: Path | None = None) -> None:
    values = {
        "dataset": "synthetic:60:3",
        "model": "cnn",
        "clients": 3,
        "clients-per-round": 2,
        "rounds": 1,
        "batch-size": 16,
        "device": "cpu",
        "seed": seed,
        **form,
    }
    plan = RunPlan.prepare(RunConfig.from_mapping(values))
    grid = LocalGrid(app, plan.config.clients, recordings=path.parent)
    if nodes is not None:
        grid = LocalGrid(
            app,
            plan.config.clients,
            node_config=lambda p: {"recordings": str(nodes / str(p)), "capture": True},
        )
    execute(grid, plan, path, observer=Memory(), workers=1, stop=threading.Event())


# --- what is done to a file


Change = Callable[["Input", Path], None]


@dataclass
class Input:
    """One damaged run directory and the command that gets it."""

    number: int
    draw: random.Random
    run: Path
    other: Path
    outside: Path
    applied: list[str] = field(default_factory=list)

    def target_outside(self) -> Path:
        return self.draw.choice([self.outside / "secret", *sorted(self.outside.rglob("*"))])


def truncate(this: Input, path: Path) -> None:
    size = path.stat().st_size
    os.truncate(
        path,
        this.draw.choice([0, 1, 7, 8, 9, size - 1, this.draw.randrange(size + 1)]) % (size + 1),
    )


def extend(this: Input, path: Path) -> None:
    with path.open("ab") as file:
        file.write(this.draw.randbytes(this.draw.choice([1, 8, 1000])))


def flip(this: Input, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if not content:
        return
    # Half of them at the beginning, where headers are.
    most = len(content) if this.draw.random() < 0.5 else min(len(content), 400)
    for _ in range(this.draw.choice([1, 1, 2, 16, 64])):
        content[this.draw.randrange(most)] ^= 1 << this.draw.randrange(8)
    path.write_bytes(content)


def splice(this: Input, path: Path) -> None:
    content, source = path.read_bytes(), random_file(this, this.run).read_bytes()
    begin = this.draw.randrange(len(source) + 1)
    piece = source[begin : begin + this.draw.choice([1, 16, 4096])]
    at = this.draw.randrange(len(content) + 1)
    path.write_bytes(content[:at] + piece + content[at + this.draw.choice([0, len(piece)]) :])


def noise(this: Input, path: Path) -> None:
    path.write_bytes(this.draw.randbytes(this.draw.choice([0, 1, 8, 300, 70_000])))


def remove(this: Input, path: Path) -> None:
    path.unlink()


def be_folder(this: Input, path: Path) -> None:
    path.unlink()
    path.mkdir()


def be_pipe(this: Input, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def be_device(this: Input, path: Path) -> None:
    path.unlink()
    path.symlink_to(this.draw.choice(["/dev/zero", "/dev/null", "/dev/stdin"]))


def be_link(this: Input, path: Path) -> None:
    name = path.relative_to(this.run)
    path.unlink()
    targets = [this.outside / "secret", this.outside / "run" / name, path, Path("no/such/file")]
    path.symlink_to(this.draw.choice(targets))


def link_folder(this: Input, path: Path) -> None:
    inner = [p for p in path.parents if this.run in p.parents]
    folder = this.draw.choice(inner) if inner else this.run / "rounds"
    name = folder.relative_to(this.run)
    shutil.rmtree(folder)
    folder.symlink_to(this.draw.choice([this.outside, this.outside / "run" / name]))


def be_other_run(this: Input, path: Path) -> None:
    other = this.other / path.relative_to(this.run)
    shutil.copy(other if other.exists() else random_file(this, this.other), path)


def be_other_file(this: Input, path: Path) -> None:
    shutil.copy(random_file(this, this.run), path.with_name("copied"))
    path.with_name("copied").replace(path)


def claim_header(this: Input, path: Path) -> None:
    content = path.read_bytes()
    claims = [0, 1, len(content), len(content) - 8, 2**20, 10**8, 2**31, 2**40, 2**63, 2**64 - 1]
    path.write_bytes(struct.pack("<Q", this.draw.choice(claims)) + content[8:])


def plant(this: Input, path: Path) -> None:
    """Put something beside the file that a writer or a glob may run into."""
    planted = [
        (path.parent / "gradients-99999.safetensors", "file"),
        (path.parent / "gradients-\udcff.safetensors", "file"),
        (path.parent / f"{path.name}.{os.getpid()}.partial", "link"),
        (this.run / f"run.json.{os.getpid()}.partial", "link"),
        (this.run / f"checksums.jsonl.{os.getpid()}.partial", "folder"),
        (this.run / "rounds" / "0002", "link folder"),
        (this.run / "rounds" / "0002", "file"),
        (this.run / "rounds" / "0002", "folder"),
        (this.run / "rounds" / ("9" * 200), "folder"),
        (this.run / "rounds" / "0007", "link folder"),
    ]
    place, kind = this.draw.choice(planted)
    with contextlib.suppress(FileExistsError):
        if kind == "file":
            place.write_bytes(this.draw.randbytes(20))
        elif kind == "folder":
            place.mkdir()
        else:
            place.symlink_to(this.outside / ("run" if "folder" in kind else "secret"))


_WORDS = """
../../outside/secret /etc/passwd . .. nan digits cifar10 resnet18 synthetic:60:3 synthetic:6:2
synthetic:99999999999 all none first:1 every:2 last:99999999999999999999 sketch:16 sketch:999999
support dense adam bfloat16 float16 float32 float64 int64 running failed ok cuda
@NAN@ @INFINITY@ @HUGE@ @DEEP@ @OVERFLOW@ @SURROGATE@ @LATIN@ @LONG@
"""
HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 60, 10**6, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64),
    *(10**30, -(10**18), 0.5, -0.0, 1e308, 5e-324, "", "0", "1", "00", "x", "\0", "\x1b[2J\x07"),
    *([], {}, [[]], [{}], [None], [-1], [10**12], {"": 0}, {"../../outside/secret": {}}, "a\nb"),
    [0] * 20_000,
    *_WORDS.split(),
]
"""Values, and names of texts that no JSON writer would make."""
TEXTS = {
    '"@NAN@"': b"NaN",
    '"@INFINITY@"': b"-Infinity",
    '"@HUGE@"': b"9" * 5000,
    '"@DEEP@"': b"[" * 100_000 + b"]" * 100_000,
    '"@OVERFLOW@"': b"1e999",
    '"@SURROGATE@"': b'"\\ud800"',
    '"@LATIN@"': b'"\xe9\xff"',
    '"@LONG@"': b'"' + b"a" * 300_000 + b'"',
}


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from nodes(item, (*path, key))
    elif isinstance(value, list):
        for position, item in enumerate(value[:3]):
            yield from nodes(item, (*path, position))


def hostile_json(this: Input, value: Any) -> bytes:
    """Replace, remove or add a node of a value."""
    value = copy.deepcopy(value)
    for _ in range(this.draw.choice([1, 1, 1, 2, 4])):
        chosen = this.draw.choice(list(nodes(value)))
        new = copy.deepcopy(this.draw.choice(HOSTILE))
        if not chosen:
            if this.draw.random() < 0.2:
                value = new
            continue
        parent = value
        for step in chosen[:-1]:
            parent = parent[step]
        old, how = parent[chosen[-1]], this.draw.random()
        if how < 0.15:
            del parent[chosen[-1]]
        elif how < 0.25 and isinstance(parent, dict):
            parent[str(new)[:50]] = old
        elif how < 0.35 and isinstance(old, list):
            old.append(new)
        elif how < 0.5 and isinstance(old, int | float):
            parent[chosen[-1]] = this.draw.choice([old + 1, old - 1, old * 2, -old, old * 10**9])
        else:
            parent[chosen[-1]] = new
    text = json.dumps(value, separators=(",", ":")).encode()
    for name, replacement in TEXTS.items():
        text = text.replace(name.encode(), replacement)
    if this.draw.random() < 0.03 and text.startswith(b"{"):
        text = b'{"round":7,"files":{},' + text[1:]
    return text


def edit_json(this: Input, path: Path) -> None:
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        text = hostile_json(this, header)
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    elif path.suffix == ".jsonl":
        lines = path.read_bytes().split(b"\n")[:-1]
        if not lines:
            return
        position = this.draw.randrange(len(lines))
        how = this.draw.random()
        if how < 0.1:
            lines.insert(position, this.draw.choice(lines))
        elif how < 0.15:
            lines.pop(position)
        elif how < 0.2:
            this.draw.shuffle(lines)
        elif path.name == "checksums.jsonl":
            body = hostile_json(this, {"files": json.loads(lines[position])["files"]})[:-1]
            lines[position] = body + f',"line":"{Checksum.of(body).xxh3_128}"}}'.encode()
        else:
            lines[position] = hostile_json(this, json.loads(lines[position]))
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    else:
        with contextlib.suppress(ValueError):
            path.write_bytes(hostile_json(this, json.loads(path.read_bytes())))


def edit_config(this: Input, path: Path) -> None:
    manifest = json.loads(read_text_bytes(this.run / "run.json"))
    key = this.draw.choice(list(manifest["config"]))
    manifest["config"][key] = copy.deepcopy(this.draw.choice(HOSTILE))
    if this.draw.random() < 0.3:
        manifest["config"]["data-root"] = str(this.outside / "data")
    text = json.dumps(manifest).encode()
    for name, replacement in TEXTS.items():
        text = text.replace(name.encode(), replacement)
    (this.run / "run.json").write_bytes(text)


CHANGES: dict[str, tuple[Change, int]] = {
    "truncate": (truncate, 4),
    "extend": (extend, 2),
    "flip": (flip, 6),
    "splice": (splice, 3),
    "noise": (noise, 2),
    "remove": (remove, 1),
    "folder": (be_folder, 2),
    "pipe": (be_pipe, 2),
    "device": (be_device, 2),
    "link": (be_link, 4),
    "folder link": (link_folder, 3),
    "other run": (be_other_run, 3),
    "other file": (be_other_file, 2),
    "header": (claim_header, 4),
    "plant": (plant, 4),
    "json": (edit_json, 24),
    "config": (edit_config, 8),
}


def random_file(this: Input, root: Path) -> Path:
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    # Every kind of file as often as any other, however many there are.
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(path.name, []).append(path)
    return this.draw.choice(kinds[this.draw.choice(sorted(kinds))])


_UNSUITABLE = (InputError, ValueError, KeyError, TypeError, struct.error, OSError, RecursionError)
"""What a change says of a file that an earlier change has left nothing to work on."""


def damage(this: Input) -> None:
    """Change one file or two, and make the checksums of half of the inputs fit."""
    if this.draw.random() < 0.03:
        path = random_file(this, this.run)
        this.applied.append(f"hole {path.relative_to(this.run)}")
        os.truncate(path, 2 ** this.draw.choice([30, 36, 40]))
        return
    names, weights = list(CHANGES), [weight for _, weight in CHANGES.values()]
    for _ in range(this.draw.choice([1, 1, 1, 2])):
        name = this.draw.choices(names, weights)[0]
        # What a node sent may be one or two files, and gone after the first change.
        if not any(p.is_file() and not p.is_symlink() for p in this.run.rglob("*.safetensors")):
            break
        path = random_file(this, this.run)
        if name == "header":
            while path.suffix != ".safetensors":
                path = random_file(this, this.run)
        this.applied.append(f"{name} {path.relative_to(this.run)}")
        with contextlib.suppress(*_UNSUITABLE):
            CHANGES[name][0](this, path)
    if this.draw.random() < 0.5:
        this.applied.append("reseal")
        with contextlib.suppress(*_UNSUITABLE):
            reseal(this.run)


def reseal(root: Path) -> None:
    """Make all checksums those of what is there, as a forger would, as far as it can be done."""
    there = {p for p in root.rglob("*") if p.is_file() and not p.is_symlink()}
    if root / "clients.jsonl" in there:
        lines = []
        for line in (root / "clients.jsonl").read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(*_UNSUITABLE, AttributeError):
                row = json.loads(line)
                folder = root / f"rounds/{row['round']:04d}/clients/{row['partition']:04d}"
                for name in row["files"]:
                    if folder / name in there:
                        row["files"][name] = Checksum.of_file(folder / name).to_json()
                        line = json.dumps(row, separators=(",", ":")).encode()
            lines.append(line + b"\n")
        (root / "clients.jsonl").write_bytes(b"".join(lines))
    sealed = []
    for listed in read_checksums(root / "checksums.jsonl"):
        files = {
            name: Checksum.of_file(root / name) if root / name in there else checksum
            for name, checksum in listed.files.items()
        }
        sealed.append(checksum_line(files))
    (root / "checksums.jsonl").write_bytes(b"".join(sealed))


TOML = """\
dataset = "synthetic:60:3"
model = "cnn"
clients = 3
clients-per-round = 2
rounds = 2
batch-size = [8, 16]
learning-rate = 0.1
capture-layers = ["*"]
device = "cpu"

[client.1]
batch-size = 4
"""
_TOML_WORDS = """
nan inf 1e400 -1 0 5 1.0 .5 2_0 100000 1000000000 true [] {} [1.5] [[1,2],[0]] {1={}} "" '/dev/zero'
1979-05-27T07:32:00Z "\\u0000" "\\ud800" "\\u001b[2J" "synthetic:99999999999" "synthetic:60:3" "all"
"sketch:999999" "10kB"
"""
TOML_VALUES = [
    *("9" * 5000, "0x" + "f" * 5000, "[" * 3000 + "]" * 3000, "{a=" * 500 + "1" + "}" * 500),
    *('"' + "a" * 100_000 + '"', "[" + "1," * 50_000 + "]", "'''\n'''"),
    *_TOML_WORDS.split(),
]


def hostile_toml(this: Input) -> bytes:
    lines = TOML.splitlines()
    for _ in range(this.draw.choice([1, 1, 2])):
        how = this.draw.random()
        keys = [name.replace("_", "-") for name in RunConfig.model_fields]
        line = f"{this.draw.choice(keys)} = {this.draw.choice(TOML_VALUES)}"
        if how < 0.3:
            lines.insert(0, line)
        elif how < 0.8:
            key = line.partition(" = ")[0]
            lines = [line, *(old for old in lines if old.partition(" = ")[0] != key)]
        elif how < 0.9:
            lines.append("[client." + this.draw.choice(["1", "x", "9" * 5000, "-1", "a.b.c"]) + "]")
        else:
            lines.append(".".join("a" for _ in range(this.draw.choice([2, 5000]))) + " = 1")
    content = bytearray("\n".join(lines).encode())
    if this.draw.random() < 0.3:
        for _ in range(this.draw.choice([1, 8])):
            content[this.draw.randrange(len(content))] = this.draw.randrange(256)
    if this.draw.random() < 0.1:
        del content[this.draw.randrange(len(content)) :]
    return bytes(content)


# --- what is asked of it


def touch_all(run: Path) -> None:
    """Look at everything that the Python reader offers."""
    opened = load_run(run)
    repr(opened)
    asks: list[Callable[[], Any]] = [
        *(lambda: opened.config, lambda: opened.partition, lambda: opened.shapes),
        *(opened.rounds, opened.telemetry, lambda: opened.round(10**9)),
    ]
    asks += [lambda n=n: touch_round(opened.round(n)) for n in (0, 1, 2)]  # type: ignore[misc]
    for ask in asks:
        with contextlib.suppress(InputError):
            ask()


def touch_round(found: Any) -> None:
    dict(found.state)
    if found.number:
        dict(found.aggregate)
    for client in found.clients.values():
        asks: list[Callable[[], Any]] = [
            lambda client=client: {**client.delta},
            lambda client=client: client.steps,
            lambda client=client: client.is_replayable,
            lambda client=client: [client.gradient(s).numpy() for s in client.captured_steps],
            lambda client=client: [client.layer(n) for n in client.captured_parameters[-1:]],
            lambda client=client: client.gradient(1, weight_decay=True),
            lambda client=client: [len(g) for g, _ in client.replay()],
            lambda client=client: client.sketch(0),
        ]
        for ask in asks:
            with contextlib.suppress(InputError):
                ask()


def arguments_of(this: Input, scratch: Path) -> list[str]:
    run, out = str(this.run), str(scratch / "out")
    breaching = ["export", "breaching", run, "--round", "1", "--output", out, "--client"]
    several = ["1", "--step", "1", "--steps", "2", "--allow-not-replayable"]
    commands = [
        ["read"],
        ["inspect", run],
        ["verify", run, "--jobs", "1"],
        ["verify", run, "--jobs", "2", "--recompute", "1"],
        [*breaching, "0", "--step", "0"],
        [*breaching, *several],
        ["export", "notebook", run, "--round", "1", "--output", out],
        ["resume", run],
        ["resume", run, "--rounds", "3"],
        ["plan", f"{run}/run.json"],
        ["push", run, f"{scratch}/copy"],
        ["fetch", run, f"{scratch}/back"],
        ["collect", run, *(str(p) for p in sorted(scratch.glob(f"{NODES}/*")))],
    ]
    collects = 10 if (scratch / NODES).exists() else 0
    weights = [4, 3, 4, 3, 3, 3, 3, 4, 4, 2, 5, 5, collects]
    return this.draw.choices(commands, weights)[0]


def reopen_only(plan: RunPlan, output: Path, *_: Any, recovery: Recovery, **__: Any) -> None:
    """Stand where a resumed run would start its clients."""
    config = plan.config.to_mapping()
    writer = RunWriter.reopen(output, config, plan.partition, recovery, versions(), device_of(plan))
    if recovery.round >= 0:
        writer.state(recovery.round)
        writer.strategy_state(recovery.round)
    writer.close()


# --- nothing outside


class Watch:
    """Hears of everything that is opened, listed or changed, and keeps what leads outside."""

    def __init__(self) -> None:
        self.outside = ""
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.outside or event not in _AUDITED or not arguments:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_NOFOLLOW:
            path = os.path.dirname(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100, PTH120
        with contextlib.suppress(ValueError, OSError):
            if os.path.realpath(os.fsdecode(path)).startswith(self.outside):
                self.heard.append(f"{event} {os.fsdecode(path)}")


_AUDITED = {
    *("open", "os.listdir", "os.scandir", "os.truncate", "os.remove", "os.rename", "os.rmdir"),
    *("os.mkdir", "os.link", "os.symlink", "os.chmod", "os.utime", "shutil.rmtree"),
}


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        content = (about.st_size, about.st_mtime_ns) if path.is_file() else ()
        found[str(path)] = (about.st_mode, about.st_ino, content)
    return found


def is_plainly_damaged(this: Input, base: Path) -> bool:
    """Whether a file that is listed is not as it was, while its checksum is."""
    if "reseal" in this.applied or any("checksums" in change for change in this.applied):
        return False
    for path in base.rglob("*.*"):
        mine = this.run / path.relative_to(base)
        if mine.name == "checksums.jsonl":
            continue
        if not mine.is_file() or mine.is_symlink() or mine.resolve() != mine:
            return True
        if mine.stat().st_size != path.stat().st_size or mine.read_bytes() != path.read_bytes():
            return True
    return False


def is_plain(folder: Path) -> bool:
    """Whether there are regular files and folders only."""
    kinds = (path.lstat().st_mode for path in folder.rglob("*"))
    return all(stat.S_ISREG(kind) or stat.S_ISDIR(kind) for kind in kinds)


def is_fetched_otherwise(this: Input, base: Path, back: Path) -> bool:
    """Whether what was fetched is not what was written, while its checksums are."""
    if "reseal" in this.applied or any("checksums" in change for change in this.applied):
        return False
    files = [path for path in back.rglob("*") if path.is_file() and path.name != "checksums.jsonl"]
    return any(
        not (base / path.relative_to(back)).read_bytes().startswith(path.read_bytes())
        for path in files
    )


# --- all of it


@dataclass
class Report:
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    growth: int = 0
    largest: tuple[int, str] = (0, "")

    def add(self, other: Report) -> None:
        self.inputs += other.inputs
        self.outcomes += other.outcomes
        self.changes += other.changes
        self.examples = other.examples | self.examples
        self.failures += other.failures
        self.slowest = max(self.slowest, other.slowest)
        self.growth = max(self.growth, other.growth)
        self.largest = max(self.largest, other.largest)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_MADE = {
    "push": {"copy"},
    "fetch": {"back", "back.partial"},
    "export": {"out", "out_01_tensors.pt", "out_01_meta.json"},
}
"""What a command may make beside the run."""


class Fuzzer:
    """Makes the runs once, then inputs from them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._watch = Watch()
        self._bases = []
        for position, form in enumerate(FORMS):
            pair = folder / f"base{position}", folder / f"other{position}"
            for number, path in enumerate(pair):
                make_run(path, form, seed=number)
            self._bases.append(pair)
        away = folder / "away", folder / "other0"
        make_run(away[0], FORMS[1], seed=0, nodes=folder / NODES)
        self._bases.append(away)
        for number in range(20):
            # Imports and caches are not growth.
            self._answer(-1 - number, whole=True)
        self._base_bytes = peak_bytes()

    def run(self, numbers: Iterator[int] | range) -> Report:
        report = Report()
        for number in numbers:
            before = peak_bytes()
            name, changes, code, seconds, problems = self._answer(number)
            if seconds > MOST_SECONDS:
                # A busy machine is slow now and then; an input is slow again.
                name, changes, code, seconds, problems = self._answer(number)
            report.inputs += 1
            report.outcomes[f"{name}: {code}"] += 1
            report.examples.setdefault(f"{name}: {code}", number)
            report.changes.update({change.rpartition(" ")[0] or change for change in changes})
            told = f"input {number}: {name} after {', '.join(changes)}"
            report.slowest = max(report.slowest, (seconds, told))
            report.largest = max(report.largest, (peak_bytes() - before, told))
            report.growth = peak_bytes() - self._base_bytes
            if report.growth > MOST_GROWTH:
                problems.append(f"memory grew by {report.growth / 1e6:.0f} MB")
            report.failures += [f"{told}: {problem}" for problem in problems]
        return report

    def _answer(
        self, number: int, *, whole: bool = False
    ) -> tuple[str, list[str], int | str, float, list[str]]:
        scratch = self._folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        draw = random.Random(f"{self._seed} {number}")
        base, other = draw.choice(self._bases)
        outside = scratch / "outside"
        shutil.copytree(base, scratch / "run")
        shutil.copytree(other, outside / "run")
        (outside / "secret").write_text(MARKER)
        (outside / "data").mkdir()
        if base.name == "away":
            shutil.copytree(self._folder / NODES, scratch / NODES)
        this = Input(number, draw, scratch / "run", other, outside)
        arguments = arguments_of(this, scratch)
        if draw.random() < 0.08 and not whole:
            config = scratch / draw.choice(["x.toml", "x.toml", "x.toml", "x.json"])
            config.write_bytes(hostile_toml(this))
            if draw.random() < 0.03:
                draw.choice([be_folder, be_pipe])(this, config)
            this.applied.append("toml")
            arguments = ["plan", str(config)]
        elif not whole:
            sent = sorted(scratch.glob(f"{NODES}/*/*"))
            broken = arguments[0] == "collect" and draw.random() < 0.7
            damage(replace(this, run=draw.choice(sent)) if broken else this)
        problems: list[str] = []
        beyond, within, sent = (snapshot(p) for p in (outside, this.run, scratch / NODES))
        around = {path.name for path in scratch.iterdir()}
        out, err = io.StringIO(), io.StringIO()
        self._watch.heard = []
        self._watch.outside = str(outside.resolve())
        started = time.perf_counter()
        code: int | str
        signal.alarm(60)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = self._call(arguments, this.run)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            code = type(error).__name__
            problems.append("".join(traceback.format_exception(error)))
        finally:
            signal.alarm(0)
            self._watch.outside = ""
        seconds = time.perf_counter() - started
        said = err.getvalue()
        if seconds > MOST_SECONDS:
            problems.append(f"took {seconds:.1f} s")
        if code not in (0, 1, 2) and not problems:
            problems.append(f"exit code {code}")
        expected = 0 if code == 0 else 1
        if said.count("\n") != expected or (said and not said.startswith("fedsim: ")):
            problems.append(f"exit code {code} and on stderr: {said!r}")
        try:
            out.getvalue().encode()
        except UnicodeEncodeError as error:
            problems.append(f"cannot be printed: {error}")
        if MARKER in out.getvalue() + said:
            problems.append("it tells what is outside of the run")
        if self._watch.heard:
            problems.append(f"it went outside: {self._watch.heard}")
        if snapshot(outside) != beyond:
            problems.append("it changed what is outside of the run")
        writes = arguments[0] == "collect" or (arguments[0] == "resume" and code == 0)
        if not writes and snapshot(this.run) != within:
            problems.append("it changed the run")
        if snapshot(scratch / NODES) != sent:
            problems.append("it changed what nodes sent")
        made = {path.name for path in scratch.iterdir()} - around
        if not made <= _MADE.get(arguments[0], set()):
            problems.append(f"it made {sorted(made)}")
        if not all(is_plain(scratch / name) for name in made):
            problems.append("it copied what is not a file")
        if (
            arguments[0] == "fetch"
            and code == 0
            and is_fetched_otherwise(this, base, scratch / "back")
        ):
            problems.append("it fetched what was not written")
        asked = "cannot be used" in said or "this machine" in said
        if arguments[0] == "verify" and code == 2 and not asked:
            problems.append(f"it refuses what it should judge: {said}")
        if arguments[0] == "verify" and code == 0 and is_plainly_damaged(this, base):
            problems.append("it takes a damaged run for a whole one")
        name = " ".join(a for a in arguments[:2] if not a.startswith("/"))
        return name, this.applied, code, seconds, problems

    def _call(self, arguments: list[str], run: Path) -> int:
        if arguments == ["read"]:
            try:
                touch_all(run)
            except InputError as error:
                cli.say(str(error))
                return 2
            return 0
        with mock.patch.object(simulation, "simulate", reopen_only):
            return cli.run(arguments)


def _hang(number: int, frame: Any) -> None:
    raise TimeoutError("a hang")


@contextlib.contextmanager
def fuzzer(seed: int) -> Iterator[Fuzzer]:
    """Give a fuzzer with a folder of its own, in memory where there is such a one."""
    memory = Path("/dev/shm")  # noqa: S108
    folder = tempfile.mkdtemp(prefix="fedsim-fuzz-", dir=memory if memory.is_dir() else None)
    environment = {"FEDSIM_CACHE": f"{folder}/cache", "FEDSIM_DATA_ROOT": f"{folder}/none"}
    before = signal.signal(signal.SIGALRM, _hang)
    try:
        with mock.patch.dict(os.environ, environment):
            yield Fuzzer(Path(folder), seed)
    finally:
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder, ignore_errors=True)


def _job(seed: int, numbers: range) -> Report:
    torch.set_num_threads(1)
    # Rather an error here than a machine without memory.
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 10**9, resource.RLIM_INFINITY))
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with fuzzer(seed) as fuzz:
        return fuzz.run(numbers)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one input")
    parsed = parser.parse_args()
    started = time.perf_counter()
    report = Report()
    if parsed.only is not None:
        report = _job(parsed.seed, range(parsed.only, parsed.only + 1))
    else:
        parts = [range(j, parsed.inputs, parsed.jobs) for j in range(parsed.jobs)]
        spawn = multiprocessing.get_context("spawn")
        # Unlike a plain pool it notices a process that is killed.
        with ProcessPoolExecutor(parsed.jobs, mp_context=spawn) as pool:
            for found in pool.map(_job, itertools.repeat(parsed.seed), parts):
                report.add(found)
    for title, counter in (("command: exit code", report.outcomes), ("change", report.changes)):
        print(f"\n{title}")
        for name, count in sorted(counter.items(), key=lambda item: (str(item[0]), item[1])):
            example = f", like input {report.examples[name]}" if name in report.examples else ""
            print(f"  {count:6d}  {name}{example}")
    print(f"\nslowest   {report.slowest[0]:.2f} s  {report.slowest[1]}")
    print(f"growth    {report.growth / 1e6:.0f} MB; by one input {report.largest[0] / 1e6:.0f} MB")
    print(f"          {report.largest[1]}")
    print(f"inputs    {report.inputs} in {time.perf_counter() - started:.0f} s, seed {parsed.seed}")
    print(f"failures  {len(report.failures)}")
    for failure in report.failures[:30]:
        print(f"\n{failure if len(failure) < 3000 else failure[:500] + ' ... ' + failure[-2000:]}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
