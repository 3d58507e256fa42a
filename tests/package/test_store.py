"""Packages on disk: round trips, damage, and readability at every moment of a change."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratioctl import package
from ratioctl.errors import DiskError, OutputError, PackageError
from ratioctl.package import store
from ratioctl.utils import atomic_files as files


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edit(pkg: package.ModelPackage, change: Callable[[dict[str, Any]], object]) -> None:
    path = pkg.path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_round_trip(pkg: package.ModelPackage, tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    again = package.read(tmp_path / "cat-dog")
    assert again == pkg
    assert names(pkg.path) == {"model.safetensors", "config.json", "recipe.toml", "README.md", "model.onnx"}
    assert (again.name, again.architecture, again.architecture_options) == (
        "cat-dog",
        "resnet18",
        {"width": 16},
    )
    assert again.label_names == ("cat", "dog")
    assert again.input_size == (3, 32, 32)
    assert (again.mean, again.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.25))
    assert (again.temperature, again.thresholds) == (0.5, {"tpr95": 0.4, "tpr99": 0.3})
    assert again.ladders == {"2": (0.5, 1.0)}
    assert again.recipe_text == "name = 'x'\n"
    assert again.config["num_classes"] == 2
    assert again.config["ratio"]["provenance"] == {"seed": 7}
    assert again.calibrated
    assert not again.edited
    tensors = package.read_weights(again)
    assert set(tensors) == set(tensors)
    for name, array in tensors.items():
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].flags.writeable


def test_files_are_recorded_with_their_sha256(pkg: package.ModelPackage) -> None:
    recorded = json.loads((pkg.path / "config.json").read_text())["ratio"]["files"]
    assert set(recorded) == names(pkg.path) - {"config.json"}
    for name, value in recorded.items():
        assert value == hashlib.sha256((pkg.path / name).read_bytes()).hexdigest()
    assert package.check(pkg.path) == [("config.json", None), *((name, None) for name in sorted(recorded))]


def test_a_new_package_may_go_into_an_empty_folder_but_not_among_other_things(
    tmp_path: Path, package_config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    (tmp_path / "empty").mkdir()
    package.write(tmp_path / "empty", config=package_config, weights=tensors)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="not empty and not a package"):
        package.write(tmp_path / "full", config=package_config, weights=tensors)
    assert names(tmp_path / "full") == {"thesis.txt"}


def test_writing_over_a_package_replaces_it(
    pkg: package.ModelPackage, package_config: dict[str, Any]
) -> None:
    new = package.write(pkg.path, config=package_config, weights={"other": np.ones(3, np.float32)})
    assert names(pkg.path) == {"model.safetensors", "config.json", "README.md"}
    assert set(package.read_weights(new)) == {"other"}
    assert new.recipe_text is None
    assert new.digest != pkg.digest


def test_the_folder_s_name_names_the_model_but_a_run_s_package_is_named_after_the_run(
    tmp_path: Path, package_config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    made = package.write(tmp_path / "runs" / "digits" / "package", config=package_config, weights=tensors)
    assert made.name == "digits"
    moved = shutil.copytree(made.path, tmp_path / "elsewhere")
    assert package.read(moved).name == "digits"


def test_an_edit_by_hand_is_noticed(pkg: package.ModelPackage) -> None:
    edit(pkg, lambda config: config["ratio"].update(temperature=0.7))
    again = package.read(pkg.path)
    assert (again.temperature, again.edited) == (0.7, True)
    assert package.check(pkg.path)[0] == ("config.json", "was edited: its recorded digest differs")


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.toml", "README.md", "model.onnx"])
def test_one_flipped_bit_is_found(pkg: package.ModelPackage, name: str) -> None:
    path = pkg.path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match=f"{name}: does not match its recorded SHA-256") as caught:
        package.read(pkg.path)
    assert caught.value.exit_code == 5
    package.read(pkg.path, verify=False)
    assert [file for file, fault in package.check(pkg.path) if fault] == [name]
    if name == "model.safetensors":
        with pytest.raises(PackageError, match="SHA-256"):
            package.read_weights(pkg)


def test_a_missing_file_is_found(pkg: package.ModelPackage) -> None:
    (pkg.path / "recipe.toml").unlink()
    for verify in (True, False):
        with pytest.raises(PackageError, match=r"recipe.toml: is missing"):
            package.read(pkg.path, verify=verify)


def test_a_fifo_instead_of_a_file_is_refused_without_waiting(pkg: package.ModelPackage) -> None:
    (pkg.path / "model.onnx").unlink()
    os.mkfifo(pkg.path / "model.onnx")
    with pytest.raises(PackageError, match="not a plain file"):
        package.read(pkg.path)


def test_writing_refuses_what_reading_would_refuse(
    tmp_path: Path, package_config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    with pytest.raises(PackageError, match="not finite"):
        package.write(tmp_path / "a", config=package_config, weights={"w": np.array([np.nan])})
    with pytest.raises(PackageError, match="label_names"):
        package.write(tmp_path / "a", config={**package_config, "label_names": []}, weights=tensors)
    with pytest.raises(PackageError, match="no JSON form"):
        package.write(tmp_path / "a", config={**package_config, "more": float("nan")}, weights=tensors)
    assert names(tmp_path) == set()


def test_update_changes_what_it_is_given_and_keeps_the_rest(pkg: package.ModelPackage) -> None:
    measured = [{"name": "accuracy", "value": 0.9, "n": 100, "interval": [0.8, 0.95], "dataset": "d"}]
    new = package.update(pkg, config_changes={"ratio": {"metrics": measured}})
    assert new.config["ratio"]["metrics"] == measured
    assert new.config["ratio"]["thresholds"] == pkg.thresholds
    assert new.config["pretrained_cfg"] == pkg.config["pretrained_cfg"]
    assert new.onnx_path is not None
    assert new.onnx_path.read_bytes() == b"graph"
    assert new.card is not None
    assert "| accuracy | 0.9 | 0.8 to 0.95 | 100 | d | - |" in new.card
    assert names(pkg.path) == {"model.safetensors", "config.json", "recipe.toml", "README.md", "model.onnx"}


def test_measurements_reach_the_exports_metadata(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    old = package.read(tiny_package)
    assert old.onnx_path is not None
    graph = onnx.load(old.onnx_path).graph
    new = package.update(old, config_changes={"ratio": {"metrics": [{"name": "accuracy", "value": 0.9}]}})
    assert new.digest == old.digest
    assert new.onnx_path is not None
    model = onnx.load(new.onnx_path)
    assert model.graph == graph
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata == {"ratioctl": package.portable_config(new)}
    assert metadata["ratioctl"]["ratio"]["metrics"][0]["value"] == 0.9


def test_a_change_gives_no_new_hash_to_a_damaged_export(tiny_package: Path) -> None:
    old = package.read(tiny_package)
    assert old.onnx_path is not None
    data = old.onnx_path.read_bytes()
    old.onnx_path.write_bytes(data.replace(b"is_ood", b"isnood"))
    before = (tiny_package / "config.json").read_bytes()
    with pytest.raises(PackageError, match=r"model\.onnx: does not match its recorded SHA-256"):
        package.update(old, config_changes={"ratio": {"metrics": [{"name": "accuracy", "value": 0.9}]}})
    assert (tiny_package / "config.json").read_bytes() == before


def test_update_removes_an_export_that_no_longer_fits(pkg: package.ModelPackage) -> None:
    new = package.update(pkg, config_changes={"ratio": {"temperature": 0.6}})
    assert new.onnx_path is None
    assert "model.onnx" not in names(pkg.path)
    newer = package.update(new, onnx=b"new graph")
    assert newer.onnx_path == pkg.path / "model.onnx"
    assert newer.onnx_path.read_bytes() == b"new graph"


def test_update_starts_from_what_is_on_disk_now(pkg: package.ModelPackage) -> None:
    package.update(pkg, config_changes={"ratio": {"temperature": 0.6}})
    new = package.update(pkg, config_changes={"ratio": {"thresholds": {"tpr95": 0.2}}})
    assert (new.temperature, new.thresholds) == (0.6, {"tpr95": 0.2})


def test_files_that_are_not_ours_stay(pkg: package.ModelPackage) -> None:
    (pkg.path / "notes.txt").write_text("mine")
    package.update(pkg, config_changes={"ratio": {"temperature": 0.6}})
    assert (pkg.path / "notes.txt").read_text() == "mine"


class Callback:
    """Calls `look` before every operation that changes the disk; raises at the one numbered `fail_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
        self.look, self.count, self.fail_at, self.active = look, 0, -1, True
        self.error: BaseException = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name in ("fsync", "replace", "link", "rename", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.active:
                self.active = False  # what the test does itself is not watched
                self.look()
                self.active = True
                self.count += 1
                if self.count == self.fail_at:
                    raise self.error
            return original(*args, **kwargs)

        return watched


def change(pkg: package.ModelPackage) -> package.ModelPackage:
    return package.update(
        pkg, config_changes={"ratio": {"temperature": 0.6}}, card="# New\n", onnx=b"another graph"
    )


def test_a_package_is_readable_at_every_moment_of_a_change(
    pkg: package.ModelPackage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At each step, as if the process had died there, the folder is the old package or the new one, and the
    next change works and leaves a tidy folder."""
    seen = []

    def look() -> None:
        copy = shutil.copytree(pkg.path, tmp_path / f"moment-{len(seen)}")
        there = package.read(copy)
        seen.append(there.temperature)
        wanted = {0.5: (pkg.card, b"graph"), 0.6: ("# New\n", b"another graph")}[there.temperature]
        assert there.onnx_path is not None
        assert (there.card, there.onnx_path.read_bytes()) == wanted
        after = package.update(there, config_changes={"ratio": {"provenance": {"seed": 9}}})
        assert after.temperature == there.temperature
        assert names(copy) == {"model.safetensors", "config.json", "recipe.toml", "README.md", "model.onnx"}

    callback = Callback(monkeypatch, look)
    new = change(pkg)
    callback.active = False
    assert new.temperature == 0.6
    assert seen == sorted(seen)
    assert set(seen) == {0.5, 0.6}
    assert len(seen) > 8


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_disk_leaves_the_old_package_or_the_new_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    package_config: dict[str, Any],
    tensors: dict[str, np.ndarray],
) -> None:
    original = package.write(tmp_path / "p", config=package_config, weights=tensors, onnx=b"graph")
    callback = Callback(monkeypatch, lambda: None)
    callback.error = error
    outcomes = set()
    for step in range(1, 100):
        callback.active = False
        folder = shutil.copytree(original.path, tmp_path / f"q{step}")
        there = package.read(folder)
        callback.count, callback.fail_at, callback.active = 0, step, True
        try:
            change(there)
        except (DiskError, KeyboardInterrupt):
            failed = True
        else:
            failed = False
        callback.active = False
        now = package.read(folder)
        outcomes.add((failed, now.temperature))
        if failed and now.temperature == 0.5:
            assert names(folder) - {".lock"} == names(original.path), "something half-written stayed"
        if callback.count < step:  # it ended before the fault
            break
    assert {(True, 0.5), (False, 0.6)} <= outcomes
    assert step > 8


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(errno.ENOSPC, DiskError, 6), (errno.EIO, DiskError, 6), (errno.EACCES, OutputError, 2)],
)
def test_a_fresh_package_that_cannot_be_written_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
    code: int,
    package_config: dict[str, Any],
    tensors: dict[str, np.ndarray],
) -> None:
    callback = Callback(monkeypatch, lambda: None)
    callback.error = OSError(number, os.strerror(number))
    codes = set()
    for step in range(2, 100):  # 1 is the parent folder, which is there
        callback.count, callback.fail_at = 0, step
        try:
            package.write(tmp_path / "out" / "p", config=package_config, weights=tensors)
        except kind as error:
            codes.add(error.exit_code)  # type: ignore[attr-defined]
        if (tmp_path / "out" / "p").exists():
            break
        assert names(tmp_path / "out") == set()
    assert step > 5
    assert codes == {code}


def test_a_place_that_cannot_be_written_is_a_usage_error(
    tmp_path: Path, package_config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as caught:
        package.write(tmp_path / "file" / "p", config=package_config, weights=tensors)
    assert caught.value.exit_code == 2


def test_a_second_writer_learns_who_is_first(pkg: package.ModelPackage) -> None:
    with files.lock(pkg.path), pytest.raises(OutputError, match=rf"being written by process {os.getpid()} "):
        package.update(pkg, card="x")
    package.update(pkg, card="x")
    assert ".lock" not in names(pkg.path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_can_be_written(
    number: int, pkg: package.ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some of those in networks are."""
    fcntl = pytest.importorskip("fcntl")

    def none(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    assert package.update(pkg, card="# New\n").card == "# New\n"
    assert not (pkg.path / ".lock").exists()


def kill_itself(program: str, pkg: package.ModelPackage) -> None:
    """Run a program that changes the package in `sys.argv[1]` and kills itself in the middle."""
    done = subprocess.run([sys.executable, "-c", program, str(pkg.path)], check=False)
    assert done.returncode == -9


def test_what_a_killed_writer_left_does_not_hinder(pkg: package.ModelPackage) -> None:
    """kill -9 in the middle of a change: the lock is free, the leftovers go with the next change."""
    program = (
        "import os, signal, sys\nfrom ratioctl import package\n"
        "pkg = package.read(sys.argv[1])\n"
        "real = os.replace\n"
        "def replace(old, new):\n"
        "    real(old, new)\n"
        "    if os.path.basename(new) == 'config.json':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = replace\n"
        "package.update(pkg, card='# New', config_changes={'ratio': {'temperature': 0.6}})\n"
    )
    kill_itself(program, pkg)
    there = package.read(pkg.path)
    assert (there.temperature, there.card) == (0.6, "# New")
    assert any(name.startswith("README-") for name in names(pkg.path))
    package.update(there, config_changes={"ratio": {"temperature": 0.7}})
    assert names(pkg.path) == {"model.safetensors", "config.json", "recipe.toml", "README.md"}


def test_a_writer_killed_in_the_middle_of_a_file_leaves_no_half_one_under_a_name_that_says_otherwise(
    pkg: package.ModelPackage,
) -> None:
    """Found by killing at random: half an export stood as `model-b04fb459.onnx`."""
    before = names(pkg.path)
    program = (
        "import os, signal, sys\nfrom ratioctl import package\nfrom ratioctl.package import store\n"
        "def half(path, data):\n"
        "    path.write_bytes(data[:len(data) // 2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.write_synced = half\n"
        "package.update(package.read(sys.argv[1]), card='# New, and longer than a byte')\n"
    )
    kill_itself(program, pkg)
    left = names(pkg.path) - before
    assert left
    assert all(name.startswith(".") for name in left)
    package.update(pkg, card="# Newer")
    assert names(pkg.path) == before | {"README.md"}


def test_leftovers_of_a_killed_fresh_write_are_swept(
    tmp_path: Path, package_config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    partial = tmp_path / ".p.1-2.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    os.utime(partial, (0, 0))
    package.write(tmp_path / "p", config=package_config, weights=tensors)
    assert names(tmp_path) == {"p"}


def test_a_reader_starts_over_when_the_package_changes_under_it(
    pkg: package.ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, changed = store._check_file, []

    def meddle(path: Path, recorded: str) -> None:
        if not changed:
            changed.append(path)
            package.update(pkg, config_changes={"ratio": {"temperature": 0.6}}, card="# New\n")
        original(path, recorded)

    monkeypatch.setattr(store, "_check_file", meddle)
    assert package.read(pkg.path).temperature == 0.6


@pytest.fixture
def assets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package_config: dict[str, Any],
    tensors: dict[str, np.ndarray],
) -> Path:
    monkeypatch.setattr("ratioctl.utils.resources.folder", lambda name: tmp_path / name)
    for name in ("cifar10-ratio", "digits-ratio"):
        package.write(tmp_path / "assets" / "models" / name, config=package_config, weights=tensors)
    return tmp_path / "assets" / "models"


def test_find(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert package.bundled() == ["cifar10-ratio", "digits-ratio"]
    assert package.find() == package.find("cifar10-ratio") == assets / "cifar10-ratio"
    assert package.find(assets / "digits-ratio") == assets / "digits-ratio"
    monkeypatch.chdir(tmp_path)
    Path("cifar10-ratio").mkdir()
    assert package.find("cifar10-ratio") == assets / "cifar10-ratio"
    Path("cifar10-ratio/config.json").touch()
    assert package.find("cifar10-ratio") == Path("cifar10-ratio")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("cifar10-ratoi", 'Did you mean "cifar10-ratio"? Bundled models: cifar10-ratio, digits-ratio.'),
        ("zebra", "no such package folder or bundled model. Bundled models: cifar10-ratio"),
        ("a\0b", "no such package"),
        ("x" * 5000, "no such package"),
        ("", "not a package"),
        ("empty", "has no config.json"),
        ("run", "is a run folder. Its package is"),
        ("weights.pt", "is a file"),
    ],
)
def test_find_says_what_there_is(
    assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    said: str,
    package_config: dict[str, Any],
    tensors: dict[str, np.ndarray],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    package.write("run/package", config=package_config, weights=tensors)
    Path("weights.pt").touch()
    with pytest.raises(PackageError) as caught:
        package.find(model)
    assert said in str(caught.value)
    assert caught.value.exit_code == 5


def test_bundled_models_are_read_only(assets: Path) -> None:
    bundled = package.resolve("cifar10-ratio")
    before = {path.name: path.read_bytes() for path in bundled.path.iterdir()}
    assert package.is_bundled(bundled)
    with pytest.raises(
        OutputError, match=r"is a bundled model, which is read-only\. Write a changed copy"
    ) as caught:
        package.update(bundled, config_changes={"ratio": {"temperature": 2.0}})
    assert caught.value.exit_code == 2
    assert {path.name: path.read_bytes() for path in bundled.path.iterdir()} == before
    assert package.resolve(bundled) is bundled
