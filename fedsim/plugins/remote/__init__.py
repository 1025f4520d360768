"""The plugin ``remote``: copies of runs elsewhere, and files that clients kept on their disks."""

PROVIDES = {
    "commands": "fedsim.plugins.remote.commands:COMMANDS",
    "mirror": "fedsim.plugins.remote.mirror",
}
