"""Files that appear whole or not at all: a gateway that reads them meanwhile sees the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hub_gateway.errors import BadRequest, Conflict

__all__ = ["Content", "contents_of", "write_file", "write_folder"]


@dataclass(frozen=True)
class Content:
    """What a file is to hold."""

    data: bytes
    mode: int = 0o644


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Write a file in one go, with that mode whatever the umask. Raises `OSError`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def contents_of(folder: Path) -> dict[str, Content]:
    """The files of a folder and of those below it, by relative name. Raises `BadRequest`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise BadRequest(f"{path} is a link to {path.resolve()}, outside of the folder; put the file in its place.")
        if path.is_symlink() and not path.is_file():
            raise BadRequest(f"{path} is a link to {path.resolve()}, which is no file; put the folder in its place.")
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        try:
            found[name] = Content(path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644)
        except OSError as error:
            raise BadRequest(f"{path} cannot be read: {error.strerror}.") from error
    return found


def write_folder(folder: Path, files: Mapping[str, Content], *, last: str, replace: bool) -> None:
    """Write a folder's files, the one that makes it count `last`. Raises `Conflict`, `BadRequest`.

    With `replace` a folder that has such a file is brought to these, and is never without it; what is not among them
    is removed.
    """
    try:
        _make_folders(folder.parent)
        made = _make(folder, last, replace=replace)
        try:
            for name in sorted(files, key=lambda name: name == last):
                _make_below(folder, Path(name).parent)
                write_file(folder / name, files[name].data, files[name].mode)
        except OSError:
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        for path in [] if made else sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(folder).as_posix() not in files:
                path.unlink()
    except OSError as error:
        raise BadRequest(f"{error.filename or folder} cannot be written: {error.strerror}.") from error


def _make(folder: Path, last: str, *, replace: bool) -> bool:
    """Whether the folder was made; else it was there, and may be written over."""
    try:
        _mkdir(folder)
    except FileExistsError as error:
        if not replace:
            raise Conflict(
                f"{folder} is there already, and was left as it is.", hint="--replace writes over it"
            ) from error
        if not (folder / last).is_file():
            raise Conflict(f"{folder} holds no {last}, so it is left alone; choose another name.") from error
        return False
    return True


def _make_below(folder: Path, below: Path) -> None:
    """Make a sub-folder; a link in its place would lead what is written out of the folder, and is removed."""
    for part in [*reversed(below.parents), below]:
        if part.parts and (folder / part).is_symlink():
            (folder / part).unlink()
    _make_folders(folder / below)


def _make_folders(folder: Path) -> None:
    """Make a folder, and those above it that are not there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # somebody else was quicker
            _mkdir(path)


def _mkdir(folder: Path) -> None:
    """Make one that the gateway, which may be another account, can read whatever the umask. Raises `OSError`."""
    folder.mkdir(0o755)
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o755)
