"""Networks: pixels in [0,1] to logits, normalization inside."""

from ratioctl.models.folding import fold_batchnorm, fold_scales, sync_folded
from ratioctl.models.network import Classifier, build, from_package, load_weights
from ratioctl.models.registry import architectures, register_architecture

__all__ = [
    "Classifier",
    "architectures",
    "build",
    "fold_batchnorm",
    "fold_scales",
    "from_package",
    "load_weights",
    "register_architecture",
    "sync_folded",
]
