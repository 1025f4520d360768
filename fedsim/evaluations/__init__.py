"""What clients measure of the model that they get: one evaluation a file, found by its name."""
