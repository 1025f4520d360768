"""Learning rates by round and step: one schedule a file, found by its name."""
