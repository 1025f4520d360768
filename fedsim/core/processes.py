"""Starting a module of ours in a process of its own, which finds it where this process did."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def start_module(
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE``, out of reach of a Ctrl-C and of the end of the terminal.

    Parameters
    ----------
    module : str
        Its name.
    arguments : sequence of str
        Of its command line.
    environment : mapping of str to str, optional
        Its environment variables; by default those of this process.
    **options
        Of `subprocess.Popen`.
    """
    # The new process has the `sys.path` of this one, in the same order: without -P, the modules of
    # the working directory would come first. An empty entry means that directory.
    path = os.pathsep.join(entry or str(os.getcwd()) for entry in sys.path)  # noqa: PTH109
    return subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-P", "-m", module, *arguments],
        env={**(os.environ if environment is None else environment), "PYTHONPATH": path},
        start_new_session=True,
        **options,
    )
