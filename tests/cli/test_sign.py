"""`sign` and `verify --public-key` on the command line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from ratioctl.cli import main

pytest.importorskip("minisign", reason="the extra ratioctl[sign] is not installed")


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RATIOCTL_KEY_PASSWORD", "")
    assert main(["sign", "--new-key", str(tmp_path / "me"), "-q"]) == 0
    return tmp_path / "me"


def test_a_pipeline_refuses_what_is_not_signed(
    tiny_package: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = ["verify", str(tiny_package), "--public-key", f"{key}.pub"]
    assert main(checked) == 5
    assert "is not signed" in capsys.readouterr().err
    assert main(["sign", str(tiny_package), "--key", f"{key}.key", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main(checked) == 0
    assert f"config.json.minisig: ok, signed by {made['key_id']}" in capsys.readouterr().out
    assert main([*checked, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is True
    assert shown["signature"] == {
        "ok": True,
        "key_id": made["key_id"],
        "comment": made["comment"],
        "fault": None,
    }
    assert main(["verify", str(tiny_package)]) == 0
    assert "was not checked" in capsys.readouterr().err
    config = tiny_package / "config.json"
    config.write_text(config.read_text().replace('"tpr99": 0.7', '"tpr99": 0.7 '))
    assert main(["verify", str(tiny_package)]) == 0  # every hash still fits
    capsys.readouterr()
    assert main([*checked, "--json"]) == 5
    shown = json.loads(capsys.readouterr().out)
    assert (shown["ok"], shown["signature"]["ok"]) == (False, False)
    assert "is not valid" in shown["signature"]["fault"]


def test_a_key_with_a_password(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import minisign

    pair = minisign.KeyPair.generate()
    (tmp_path / "k.pub").write_bytes(bytes(pair.public_key))
    # A real one takes a gigabyte and a second; minisign's format carries the cost.
    pair.secret_key.encrypt("right", opslimit=2**15, memlimit=2**20)
    (tmp_path / "k.key").write_bytes(bytes(pair.secret_key))
    line = ["sign", str(tiny_package), "--key", str(tmp_path / "k.key")]
    monkeypatch.delenv("RATIOCTL_KEY_PASSWORD", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(line) == 2
    assert "RATIOCTL_KEY_PASSWORD" in capsys.readouterr().err
    monkeypatch.setenv("RATIOCTL_KEY_PASSWORD", "wrong")
    assert main(line) == 2
    assert "the password is wrong" in capsys.readouterr().err
    monkeypatch.setenv("RATIOCTL_KEY_PASSWORD", "right")
    assert main(line) == 0
    assert main(["verify", str(tiny_package), "--public-key", str(tmp_path / "k.pub")]) == 0


def test_usage(tiny_package: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        ["sign"],
        ["sign", str(tiny_package)],
        ["sign", str(tiny_package), "--new-key", "x"],
        ["sign", "--new-key", "."],
        ["sign", str(tiny_package), "--key", str(tiny_package / "config.json")],
        ["verify", str(tiny_package), "--public-key", str(tiny_package)],
    ):
        assert main(line) == 2
        assert capsys.readouterr().err.startswith("Error: ")


def test_without_the_extra_it_says_what_to_install(
    tiny_package: Path, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "minisign", None)
    assert main(["verify", str(tiny_package)]) == 0
    capsys.readouterr()
    assert main(["verify", str(tiny_package), "--public-key", f"{key}.pub"]) == 2
    assert "ratioctl[sign]" in capsys.readouterr().err
