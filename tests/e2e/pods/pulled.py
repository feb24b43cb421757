"""Nothing: the image is there."""
