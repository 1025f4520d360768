"""The plugin ``deploy``: a federation of real Flower nodes, made and started."""

PROVIDES = {"commands": "fedsim.plugins.deploy.commands:COMMANDS"}
