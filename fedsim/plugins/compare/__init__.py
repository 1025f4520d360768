"""The plugin ``compare``: grids of configurations, run and tabulated."""

PROVIDES: dict[str, str] = {}
