"""A copy of a run at a URL: whatever cuts it off, what is there is a run; and the way back."""

import json
import os
import shutil
import sys
import threading

import pytest
from fsspec.implementations.memory import MemoryFile

from fedsim import cli
from fedsim.core.config import RunConfig
from fedsim.core.errors import ConfigError, InputError, RunFailedError
from fedsim.core.plan import RunPlan
from fedsim.flower.client_app import app
from fedsim.flower.server_app import execute
from fedsim.plugins.remote import folder, mirror
from fedsim.plugins.remote.folder import Folder, RemoteError
from fedsim.plugins.remote.mirror import Mirror, Stopped, check_new, check_same, fetch, push
from fedsim.recording.checksums import checksum_line, read_checksums
from fedsim.recording.files import Checksum
from fedsim.recording.reader import load_run
from fedsim.recording.recovery import find_recovery
from fedsim.recording.verify import verify
from tests.local_grid import LocalGrid
from tests.observers import Memory
from tests.patience import PATIENCE


class CutOffError(RemoteError):
    pass


class Counting(Folder):
    """A folder that takes so many files, and no more."""

    def __init__(self, url, most=10**9):
        super().__init__(url)
        self.most = most
        self.names = []

    def put(self, name, content):
        self._count(name)
        super().put(name, content)

    def _count(self, name):
        if len(self.names) == self.most:
            raise CutOffError("cut off")
        self.names.append(name)


@pytest.fixture
def finished(recorded):
    return recorded.path


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def is_whole(url, folder):
    """Fetch a copy and verify it; give its rounds."""
    count = fetch(str(url), folder)
    violations = verify(folder).violations
    # As of any run that has no round yet.
    names = ("rounds.jsonl", "clients.jsonl")
    unlisted = [f"{name} is not listed in checksums.jsonl" for name in names]
    run = load_run(folder)
    if run.status == "finished" and 0 < count < 3:
        # What was copied before and was made again is gone until it is there again.
        assert violations == [f"run.json: finished, with {count - 1} of 2 rounds"]
    else:
        assert violations == ([] if count else unlisted)
    assert [row["round"] for row in run.round_rows] == list(range(count))
    assert not list(folder.rglob("*.partial"))
    return count


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_copy_is_the_run_to_the_byte_and_so_is_what_is_fetched(finished, tmp_path, form):
    url = form.format(tmp_path / "copy")
    copied = push(finished, Folder(url))
    assert files_of(tmp_path / "copy") == files_of(finished)
    listed = [name for name in files_of(finished) if "/" in name or name.startswith("partition")]
    assert copied == sum((finished / name).stat().st_size for name in listed)
    assert is_whole(url, tmp_path / "back") == 3
    assert files_of(tmp_path / "back") == files_of(finished)
    assert push(finished, Folder(url)) == 0


def laid_out(files, folder):
    """Put files of a moment of a run into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def copy_of(folder, path):
    if folder.exists():
        shutil.copytree(folder, path)
    return path


@pytest.mark.matrix
def test_a_copy_is_a_run_at_every_moment_of_a_run_and_wherever_it_is_cut_off(
    recorded, tmp_path, monkeypatch
):
    # Every round is closed on its own.
    monkeypatch.setattr(mirror, "_BATCH", 0)
    counts, copy = [], tmp_path / "copy-0"
    for number, (moment, files) in enumerate(recorded.moments):
        root = laid_out(files, tmp_path / f"moment-{number}")
        after = copy_of(copy, tmp_path / f"copy-{number + 1}")
        counting = Counting(str(after))
        push(root, counting)
        for most in range(len(counting.names)):
            cut = copy_of(copy, tmp_path / f"cut-{number}-{most}")
            with pytest.raises(CutOffError):
                push(root, Counting(str(cut), most))
            if not (cut / "run.json").exists():
                with pytest.raises(InputError, match=r"holds no run: it has no run\.json$"):
                    fetch(str(cut), tmp_path / "none")
                continue
            counts.append(is_whole(cut, tmp_path / f"back-{number}-{most}"))
            # What was cut off goes on where it was, with what is missing alone.
            rest = Counting(str(cut))
            push(root, rest)
            assert files_of(cut) == files_of(after), moment
            shutil.rmtree(cut)
            shutil.rmtree(tmp_path / f"back-{number}-{most}")
        copy = after
    # From the empty run on; that the run is finished comes last.
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3}
    assert files_of(copy) == files_of(recorded.path)


def test_a_finished_run_is_no_run_at_its_copy_before_all_of_it_is_there(finished, tmp_path):
    whole = Counting(str(tmp_path / "whole"))
    push(finished, whole)
    assert whole.names[-1] == "run.json"
    assert whole.names[-4:-1] == ["checksums.jsonl", "clients.jsonl", "rounds.jsonl"]
    assert whole.names.count("rounds.jsonl") == 1


def test_rounds_that_were_made_again_take_the_place_of_those_of_before(
    recorded, tmp_path, monkeypatch
):
    monkeypatch.setattr(mirror, "_BATCH", 0)
    root = tmp_path / "run"
    shutil.copytree(recorded.path, root)
    push(root, Folder(str(tmp_path / "before")))
    # A last round that is damaged is made again, with other times in its rows.
    (root / "rounds" / "0002" / "global.safetensors").write_bytes(b"")
    resume(root, recorded.plan)
    assert files_of(root) != files_of(recorded.path)
    whole = Counting(str(copy_of(tmp_path / "before", tmp_path / "all")))
    push(root, whole)
    assert files_of(tmp_path / "all") == files_of(root)
    counts = []
    for most in range(len(whole.names)):
        cut = copy_of(tmp_path / "before", tmp_path / f"cut-{most}")
        with pytest.raises(CutOffError):
            push(root, Counting(str(cut), most))
        counts.append(is_whole(cut, tmp_path / f"back-{most}"))
    # The round that was made again is gone first of all, and back with its last list.
    closed = whole.names.index("rounds.jsonl", 1) + 1
    assert counts == [3, *[2] * (closed - 1), *[3] * (len(whole.names) - closed)]


def resume(root, plan):
    execute(
        LocalGrid(app, plan.config.clients, recordings=root.parent),
        plan,
        root,
        observer=Memory(),
        workers=2,
        stop=threading.Event(),
        recovery=find_recovery(root),
    )


def test_what_is_not_what_was_written_is_not_copied(copied, tmp_path):
    path = min(copied.glob("rounds/0001/clients/*/gradients-*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunFailedError, match=f"^{path} is not what was written$"):
        push(copied, Folder(str(tmp_path / "copy")))
    path.unlink()
    with pytest.raises(RunFailedError, match=f"^{path} cannot be read: No such file or directory$"):
        push(copied, Folder(str(tmp_path / "copy")))
    assert not (tmp_path / "copy" / "run.json").exists()


def test_what_was_changed_at_the_copy_is_not_fetched(finished, tmp_path):
    url = tmp_path / "copy"
    push(finished, Folder(str(url)))
    name = "rounds/0001/aggregate.safetensors"
    content = (url / name).read_bytes()
    (url / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunFailedError, match=f"^{url}/{name} is not what was written$"):
        fetch(str(url), tmp_path / "back")
    (url / name).write_bytes(content + b"more")
    sizes = f"has {len(content) + 4} bytes, not {len(content)}"
    with pytest.raises(RunFailedError, match=f"^{url}/{name} {sizes}$"):
        fetch(str(url), tmp_path / "back")
    (url / name).unlink()
    with pytest.raises(RunFailedError, match=f"^{url}/{name} is not there$"):
        fetch(str(url), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    # What is there by now is not copied again.
    (url / name).write_bytes(content)
    (url / "partition.safetensors").unlink()
    assert is_whole(url, tmp_path / "back") == 3


def test_a_name_that_leads_out_of_the_folder_is_refused(finished, tmp_path):
    url = tmp_path / "copy"
    push(finished, Folder(str(url)))
    line = checksum_line({"../out": Checksum.of(b"x")})
    with (url / "checksums.jsonl").open("ab") as file:
        file.write(line)
    (tmp_path / "out").write_bytes(b"x")
    with pytest.raises(InputError, match=r"^\.\./out leads out of the run directory$"):
        fetch(str(url), tmp_path / "back" / "run")


def test_a_folder_that_exists_is_not_fetched_into(finished, tmp_path):
    with pytest.raises(InputError, match="exists already; expected a new folder"):
        fetch(str(finished), tmp_path)


def test_another_run_is_never_overwritten(recorded, copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "copy"
    push(recorded.path, Folder(url))
    manifest = json.loads((copied / "run.json").read_bytes())
    manifest["created"] = "2020-01-01T00:00:00+00:00"
    (copied / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"^{url} holds another run$"):
        push(copied, Folder(url))
    with pytest.raises(ConfigError) as caught:
        check_same(url, copied)
    assert str(caught.value) == (
        f"mirror = {url!r} cannot be used; expected a copy of {copied}, or a new URL "
        f"({url} holds another run)"
    )
    check_same(url, recorded.path)
    with pytest.raises(ConfigError, match="expected a URL that holds no run, since none is ever"):
        check_new(url, tmp_path / "run")


def test_a_place_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    url = f"{tmp_path}/file/copy"
    with pytest.raises(ConfigError, match=r"^mirror = '.* cannot be used; expected a URL that"):
        check_new(url, tmp_path / "run")
    check_new(str(tmp_path / "new"), tmp_path / "run")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"Protocol not known: nowhere"):
        check_new("nowhere://x/y", tmp_path / "run")


def test_a_run_with_a_mirror_ends_with_its_whole_copy(plan, tmp_path):
    config = {**plan.config.to_mapping(), "mirror": str(tmp_path / "copy")}
    mirrored = RunPlan.prepare(RunConfig.from_mapping(config))
    memory = Memory()
    run_locally(mirrored, tmp_path / "run", memory)
    assert memory.of("warned") == []
    assert files_of(tmp_path / "copy") == files_of(tmp_path / "run")
    assert verify(tmp_path / "copy").violations == []


def run_locally(plan, path, observer):
    execute(
        LocalGrid(app, plan.config.clients, recordings=path.parent),
        plan,
        path,
        observer=observer,
        workers=2,
        stop=threading.Event(),
    )


class Flaky(Counting):
    """Refuses whatever comes before it is told otherwise."""

    def __init__(self, url):
        super().__init__(url, 0)
        self.tried = threading.Event()

    def _count(self, name):
        try:
            super()._count(name)
        finally:
            self.tried.set()


def test_a_copy_that_fails_is_told_once_and_caught_up_at_the_end(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_FIRST_PAUSE", 0.01)
    remote, told = Flaky(str(tmp_path / "copy")), []
    copying = Mirror(recorded.path, remote, tell=told.append, stop=threading.Event())
    for _ in range(3):
        remote.tried.clear()
        copying.wake()
        assert remote.tried.wait(PATIENCE)
    remote.most = 10**9
    copying.close()
    assert told == ["the copy is behind and will be tried again: cut off"]
    assert files_of(tmp_path / "copy") == files_of(recorded.path)


def test_a_copy_that_fails_to_the_end_leaves_a_command_that_brings_it(recorded, tmp_path):
    told = []
    remote = Flaky(str(tmp_path / "copy"))
    copying = Mirror(recorded.path, remote, tell=told.append, stop=threading.Event())
    copying.close()
    assert told[-1] == (
        f"the copy is behind: cut off; `fedsim push {recorded.path} {remote.url}` brings it up to "
        "date"
    )


def test_a_run_that_is_stopped_does_not_wait_for_its_copy(recorded, tmp_path):
    stop, told = threading.Event(), []
    stop.set()
    with pytest.raises(Stopped):
        push(recorded.path, Folder(str(tmp_path / "copy")), stop=stop.is_set)
    Mirror(recorded.path, Folder(str(tmp_path / "copy")), tell=told.append, stop=stop).close()
    assert "the run was stopped" in told[-1]


@pytest.mark.parametrize("name", ["run.json", "clients.jsonl"])
def test_a_store_is_asked_how_much_it_has_before_any_of_it_is_taken(
    recorded, tmp_path, monkeypatch, name
):
    store = Folder("memory://of a stranger")
    push(recorded.path, store)
    monkeypatch.setattr(folder, "MOST_TEXT_BYTES", store.size(name) - 1)
    monkeypatch.setattr(MemoryFile, "read", lambda self, size=-1: pytest.fail("it was read"))
    told = rf"^memory://of a stranger/{name} cannot be read: it has more than [0-9,]+ bytes$"
    with pytest.raises(RemoteError, match=told):
        store.read(name)


def test_no_pipe_of_a_chained_url_is_waited_for(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    url = f"dir://.::file://{tmp_path}/copy"
    for name in ("run.json", "rounds/0001/global.safetensors"):
        content = (tmp_path / "copy" / name).read_bytes()
        (tmp_path / "copy" / name).unlink()
        os.mkfifo(tmp_path / "copy" / name)
        with pytest.raises(RunFailedError, match=f"{name} cannot be read: it is not a file of a"):
            fetch(url, tmp_path / "back")
        (tmp_path / "copy" / name).unlink()
        (tmp_path / "copy" / name).write_bytes(content)
    assert fetch(url, tmp_path / "back") == 3


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/run",
        "https://host/run?token=secret",
        "a?b",
        "dir://x::sftp://u:secret@h/y",
        "simplecache::dir::sftp://u:secret@h/y",
        "sftp://u:sec/ret@h/y",
        "sftp://u:sec@ret@h/y",
        "sftp://u:sec::ret@h/y",
    ],
)
def test_a_url_with_a_secret_is_refused(url):
    with pytest.raises(ConfigError, match="a URL or path without a password or"):
        RunConfig.from_mapping({"mirror": url})
    for url in (
        "abfs://box@account/run",
        "dir://x::sftp://u@h:2222/y",
        "simplecache::s3://bucket/a:b",
        "/mnt/a:b@c",
        "s3://bucket/2026-11-23T10:04:17",
    ):
        assert RunConfig.from_mapping({"mirror": url}).mirror == url


def test_the_commands_copy_a_run_there_and_back(recorded, tmp_path, capsys):
    run, url, back = str(recorded.path), str(tmp_path / "copy"), str(tmp_path / "back")
    assert cli.run(["push", run, url]) == 0
    assert cli.run(["fetch", url, back]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("copied: ")
    assert out[0].endswith(f" to {url}, which is up to date")
    assert out[1] == f"fetched: 2 rounds into {back}"
    assert cli.run(["fetch", url, back]) == 2
    assert cli.run(["push", run]) == 2
    assert cli.run(["push", str(tmp_path / "nothing"), url]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"fedsim: {back} exists already; expected a new folder",
        "fedsim: missing argument 'URL'; see `fedsim push --help`",
        f"fedsim: {tmp_path / 'nothing'} is not a run directory: it has no whole run.json",
    ]


@pytest.mark.parametrize("place", ["run", "run/copy", "run/rounds", ".", "link", "link/rounds/new"])
@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_copy_is_never_made_over_its_run(copied, place, form, tmp_path, capsys, monkeypatch):
    assert copied == tmp_path / "run"
    (tmp_path / "link").symlink_to(copied)
    url = form.format(tmp_path / place)
    before = files_of(tmp_path)
    said = (
        f"{url} is the run directory {copied}, lies in it or contains it; expected a place apart "
    )
    assert cli.run(["push", str(copied), url]) == 2
    assert capsys.readouterr().err == f"fedsim: {said}from it\n"
    with pytest.raises(ConfigError, match="lies in it or contains it"):
        check_same(url, copied)
    with pytest.raises(ConfigError, match="lies in it or contains it"):
        check_new(url, copied)
    if place.startswith("run"):
        flags = ["--model=cnn", f"--output={tmp_path}/new", f"--mirror={tmp_path}/new/copy"]
        assert cli.run(["run", *flags]) == 2
        assert "lies in it or contains it" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_a_run_is_not_fetched_into_itself(finished):
    with pytest.raises(InputError, match="lies in it or contains it"):
        fetch(str(finished), finished / "back")
    assert not (finished / "back.partial").exists()


def test_a_round_whose_line_lacks_a_list_is_refused(copied, tmp_path):
    lines = list(read_checksums(copied / "checksums.jsonl"))
    kept = [
        {n: c for n, c in line.files.items() if n != "clients.jsonl" or not line.rows}
        for line in lines
    ]
    (copied / "checksums.jsonl").write_bytes(b"".join(checksum_line(files) for files in kept))
    said = f"^{copied}: clients.jsonl is not listed with its round in checksums.jsonl$"
    with pytest.raises(InputError, match=said):
        push(copied, Folder(str(tmp_path / "copy")))
    with pytest.raises(InputError, match=said):
        fetch(str(copied), tmp_path / "back")


def test_a_store_without_its_package_names_the_extra(recorded, monkeypatch, capsys):
    for package in ("s3fs", "obstore.fsspec"):
        monkeypatch.setitem(sys.modules, package, None)
    assert cli.run(["push", str(recorded.path), "s3://bucket/run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fedsim: s3://bucket/run needs a package that is not here (")
    assert err.endswith("; the extra 'remote' brings one\n")
