"""The plugin ``export``: recorded gradients in the forms of other programs."""

PROVIDES = {"commands": "fedsim.plugins.export.commands:COMMANDS"}
