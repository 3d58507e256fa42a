"""Networks: pixels in [0,1] to logits, normalization inside."""

from ratioctl.models.folding import fold_batchnorm, fold_scales, sync_folded
from ratioctl.models.network import Classifier, build, from_package, head_keys, load_weights, state_of
from ratioctl.models.registry import architectures, build_network, register_architecture

__all__ = [
    "Classifier",
    "architectures",
    "build",
    "build_network",
    "fold_batchnorm",
    "fold_scales",
    "from_package",
    "head_keys",
    "load_weights",
    "register_architecture",
    "state_of",
    "sync_folded",
]
