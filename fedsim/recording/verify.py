"""Proving that a run directory holds what happened, and saying what cannot be proven."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedsim.core.allowance import usable_cpus
from fedsim.core.capture import is_at_hand, not_at_hand
from fedsim.core.determinism import torch_threads
from fedsim.core.errors import InputError
from fedsim.core.inputs import open_regular
from fedsim.core.task import FederatedData, task_of
from fedsim.core.units import format_bytes
from fedsim.recording import proofs, row_proofs, strategy_proofs
from fedsim.recording.checksums import (
    ChecksumLine,
    files_away,
    files_of,
    files_removed,
    read_checksums,
)
from fedsim.recording.disk import WholeReader
from fedsim.recording.evidence import DamagedFileError, Evidence
from fedsim.recording.files import Checksum
from fedsim.recording.findings import (
    AGGREGATE,
    EVALUATION,
    FILES,
    GRADIENTS,
    INITIAL,
    LOSSES,
    PARTICIPANTS,
    PARTITION,
    RECOMPUTED,
    REPLAY,
    ROWS,
    SCORES,
    SOURCES,
    STATE,
    STEPS,
    WHOLE_RUN,
    Findings,
    Place,
)
from fedsim.recording.layout import STEPS as STEPS_FILE
from fedsim.recording.layout import RunLayout, is_of_client
from fedsim.recording.reader import Client, Run, load_run
from fedsim.recording.recomputation import Candidate, Recomputation, draw, fresh_seed

Progress = Callable[[int, int], None]

_MOST_IN_MEMORY = 512 * 2**20
"""Bytes of a file that is read into memory for its checksum and its proof at once."""
_ROOT_FILES = ("run.json", "rounds.jsonl", "clients.jsonl")


def verify(
    path: Path,
    *,
    rounds: Collection[int] | None = None,
    clients: Collection[int] | None = None,
    evaluate: int | None = None,
    recompute: int | None = 0,
    seed: int | None = None,
    data_root: str | None = None,
    strategy: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Findings:
    """Check a run directory against itself.

    Parameters
    ----------
    path : Path
        The run directory.
    rounds, clients : collection of int, optional
        Look at these rounds only, and in them at the steps and gradients of these clients only.
        Aggregates and states are always those of all clients.
    evaluate : int, optional
        States to evaluate again, drawn at random; all by default.
    recompute : int or None
        Local steps to compute again from the data, drawn at random; None for all.
    seed : int, optional
        Of both draws; one from the operating system's randomness by default, which nobody who
        altered the run could foresee.
    data_root : str, optional
        Folder of the data, where it is not the one of the run.
    strategy : str, optional
        The user's class that made the run, as ``module:Class`` or ``FILE.py:Class``: it is loaded
        because it is named here, and what only its own check can prove is proven by it.
    jobs : int, optional
        Threads; by default as many as there are cores that this process may use.
    progress : callable, optional
        Told bytes done and bytes in all, from several threads.
    tell : callable, optional
        Told in a sentence what is about to take long.

    Returns
    -------
    Findings
        All that is wrong with the directory.

    Raises
    ------
    InputError
        When `path` is not a folder, a round or client asked for does not exist, or the strategy
        is not the run's or cannot be loaded.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; expected a run directory")
    verifier = _Verifier(path, jobs or usable_cpus(), progress)
    # Each thread of ours works on one client: more threads inside would only compete.
    with torch_threads(1):
        run = verifier.open()
        if run is None:
            reason = "one of run.json, rounds.jsonl, clients.jsonl is damaged: files only"
            verifier.findings.leave(STATE, reason)
            verifier.check_other_files()
        else:
            _refuse_unknown(run, rounds, clients)
            if strategy is not None:
                run = load_run(path, strategy)
                # Here, and not in a thread whose findings it would be.
                _ = run.algorithm
            verifier.check(
                run,
                rounds,
                clients,
                _Again(evaluate, recompute, fresh_seed() if seed is None else seed, tell),
                data_root,
            )
    return verifier.findings


def _refuse_unknown(
    run: Run, rounds: Collection[int] | None, clients: Collection[int] | None
) -> None:
    for flag, asked, known in (
        ("--round", rounds, {row["round"] for row in run.round_rows}),
        ("--client", clients, {row["partition"] for row in run.client_rows}),
    ):
        for number in sorted(set(asked or ()) - known):
            there = ", ".join(map(str, sorted(known)[:20])) or "none"
            raise InputError(f"{flag} = {number} is not in the run; there are {there}")


def _ends_with_a_line(path: Path) -> bool:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return (
                file.seek(0, os.SEEK_END) > 0
                and os.pread(file.fileno(), 1, file.tell() - 1) == b"\n"
            )
    except OSError:
        return False


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


@dataclass(frozen=True)
class _Again:
    """What is to be computed again: how many states and steps (None: all), by which draw."""

    evaluate: int | None
    recompute: int | None
    seed: int
    tell: Callable[[str], None] | None

    def say(self, text: str) -> None:
        """Announce what takes long."""
        if self.tell is not None:
            self.tell(text)


class _FilesOfRound:
    """What the verifier says of files, of checks of one round."""

    def __init__(self, verifier: _Verifier, number: int) -> None:
        self._verifier = verifier
        self._at = (number, None)

    def whole(self, check: str, paths: Sequence[Path]) -> bool:
        """Say whether all can be relied on."""
        return self._verifier.whole(check, paths, self._at)

    def is_listed(self, path: Path) -> bool:
        """Say whether the run says that it wrote a file."""
        return self._verifier.is_listed(path)


class _Verifier:
    """Decides which files can be relied on, and calls the proofs over those."""

    def __init__(self, path: Path, jobs: int, progress: Progress | None) -> None:
        self.findings = Findings()
        self._path = path
        self._jobs = jobs
        self._progress = progress
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._listed: dict[str, Checksum] = {}
        self._away: set[str] = set()
        self._removed: set[str] = set()
        self._state_of: dict[str, bool] = {}
        self._why_no_data = ""
        self._done = 0
        self._to_do = 0

    # What there is

    def open(self) -> Run | None:
        """Check the files that say what there is; give the run where they can be relied on."""
        lines: list[ChecksumLine] = []
        run, finished = None, True
        checksums = self._path / "checksums.jsonl"
        with self.findings.guarded(FILES, "checksums.jsonl"):
            lines = list(read_checksums(checksums))
        with self.findings.guarded(FILES, "run.json"):
            opened = load_run(self._path)
            finished = opened.status == "finished"
            # Looks at all of it once: what cannot be read is found here.
            known = opened.config, opened.round_rows, opened.client_rows
            run = opened if all(part is not None for part in known) else None
        with self.findings.guarded(FILES, "checksums.jsonl"):
            if finished and not _ends_with_a_line(checksums):
                self.findings.violate(FILES, "checksums.jsonl ends within a line")
        lines = self._without_unfinished_round(lines, finished)
        self._listed.update(files_of(lines))
        self._away = files_away(self._path, lines)
        self._removed = self._away & files_removed(lines)
        if self._away:
            self.findings.leave(FILES, self._why_away())
        versions = [line.files["run.json"] for line in lines if "run.json" in line.files]
        whole = [self._check_root_file("run.json", versions, size_may_differ=False)]
        for name in ("rounds.jsonl", "clients.jsonl"):
            last = [self._listed[name]] if name in self._listed else []
            whole.append(self._check_root_file(name, last, size_may_differ=not finished))
        for name in _ROOT_FILES:
            self._listed.pop(name, None)
        return run if all(whole) else None

    def _why_away(self) -> str:
        parts = (
            (
                self._away - self._removed,
                "are on the disks of clients; `fedsim collect` brings them",
            ),
            (
                self._removed,
                "of gradients were removed to make room; `fedsim collect` brings them from a copy",
            ),
        )
        told = []
        for names, where in parts:
            size = format_bytes(sum(self._listed[name].size for name in names))
            told += [f"{len(names):,} files ({size}) {where}"] if names else []
        return "; ".join(told)

    def _without_unfinished_round(
        self, lines: list[ChecksumLine], finished: bool
    ) -> list[ChecksumLine]:
        """Leave out the last line of a run that was killed between that and the round's row."""
        listed = [line for line in lines if "rounds.jsonl" in line.files]
        if finished or not listed:
            return lines
        if _size_of(self._path / "rounds.jsonl") >= listed[-1].files["rounds.jsonl"].size:
            return lines
        return [line for line in lines if line is not listed[-1]]

    def _check_root_file(
        self, name: str, allowed: Sequence[Checksum], *, size_may_differ: bool
    ) -> bool:
        path = self._path / name
        problem = f"{name} is not what was written"
        if not allowed:
            problem = f"{name} is not listed in checksums.jsonl"
        try:
            for checksum in reversed(allowed):
                if checksum.matches(path, grows=size_may_differ):
                    self.findings.prove(FILES)
                    self.findings.bytes_read += checksum.size
                    return True
        except OSError as error:
            problem = f"{name} cannot be read: {error.strerror}"
        self.findings.violate(FILES, problem)
        return False

    # Order of work

    def check(
        self,
        run: Run,
        rounds: Collection[int] | None,
        clients: Collection[int] | None,
        again: _Again,
        data_root: str | None,
    ) -> None:
        """Go through the run: partition, clients, rounds, and what is computed again."""
        numbers = [row["round"] for row in run.round_rows]
        if numbers != list(range(len(numbers))):
            self.findings.violate(PARTICIPANTS, "rounds.jsonl: rounds do not count up from 0")
            self.check_other_files()
            return
        numbers = [n for n in numbers if rounds is None or n in rounds]
        chosen = [
            client
            for number in numbers
            for client in run.round(number).clients.values()
            if clients is None or client.partition in clients
        ]
        self.findings.roll.update((n, frozenset(run.round(n).clients)) for n in numbers)
        self._to_do = sum(self._listed[name].size for name in self._listed)
        # Following what was captured is work like reading it.
        self._to_do += sum(
            capture.work(c) for c in chosen for capture in run.config.captures_at_hand
        )
        self._check_official(run)
        dataset = self._dataset_of(run, data_root, again)
        if self._whole(PARTITION, ["partition.safetensors"]):
            with self.findings.guarded(PARTITION, "partition.safetensors"):
                trained_on = None if run.config.own_data else dataset
                proofs.prove_partition(run, trained_on, self.findings)
            with self.findings.guarded(ROWS, "run.json"):
                row_proofs.prove_manifest(run, dataset, self._why_no_data, self.findings)
        # The longest first: the last one decides when all is done.
        chosen.sort(key=lambda client: -client.telemetry["bytes_captured"])
        self._in_parallel([partial(self._check_client, run, client) for client in chosen])
        self._in_parallel([partial(self._check_round, run, number) for number in numbers])
        if dataset is not None:
            recomputation = Recomputation(run, dataset, self.findings)
            self._evaluate(run, numbers, recomputation, again)
            if again.recompute != 0 and not run.config.own_data:
                self._recompute(run, chosen, recomputation, again)
        if rounds is None and clients is None:
            self.check_other_files()

    def check_other_files(self) -> None:
        """Check the listed files that nothing has asked for."""
        left = sorted(set(self._listed) - set(self._state_of) - self._away)
        self._in_parallel([partial(self._is_whole, name) for name in left])

    def _in_parallel(self, tasks: Sequence[Callable[[], object]]) -> None:
        with self.findings.in_one_order(), ThreadPoolExecutor(self._jobs) as pool:
            for future in [pool.submit(task) for task in tasks]:
                future.result()

    def _advance(self, count: float) -> None:
        with self._lock:
            self._done += int(count)
            done, total = self._done, max(self._done, self._to_do)
        if self._progress is not None:
            self._progress(done, total)

    def _check_official(self, run: Run) -> None:
        """Report a run that names a public dataset and was trained on other samples."""
        name, told = run.config.dataset, run.entry("dataset")["sha256"]
        known = task_of(run.config).spec.official_sha256
        if known is not None and told != known:
            self.findings.violate(
                PARTITION,
                f"run.json: the data has sha256 {told[:16]}..., which is not the official {name}",
            )

    def _dataset_of(self, run: Run, data_root: str | None, again: _Again) -> FederatedData | None:
        config, own = run.config, "the data is at the nodes, which tell its hash and keep it"
        if config.own_data:
            self._leave_without_data(own, again)
        try:
            run.check_sizes()
            task = task_of(config, data_root=data_root, download=data_root is not None)
            dataset = task.data()
            if dataset.fingerprint == run.entry("dataset")["sha256"]:
                return dataset
            reason = "the data at hand has another hash than that of the run"
        except InputError as error:
            reason = f"the data is not at hand: {error}"
        self._why_no_data = reason
        if not config.own_data:
            self._leave_without_data(reason, again)
        if again.evaluate != 0:
            self.findings.leave(EVALUATION, reason)
        return None

    def _leave_without_data(self, reason: str, again: _Again) -> None:
        self.findings.leave(PARTITION, f"class counts: {reason}")
        if again.recompute != 0:
            self.findings.leave(RECOMPUTED, reason)

    # Files

    def is_listed(self, path: Path) -> bool:
        """Say whether the checksums name a file."""
        return self._name(path) in self._listed

    def whole(self, check: str, paths: Sequence[Path], at: Place) -> bool:
        """Say whether all files can be relied on; where a check is named, why not."""
        names = [self._name(path) for path in paths]
        return self._whole(check, names, at) if check else all(map(self._is_whole, names))

    def _whole(self, check: str, names: Sequence[str], at: Place = WHOLE_RUN) -> bool:
        """Say whether all files a check needs can be relied on, reading each once."""
        whole = True
        for name in names:
            if not self._is_whole(name):
                if name in self._away:
                    self.findings.leave(check, self._why_away(), at=at)
                else:
                    self.findings.leave(check, f"{name} is damaged")
                whole = False
        return whole

    def _is_whole(self, name: str, checksum: Callable[[], Checksum] | None = None) -> bool:
        if name in self._away:
            return False
        with self._lock:
            if name in self._state_of:
                return self._state_of[name]
        problem = self._problem_of(name, checksum)
        with self._lock:
            # Another thread may have needed it too.
            if name in self._state_of:
                return self._state_of[name]
            self._state_of[name] = problem is None
            if problem is None:
                self.findings.bytes_read += self._listed[name].size
        if problem is None:
            self.findings.prove(FILES)
            self._advance(self._listed[name].size)
        else:
            self.findings.violate(FILES, problem)
        return problem is None

    def _problem_of(self, name: str, checksum: Callable[[], Checksum] | None) -> str | None:
        if name not in self._listed:
            return f"{name} is not listed in checksums.jsonl"
        listed = self._listed[name]
        try:
            # A name from a forged list may lead anywhere.
            path = RunLayout(self._path).inside(name)
            if (size := path.lstat().st_size) != listed.size:
                return f"{name} has {size} bytes, not {listed.size}"
            if (checksum() if checksum else Checksum.of_file(path)) != listed:
                return f"{name} is not what was written"
        except InputError as error:
            return str(error)
        except FileNotFoundError:
            return f"{name} is not there"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None

    def _name(self, path: Path) -> str:
        return path.relative_to(self._path).as_posix()

    # Proofs over whole files

    def _check_round(self, run: Run, number: int) -> None:
        with self.findings.guarded(FILES, f"round {number}"):
            self._check_round_files(run, number)

    def _check_round_files(self, run: Run, number: int) -> None:
        findings, layout = self.findings, run.layout
        if run.round(number).row["global_accuracy"] is not None:
            findings.leave(ROWS, SCORES, at=(number, None))
        with findings.guarded(ROWS, "rounds.jsonl"):
            row_proofs.prove_round_row(run, number, findings)
        for row in run.client_rows_of(number):
            if row["status"] != "ok":
                findings.leave(ROWS, row_proofs.OF_FAILED, at=(number, row["partition"]))
        state = self._name(layout.state(number))
        if number == 0:
            if self._whole(INITIAL, [state]):
                with findings.guarded(INITIAL, state):
                    proofs.prove_initial_state(run, findings)
            strategy_proofs.prove_strategy(run, number, findings, _FilesOfRound(self, number))
            return
        with findings.guarded(PARTICIPANTS, f"round {number}"):
            proofs.prove_participants(run, number, findings)
        aggregate = self._name(layout.aggregate(number))
        deltas = [
            *dict.fromkeys(self._name(c.delta_path) for c in run.round(number).clients.values())
        ]
        at = (number, None)
        if self._whole(AGGREGATE, [aggregate, "partition.safetensors", *deltas], at):
            with findings.guarded(AGGREGATE, aggregate):
                proofs.prove_aggregate(run, number, findings)
        strategy_proofs.prove_strategy(run, number, findings, _FilesOfRound(self, number))

    def _check_client(self, run: Run, client: Client) -> None:
        with self.findings.guarded(FILES, f"client {client.partition} of round {client.round}"):
            num_steps = client.telemetry["num_steps"]
            self.findings.leave(ROWS, LOSSES, at=client.place, steps=num_steps)
            if captured := client.telemetry["num_steps_captured"]:
                self.findings.leave(RECOMPUTED, SOURCES, at=client.place, steps=captured)
            for capture in run.config.captures_at_hand:
                capture.leave(client, self.findings)
            if self._whole(ROWS, ["partition.safetensors"]):
                with self.findings.guarded(ROWS, "clients.jsonl"):
                    row_proofs.prove_client_row(run, client, self.findings)
            folder = self._name(client.folder)
            told = {f"{folder}/{name}": file for name, file in client.telemetry["files"].items()}
            for name, file in told.items():
                if name in self._listed and self._listed[name].to_json() != file:
                    self.findings.violate(FILES, f"clients.jsonl has another checksum of {name}")
            for name in sorted(self._unlisted(client)):
                self.findings.violate(FILES, f"{folder}/{name} is not listed in clients.jsonl")
            if client.telemetry.get("place") == "none":
                self.findings.leave(STEPS, "clients keep no record on their nodes", at=client.place)
                return
            steps = self._name(client.steps_path)
            if self._whole(STEPS, [steps, "partition.safetensors"], client.place):
                with self.findings.guarded(STEPS, steps):
                    proofs.prove_steps(run, client, self.findings)
                    row_proofs.prove_step_rows(run, client, self.findings)
            evidence = Evidence(
                client=client,
                findings=self.findings,
                folder=folder,
                own=list(told),
                are_here=self._away.isdisjoint(told),
                why_away=self._why_away(),
                whole=self._whole,
                read=self._read_whole,
            )
            for capture in run.config.captures_at_hand:
                capture.check(evidence)
            if not is_at_hand(run.config.capture):
                self._leave_capture(run, client)

    def _leave_capture(self, run: Run, client: Client) -> None:
        """Name the files of a capture that only its own class can prove."""
        why = not_at_hand(run.config.capture)
        names = [n for n in client.telemetry["files"] if not is_of_client(n)]
        self.findings.leave(REPLAY, why, at=client.place)
        if names:
            self.findings.leave(GRADIENTS, f"{', '.join(names)}: {why}", at=client.place)

    def _unlisted(self, client: Client) -> set[str]:
        """Name what readers would take for the client's own, and the client did not list."""
        try:
            there = {path.name for path in client.folder.iterdir()}
        except FileNotFoundError:
            return set()
        return {n for n in there if is_of_client(n) and n not in client.telemetry["files"]}

    def _read_whole(self, names: Sequence[str]) -> Iterator[tuple[Path, memoryview | None]]:
        """Read files once, for their checksum and for what is in them."""
        if not hasattr(self._of_thread, "reader"):
            self._of_thread.reader = WholeReader()
        content = memoryview(b"")

        def checksum(path: Path) -> Checksum:
            nonlocal content
            content = self._of_thread.reader.read(path)
            return Checksum.of(content)

        for name in names:
            path = self._path / name
            # A step of a very large model, or a file that is mostly a claim.
            is_large = _size_of(path) > _MOST_IN_MEMORY
            if not self._is_whole(name, None if is_large else partial(checksum, path)):
                raise DamagedFileError(name)
            yield path, None if is_large else content
            self._advance(self._listed[name].size)

    # What is computed again

    def _evaluate(
        self, run: Run, numbers: Sequence[int], recomputation: Recomputation, again: _Again
    ) -> None:
        rows = {n: run.round(n).row for n in numbers}
        # A loss that is not finite is null.
        due = [n for n, row in rows.items() if row["global_accuracy"] is not None]
        count = len(due) if again.evaluate is None else again.evaluate
        drawn = [due[position] for position in draw(len(due), count, again.seed)]
        if not drawn:
            return
        spent = sum(rows[number]["seconds"]["evaluate"] for number in drawn)
        states = "1 state" if len(drawn) == 1 else f"{len(drawn):,} states"
        again.say(f"evaluating {states} again, for which the run took {spent:.1f} s")
        if len(drawn) < len(due):
            seed = f"drawn from {len(due):,} with --recompute-seed {again.seed}"
            self.findings.note(EVALUATION, seed)
        for number in drawn:
            with self.findings.guarded(EVALUATION, f"the state of round {number}"):
                state = self._name(run.layout.state(number))
                if self._whole(EVALUATION, [state], (number, None)):
                    recomputation.evaluate(number)

    def _recompute(
        self, run: Run, clients: Sequence[Client], recomputation: Recomputation, again: _Again
    ) -> None:
        candidates = []
        for client in sorted(clients, key=lambda c: c.place):
            # Where its files are damaged, the checks of the client have reported it.
            with suppress(InputError):
                candidate = self._candidate(run, client, recomputation)
                if candidate is not None and candidate.count:
                    candidates.append(candidate)
        if not candidates:
            return
        total = sum(candidate.count for candidate in candidates)
        count = total if again.recompute is None else min(again.recompute, total)
        again.say(
            f"computing {count:,} of {total:,} local steps again, drawn with "
            f"--recompute-seed {again.seed}"
        )
        recomputation.recompute(candidates, count, again.seed)

    def _candidate(
        self, run: Run, client: Client, recomputation: Recomputation
    ) -> Candidate | None:
        folder, number = self._name(client.folder), client.round
        if client.unknown_correction:
            self.findings.leave(RECOMPUTED, client.unknown_correction, at=client.place)
            return None
        needed = [self._name(run.layout.state(number - 1)), "partition.safetensors"]
        needed.append(self._name(client.delta_path))
        if run.algorithm is not None and run.algorithm.corrects:
            if (last := client.control_round) and run.algorithm.keeps_of_client():
                needed.append(self._name(run.layout.control(last, client.partition)))
            if number > 1 and run.algorithm.keeps():
                needed.append(self._name(run.layout.strategy(number - 1)))
        if not all(self._is_whole(name) for name in needed):
            # The checks of the client and of the round have reported it.
            return None
        names = client.telemetry["files"]
        whole = {name for name in names if self._is_whole(f"{folder}/{name}")}
        if client.telemetry.get("place") != "none" and self._is_whole(
            self._name(client.steps_path)
        ):
            whole.add(STEPS_FILE)
        candidate = recomputation.candidate(client, frozenset(whole))
        if not candidate.count:
            reason = recomputation.why_not(client)
            self.findings.leave(RECOMPUTED, reason, at=client.place)
        return candidate
