"""Files, folders and lists of paths."""

import inspect
import io
import os
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratioctl import images
from ratioctl.errors import ImageError, SourceError
from tests.images.helpers import PNG, paths_of, plant, reason_of


def test_folders_are_walked_recursively_in_sorted_order(tmp_path):
    plant(
        tmp_path,
        "b/2.jpg",
        "b/10.JPG",
        "a/deep/x.webp",
        "c.png",
        "A.tiff",
        "notes.txt",
        ".hidden.png",
        ".git/x.png",
    )
    got = paths_of(str(tmp_path))
    assert got == [f"{tmp_path}/{n}" for n in ("A.tiff", "a/deep/x.webp", "b/10.JPG", "b/2.jpg", "c.png")]


def test_paths_are_the_argument_as_given_joined(tmp_path, monkeypatch):
    plant(tmp_path, "photos/a.png", "photos/sub/b.png")
    monkeypatch.chdir(tmp_path)
    assert paths_of("photos") == ["photos/a.png", "photos/sub/b.png"]
    assert paths_of("photos/") == ["photos/a.png", "photos/sub/b.png"]
    assert paths_of("./photos") == ["./photos/a.png", "./photos/sub/b.png"]
    assert paths_of(".") == ["./photos/a.png", "./photos/sub/b.png"]
    assert paths_of(Path("photos/a.png"), "photos/sub") == ["photos/a.png", "photos/sub/b.png"]


def test_files_without_the_suffix_of_an_image_are_counted(tmp_path, caplog):
    folder = tmp_path / "inbox"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "upload", "sub/notes.txt", ".hidden"):
        (folder / name).write_bytes(b"")
    said = "2 files without the suffix of an image left out (sub/notes.txt)"
    caplog.set_level("WARNING", "ratioctl")  # a command with -q in this process has set another
    assert [item.path for item in images.walk([folder])] == [f"{folder}/a.png"]
    assert caplog.messages == [f"{folder}: {said}"]
    caplog.clear()
    with tarfile.open(tmp_path / "inbox.tar", "w") as tar:
        tar.add(folder, ".")
    assert len(list(images.walk([tmp_path / "inbox.tar"]))) == 1
    assert "2 files without the suffix of an image left out" in caplog.text
    caplog.clear()
    assert len(list(images.walk([folder / "upload"]))) == 1, "a file given by name"
    assert caplog.messages == []


def test_a_file_given_by_name_is_always_an_item(tmp_path):
    plant(tmp_path, "scan.dat", "UPPER.PNG", ".hidden")
    names = [f"{tmp_path}/{n}" for n in ("scan.dat", ".hidden", "UPPER.PNG")]
    items = list(images.walk(names))
    assert [i.path for i in items] == names
    assert all(i.read() == PNG and i.open().read() == PNG for i in items)


def test_symbolic_links_are_followed_and_loops_end(tmp_path):
    plant(tmp_path, "set/a/1.png", "other/2.png")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/self").symlink_to(tmp_path / "set/self")
    (tmp_path / "set/more").symlink_to(tmp_path / "other")
    (tmp_path / "set/one.png").symlink_to(tmp_path / "other/2.png")
    (tmp_path / "other/back").symlink_to(tmp_path / "set")
    got = paths_of(str(tmp_path / "set"))
    assert got == [f"{tmp_path}/set/{n}" for n in ("a/1.png", "more/2.png", "one.png")]


def test_folders_linked_to_each_other_do_not_explode(tmp_path):
    for i in range(8):
        plant(tmp_path, f"d{i}/x.png")
    for i in range(8):
        for j in range(8):
            (tmp_path / f"d{i}" / f"to{j}").symlink_to(tmp_path / f"d{j}")
    assert 8 <= len(paths_of(str(tmp_path))) <= 64


def test_photographs_of_unsupported_kinds_are_not_passed_over(tmp_path):
    plant(tmp_path, "a.heic", "b.avif", data=b"\0\0\0\x20ftypheic" + b"\0" * 20)
    items = list(images.walk([tmp_path]))
    assert len(items) == 2
    assert "HEIC" in reason_of(items[0].read())


def test_missing_and_empty_arguments_fail_before_the_first_item(tmp_path):
    plant(tmp_path, "a.png", "empty/readme.txt", "empty/.x.png")
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.add(tmp_path / "empty/readme.txt", "readme.txt")
    for argument, reason in ((tmp_path / "nothing", "does not exist"), ("a\0b", "does not exist")):
        with pytest.raises(SourceError, match=reason) as caught:
            images.walk([tmp_path / "a.png", argument])
        assert caught.value.exit_code == 2
    for name in ("empty", "empty.tar"):
        with pytest.raises(SourceError, match="holds no images"):
            images.walk([tmp_path / "a.png", tmp_path / name])
    assert list(images.walk([])) == []


def test_paths_from_stdin(tmp_path, monkeypatch):
    plant(tmp_path, "a.png", "d/b.png", "d/c.png", "with\nnewline.png")
    os.mkdir(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    lines = b"a.png\r\n\nd\nmissing.png\nempty\na.png"
    items = list(images.walk(["-", "a.png"], stdin=io.BytesIO(lines)))
    assert [i.path for i in items] == [
        "a.png",
        "d/b.png",
        "d/c.png",
        "missing.png",
        "empty",
        "a.png",
        "a.png",
    ]
    for bad, reason in ((3, "does not exist"), (4, "holds no images")):
        with pytest.raises(ImageError, match=reason):
            items[bad].read()
    nul = b"with\nnewline.png\0d/b.png\0"
    assert paths_of("-", stdin=io.BytesIO(nul)) == ["with\nnewline.png", "d/b.png"]


def test_stdin_is_streamed():
    read, write = os.pipe()
    with open(read, "rb") as stdin, open(write, "wb", buffering=0) as feed:
        feed.write(b"/nothing/1\n")
        items = images.walk(["-"], stdin=stdin)
        assert next(items).path == "/nothing/1"  # the writer has not finished yet
        feed.write(b"/nothing/2\n")
        assert next(items).path == "/nothing/2"


def test_strange_names(tmp_path):
    raw = os.fsencode(str(tmp_path))
    for name in (b"new\nline.png", b"bad\xff.png", b"esc\x1b[31m.png", "Käse.png".encode()):
        with open(raw + b"/" + name, "wb") as file:
            file.write(PNG)
    items = list(images.walk([str(tmp_path)]))
    names = [i.path.removeprefix(f"{tmp_path}/") for i in items]
    assert names == ["Käse.png", "bad\\xff.png", "esc\x1b[31m.png", "new\nline.png"]
    assert all(i.read() == PNG for i in items)
    for item in items:
        item.path.encode("utf-8")
        assert images.shown(item.path).isprintable()
    assert images.shown("a\nb\x1b[0m") == "a\\nb\\x1b[0m"
    assert images.shown(b"\xff\xfe") == "\\xff\\xfe"


@settings(deadline=None)
@given(st.text(max_size=20))
def test_shown_is_always_printable(text):
    assert images.shown(text).isprintable()


def test_folders_deeper_than_pythons_stack(tmp_path):
    depth = 400
    folder = tmp_path.joinpath(*["d"] * depth)
    folder.mkdir(parents=True)
    (folder / "bottom.png").write_bytes(b"x")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 200)
    try:
        found = [item.path for item in images.walk([tmp_path])]
    finally:
        sys.setrecursionlimit(limit)
    assert found == [str(folder / "bottom.png")]


def test_special_files_in_folders_are_items_with_errors(tmp_path):
    plant(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("nowhere")
    items = list(images.walk([tmp_path]))
    assert [i.path.rsplit("/")[-1] for i in items] == ["a.png", "b.png", "c.png"]
    for item, reason in zip(items[1:], ("FIFO", "does not exist"), strict=True):
        with pytest.raises(ImageError, match=reason) as caught:
            item.read()
        assert caught.value.thing == item.path


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    plant(tmp_path, "a.png", "shut/b.png", "z.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    items = list(images.walk([str(tmp_path)]))
    assert [i.path for i in items] == [f"{tmp_path}/{n}" for n in ("a.png", "shut", "z.png")]
    with pytest.raises(ImageError, match="cannot be listed"):
        items[1].read()
    with pytest.raises(SourceError, match="cannot be listed"):
        images.load_source(str(tmp_path), 8)


def test_a_file_that_vanishes_is_an_error_of_its_own(tmp_path):
    plant(tmp_path, "a.png", "b.png")
    items = list(images.walk([tmp_path]))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match="does not exist"):
        items[0].read()
    assert items[1].read() == PNG
