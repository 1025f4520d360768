"""Large files, written and read at the speed of the disk."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from fedsim.core.inputs import open_regular

DIRECT_FROM = 4 * 2**20
"""Files of at least so many bytes go past the page cache."""

_BLOCK = 4096
_BUFFER_BYTES = 4 * 2**20
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class OutputFile:
    """A new file that grows at its end.

    Through the page cache the kernel takes 2 to 3 s of a core for each GB: it finds a page for
    every 4 KB, copies, and later walks over them to write them out. That is four tenths of
    a training step for its 17 MB of gradients, and nobody reads the pages. With O_DIRECT the
    disk takes the bytes from our own buffer, for 0.2 s of a core a GB. Where the system or the
    file system has no such thing, the file is written in the ordinary way.

    Parameters
    ----------
    path : Path
        Made, or emptied.
    size : int
        Bytes that will be written, as far as known: small files are not worth the detour.

    Raises
    ------
    OSError
        From every method, as the system says it.
    """

    def __init__(self, path: Path, *, size: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        direct = getattr(os, "O_DIRECT", 0) if size >= DIRECT_FROM else 0
        try:
            self._descriptor = os.open(path, flags | direct, 0o666)
        except OSError as error:
            if not direct or error.errno not in _REFUSED:
                raise
            direct = 0
            self._descriptor = os.open(path, flags, 0o666)
        self._direct = direct
        # Pages of their own: direct writes take memory, lengths and offsets in whole blocks.
        self._pages = mmap.mmap(-1, _BUFFER_BYTES) if direct else None
        self._filled = 0

    def write(self, content: memoryview) -> None:
        """Append bytes."""
        if self._pages is None:
            self._write_out(content)
            return
        pages = np.frombuffer(self._pages, dtype=np.uint8)
        source = np.frombuffer(content, dtype=np.uint8)
        while len(source):
            count = min(len(pages) - self._filled, len(source))
            # numpy copies without holding the interpreter; a memoryview would stop training.
            np.copyto(pages[self._filled : self._filled + count], source[:count])
            self._filled += count
            source = source[count:]
            if self._filled == len(pages):
                self._write_out(memoryview(self._pages))
                self._filled = 0

    def finish(self, head: bytes = b"") -> None:
        """Write what is left, and `head` over the first bytes; close the file."""
        if self._pages is not None:
            whole = self._filled - self._filled % _BLOCK
            pages = memoryview(self._pages)
            self._write_out(pages[:whole])
            self._leave_direct()
            self._write_out(pages[whole : self._filled])
            self._filled = 0
        if head:
            os.pwrite(self._descriptor, head, 0)
        self.close()

    def close(self) -> None:
        """Close the file without what is still in the buffer."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write_out(self, content: memoryview) -> None:
        while len(content):
            try:
                count = os.write(self._descriptor, content)
            except OSError as error:
                # Some file systems take the flag and refuse the write.
                if not self._direct or error.errno not in _REFUSED:
                    raise
                self._leave_direct()
                continue
            if count % _BLOCK:
                self._leave_direct()
            content = content[count:]

    def _leave_direct(self) -> None:
        if self._direct:
            _clear(self._descriptor, self._direct)
            self._direct = 0


class WholeReader:
    """Reads whole files, one after the other, into the same memory.

    Past the page cache like `OutputFile`, for the same reason: what is looked at once need not
    push everything else out of memory, and costs half of the processor time.
    """

    def __init__(self) -> None:
        self._pages = mmap.mmap(-1, _BUFFER_BYTES)

    def read(self, path: Path) -> memoryview:
        """Read a file.

        Returns
        -------
        memoryview
            Its bytes, until the next call.

        Raises
        ------
        OSError
            As the system says it.
        """
        size = path.stat().st_size
        direct = getattr(os, "O_DIRECT", 0) if size >= DIRECT_FROM else 0
        if size > len(self._pages):
            # A new one: views of the former keep that alive.
            self._pages = mmap.mmap(-1, -(-size // _BLOCK) * _BLOCK)
        try:
            descriptor = open_regular(path, direct)
        except OSError as error:
            if not direct or error.errno not in _REFUSED:
                raise
            direct = 0
            descriptor = open_regular(path)
        view = memoryview(self._pages)
        done = 0
        try:
            while done < size:
                try:
                    count = os.readv(descriptor, [view[done : done + _BUFFER_BYTES]])
                except OSError as error:
                    if not direct or error.errno not in _REFUSED:
                        raise
                    count = -1
                if direct and count % _BLOCK:
                    # Refused, or an odd place to go on from.
                    _clear(descriptor, direct)
                    direct = 0
                if not count:
                    break
                done += max(count, 0)
        finally:
            os.close(descriptor)
        return view[:done]


def _clear(descriptor: int, flag: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~flag)
