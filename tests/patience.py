"""How long tests wait for other processes."""

PATIENCE = 900.0
"""Seconds until a test gives up. It says nothing of how long anything takes, and cuts short only
what would never end: on a busy machine the start of an engine takes minutes."""
