"""``fedsim`` as `compare` starts it: the same commands, and the end of whoever started it is ours.

Standard input is a pipe that nobody writes to; it ends when the process at its other end does,
however that ends.
"""

from __future__ import annotations

import os
import sys
import threading

from fedsim.cli import INTERRUPTED, main


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    # At once: what is on the disk is whole at any moment, and the janitor ends the workers.
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
