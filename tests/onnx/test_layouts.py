"""The registry of export layouts: one registered function is an option of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratioctl import package
from ratioctl.errors import UsageError
from ratioctl.onnx import layouts


def test_names_start_with_the_default_and_unknown_ones_are_suggested() -> None:
    assert layouts.layout_names() == ["file", "triton", "kserve"]
    with pytest.raises(UsageError, match=r'Did you mean "triton"\? Use one of: file, triton, kserve\.'):
        layouts.find_layout("tritn")


def test_a_registered_layout_is_found_and_writes_its_files(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))

    @layouts.register_layout("versioned")
    def versioned(root, name, model, spec, input_type):  # type: ignore[no-untyped-def]
        return {root / f"{name}-{len(spec.label_names)}-{input_type}.onnx": model}

    assert layouts.layout_names()[-1] == "versioned"
    with pytest.raises(ValueError, match='already a layout named "versioned"'):
        layouts.register_layout("versioned")(versioned)
    chosen = layouts.find_layout("versioned")
    assert chosen.is_folder
    spec = package.read(tiny_package)
    assert chosen.contents(tmp_path, "tiny", b"graph", spec, "float") == {
        tmp_path / "tiny-3-float.onnx": b"graph"
    }


def test_a_servers_folder_has_its_configuration_last(tiny_package: Path) -> None:
    spec, root = package.read(tiny_package), Path("repository")
    names = [str(path) for path in layouts.find_layout("kserve").contents(root, "m", b"", spec, "uint8")]
    assert names == [
        *("repository/m/1/model.onnx", "repository/m/labels.txt", "repository/m/config.pbtxt"),
        "repository/inferenceservice.yaml",
    ]
