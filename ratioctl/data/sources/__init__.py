"""Named data sources, one module each; `ratioctl.data.registry` imports them all."""
