"""ratioctl: image classifiers that can be trusted and questioned."""

__version__ = "0.1.0"
