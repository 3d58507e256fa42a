"""Data: labelled sets, out-distributions, augmentation and deterministic batches."""
