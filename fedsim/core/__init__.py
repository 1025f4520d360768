"""Pure functions over plain values: nothing here knows Flower, Ray or a run directory."""
