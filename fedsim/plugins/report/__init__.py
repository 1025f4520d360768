"""The plugin ``report``: figures of runs, in notebooks and on one page."""

PROVIDES = {
    "commands": "fedsim.plugins.report.commands:COMMANDS",
    "plots": "fedsim.plugins.report.plots:Plots",
}
