"""Images of 32x32 pixels in classes: data, models, augmentation, loss and metrics."""

IMAGE_SHAPE = (3, 32, 32)
"""Channels, height and width of every image."""
