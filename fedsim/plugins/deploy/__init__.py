"""The plugin ``deploy``: a federation of real Flower nodes, made and started."""

PROVIDES: dict[str, str] = {}
