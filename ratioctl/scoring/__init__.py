"""Out-of-distribution scores: images in, one row each out."""
