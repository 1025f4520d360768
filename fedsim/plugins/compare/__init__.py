"""The plugin ``compare``: grids of configurations, run and tabulated."""

PROVIDES = {"commands": "fedsim.plugins.compare.commands:COMMANDS"}
