"""Writing artefact folders: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from skive.errors import SkiveError
from skive.runtime import MANIFEST


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes otherwise.

    An existing `folder` is replaced only if it is an artefact (or empty): nothing else is ever
    deleted. SkiveError if the place cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SkiveError(f"{folder} exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise SkiveError(f"{folder} is not empty and not an artefact; name another folder")
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
    except OSError as e:
        raise SkiveError(f"cannot write {folder}: {e.strerror}") from None
    try:
        try:
            yield temporary
        except OSError as e:
            raise SkiveError(f"cannot write {folder}: {e.strerror or e}") from None
        temporary.chmod(0o755)
        old = None
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=parent))
            os.replace(folder, old / "artefact")
        os.replace(temporary, folder)
        if old:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
