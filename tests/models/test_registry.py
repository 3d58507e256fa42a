"""The registry of architectures: names, options and their checks come from the builders."""

from __future__ import annotations

from typing import Literal

import pytest
from torch import nn

from ratioctl.errors import UsageError
from ratioctl.models import architectures, build, register_architecture, registry
from ratioctl.models.registry import find_architecture, parse_option


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture that a test registers: one linear layer."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", [])
    monkeypatch.setattr(registry, "_all", lambda: registry._ARCHITECTURES)

    @register_architecture("flat-relu", "flat-tanh", pattern="flat-[a-z]+")
    def flat(
        name: str,
        *,
        num_classes: int,
        channels: int,
        bias: bool = True,
        mode: Literal["a", "b"] = "a",
        depth: int = 1,
    ) -> nn.Module:
        head = nn.Linear(channels * 16, num_classes, bias=bias)
        return nn.Sequential(nn.Flatten(), *[nn.Identity() for _ in range(depth)], head)


PIXELS = {"num_classes": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def test_our_architectures_are_registered_and_libraries_come_last() -> None:
    names = architectures()
    wrapped = {"certified:NAME", "torchvision:NAME", "timm:NAME", "robustbench:NAME"}
    assert set(names[-4:]) == wrapped
    assert {"resnet18", "resnet34", "resnet50", "preactresnet18", "wideresnet-28-10"} <= set(names)
    assert find_architecture("torchvision:googlenet").options == {"aux_logits": bool, "transform_input": bool}
    assert find_architecture("torchvision:resnet18").options == {}
    assert find_architecture("resnet18").options == {"width": int, "stem_stride": int}


def test_a_registered_builder_is_enough(flat: None) -> None:
    assert architectures() == ["flat-relu", "flat-tanh"]
    model = build("flat-sine", bias=False, depth=3, **PIXELS)
    assert len(model.network) == 5
    assert model.network[-1].bias is None
    with pytest.raises(UsageError, match=r'Did you mean "flat-tanh"\? Use one of: flat-relu, flat-tanh\.'):
        build("flattanh", **PIXELS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bias=false", ("bias", False)),
        ("mode=b", ("mode", "b")),
        ("depth=4", ("depth", 4)),
        ("depth", "not of the form KEY=VALUE"),
        ("depth=four", "Use a whole number"),
        ("bias=1", "Use true or false"),
        ("mode=c", "Use a or b"),
        ("width=3", "has no width option. It has bias, mode, depth"),
    ],
)
def test_options_on_the_command_line(flat: None, text: str, expected: object) -> None:
    if isinstance(expected, tuple):
        assert parse_option("flat-relu", text) == expected
        return
    with pytest.raises(UsageError, match=str(expected)):
        parse_option("flat-relu", text)


@pytest.mark.parametrize("width", [0, 10**20, True, 2.5])
def test_widths_that_no_network_has(width: object) -> None:
    with pytest.raises(UsageError, match="width"):
        build("resnet18", width=width, **PIXELS)
