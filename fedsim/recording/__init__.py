"""The run directory: writing it, reading it. Nothing here knows Flower or Ray."""
