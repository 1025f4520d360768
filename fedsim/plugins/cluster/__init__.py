"""The plugin ``cluster``: workers on the nodes of a Ray cluster."""

PROVIDES = {"cluster": "fedsim.plugins.cluster.cluster"}
