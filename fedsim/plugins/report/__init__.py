"""The plugin ``report``: figures of runs, in notebooks and on one page."""

PROVIDES = {"plots": "fedsim.plugins.report.plots:Plots"}
