"""Ports of loopback for tests: no two tests are given the same one, also in other processes."""

from __future__ import annotations

import socket

# Below those that systems hand out by themselves (Linux from 32,768), which Ray's processes use.
_BLOCKS = range(20_000, 32_000, 16)
_claims: list[socket.socket] = []


def free_ports(count: int) -> int:
    """Give the first of some neighbouring ports that are this process's until it ends.

    A server takes its port seconds after the port was looked for. So each block of ports is claimed
    by its first UDP port, which the kernel gives to one process only and no server here wants.
    """
    assert count <= _BLOCKS.step
    for first in _BLOCKS:
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", first))
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return first
    raise AssertionError("no ports are free")
