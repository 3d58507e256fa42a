"""Networks: pixels in [0,1] to logits, normalisation inside."""

from ratioctl.models.network import Classifier, build, from_package, frozen, load_weights, refresh
from ratioctl.models.winograd import quicken

__all__ = ["Classifier", "build", "from_package", "frozen", "load_weights", "quicken", "refresh"]
