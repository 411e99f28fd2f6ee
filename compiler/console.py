"""How the command line speaks and how it ends: tables, JSON, progress, errors in one line, signals."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from skive.errors import SkiveError, UnsupportedOpError

if TYPE_CHECKING:
    from skive.changes import Progress

# ------------------------------------------------------------------------------------ what is said


def printable(text: str) -> str:
    """`text` on one line, with control, bidirectional and other invisible characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(error: SkiveError) -> str:
    """The message of `error` on one line."""
    if isinstance(error, UnsupportedOpError) and len(error.problems) > 1:
        places = (f"{node}: {reason}" + (f"; {hint}" if hint else "")
                  for node, reason, hint in error.problems)
        return printable(f"{len(error.problems)} places are not supported: " + " | ".join(places))
    return printable(" ".join(str(error).split("\n  ")))


def bytes_text(n: float) -> str:
    """`n` bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "KB", "MB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.3g} {unit}" if n < 999 else f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.3g} GB"


def count_text(n: float) -> str:
    """`n` with a decimal suffix: 4.09 G."""
    for unit in ("", " K", " M"):
        if n < 1000:
            return f"{n:.0f}" if not unit else f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} G"


def finite(value: Any) -> Any:
    """`value` as JSON data: NumPy scalars unwrapped, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(document: Any) -> None:
    click.echo(json.dumps(finite(document), indent=1, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; a column whose name starts with `>` is aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for c in columns:
        table.add_column(Text(c.lstrip(">")), justify="right" if c.startswith(">") else "left",
                         overflow="fold", no_wrap=c.startswith(">"))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # A pipe has no width: nothing is cut there.
    width = None if sys.stdout.isatty() else 10_000
    console = Console(file=sys.stdout, width=width, highlight=False)
    with console.capture() as captured:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callable that shows (step, fraction) as a bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda step, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description:<10}"), BarColumn(), TimeElapsedColumn(),
                  console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("start", total=1.0)
        yield lambda step, fraction: bars.update(bar, description=step, completed=fraction)


class OneLine(logging.Handler):
    """Warnings of the compiler as lines `warning: ...` on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.lower()}: {printable(record.getMessage())}", err=True)


# --------------------------------------------------------------------------------- how it ends


def _descendants() -> list[int]:
    """Process ids of the children of this process, and of theirs."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (command) state ppid ...": the command may hold spaces and parentheses.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it ended meanwhile
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _end_descendants(sweeps: int | None = None) -> None:
    """Ends compilers and bench workers: until none is left, but at most so often. None: for as long as this
    process lives, as a pool of threads may start one more before it learns that it is no longer wanted."""
    for _ in itertools.count() if sweeps is None else range(sweeps):
        stopped: set[int] = set()
        while found := set(_descendants()) - stopped:  # what has stopped starts nothing that would outlive it
            _signal(found, signal.SIGSTOP)
            stopped |= found
        if not stopped and sweeps is not None:
            return
        _signal(stopped, signal.SIGTERM)
        _signal(stopped, signal.SIGCONT)
        time.sleep(0.02)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


class _Interrupted(BaseException):
    """Raised by a signal. Not a KeyboardInterrupt: click prints an empty line for that."""


def _late(signum: int, frame: Any) -> None:
    """Ignores a signal. Not SIG_IGN: a compiler that a thread starts meanwhile would inherit that, and not end."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM end the child processes and raise _Interrupted.

    A signal strikes anywhere, also where a lock of `threading` is about to be released: what the block raises
    afterwards is a consequence. One that strikes after the interpreter looked for signals, but before the main
    thread sleeps in the kernel, would be noticed when that sleep ends: a second thread, which hears of each
    signal (`signal.set_wakeup_fd`), repeats it until it is noticed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        for s in before:
            signal.signal(s, _late)  # cleaning up is not interrupted
        raise _Interrupted

    def watch() -> None:
        if struck := heard.recv(1):
            while signal.getsignal(struck[0]) is interrupt:
                signal.pthread_kill(main, struck[0])
                time.sleep(0.02)
            _end_descendants()
        heard.close()

    heard, told = socket.socketpair()
    told.setblocking(False)
    main = threading.get_ident()
    threading.Thread(target=watch, daemon=True).start()
    others = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException as e:
        if signal.getsignal(signal.SIGINT) is _late:
            raise _Interrupted from e
        raise
    finally:
        for s, handler in before.items():
            if signal.getsignal(s) is interrupt:
                signal.signal(s, handler)
        signal.set_wakeup_fd(others)
        told.close()


def fail(message: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"error: {message}", err=True)
    return 1


def _guarded(call: Callable[[], Any]) -> int:
    """The exit status of `call`, whose errors are told in one line."""
    try:
        with _interruptible():
            status = call()
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.UsageError as e:
        e.show()
        return 2
    except click.ClickException as e:
        return fail(printable(e.format_message()))
    except _Interrupted:
        fail("interrupted")
        _end_descendants(100)
        # Without waiting for threads: one whose start was interrupted is in no pool, and never ends.
        atexit._run_exitfuncs()
        os._exit(1)
    except (KeyboardInterrupt, click.Abort):
        return fail("interrupted")
    except BrokenPipeError:
        # The reader has gone. What is still buffered must not fail once more at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SkiveError as e:
        if os.environ.get("SKIVE_DEBUG"):
            traceback.print_exc()
        return fail(describe(e))
    except MemoryError:
        return fail("out of memory")
    except OSError as e:
        if os.environ.get("SKIVE_DEBUG"):
            traceback.print_exc()
        place = f"{e.filename}: " if e.filename else ""
        return fail(printable(f"{place}{e.strerror or e}"))
    except Exception as e:  # noqa: BLE001 - a traceback is not an answer
        if os.environ.get("SKIVE_DEBUG"):
            traceback.print_exc()
            return fail(printable(f"internal: {type(e).__name__}: {e}"))
        return fail(printable(f"internal: {type(e).__name__}: {e}; please report it "
                               "(SKIVE_DEBUG=1 shows where it happened)"))


class Commands(click.Group):
    """A group whose every error ends as the contract says."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None,
             complete_var: str | None = None, standalone_mode: bool = True,
             windows_expand_args: bool = True, **extra: Any) -> Any:
        if not os.environ.get("SKIVE_DEBUG"):
            warnings.simplefilter("ignore")  # of other packages, for developers
        sys.exit(_guarded(lambda: super(Commands, self).main(
            args, prog_name or "skive", complete_var, standalone_mode=False, **extra)))


def write_file(path: str, write: Callable[[Path], Any]) -> None:
    """Has `write` fill a temporary file beside `path`, then moves it there: whole or not at all."""
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.absolute().parent, prefix=f".{target.name}.",
                                        suffix=target.suffix)
        os.close(handle)
    except OSError as e:
        raise SkiveError(f"cannot write {path}: {e.strerror}") from None
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as e:
        raise SkiveError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)
