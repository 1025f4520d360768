"""Making and starting a federation of real Flower nodes."""
