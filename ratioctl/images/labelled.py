"""Labelled SOURCEs: class folders in a folder or archive, decoded into one uint8 array."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ratioctl.errors import ImageError, SourceError
from ratioctl.images import cache as decoded_cache
from ratioctl.images.archive import ARCHIVE_SUFFIXES, DamagedArchiveError, Member, archive_members, is_archive
from ratioctl.images.decode import decode
from ratioctl.images.files import FORMATS, suffix_kind
from ratioctl.images.rows import select
from ratioctl.images.table import SUFFIXES as TABLES
from ratioctl.images.table import is_table, table_members
from ratioctl.images.walk import folder_members, is_file, is_folder, remote_members
from ratioctl.utils import resources
from ratioctl.utils.frame import Frame, Size, frame_of
from ratioctl.utils.ordered_pool import map_batches
from ratioctl.utils.remote import RemoteError, is_url
from ratioctl.utils.remote import info as remote_info
from ratioctl.utils.suggest import nearest
from ratioctl.utils.text import nfc, readable, shown

SPLIT_NAMES = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout")
)

_FOREIGN = {
    "COCO": ("annotations/*.json", "*_annotations.coco.json", "*/_annotations.coco.json", "instances_*.json"),
    "Pascal VOC": ("Annotations/*.xml",),
    "YOLO": ("data.yaml", "labels/*.txt", "labels/*/*.txt"),
}
MISSING = "does not exist"  # the reason of a SourceError for a path that is not there
NOT_READ = "looks like a data set with {} annotations, which are not read"
ARRANGE = "Arrange it as CLASS/image.png, one folder a class, or write a CSV file of path,label."
_MAX_WAITING_BYTES = 2**24  # encoded members of an archive that wait to be decoded


@dataclass(frozen=True, kw_only=True)
class SourceIndex:
    """Names and labels of a SOURCE, sorted by class, then name; no pixels."""

    path: str
    split: str | None
    names: tuple[str, ...]  # POSIX paths inside the source
    labels: np.ndarray | None  # (N,) int64 into label_names; None for a flat source
    label_names: tuple[str, ...]  # sorted; empty for a flat source


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A SOURCE in memory. Unreadable images are left out and listed in `errors`."""

    images: np.ndarray  # (N, H, W, C) uint8; may be a private memory map, or `PixelRows` of one
    labels: np.ndarray | None  # (N,) int64; None for a flat source
    label_names: tuple[str, ...]
    names: tuple[str, ...]  # (N,) POSIX paths inside the source
    errors: tuple[tuple[str, str], ...]  # (name, reason)
    fingerprint: str  # SHA-256 of pixels, labels and label names: independent of the packing
    digests: np.ndarray  # (N,) uint64, of the encoded files


def split_source(source: str) -> tuple[str, str | None]:
    """(path, split) of `PATH` or `PATH:SPLIT`. A colon is part of the path if that path exists.

    Raises:
        SourceError: nothing of that name exists.
    """
    if source and _exists(source):
        return source, None
    left, colon, right = source.rpartition(":")
    inner = left.partition("://")[2] if is_url(left) else left
    if colon and inner and (inner == left or "/" in inner) and _exists(left):
        if not right.strip("/"):
            raise SourceError(shown(source), "names no split after the colon", "Write for example :test.")
        return left, right.strip("/")
    raise SourceError(shown(source), MISSING, "Check the spelling of the path.")


def _exists(path: str) -> bool:
    if not is_url(path):
        return os.path.exists(path)
    try:
        return remote_info(path) is not None
    except RemoteError as error:
        raise error.of(SourceError, path) from None


def _source_members(path: str, wanted: Callable[[str], bool]) -> Iterator[Member]:
    if is_folder(path):
        return _listable_members(path)
    if is_archive(path) and is_file(path):
        return archive_members(path, wanted)
    if is_table(path) and is_file(path):
        return table_members(path)
    kinds = ", ".join((*ARCHIVE_SUFFIXES, *TABLES))
    reason = "is neither a folder nor an archive nor a table of paths and labels"
    raise SourceError(shown(path), reason, f"Archives and tables end in {kinds}.")


def _listable_members(path: str) -> Iterator[Member]:
    try:
        for member in remote_members(path) if is_url(path) else folder_members(path):
            if member.kind == "closed":
                raise SourceError(shown(f"{path}/{member.name}"), member.error, "Change its permissions.")
            yield member
    except RemoteError as error:
        raise error.of(SourceError, path) from None


def sample(source: str, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of some images of a SOURCE: evenly spaced in a folder or table, else the first.

    Raises:
        SourceError: as `load_source`.
    """
    path, split = split_source(source)
    prefix = "" if split is None else nfc(split) + "/"
    members: Iterator[Member] = (
        member
        for member in _source_members(path, lambda name: True)
        if member.kind == "image" and (not prefix or prefix in nfc(member.name))
    )
    if is_folder(path) or is_table(path):
        every = list(members)
        members = iter(every[:: max(1, len(every) // count)])
    try:
        for member in itertools.islice(members, count):
            with contextlib.suppress(ImageError):
                name = nfc(readable(member.name))
                yield name.rpartition(prefix)[2] if prefix else name, member.read(member.name)
    except DamagedArchiveError as e:
        raise _damaged_source(source, e) from e


def splits_of(source: str) -> tuple[str, ...]:
    """The first-level folders of a SOURCE where these are splits ("train", "test"), else ().

    Raises:
        SourceError: as `load_source`.
    """
    path, split = split_source(source)
    if split is not None:
        return ()
    names = [nfc(name) for name in _listing(source, path)[0]]
    outer = os.path.commonpath(names) if len(names) > 1 else ""
    for prefix in ("", f"{outer}/"):
        tops = {n[len(prefix) :].split("/", 1)[0] for n in names if "/" in n[len(prefix) :]}
        if len(tops) > 1 and {top.lower() for top in tops} <= SPLIT_NAMES:
            return tuple(sorted(tops))
    return ()


def foreign_layout(source: str) -> str | None:
    """The name of a layout of annotations that is not read, if `source` lies in one: COCO, YOLO or VOC."""
    if is_url(source):
        return None
    path = source if os.path.exists(source) else source.rpartition(":")[0]
    for folder in (path, os.path.dirname(os.path.abspath(path))):
        if not os.path.isdir(folder):
            continue
        for kind, patterns in _FOREIGN.items():
            if any(glob.glob(os.path.join(glob.escape(folder), pattern)) for pattern in patterns):
                return kind
    return None


def list_source(source: str, *, exclude: Sequence[str] = ()) -> SourceIndex:
    """The names and labels of a SOURCE, without decoding; archives are read once.

    Raises:
        SourceError: as `load_source`.
    """
    path, split = split_source(source)
    names, folders = _listing(source, path)
    layout = _layout(source, names, folders, split, exclude)
    order = layout.order
    return SourceIndex(
        path=path,
        split=split,
        names=tuple(names[i] for i in order),
        labels=layout.labels,
        label_names=layout.label_names,
    )


def _listing(source: str, path: str) -> tuple[list[str], list[str]]:
    names: list[str] = []
    folders: list[str] = []
    try:
        for member in _source_members(path, lambda name: False):
            if member.kind == "image":
                names.append(readable(member.name))
            elif member.kind == "folder":
                folders.append(readable(member.name))
    except DamagedArchiveError as e:
        raise _damaged_source(source, e) from e
    return names, folders


def _damaged_source(source: str, e: DamagedArchiveError) -> SourceError:
    return SourceError(shown(source), e.fault, e.next_step)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    order: list[int]  # which of the names belong to the source, in their final order
    labels: np.ndarray | None
    label_names: tuple[str, ...]


def _layout(
    source: str, names: Sequence[str], folders: Iterable[str], split: str | None, exclude: Sequence[str]
) -> _Layout:
    """Classes of the image paths `names`; a folder around everything (`tar cf pets.tar pets`) is removed."""
    shown_source = shown(source)
    # macOS stores names decomposed, keyboards type them composed.
    names, exclude = [nfc(name) for name in names], [nfc(name) for name in exclude]
    folders, split = [nfc(folder) for folder in folders], None if split is None else nfc(split)
    if not names:
        raise SourceError(shown_source, "holds no images", f"Images may be {FORMATS}.")
    prefix = _prefix(shown_source, names, split)
    inside = [(i, n[len(prefix) :]) for i, n in enumerate(names) if n.startswith(prefix)]
    loose = [n for _, n in inside if "/" not in n]
    known = tuple(sorted({n.split("/", 1)[0] for _, n in inside if "/" in n}))
    if not known:
        if exclude:
            raise SourceError(shown_source, "has no classes, so none can be left out", "Drop the exclusion.")
        order = [i for i, _ in sorted(inside, key=lambda pair: pair[1])]
        return _Layout(order=order, labels=None, label_names=())
    if loose:
        reason = f"has images beside its class folders, for example {shown(loose[0])}"
        raise SourceError(shown_source, reason, "Move them into a class folder or out of the source.")
    if len(known) > 1 and {k.lower() for k in known} <= SPLIT_NAMES:
        reason = f"has the splits {', '.join(known)}"
        raise SourceError(shown_source, reason, f"Choose one, for example {shown_source}:{known[-1]}.")
    present = {
        f[len(prefix) :].split("/", 1)[0] for f in folders if f.startswith(prefix) and len(f) > len(prefix)
    }
    empty = sorted(present - set(known))
    for name in exclude:
        if name not in known and name not in empty:
            raise SourceError(
                f"class {shown(name)!r}",
                f"is not in {shown_source}",
                f"The nearest is {nearest(name, known, cutoff=0)!r}.",
            )
    empty = [e for e in empty if e not in exclude]
    if empty:
        reason = f"has no images for class {', '.join(shown(e) for e in empty)}"
        raise SourceError(shown_source, reason, "Add images, remove the folder, or leave the class out.")
    label_names = tuple(k for k in known if k not in set(exclude))
    if not label_names:
        raise SourceError(shown_source, "has no class left after the exclusion", "Leave out fewer classes.")
    number = {k: k_i for k_i, k in enumerate(label_names)}
    kept = sorted((number[n.split("/", 1)[0]], n, i) for i, n in inside if n.split("/", 1)[0] in number)
    labels = np.array([k for k, _, _ in kept], dtype=np.int64)
    return _Layout(order=[i for _, _, i in kept], labels=labels, label_names=label_names)


def _prefix(shown_source: str, names: Sequence[str], split: str | None) -> str:
    """The prefix to remove from the names: folders that contain everything, then the split."""

    def tops(prefix: str) -> set[str]:
        return {n[len(prefix) :].split("/", 1)[0] for n in names}

    def wrapper(prefix: str, depth: int) -> str:
        first = tops(prefix)
        alone = len(first) == 1 and all(n.count("/", len(prefix)) >= depth for n in names)
        return prefix + first.pop() + "/" if alone else ""

    if split is None:
        # At most two: the folder that was packed, and a single split in it.
        outer = wrapper("", 2)
        return wrapper(outer, 2) or outer if outer else ""
    for prefix in ("", wrapper("", 1)):
        if any(n.startswith(f"{prefix}{split}/") for n in names):
            return f"{prefix}{split}/"
    outer = wrapper("", 2)
    there = sorted({n[len(outer) :].split("/", 1)[0] for n in names if "/" in n[len(outer) :]})
    has = (
        f"its first-level folders are {', '.join(shown(t) for t in there[:12])}"
        if there
        else "it has no folders"
    )
    if len(there) > 12:
        has += f" and {len(there) - 12} more"
    near = nearest(split, there)
    step = f"Did you mean :{shown(near)}?" if near else "Name one of them after the colon, or none."
    raise SourceError(shown_source, f"has no split {shown(split)!r}; {has}", step)


def load_source(
    source: str,
    size: Size,
    channels: int = 3,
    *,
    exclude: Sequence[str] = (),
    workers: int | None = None,
    cache: bool = True,
) -> Loaded:
    """A labelled SOURCE decoded into one uint8 array, in an order that does not depend on the packing.

    SOURCE is a folder or a .tar, .tar.gz, .tar.xz, .tar.bz2 or .zip of one, either followed by `:SPLIT` for a
    first-level folder. Its first-level folders are the classes, images may lie deeper; images without a
    folder make an unlabelled source. Archives are streamed once; besides the array a few megabytes are used.

    Args:
        source: see above.
        size, channels: as for `decode`.
        exclude: classes to leave out.
        workers: decoding threads; the number of processors by default.
        cache: keep large results in `cache_dir()` and take them from there.
    Raises:
        SourceError: missing, damaged, without images, an empty class, splits of which none is chosen, an
            unknown class in `exclude`, or no readable image.
    """
    path, split = split_source(source)
    key = _cache_key(path, split, size, channels, exclude) if cache else None
    if key is not None and (cached := _cached(key)) is not None:
        return cached
    frame = frame_of(size)
    rows = decoded_cache.Rows(key, (frame.height, frame.width, channels), shown(source))
    try:
        return _loaded(source, path, split, exclude, workers, rows, frame)
    except SourceError as error:
        if (kind := foreign_layout(source)) is not None:
            raise SourceError(error.thing, NOT_READ.format(kind), ARRANGE) from None
        raise
    finally:
        rows.discard()


def _loaded(
    source: str,
    path: str,
    split: str | None,
    exclude: Sequence[str],
    workers: int | None,
    rows: decoded_cache.Rows,
    frame: Frame,
) -> Loaded:
    names, folders, failed, found = _decode_all(source, path, split, rows, frame, workers)
    layout = _layout(source, names, folders, split, exclude)
    at = {name_index: row for row, name_index in enumerate(i for i in range(len(names)) if i not in failed)}
    good = [(place, i) for place, i in enumerate(layout.order) if i not in failed]
    errors = tuple((names[i], failed[i]) for i in layout.order if i in failed)
    if not good:
        name, reason = errors[0]
        raise SourceError(shown(source), f"has no readable image; {shown(name)} {reason}")
    order = [at[i] for _, i in good]
    images = _ordered(rows.images(), order)
    labels = None if layout.labels is None else layout.labels[[place for place, _ in good]]
    digests = np.array(found, dtype=np.uint64)[order]
    loaded = Loaded(
        images=images,
        labels=labels,
        label_names=layout.label_names,
        names=tuple(names[i] for _, i in good),
        errors=errors,
        fingerprint=_fingerprint(images, labels, layout.label_names),
        digests=digests,
    )
    meta = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)[1:]}
    rows.file_under_key(
        {
            **meta,
            "labels": None if labels is None else labels.tolist(),
            "order": order,
            "digests": digests.tolist(),
        }
    )
    return loaded


def _ordered(images: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The images in that order, not copied: rows are stored as an archive lists them."""
    if len(order) == len(images) and all(row == k for k, row in enumerate(order)):
        return images
    return select(images, np.array(order, dtype=np.int64))


def _cache_key(path: str, split: str | None, size: Size, channels: int, exclude: Sequence[str]) -> str | None:
    shape = dataclasses.astuple(frame_of(size))
    if is_url(path):  # what is remote may change without a trace
        return None
    try:
        members: Iterable[Member] = [Member(name="", file=path)]
        if os.path.isdir(path):
            members = folder_members(path)
        elif is_table(path):
            members = itertools.chain(members, table_members(path))
        files = ((member.name, member.file) for member in members)
        return decoded_cache.key_of([os.path.realpath(path), split, shape, channels, sorted(exclude)], files)
    except OSError:
        return None


def _cached(key: str) -> Loaded | None:
    """The cached result, checked against its fingerprint; None where there is none or it is damaged."""
    found = decoded_cache.read(key)
    if found is None:
        return None
    images, meta, unchanged = found
    try:
        fits = images.dtype == np.uint8 and images.ndim == 4 and max(meta["order"]) < len(images)
        images = _ordered(images, meta["order"]) if fits else images
        labels = None if meta["labels"] is None else np.array(meta["labels"], dtype=np.int64)
        label_names = tuple(str(k) for k in meta["label_names"])
        if not fits or len(images) != len(meta["names"]):
            return None
        # Hashing all pixels takes seconds for large sources; a file that was not touched needs no check.
        if not unchanged and _fingerprint(images, labels, label_names) != meta["fingerprint"]:
            return None
        return Loaded(
            images=images,
            labels=labels,
            label_names=label_names,
            names=tuple(str(n) for n in meta["names"]),
            errors=tuple((str(n), str(r)) for n, r in meta["errors"]),
            fingerprint=meta["fingerprint"],
            digests=np.array(meta["digests"], dtype=np.uint64),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _decode_all(
    source: str, path: str, split: str | None, rows: decoded_cache.Rows, frame: Frame, workers: int | None
) -> tuple[list[str], list[str], dict[int, str], list[int]]:
    """(image names, folders, {index: reason}, digests); images that can be read go into `rows`."""
    names: list[str] = []
    folders: list[str] = []
    failed: dict[int, str] = {}

    def wanted(name: str) -> bool:
        return split is None or nfc(split) in nfc(name).split("/", 2)[:2]

    def listed() -> Iterator[tuple[int, Member]]:
        for member in _source_members(path, wanted):
            name = readable(member.name)
            if member.kind == "folder":
                folders.append(name)
            if member.kind != "image":
                continue
            if not names and split is None and name.split("/", 1)[0].lower() in SPLIT_NAMES:
                list_source(source)  # raises at once where a split must be chosen
            names.append(name)
            if wanted(name):
                yield len(names) - 1, member
            else:
                failed[len(names) - 1] = ""

    def work(batch: Sequence[tuple[int, Member]]) -> list[tuple[int, tuple[np.ndarray, int] | str]]:
        return [(index, _pixels_or_reason(member, frame, channels)) for index, member in batch]

    channels = rows.shape[2]
    digests: list[int] = []
    if (count := _count(path, wanted)) is not None:
        rows.expect(count)
    threads = workers or resources.processors()
    batches = map_batches(
        listed(),
        work,
        batch=64,
        workers=threads,
        weigh=lambda item: len(item[1].data or b""),
        max_weight=_MAX_WAITING_BYTES,
        name="decode",
    )
    try:
        with contextlib.closing(batches):
            for index, result in itertools.chain.from_iterable(batches):
                if isinstance(result, str):
                    failed[index] = result
                    continue
                rows.append(result[0])
                digests.append(result[1])
    except DamagedArchiveError as e:
        raise _damaged_source(source, e) from e
    return names, folders, failed, digests


def _count(path: str, wanted: Callable[[str], bool]) -> int | None:
    """How many images a folder or zip holds; None for tars, which would have to be read to their end, and
    for URLs, which would be listed twice.
    """
    if is_url(path):
        return None
    if os.path.isdir(path) or is_table(path):
        members = _source_members(path, wanted)
        return sum(member.kind == "image" and wanted(member.name) for member in members)
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(suffix_kind(name) == "image" and wanted(name) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None


def _pixels_or_reason(member: Member, size: Frame, channels: int) -> tuple[np.ndarray, int] | str:
    try:
        data = member.read(member.name)
        digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
        return decode(data, size, channels, name=member.name).pixels, digest
    except ImageError as e:
        return e.reason


def _fingerprint(images: np.ndarray, labels: np.ndarray | None, label_names: tuple[str, ...]) -> str:
    head = {"shape": images.shape, "label_names": label_names, "labelled": labels is not None}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode("utf-8"))
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[start : start + 4096]).data)
    return digest.hexdigest()
