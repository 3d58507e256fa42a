"""Networks with a certified head: confidence on out-of-distribution images that is bounded in an linf ball.

ProoD (Meinke, Bitterwolf, Hein, NeurIPS 2022, arXiv 2106.04260) multiplies a classifier with a small binary
discriminator g between in- and out-distribution:

    p(y|x) = q(y|x) s(x) + (1 - s(x)) / K,    s(x) = sigmoid(g(x)),    q = softmax(base logits / T_base)

Interval arithmetic bounds g over the ball, and so the confidence, whatever the base network says:

    max_y p(y|z) <= s_max + (1 - s_max) / K   for every z in the ball,    s_max = sigmoid(max g)

Multiplied by 1 + exp(g), which a softmax does not see, the log-probabilities become the logits

    f_y(x) = softplus(log q(y|x) + g(x) + log K) >= 0,

so temperature, scores, thresholds, attacks and exports treat such a network like any other. The bound holds
for every temperature T of the package:

    log-odds of the confidence <= softplus(max g + log K) / T - log(K - 1)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratioctl.errors import UsageError
from ratioctl.models.network import Classifier
from ratioctl.models.registry import InputSize, build_network, register_architecture
from ratioctl.package import CERTIFIED

_ROUNDING = 2.0**-24  # of one operation in float32, relative
_WIDENED = 1e-6  # of the radius: rounding of the pixels and of their normalization
MAX_HEAD_WIDTH = 1024


class SpatialMean(nn.Module):
    """(N, C, H, W) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class Discriminator(nn.Sequential):
    """(N, C, H, W) normalized pixels -> (N, 1) g(x); sigmoid(g) is the probability of the in-distribution.

    Convolutions, ReLUs and means only, so that `bounds` can follow it.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            SpatialMean(),
            nn.Linear(4 * width, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, 1),
        )


class CertifiedNetwork(nn.Module):
    """(N, C, H, W) normalized pixels -> (N, K) logits of `base` and `discriminator` together.

    Attributes:
        temperature: (1,) T_base, the temperature at which the base network was calibrated.
        shift: (1,) added to g. A larger one costs guarantee and leaves ID images more of their confidence.
    """

    temperature: Tensor
    shift: Tensor

    def __init__(self, base: nn.Module, discriminator: Discriminator, num_classes: int) -> None:
        super().__init__()
        self.base, self.discriminator = base, discriminator
        self.num_classes = num_classes
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        log_q = F.log_softmax(self.base(x) / self.temperature, dim=1)
        return _softplus(log_q + (self.discriminator(x) + self.shift + math.log(self.num_classes)))

    def upper(self, low: Tensor, high: Tensor) -> Tensor:
        """(N,) upper bound of g + shift over normalized pixels between `low` and `high` (N, C, H, W)."""
        _, high = bounds(self.discriminator, low, high)
        return (high + self.shift).squeeze(1)


def bounds(layers: nn.Sequential, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715): bounds of every output.

    They also hold for the layers as float32 computes them: every sum of n products gets the a priori bound of
    its rounding, n 2^-24 times the sum of their magnitudes, four times (forward pass, centers, radii, spare).

    Args:
        layers: convolutions, linear layers, ReLUs and `SpatialMean`.
        low, high: (N, ...) of the inputs.

    Raises:
        TypeError: another layer.
    """
    center, radius = (high + low) / 2, (high - low) / 2
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            low, high = F.relu(center - radius), F.relu(center + radius)
            center, radius = (high + low) / 2, (high - low) / 2
        elif isinstance(layer, SpatialMean):
            wider = radius + _slack(center.shape[2] * center.shape[3]) * (center.abs() + radius)
            center, radius = layer(center), layer(wider)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            slack = _slack(layer.weight[0].numel())
            radius = _magnitude(layer, radius + slack * (center.abs() + radius), slack)
            center = layer(center)
        else:
            raise TypeError(f"no interval bounds for {type(layer).__name__}")
    return center - radius, center + radius


def _slack(terms: int) -> float:
    return 4 * (terms + 2) * _ROUNDING


def _magnitude(layer: nn.Conv2d | nn.Linear, radius: Tensor, slack: float) -> Tensor:
    """The radius after a layer: that of its inputs times the magnitudes of its weights."""
    bias = None if layer.bias is None else slack * layer.bias.abs()
    if isinstance(layer, nn.Linear):
        return F.linear(radius, layer.weight.abs(), bias)
    return F.conv2d(radius, layer.weight.abs(), bias, layer.stride, layer.padding)


def _softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)), of operators that `export --explain` differentiates."""
    return F.relu(z) + torch.log1p(torch.exp(-z.abs()))


def head_of(model: Classifier) -> CertifiedNetwork | None:
    """The network of a classifier with a certified head; None without one."""
    return model.network if isinstance(model.network, CertifiedNetwork) else None


def upper_bound(model: Classifier, x: Tensor, eps: float) -> Tensor:
    """(N,) upper bound of g + shift in the linf ball of radius `eps` around pixels x (N, C, H, W) in [0,1].

    The ball is intersected with the pixel box [0,1]. Raises TypeError without a certified head.
    """
    low, high = _normalized_ball(model, x, eps)
    network = head_of(model)
    if network is None:
        raise TypeError("the model has no certified head")
    return network.upper(low, high)


def _normalized_ball(model: Classifier, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    ends = (x - eps - _WIDENED).clamp(0, 1), (x + eps + _WIDENED).clamp(0, 1)
    low, high = ((end - model.mean) / model.std for end in ends)
    return low, high


def discriminator_bound(model: Classifier, network: CertifiedNetwork, x: Tensor, eps: float) -> Tensor:
    """(N,) upper bound of g alone, without its shift, which training minimizes on OOD images."""
    return upper_bound(model, x, eps) - network.shift


def guaranteed_log_odds(upper: Tensor, classes: int, temperature: float) -> Tensor:
    """(N,) float64: the log-odds that the confidence cannot exceed, given upper bounds (N,) of g.

    Args:
        temperature: of the package, by which the logits are divided.
    """
    z = upper.double() + math.log(classes)
    rounding = 4e-6 * (2 + z.abs())  # of the float32 logits, in units of their size
    return (_softplus(z) + rounding) / temperature - math.log(classes - 1)


@register_architecture(f"{CERTIFIED}NAME", pattern=rf"{CERTIFIED}(?!{CERTIFIED}).+")
def certified(
    name: str,
    *,
    num_classes: int,
    channels: int = 3,
    input_size: InputSize = None,
    head_width: int = 32,
    **options: object,
) -> CertifiedNetwork:
    """The architecture NAME with a certified head, trained by recipes with `objective.certified`.

    Args:
        head_width: channels of the discriminator's first convolution.
        options: of NAME.

    Raises:
        UsageError: an unknown NAME, an option it does not have, or an impossible `head_width`.
    """
    if not 1 <= head_width <= MAX_HEAD_WIDTH:
        raise UsageError(f"head_width {head_width}", "is out of range", f"Use 1 to {MAX_HEAD_WIDTH}.")
    base = build_network(
        name.removeprefix(CERTIFIED),
        num_classes=num_classes,
        channels=channels,
        input_size=input_size,
        **options,
    )
    return CertifiedNetwork(base, Discriminator(channels, head_width), num_classes)
