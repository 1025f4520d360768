"""Trackers of experiments, one a file: `fedsim.tracking.Tracker`."""
