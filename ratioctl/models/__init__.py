"""Networks: pixels in [0,1] to logits, normalisation inside."""

from ratioctl.models.network import Classifier, build, fold_batchnorm, from_package, load_weights, sync_folded

__all__ = ["Classifier", "build", "fold_batchnorm", "from_package", "load_weights", "sync_folded"]
