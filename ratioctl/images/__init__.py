"""From files, folders and archives to pixels.

`decode` is the only implementation of the input pipeline: first frame, EXIF orientation, transparency over
white, RGB, center square, Pillow bicubic, 8 bits. `walk` lists the images to score, `load_source` decodes a
labelled data source into one uint8 array, `near_duplicates` compares two such arrays. Nothing is unpacked to
disk, and every function may be called from several threads at once. What scoring does not need is imported
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ratioctl.images.archive import Member, is_archive
from ratioctl.images.arrays import pixels_sha256, to_pixels, to_uint8
from ratioctl.images.decode import MAX_PIXELS, NARROW, Decoded, decode, orientation
from ratioctl.images.files import FORMATS, read_file
from ratioctl.images.inputs import ACCEPTED, as_array, as_list, encoded, is_path, items_of_value
from ratioctl.images.walk import Item, is_collection, walk
from ratioctl.utils.text import shown

if TYPE_CHECKING:
    from ratioctl.images.cache import cache_dir
    from ratioctl.images.duplicates import Duplicate, duplicate_groups, near_duplicates
    from ratioctl.images.labelled import (
        MISSING,
        Loaded,
        SourceIndex,
        foreign_layout,
        list_source,
        load_source,
        split_source,
        splits_of,
    )

_LAZY = {
    "cache": ("cache_dir",),
    "duplicates": ("Duplicate", "duplicate_groups", "near_duplicates"),
    "labelled": (
        *("MISSING", "Loaded", "SourceIndex", "foreign_layout", "list_source", "load_source"),
        *("split_source", "splits_of"),
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
