"""What clients do with their data and their update: one behavior a file, found by its name."""
