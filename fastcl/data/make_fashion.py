"""Makes fastcl/data/fashion.npz, the embedded data: python -m fastcl.data.make_fashion FOLDER

FOLDER holds the four files of Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747; MIT licence) under
their published names, train-images-idx3-ubyte.gz and so on. The first 10,000 training and the first
2,000 test images are kept as they are, grey, 28×28: 5.3 MB. They get their colours when they are
loaded (fashion.py).
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastcl.data.fashion import ARCHIVE

TRAIN_IMAGES = 10_000
TEST_IMAGES = 2_000


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of bytes: 0, 0, type 8, rank, the sizes as big-endian int32, then the data."""
    data = gzip.decompress(path.read_bytes())
    zero, kind, rank = int.from_bytes(data[:2], "big"), data[2], data[3]
    if (zero, kind) != (0, 8):
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    sizes = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=ARCHIVE)
    args = parser.parse_args()
    np.savez_compressed(
        args.output,
        train_images=read_idx(args.folder / "train-images-idx3-ubyte.gz")[:TRAIN_IMAGES],
        train_labels=read_idx(args.folder / "train-labels-idx1-ubyte.gz")[:TRAIN_IMAGES],
        test_images=read_idx(args.folder / "t10k-images-idx3-ubyte.gz")[:TEST_IMAGES],
        test_labels=read_idx(args.folder / "t10k-labels-idx1-ubyte.gz")[:TEST_IMAGES],
    )
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
