"""The plugin ``remote``: copies of runs elsewhere, and files that clients kept on their disks."""

PROVIDES = {"mirror": "fedsim.plugins.remote.mirror"}
