"""From dataclass fields to command-line flags, and back to config.yaml.

Every field of `Run` and of a method's Config is a flag of its own name. A value comes from, the
later winning: the field's default (the paper), the recipe, `--config FILE`, the command line.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from fastcl import checkpoint
from fastcl.checkpoint import NAME, PREVIOUS
from fastcl.data import DATASETS
from fastcl.data.augment import RECIPES as AUGMENTATIONS
from fastcl.data.colours import CHANNELS
from fastcl.methods import METHODS, Config
from fastcl.methods.base import option
from fastcl.optim import OPTIMIZERS, SCHEDULES


class UsageError(Exception):
    """The user asked for something that cannot be done; the message is one line for them."""


@dataclass(frozen=True)
class Run:
    """What the trainer needs beside the method's Config."""

    method: str = option("swav", ", ".join(METHODS))
    data: str = option("fashion", ", ".join(DATASETS))
    data_dir: str | None = option(
        None, "where the data is; of hf also a name on the Hub, of webdataset 'x-{000..012}.tar'"
    )
    download: bool = option(False, "fetch the data into --data-dir when it is not there")
    image_column: str | None = option(
        None, "of hf, the column of images; of webdataset, what their names end in, as jpg"
    )
    label_column: str | None = option(
        None, "of hf, the column of labels; of webdataset, what their names end in, or json.FIELD"
    )
    recipe: str = option("quick", "quick: minutes on a CPU; paper: the published numbers")
    output: str | None = option(None, "run folder; default runs/METHOD-DATA, numbered when taken")
    seed: int = option(0, "of weights, data order and augmentation", at_least=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    precision: str = option("fp32", "fp32, bf16 or fp16: what the encoder computes in")
    channels_last: bool = option(False, "images and encoder with the channels innermost")
    compile: bool = option(False, "torch.compile the encoder for training")
    micro_batch: int = option(
        0,
        "crops that the encoder takes at once, to save memory; the loss stays that of the whole "
        "batch. 0: all",
        at_least=0,
    )
    timeout: float = option(
        30.0, "minutes that a process waits for the others, where torchrun started many", above=0
    )
    workers: int = option(1, "threads (or processes, for files) that prepare batches", at_least=0)
    eval_every: int = option(
        10, "epochs between kNN evaluations; 0: only first and last", at_least=0
    )
    checkpoint_every: int = option(1, "epochs between checkpoints", at_least=1)
    checkpoint_steps: int = option(
        0, "steps between further checkpoints, within epochs; 0: none", at_least=0
    )
    keep_every: int = option(
        0, "epochs between checkpoints kept for good, checkpoint-epochN.pt; 0: none", at_least=0
    )
    log_every: int = option(10, "steps between rows of metrics.jsonl", at_least=1)
    report: bool = option(True, "draw report.png and report.html at the end")
    tensorboard: bool = option(True, "write TensorBoard events too, where it is installed")


WATCHING = {  # flags of a Run that are about what it writes
    *("output", "eval_every", "log_every", "report", "tensorboard"),
    *("checkpoint_every", "checkpoint_steps", "keep_every"),
}
SPEED = {"precision", "channels_last", "compile", "micro_batch", "workers"}  # flags of a Run, too
OPTIMISATION = {  # flags of every Config that are about the optimizer
    *("epochs", "batch_size", "optimizer", "lr", "sgd_momentum", "weight_decay", "schedule"),
    *("warmup_epochs", "start_lr", "final_lr", "milestones", "factors"),
}
RUNS = "runs"  # the folder of run folders, where --output does not say otherwise
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    run: Run
    config: Config
    print_config: bool
    checkpoint: Path | None  # what --resume found
    changed: tuple[str, ...]  # fields that the resumed run had otherwise


def parse(argv: Sequence[str]) -> Request:
    """Read the command line. Raises UsageError with one clear line."""
    first = _Parser(add_help=False, allow_abbrev=False)
    for flag in ("--method", "--recipe", "--config", "--output"):
        first.add_argument(flag)
    first.add_argument("--resume", nargs="?", const="")
    early, _ = first.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    from_file = read_yaml(early.config) if early.config else {}
    path = (
        None if early.resume is None else find_checkpoint(early.resume, early.output, early.method)
    )
    saved = {} if path is None else _saved_values(path)
    known = saved | from_file
    method = early.method or str(known.get("method", Run.method))
    recipe = early.recipe or str(known.get("recipe", Run.recipe))
    choose("method", method, METHODS)
    choose("recipe", recipe, METHODS[method].recipes)
    base = METHODS[method].recipes[recipe]

    parser = _parser(method, recipe, base)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        what = "flag" if unknown[0].startswith("-") else "argument"
        raise UsageError(unknown_line(what, unknown[0], (f for f in flags if f[:2] == "--")))
    given = {name: value for name, value in vars(values).items() if value is not None}
    print_config = given.pop("print_config", False)
    given = {name: value for name, value in given.items() if name not in ("config", "resume")}
    names = fields_of(Run) | fields_of(type(base))
    for name in from_file:
        if name not in names:
            raise UsageError(f"{early.config}: {unknown_line('field', name, sorted(names))}")
    run, config = Run(method=method, recipe=recipe), base
    if path is not None:
        run, config = with_values(run, saved), with_values(config, saved)
        given["output"] = str(path.parent)
    before = as_dict(run, config)
    run, config = with_values(run, from_file | given), with_values(config, from_file | given)
    after = as_dict(run, config)
    changed = tuple(name for name in after if path is not None and after[name] != before[name])
    return Request(run, config, bool(print_config), path, tuple(set(changed) - {"output"}))


def find_checkpoint(where: str, output: str | None, method: str | None) -> Path:
    """The checkpoint that `--resume [where]` means. Raises UsageError when there is none."""
    if where or output:
        path = Path(where or str(output))
        path = path / NAME if path.is_dir() else path
        if not path.is_file():
            raise UsageError(f"nothing to resume: there is no checkpoint at {path}{_whole(path)}")
        return path
    found = sorted(
        Path(RUNS).glob(f"{method or ''}*/{NAME}"), key=lambda path: path.stat().st_mtime
    )
    if not found:
        raise UsageError(f"nothing to resume: no {RUNS}/{method or ''}*/{NAME}; give --resume RUN")
    return found[-1]


def claim_folder(request: Request) -> Path:
    """The run folder, created. Raises UsageError rather than overwrite another run's checkpoint."""
    if request.checkpoint is not None:
        return request.checkpoint.parent
    run = request.run
    if run.output is not None:
        folder = Path(run.output)
        if (folder / NAME).exists():
            raise UsageError(
                f"{folder} holds a run already: go on with --resume {folder}, "
                "or choose another --output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        folder = Path(RUNS) / f"{run.method}-{run.data}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _saved_values(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = checkpoint.load(path)["values"]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot resume: {error}{_whole(path)}") from None
    return values


def _whole(path: Path) -> str:
    """Which other checkpoint beside path can be read, and how to go on from it; "" for none."""
    others = [path.with_name(NAME), path.with_name(PREVIOUS)]
    others += sorted(path.parent.glob("checkpoint-epoch*.pt"), key=lambda p: -p.stat().st_mtime)
    for other in others:
        with contextlib.suppress(OSError, ValueError):
            if other != path:
                step = checkpoint.load(other)["step"]
                return f"; {other.name} is whole, of step {step}: go on with --resume {other}"
    return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)


def _parser(method: str, recipe: str, base: Config) -> _Parser:
    parser = _Parser(
        prog="python -m fastcl.train",
        usage="%(prog)s [--method METHOD] [flags]",
        description="Self-supervised training. In brackets: the default, here that of\n"
        f"--method {method} --recipe {recipe}.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of values for the flags below")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with a run (folder or checkpoint.pt); alone: with --output, or the latest one",
    )
    parser.add_argument("--print-config", action="store_true", help="print the values and stop")
    shared = fields_of(Config)
    groups = (
        ("the run", Run(), fields_of(Run) - WATCHING - SPEED),
        ("speed and memory", Run(), SPEED),
        ("what it writes, and how often", Run(), WATCHING),
        ("encoder and views", base, shared - OPTIMISATION),
        ("optimisation", base, OPTIMISATION),
        (f"the method, {method}", base, fields_of(type(base)) - shared),
    )
    for title, instance, names in groups:
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(instance):
            if field.name in names:
                _add_flag(group, field.name, type(instance), getattr(instance, field.name))
    return parser


def _add_flag(group: argparse._ArgumentGroup, name: str, owner: type, default: Any) -> None:
    """One flag; its default is None, so that what was given can be told from what was not."""
    flag, text = "--" + name.replace("_", "-"), metadata(owner, name)["help"]
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "none" if shown in (None, "") else shown
    shown = ("off", "on")[shown] if isinstance(shown, bool) else shown
    options: dict[str, Any] = {"default": None, "help": f"{text} [{shown}]".replace("%", "%%")}
    kind, many, _ = kind_of(owner, name)
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif many:
        group.add_argument(flag, nargs="*", metavar="N", **options)
    else:
        group.add_argument(flag, metavar=kind.__name__.upper(), **options)


def fields_of(owner: type) -> set[str]:
    return {field.name for field in dataclasses.fields(owner)}


def metadata(owner: type, name: str) -> Mapping[str, Any]:
    """A field's metadata, from the nearest class that gives any: a new default keeps it."""
    for cls in owner.__mro__:
        field = cls.__dict__.get("__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata:
            found: Mapping[str, Any] = field.metadata
            return found
    raise AssertionError(f"{owner.__name__}.{name} has no help")


def kind_of(owner: type, name: str) -> tuple[type, bool, int | None]:
    """(type of the value or of its items, whether it is a tuple, of how many if that is fixed)."""
    hint = typing.get_type_hints(owner)[name]
    if isinstance(hint, UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not NoneType)
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return items[0], True, None if items[-1] is Ellipsis else len(items)
    return hint, False, None


T = typing.TypeVar("T", bound=Run | Config)


def with_values(instance: T, values: Mapping[str, Any]) -> T:
    """instance with those of `values` that are its fields, converted to their types and checked."""
    changes = {
        name: convert(type(instance), name, values[name])
        for name in fields_of(type(instance))
        if name in values
    }
    return dataclasses.replace(instance, **changes)


def convert(owner: type, name: str, value: Any) -> Any:
    """A value from the command line or from YAML as the field's type. Raises UsageError."""
    flag, (kind, many, length) = "--" + name.replace("_", "-"), kind_of(owner, name)
    if value is None:
        return None
    if many:
        items = value if isinstance(value, list | tuple) else [value]
        if length is not None and len(items) != length:
            raise UsageError(f"{flag} takes {length} values; got {len(items)}")
        return tuple(_one(flag, kind, item) for item in items)
    result = _one(flag, kind, value)
    rule = metadata(owner, name)
    above, at_least = rule.get("above"), rule.get("at_least")
    if above is not None and not result > above:
        raise UsageError(f"{flag} must be above {above:g}; got {result}")
    if at_least is not None and not result >= at_least:
        raise UsageError(f"{flag} must be at least {at_least:g}; got {result}")
    for key, choices in CHOICES.items():
        if name == key:
            choose(name, result, choices)
    return result


CHOICES: dict[str, Iterable[str]] = {
    "method": METHODS,
    "data": DATASETS,
    "augmentation": AUGMENTATIONS,
    "colours": CHANNELS,
    "precision": PRECISIONS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}


def _one(flag: str, kind: type, value: Any) -> Any:
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and isinstance(value, bool | float) and value != int(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise UsageError(f"{flag} must be {wanted}; got {value!r}") from None


def choose(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises UsageError with the whole list unless value is one of choices."""
    if value not in choices:
        raise UsageError(unknown_line(what, value, choices))


def unknown_line(what: str, value: str, choices: Iterable[str]) -> str:
    """`unknown method 'swaw'; did you mean swav? Methods: moco-v1, …`"""
    choices = list(choices)
    close = difflib.get_close_matches(value.split("=")[0], choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    plural = what if what == "data" else f"{what}s"
    return f"unknown {what} {value!r}{hint} {plural.capitalize()}: {', '.join(choices)}"


def as_dict(run: Run, config: Config) -> dict[str, Any]:
    """All values by flag, tuples as lists: what checkpoints and config.yaml hold."""
    both = dataclasses.asdict(run) | dataclasses.asdict(config)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in both.items()}


def to_yaml(values: Mapping[str, Any]) -> str:
    """One `key: value` a line."""
    return "".join(f"{key}: {_yaml(value)}\n" for key, value in values.items())


def _yaml(value: Any) -> str:
    """A value as JSON, which is YAML too, but for 1e-06: to YAML a number only as 1.0e-06."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError."""
    try:
        import yaml
    except ImportError:
        raise UsageError("--config needs PyYAML: pip install 'fastcl[train]'") from None
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold `flag: value` lines")
    return {str(key).replace("-", "_"): value for key, value in values.items()}
