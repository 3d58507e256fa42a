"""Split a labelled source into calibration and report images, as for the default model.

    python -m experiments.split_test cifar10.tar.xz:test --per-class 100

writes `cifar10-test-first-1000/` (the first 100 images of each class by file name; for calibration) and
`cifar10-test-other-9000/` (all others; for the reported numbers), with the original bytes.
"""

from __future__ import annotations

import argparse
import tarfile
from collections import defaultdict
from pathlib import Path, PurePosixPath


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="ARCHIVE:SPLIT with SPLIT/CLASS/FILE inside")
    parser.add_argument("--per-class", type=int, default=100, metavar="N")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER")
    given = parser.parse_args()
    archive, _, split = given.source.rpartition(":")
    classes: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            stream = tar.extractfile(member) if parts[-3:-2] == (split,) else None
            if stream is not None:
                classes[parts[-2]][parts[-1]] = stream.read()
    first = sum(min(given.per_class, len(files)) for files in classes.values())
    others = sum(len(files) for files in classes.values()) - first
    name = f"{Path(archive).name.partition('.')[0]}-{split}"
    for label, files in classes.items():
        for number, (file, data) in enumerate(sorted(files.items())):
            part = f"first-{first}" if number < given.per_class else f"other-{others}"
            folder = given.out / f"{name}-{part}" / label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)


if __name__ == "__main__":
    main()
