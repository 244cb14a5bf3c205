"""python -m fastcl.official FILE --method moco-v2: a run folder of a released checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastcl import checkpoint
from fastcl.config import Run, as_dict
from fastcl.official import load_official
from fastcl.official.names import FAMILIES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2, after one line, for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m fastcl.official",
        description="Makes a run folder of a checkpoint that a paper's authors released, for "
        "fastcl.evaluate and fastcl.export.",
    )
    parser.add_argument("file", type=Path, help="the released file")
    parser.add_argument("--method", choices=FAMILIES, required=True, help="what it is of")
    parser.add_argument("--output", type=Path, help="run folder; none: the file's name without end")
    parser.add_argument("--data", default="imagenet", help="data that it is evaluated on")
    parser.add_argument("--data-dir", help="where that is")
    args = parser.parse_args(argv)
    folder: Path = args.output or args.file.with_name(args.file.name.partition(".")[0])
    try:
        if (folder / checkpoint.NAME).exists():
            raise ValueError(f"{folder} holds a run already: choose another --output")
        method, absent = load_official(args.file, args.method)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(
            method=args.method, data=args.data, data_dir=args.data_dir, recipe="paper", output=None
        )
        state = {"values": as_dict(run, method.config), "method": method.state_dict(), "step": 0}
        checkpoint.save(folder / checkpoint.NAME, state)
    except (ValueError, OSError) as error:
        print(f"fastcl.official: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    lacks = f"; the file has no {', '.join(absent)}" if absent else ""
    print(f"{args.method}, {method.config.backbone}{lacks}\n{folder / checkpoint.NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
