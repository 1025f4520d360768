"""What clients learn: one package for each task."""
