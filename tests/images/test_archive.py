"""Members of tar and zip archives."""

import contextlib
import io
import lzma
import re
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratioctl import images
from ratioctl.errors import ImageError, SourceError
from ratioctl.images import archive, files
from tests.images.helpers import (
    PNG,
    pack,
    paths_of,
)


def test_extended_headers_are_read_to_the_letter():
    for block, records in (
        (b"12 path=a b\n\0\0", {"path": "a b"}),
        (b"8 k=1\n2\n9 size=7\n", {"k": "1\n2", "size": "7"}),
        (b"\0" * 512, {}),
        (b"5 a=\n" * 200_000, {"a": ""}),
    ):
        assert archive._pax_records(block) == records
    for block in (b"99 path=a\n", b"0 a=\n", b"-5 a=\n", b"x a=\n", b"9" * 10**6):
        with pytest.raises((archive.DamagedArchiveError, ValueError)):
            archive._pax_records(block)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip"])
def test_archives_are_read_in_place(tmp_path, suffix):
    members = {
        "dir/x.png": PNG,
        "dir/note.txt": b"no",
        "./b.jpg": b"B",
        ".hid.png": b"",
        "__MACOSX/c.png": b"",
    }
    path = pack(tmp_path / f"a{suffix}", members)
    items = list(images.walk([path]))
    order = ["dir/x.png", "b.jpg"] if suffix != ".zip" else ["b.jpg", "dir/x.png"]
    assert [i.path for i in items] == [f"{path}:{n}" for n in order]
    assert {i.path.rsplit(":")[1]: i.read() for i in items} == {"dir/x.png": PNG, "b.jpg": b"B"}
    assert paths_of(f"{path}:dir") == [f"{path}:dir/x.png"]
    assert paths_of(f"{path}:dir/x.png") == [f"{path}:dir/x.png"]
    with pytest.raises(SourceError, match="holds no images"):
        images.walk([f"{path}:other"])


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_dialects(tmp_path, kind):
    long = "d" * 90 + "/" + "e" * 60 + "/picture.png"
    names = [long, "Käse.png", "plain.png", "a/../b/up.png", "../../outside.png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            info.mtime = 1.5
            tar.addfile(info, io.BytesIO(PNG))
    items = list(images.walk([tmp_path / "a.tar"]))
    assert [i.path.split(":", 1)[1] for i in items] == names
    assert all(i.read() == PNG for i in items)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]  # nothing was unpacked


def test_members_that_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("s.png", tarfile.SYMTYPE),
            ("h.png", tarfile.LNKTYPE),
            ("f.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("z.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    items = list(images.walk([tmp_path / "a.tar"]))
    assert [i.path[-5:] for i in items] == ["s.png", "h.png", "f.png", "z.png"]
    for item, reason in zip(items[:3], ("link inside", "link inside", "not a regular file"), strict=True):
        with pytest.raises(ImageError, match=reason):
            item.read()
    assert items[3].read() == PNG
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("s.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ImageError, match="link inside"):
        next(images.walk([tmp_path / "a.zip"])).read()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_members_over_the_limit_are_refused_and_the_rest_unharmed(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 100_000)
    path = pack(tmp_path / f"bomb{suffix}", {"a.png": PNG, "b.png": bytes(25_000_000), "c.png": PNG})
    tracemalloc.start()
    items = list(images.walk([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with pytest.raises(ImageError, match="larger than"):
        items[1].read()
    assert items[0].read() == items[2].read() == PNG
    assert peak < 16_000_000  # xz keeps a dictionary of 8 MiB


def test_a_zip_that_lies_about_sizes(tmp_path):
    path = pack(tmp_path / "a.zip", {"a.png": PNG * 50, "b.png": PNG})
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02") + 24  # the first member's size in the central directory
    raw[at : at + 4] = struct.pack("<I", 10)
    path.write_bytes(raw)
    items = list(images.walk([path]))
    with pytest.raises(ImageError, match="damaged inside the archive"):
        items[0].read()
    assert items[1].read() == PNG


def test_encrypted_members(tmp_path):
    path = pack(tmp_path / "a.zip", {"a.png": PNG})
    raw = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(mark) + offset] |= 1
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="encrypted"):
        next(images.walk([path])).read()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_tar_that_breaks_off_is_reported(tmp_path, suffix, share):
    noise = np.random.default_rng(0)
    members = {f"{i:03d}.png": noise.bytes(3000) for i in range(60)}
    path = pack(tmp_path / f"a{suffix}", members)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    items = list(images.walk([path]))
    assert items[-1].path == str(path)
    with pytest.raises(ImageError, match="damaged archive"):
        items[-1].read()
    assert [i.read() for i in items[:-1]] == list(members.values())[: len(items) - 1]
    with pytest.raises(SourceError, match="damaged archive"):
        images.load_source(str(path), 8)


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{i}.png": PNG for i in range(5)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"3.png")] = ord("x")
    path.write_bytes(raw)
    items = list(images.walk([path]))
    assert len(items) == 4
    with pytest.raises(ImageError, match="checksum"):
        items[3].read()


def test_headers_that_claim_gigabytes(tmp_path):
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2**33
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
        with pytest.raises(ImageError, match="header of 8,589,934,592 bytes"):
            next(images.walk([tmp_path / "a.tar"])).read()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_tar_is_reported_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tar")
    path = pack(folder / "a.tar", {"a.png": b"A" * 700, "b.png": b"B"})
    raw = bytearray(path.read_bytes()[:5120])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 2600))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        for item in images.walk([path]):
            with contextlib.suppress(ImageError):
                item.read()
    except SourceError:
        pass  # both names were damaged


def test_what_is_no_archive(tmp_path):
    for name, data in (("a.tar", b"not a tar"), ("a.zip", b"not a zip"), ("a.tar.xz", b"no"), ("b.tar", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match="damaged archive"):
            next(images.walk([tmp_path / name])).read()


def test_memory_does_not_grow_with_the_members_of_a_tar(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{i:05d}.png": b"x" * 100 for i in range(2000)})
    images.walk([path])
    tracemalloc.start()
    count = sum(1 for _ in images.walk([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 1_200_000


# --- small files that unpack to much, and archives one after the other -------------------------------------


def xz_with_dictionary(exponent):
    """An empty .xz file whose header claims a dictionary of 2^(exponent / 2 + 12) bytes."""
    raw = bytearray(lzma.compress(b"x" * 2000, lzma.FORMAT_XZ, check=lzma.CHECK_NONE))
    at = raw.index(b"\x21\x01") + 2  # filter LZMA2, one byte of properties
    raw[at] = exponent
    header = raw[12 : 12 + 4 * (raw[12] + 1) - 4]
    raw[12 + len(header) : 12 + len(header) + 4] = struct.pack("<I", zlib.crc32(header))
    return bytes(raw)


def test_an_xz_that_claims_gigabytes_is_refused(tmp_path):
    (tmp_path / "a.tar.xz").write_bytes(xz_with_dictionary(40))  # 4 GiB
    (item,) = images.walk([tmp_path / "a.tar.xz"])
    with pytest.raises(ImageError, match="is refused: it needs more than 256 MiB of memory to unpack"):
        item.read()
    with pytest.raises(SourceError, match="is refused: it needs more than 256 MiB"):
        images.load_source(str(tmp_path / "a.tar.xz"), 8)


@pytest.mark.parametrize("preset", [0, 6, 9])
def test_xz_of_every_preset_and_several_streams(tmp_path, preset):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for k in range(20):
            info = tarfile.TarInfo(f"{k}.png")
            info.size = len(PNG)
            archive.addfile(info, io.BytesIO(PNG))
    data, half = tar.getvalue(), len(tar.getvalue()) // 2
    parts = [lzma.compress(part, preset=preset) for part in (data[:half], data[half:])]
    (tmp_path / "a.tar.xz").write_bytes(parts[0] + bytes(8) + parts[1] + bytes(4))
    assert [item.read() for item in images.walk([tmp_path / "a.tar.xz"])] == [PNG] * 20


def test_a_zip_whose_entries_share_their_bytes_is_refused(tmp_path):
    path = pack(tmp_path / "a.zip", {f"{k}.png": PNG for k in range(3)})
    raw = path.read_bytes()
    at = raw.index(b"PK\x01\x02")
    directory = bytearray(raw[at:])
    starts = [m.start() for m in re.finditer(b"PK\x01\x02", directory)]
    for start in starts:
        directory[start + 42 : start + 46] = bytes(4)  # every entry begins at the first one's bytes
    path.write_bytes(raw[:at] + directory)
    (item,) = images.walk([path])
    with pytest.raises(ImageError, match="overlap"):
        item.read()
    with pytest.raises(SourceError, match="overlap"):
        images.load_source(str(path), 8)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_bombs_are_left_at_the_limit(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(archive, "FREE_BYTES", 2**20)
    bomb = {f"{k}.png": bytes(200_000) for k in range(10)}
    path = pack(tmp_path / f"bomb{suffix}", bomb)
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in bomb.items():
                packed.writestr(name, data)
    items = list(images.walk([path]))
    with pytest.raises(ImageError, match="unpacks to more than 200 times its size"):
        items[-1].read()
    assert len(items) == 6  # five of 200,000 bytes, and the error
    with pytest.raises(SourceError, match="unpacks to more than 200 times its size"):
        images.load_source(str(path), 8)
    honest = {f"{k}.png": np.random.default_rng(k).bytes(200_000) for k in range(10)}
    assert len(list(images.walk([pack(tmp_path / f"honest{suffix}", honest)]))) == 10


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_occur_twice_are_read_and_noted_once(tmp_path, suffix, caplog):
    caplog.set_level("WARNING", logger="ratioctl")  # another test may have left it at --quiet's
    path = tmp_path / f"a{suffix}"
    for k, name in enumerate(("a.png", "b.png", "a.png")):
        if suffix == ".zip":
            with zipfile.ZipFile(path, "a") as packed:
                packed.writestr(name, PNG)
        else:
            with tarfile.open(path, "a") as packed:
                info = tarfile.TarInfo(name)
                info.size = len(PNG)
                packed.addfile(info, io.BytesIO(PNG))
        if k == 1:
            assert len(list(images.walk([path]))) == 2
            assert caplog.text == ""
    assert sorted(item.path.rpartition(":")[2] for item in images.walk([path])) == ["a.png", "a.png", "b.png"]
    assert images.load_source(str(path), 8).names == ("a.png", "a.png", "b.png")
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: repeated file names: 1; every copy is read, where unpacking would keep the last"
    ]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_concatenated_tars_are_read_to_the_end(tmp_path, suffix):
    parts = [pack(tmp_path / f"{k}{suffix}", {f"{k}.png": PNG}) for k in range(3)]
    (tmp_path / f"all{suffix}").write_bytes(b"".join(part.read_bytes() for part in parts))
    items = list(images.walk([tmp_path / f"all{suffix}"]))
    assert [item.path.rpartition(":")[2] for item in items] == ["0.png", "1.png", "2.png"]
    assert images.load_source(str(tmp_path / f"all{suffix}"), 8).names == ("0.png", "1.png", "2.png")


def test_data_after_the_end_of_a_tar_are_reported(tmp_path):
    path = pack(tmp_path / "a.tar", {"a.png": PNG})
    path.write_bytes(path.read_bytes() + b"something else" * 100)
    items = list(images.walk([path]))
    assert items[0].read() == PNG
    with pytest.raises(ImageError, match="other data after its end"):
        items[1].read()
