"""Networks: pixels in [0,1] to logits, normalisation inside."""

from ratioctl.nets.classifier import Classifier, build, from_package, frozen, load_weights, refresh
from ratioctl.nets.winograd import quicken

__all__ = ["Classifier", "build", "from_package", "frozen", "load_weights", "quicken", "refresh"]
