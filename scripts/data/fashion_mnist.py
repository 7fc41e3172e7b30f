"""Gets Fashion-MNIST from the Debian package `dataset-fashion-mnist` without installing it, and checks it.

    python scripts/data/fashion_mnist.py data/fashion-mnist [--deb FILE.deb]

Then: data=fashion_mnist data.path=data/fashion-mnist. Needs `apt-get` and `dpkg-deb`; with --deb, a package that was
downloaded elsewhere. The licence (MIT, Zalando) is copied beside the files.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from distill.data.idx import FILES, FashionMnist

PACKAGE = "dataset-fashion-mnist"
COUNTS = {"train": 60_000, "test": 10_000}


def unpack(deb: Path, target: Path) -> None:
    """Copy the data and the licence of a package to a folder."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["dpkg-deb", "-x", str(deb), name], check=True)
        found = Path(name) / "usr" / "share" / "datasets" / "fashion-mnist"
        target.mkdir(parents=True, exist_ok=True)
        for stem in FILES.values():
            for kind in ("images-idx3", "labels-idx1"):
                shutil.copy(found / f"{stem}-{kind}-ubyte.gz", target)
        shutil.copy(Path(name) / "usr" / "share" / "doc" / PACKAGE / "copyright", target / "copyright")


def check(target: Path, counts: dict[str, int]) -> None:
    """Raise ValueError unless each split has so many images, the same number of each class."""
    for split, count in counts.items():
        data = FashionMnist(str(target), split)
        classes = data.labels.bincount(minlength=10).tolist()
        if len(data) != count or set(classes) != {count // 10}:
            raise ValueError(
                f"{target}: {split}: found {len(data)} images, {classes} a class, expected {count}"
            )


def main() -> None:
    """Fetch, unpack and check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--deb", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if (deb := given.deb) is None:
            subprocess.run(["apt-get", "download", PACKAGE], check=True, cwd=name)
            deb = next(Path(name).glob(f"{PACKAGE}_*.deb"))
        unpack(deb, given.folder)
    check(given.folder, COUNTS)
    print(f"{given.folder}: 60,000 + 10,000 images, checked")


if __name__ == "__main__":
    main()
