"""Networks of torchvision and timm, by name: "torchvision:NAME" and "timm:NAME"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ratioctl.errors import UsageError
from ratioctl.models.registry import InputSize, register_architecture
from ratioctl.utils.suggest import did_you_mean

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the normalization of most published weights


def _has_auxiliary_heads(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"aux_logits": any(part in key for key in state for part in ("aux1.", "AuxLogits."))}


def _ambiguous_transform(option: str, input_size: InputSize) -> str | None:
    if option != "transform_input":
        return None
    return (
        "torchvision builds this network with transform_input=true around its published weights and with "
        "false otherwise; the weights are of the same form, and the wrong one changes the logits"
    )


@register_architecture(
    pattern="torchvision:(googlenet|inception_v3)",
    infer=_has_auxiliary_heads,
    undetermined=("transform_input",),
    ambiguous=_ambiguous_transform,
)
def with_auxiliary_heads(
    name: str, *, num_classes: int, channels: int = 3, aux_logits: bool = True, transform_input: bool = False
) -> nn.Module:
    """GoogLeNet or Inception v3. In eval mode the auxiliary heads are not computed."""
    import torchvision.models as models

    network = models.get_model(
        name.partition(":")[2],
        weights=None,
        num_classes=num_classes,
        aux_logits=aux_logits,
        transform_input=transform_input,
        init_weights=False,
    )
    return _with_channels(network, channels, name)


@register_architecture("torchvision:NAME", pattern="torchvision:.+")
def of_torchvision(
    name: str, *, num_classes: int, channels: int = 3, input_size: InputSize = None
) -> nn.Module:
    """A classification network of torchvision, built for images of `input_size` where it has fixed ones."""
    import torchvision.models as models

    short = name.partition(":")[2]
    known = models.list_models(module=models)
    if short not in known:
        step = did_you_mean(short, known, prefix="torchvision:") or "See torchvision.models.list_models()."
        raise UsageError(name, "torchvision has no such classification model", step)
    fixed: dict[str, Any] = {}
    if input_size is not None and short.startswith("vit_"):
        fixed = {"image_size": input_size}
    elif input_size is not None and short.startswith("maxvit"):
        fixed = {"input_size": (input_size, input_size) if isinstance(input_size, int) else input_size}
    try:
        network = models.get_model(short, weights=None, num_classes=num_classes, **fixed)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _refused(name, input_size, error) from None
    return _with_channels(network, channels, name)


@register_architecture("timm:NAME", pattern="timm:.+")
def of_timm(name: str, *, num_classes: int, channels: int = 3, input_size: InputSize = None) -> nn.Module:
    """A network of timm, built for images of `input_size` where it has fixed ones (`img_size`)."""
    try:
        import timm
    except ImportError:
        raise UsageError(name, "timm is not installed", "Install it: pip install timm.") from None
    short = name.partition(":")[2]
    if not timm.is_model(short):
        step = did_you_mean(short, timm.list_models(), prefix="timm:") or "See timm.list_models()."
        raise UsageError(name, "timm has no such model", step)
    options: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": channels}
    config = timm.get_pretrained_cfg(short)
    published = config.input_size[-1] if config is not None else None
    if input_size in (None, published):
        return timm.create_model(short, **options)
    try:
        return timm.create_model(short, img_size=input_size, **options)
    except TypeError:  # no such argument: the network takes images of any size
        return timm.create_model(short, **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _refused(name, input_size, error) from None


def _refused(name: str, input_size: InputSize, error: Exception) -> UsageError:
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    return UsageError(
        name, f"cannot be built for an input size of {input_size}: {detail}", "Try another size."
    )


def published_size(name: str) -> int | None:
    """The input size of the library's published weights, where it is known."""
    library, _, short = name.partition(":")
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(short) if timm.is_model(short) else None
        return None if config is None else int(config.input_size[-1])
    import torchvision.models as models

    if short not in models.list_models(module=models):
        return None
    weights = next(iter(models.get_model_weights(short)), None)
    return None if weights is None else int(weights.transforms.keywords["crop_size"])


def published_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the library's published weights; ImageNet's where the library states none."""
    library, _, short = name.partition(":")
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(short)
        return IMAGENET if config is None else (tuple(config.mean), tuple(config.std))
    import torchvision.models as models

    weights = next(iter(models.get_model_weights(short)), None)
    if weights is None:
        return IMAGENET
    preset = weights.transforms()
    return tuple(preset.mean), tuple(preset.std)


def published_weights(name: str) -> dict[str, Tensor]:
    """The library's default published weights, downloaded into its cache folder. Raises UsageError."""
    library, _, short = name.partition(":")
    try:
        if library == "timm":
            import timm

            return dict(timm.create_model(short, pretrained=True).state_dict())
        import torchvision.models as models

        weights = next(iter(models.get_model_weights(short)), None)
        if weights is None:
            raise UsageError(name, "torchvision publishes no weights of it", "Name a file of weights.")
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError, ValueError) as error:  # URLError is an OSError
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        step = "Check the connection, or name a file of weights."
        raise UsageError(name, f"its weights could not be downloaded: {detail}", step) from None


def family(library: str, prefix: str) -> list[str]:
    """Names of the library's networks that begin with `prefix`."""
    if library == "timm":
        import timm

        return list(timm.list_models(f"{prefix}*"))
    import torchvision.models as models

    return [name for name in models.list_models(module=models) if name.startswith(prefix)]


def _with_channels(network: nn.Module, channels: int, name: str) -> nn.Module:
    """Replace the first convolution, which takes 3 channels, by one for `channels`."""
    if channels == 3:
        return network
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.groups == 1:
            kept = ("out_channels", "kernel_size", "stride", "padding", "dilation")
            shape: dict[str, Any] = {name: getattr(module, name) for name in kept}
            stem = nn.Conv2d(channels, **shape, bias=module.bias is not None)
            network.set_submodule(path, stem)
            return network
    raise UsageError(name, f"cannot take {channels} channel(s)", "Use images with 3 channels.")
