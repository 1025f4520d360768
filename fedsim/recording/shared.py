"""Files that the clients of a round share, where there are too many for files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.recording.files import Checksum, temporary, write_tensors
from fedsim.recording.layout import RunLayout, delta_key
from fedsim.recording.tensor_files import MOST_KEYS

SHARED_BYTES = 32 * 2**20
"""Shared files close at the client that fills them to about this size."""


class SharedFiles:
    """Puts the deltas and the lines of steps of a round's clients into a few files.

    What is not written yet is held in memory: one file's worth, or one client's where that is more.
    A round that is killed loses it, with the rest of the round.

    Parameters
    ----------
    layout : RunLayout
        Of the run.
    round_number : int
        The round.

    Attributes
    ----------
    shard : int
        Number of the files that the next client goes to.
    """

    def __init__(self, layout: RunLayout, round_number: int) -> None:
        self._layout = layout
        self._round = round_number
        self.shard = 0
        self._clear()

    def add(
        self, partition: int, delta: Mapping[str, NDArray[np.generic]], steps: bytes
    ) -> dict[Path, Checksum]:
        """Add a client; give the files that it filled.

        Parameters
        ----------
        partition : int
            Whose.
        delta : mapping of str to ndarray
            Kept, not copied.
        steps : bytes
            Lines of its ``steps.jsonl``; empty where it keeps them itself.
        """
        mark = f'{{"partition":{partition},'.encode()
        lines = [mark + line[1:] for line in steps.splitlines(keepends=True)]
        self._lines += lines
        self._deltas.update((delta_key(partition, name), a) for name, a in delta.items())
        self._bytes[0] += sum(array.nbytes for array in delta.values())
        self._bytes[1] += sum(map(len, lines))
        full = max(self._bytes) >= SHARED_BYTES or len(self._deltas) + len(delta) > MOST_KEYS
        return self.close() if full else {}

    def close(self) -> dict[Path, Checksum]:
        """Write what is left, and give its files."""
        if not self._deltas:
            return {}
        deltas = self._layout.shared_deltas(self._round, self.shard)
        deltas.parent.mkdir(parents=True, exist_ok=True)
        files = {deltas: write_tensors(deltas, self._deltas)}
        if self._lines:
            steps, content = (
                self._layout.shared_steps(self._round, self.shard),
                b"".join(self._lines),
            )
            with temporary(steps) as unfinished:
                unfinished.write_bytes(content)
            files[steps] = Checksum.of(content)
        self.shard += 1
        self._clear()
        return files

    def _clear(self) -> None:
        self._deltas: dict[str, NDArray[np.generic]] = {}
        self._lines: list[bytes] = []
        self._bytes = [0, 0]
