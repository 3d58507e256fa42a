"""Signatures: who signed holds, and whatever changed since, is missing or was added is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from ratioctl import package
from ratioctl.errors import OutputError, PackageError, UsageError

pytest.importorskip("minisign", reason="the extra ratioctl[sign] is not installed")

from ratioctl.package import signing

CONFIG = {
    "architecture": "resnet18",
    "label_names": ["cat", "dog"],
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3},
    "ratio": {"thresholds": {"tpr95": 0.4}},
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def pkg(tmp_path: Path) -> Path:
    return package.write(
        tmp_path / "model", config=CONFIG, weights={"w": np.ones(8, np.float32)}, onnx=b"graph"
    ).path


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return signing.new_key(tmp_path / "release")


@pytest.fixture
def signed(pkg: Path, keys: tuple[Path, Path]) -> Path:
    signing.sign(pkg, keys[0])
    return pkg


def refusal(folder: Path, *keys: str | Path) -> str:
    with pytest.raises(PackageError) as caught:
        signing.verify(folder, keys)
    assert caught.value.exit_code == 5
    return caught.value.reason


def test_a_signed_package_holds_and_says_by_whom(pkg: Path, keys: tuple[Path, Path]) -> None:
    made = signing.sign(pkg, keys[0])
    found = signing.verify(pkg, [keys[1]])
    assert found == made
    assert found.key_id == signing._key_id(signing._public_key(keys[1]))
    assert f"digest:{package.read(pkg).digest}" in found.comment
    the_key_itself = keys[1].read_text().splitlines()[1]
    assert signing.verify(pkg, [the_key_itself]) == made
    assert package.check(pkg)[0] == ("config.json", None)


def test_every_flipped_byte_of_every_file_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    """Each file in turn, its first, middle and last byte; every third of the signature."""
    import minisign

    for path in sorted(signed.iterdir()):
        whole = path.read_bytes()
        places: Iterable[int] = (0, len(whole) // 2, len(whole) - 1)
        if path.name == signing.SIGNATURE:
            # After the untrusted comment, which is nobody's word and which nothing reads.
            places = range(whole.index(b"\n"), len(whole) - 1, 3)
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1
            if path.name == signing.SIGNATURE:
                with contextlib.suppress(ValueError):
                    if minisign.Signature.from_bytes(bytes(damaged)) == minisign.Signature.from_bytes(whole):
                        continue  # unused bits at the end of base64: the same signature, spelled otherwise
            path.write_bytes(damaged)
            assert refusal(signed, keys[1])
        path.write_bytes(whole)
    assert signing.verify(signed, [keys[1]])


def test_a_measurement_written_later_needs_a_new_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    before = package.read(signed)
    metrics = [{"name": "accuracy", "value": 0.99, "n": 10, "interval": None, "dataset": "x", "ball": None}]
    after = package.update(before, config_changes={"ratio": {"metrics": metrics}})
    assert after.digest == before.digest  # the model is the same; what is claimed of it is not
    assert "is not valid" in refusal(signed, keys[1])
    signing.sign(signed, keys[0])
    assert signing.verify(signed, [keys[1]])


def test_a_change_with_hashes_put_right_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    """Someone who knows the format: every hash fits, only the signature tells."""
    weights = {"w": np.zeros(8, np.float32)}
    config = package.read(signed).config
    shutil.copy(signed / signing.SIGNATURE, signed.parent / "kept")
    package.write(signed, config=config, weights=weights)
    shutil.copy(signed.parent / "kept", signed / signing.SIGNATURE)
    assert all(fault is None for _, fault in package.check(signed))
    assert "is not valid" in refusal(signed, keys[1])


def test_unsigned_wrong_key_and_another_packages_signature(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    other = signing.new_key(tmp_path / "other")
    assert "is signed by the key" in refusal(signed, other[1])
    assert signing.verify(signed, [other[1], keys[1]])  # one that fits is enough
    second = package.write(tmp_path / "second", config=CONFIG, weights={"w": np.zeros(8, np.float32)}).path
    assert "is not signed" in refusal(second, keys[1])
    shutil.copy(signed / signing.SIGNATURE, second / signing.SIGNATURE)
    assert "is not valid" in refusal(second, keys[1])
    (signed / signing.SIGNATURE).unlink()
    assert "is not signed" in refusal(signed, keys[1])


def test_a_forged_key_id_does_not_help(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """A signature by a stranger's key that claims the trusted key's name."""
    import base64

    other, _ = signing.new_key(tmp_path / "other")
    trusted = base64.b64decode(keys[1].read_bytes().splitlines()[1])[2:10]
    lines = other.read_bytes().splitlines()
    raw = bytearray(base64.b64decode(lines[1]))
    raw[54:62] = trusted
    forged = tmp_path / "forged.key"
    forged.write_bytes(lines[0] + b"\n" + base64.b64encode(raw) + b"\n")
    signing.sign(signed, forged)
    assert "is not valid" in refusal(signed, keys[1])


def test_files_that_no_hash_covers_are_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    """`model.bin` beside a signed package: other programs would load it."""
    (signed / "model.bin").write_bytes(b"pickle")
    assert "model.bin" in refusal(signed, keys[1])
    with pytest.raises(PackageError, match=r"model\.bin"):
        signing.sign(signed, keys[0])
    (signed / "model.bin").unlink()
    (signed / ".gitattributes").touch()
    assert signing.verify(signed, [keys[1]])


def test_damage_is_not_signed(pkg: Path, keys: tuple[Path, Path]) -> None:
    (pkg / "README.md").write_text("Accuracy: 100 %")
    with pytest.raises(PackageError, match="does not match its recorded SHA-256"):
        signing.sign(pkg, keys[0])
    assert not (pkg / signing.SIGNATURE).exists()


@pytest.mark.parametrize(
    "content", [b"", b"\n\n\n\n", b"untrusted comment: x\nRW\n", b"\xff" * 300, b"x" * 10**5]
)
def test_signatures_and_keys_that_are_none(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, content: bytes
) -> None:
    (signed / signing.SIGNATURE).write_bytes(content)
    assert "is not a signature" in refusal(signed, keys[1])
    bad = tmp_path / "bad"
    bad.write_bytes(content)
    for use in (lambda: signing.verify(signed, [bad]), lambda: signing.sign(signed, bad)):
        with pytest.raises(UsageError, match="key in minisign's format"):
            use()
    with pytest.raises(UsageError, match="cannot be read"):
        signing.verify(signed, [tmp_path / "nowhere"])


def test_keys_are_not_overwritten_and_are_private(keys: tuple[Path, Path], tmp_path: Path) -> None:
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
    before = keys[0].read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        signing.new_key(tmp_path / "release")
    assert keys[0].read_bytes() == before


def test_a_published_signature_of_minisign_holds() -> None:
    """The example of minisign's own documentation: file `test` with the content "test"."""
    import minisign

    key = signing._public_key("RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3")
    signature = minisign.Signature.from_bytes(
        b"untrusted comment: signature from minisign secret key\n"
        b"RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=\n"
        b"trusted comment: timestamp:1556193335\tfile:test\n"
        b"y/rUw2y8/hOUYjZU71eHp/Wo1KZ40fGy2VJEDl34XMJM+TX48Ss/17u3IvIfbVR1FkZZSNCisQbuQY+bHwhEBg==\n"
    )
    assert signing._key_id(signature) == signing._key_id(key) == "E7620F1842B4E81F"
    key.verify(b"test", signature)
    with pytest.raises(ValueError, match="failed"):
        key.verify(b"tes", signature)


@pytest.mark.skipif(shutil.which("minisign") is None, reason="the program minisign is not installed")
def test_minisign_itself_agrees(signed: Path, keys: tuple[Path, Path]) -> None:
    line = ["minisign", "-V", "-p", str(keys[1]), "-m", str(signed / "config.json")]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0
    with (signed / "config.json").open("ab") as stream:
        stream.write(b" ")
    assert subprocess.run(line, capture_output=True, check=False).returncode == 1
