"""Options that several commands share, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from skive.cli.arrays import read_arrays
from skive.errors import SkiveError

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Bytes(click.ParamType):
    """A number of bytes: 4096, 256K, 2M, 1G."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        text = str(value).upper().removesuffix("B")
        number, suffix = (text[:-1], text[-1:]) if text[-1:] in ("K", "M", "G") else (text, "")
        if not number.isdecimal():
            self.fail(f"{value!r} is not a number of bytes such as 4096, 256K or 2M", param, ctx)
        return int(number) * _SUFFIXES[suffix]


class InputShape(click.ParamType):
    """NAME=1x3x224x224 as (name, shape); a leading N is the batch, -1 in the shape."""

    name = "name=shape"

    def convert(self, value: Any, param: click.Parameter | None,
                ctx: click.Context | None) -> tuple[str, tuple[int, ...]]:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).rpartition("=")  # a name may hold `=`
        dims = text.split("x") if text else []
        batched = dims[:1] == ["N"]
        if not equals or not name or not all(d.isdecimal() for d in dims[batched:]):
            self.fail(f"{value!r} is not NAME=1x3x224x224 (or NAME=Nx3x224x224 with --batch-max)",
                      param, ctx)
        return name, (-1,) * batched + tuple(int(d) for d in dims[batched:])


def _configure(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Takes the defaults of the command's options from a TOML file; the command line wins."""
    if path is None:
        return
    import tomllib

    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise SkiveError(f"cannot read {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SkiveError(f"{path}: {e}") from None
    names = {o.removeprefix("--"): p.name for p in ctx.command.params
             if isinstance(p, click.Option) and p.name != "config" for o in p.opts if o.startswith("--")}
    for key, value in values.items():
        if key not in names:
            raise SkiveError(f"{path}: {ctx.info_name} has no option {key!r}; it has "
                             + ", ".join(sorted(n for n in names if n != "help")))
        many = any(p.multiple for p in ctx.command.params
                   if isinstance(p, click.Option) and p.name == names[key])
        if isinstance(value, dict) or (isinstance(value, list) and not many):
            raise SkiveError(f"{path}: {key} is one value")
        values[key] = [value] if many and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **{names[k]: v for k, v in values.items()}}


CONFIG = click.option("--config", metavar="FILE.toml", is_eager=True, expose_value=False,
                       callback=_configure, help="Options of this command, under their names here.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
THREADS = click.IntRange(1, 256)


def shape_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which shapes a model has."""
    for option in (
        click.option("--example", metavar="FILE.npz", help="Example inputs: shapes and types."),
        click.option("--batch-max", type=click.IntRange(1, 1 << 20), metavar="N",
                     help="Compile a symbolic batch for 1 to N samples a call."),
        click.option("--input", "inputs", type=InputShape(), multiple=True,
                     metavar="NAME=1x3x224x224",
                     help="Shape of an input (repeatable); NAME=Nx3x224x224 leaves the batch open."),
    ):
        command = option(command)
    return command


def requested_shapes(inputs: Sequence[tuple[str, tuple[int, ...]]], batch_max: int | None,
                     example: str | None) -> dict[str, Any]:
    """The keyword arguments of `frontend.open_model` that the shape options ask for."""
    if batch_max is None and any(shape[:1] == (-1,) for _, shape in inputs):
        raise click.UsageError("a shape with a leading N needs --batch-max")
    return {"input_shapes": dict(inputs), "batch_max": batch_max, "example_inputs": _example(example)}


def _example(spec: str | None) -> Any:
    if spec is None:
        return None
    arrays = read_arrays(spec)
    positional = [f"arr_{i}" for i in range(len(arrays))]
    return tuple(arrays[k] for k in positional) if sorted(arrays) == sorted(positional) else arrays
