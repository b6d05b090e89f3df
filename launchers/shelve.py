"""Puts the launchers on a node, and says where they lie: sent over the connection and run from there.

    python3 -I -c 'import sys;i=sys.stdin.buffer;exec(i.read(int(i.readline())))'

reads this text, preceded by its length, and then one line, a JSON document: `root`, the directory for all versions;
`names`, for a directory in it that is that instead, if everybody may write to it; `digest`, the name of this version's;
`files`, their texts by name, with `hashes` (SHA-256). What is there already and has the right hashes is kept. Everybody
may read it, as kernels of any user start from it; only who logs in may write it.

Needs Python 3.8, nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import py_compile
import re
import shutil
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List


class Refused(Exception):
    """The launchers cannot lie there; the sentence says why."""


def safe(path: str) -> None:
    """Refuse a directory that somebody else could change."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise Refused("%s is not a directory" % path)
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
        raise Refused("%s belongs to, or can be written by, somebody else" % path)


def chosen(root: str, names: List[str]) -> str:
    """The directory for all versions: `root`, or one in it that nobody else has made, where everybody may make some.

    One that is there already is taken, whichever gateway made it: what lies in it is looked at in any case.
    """
    try:
        mode = os.stat(root).st_mode
    except FileNotFoundError:
        return root
    if not mode & stat.S_IWOTH:
        return root
    if not mode & stat.S_ISVTX:
        raise Refused("everybody may take away what others have in %s, which lacks the sticky bit" % root)
    ours = re.compile(re.escape(names[0].rpartition("-")[0]) + "-[0-9a-f]{16}")
    there = [name for name in sorted(os.listdir(root)) if ours.fullmatch(name)]
    taken = ""
    for name in there + names:
        try:
            safe(os.path.join(root, name))
        except FileNotFoundError:
            pass
        except Refused as error:
            taken = str(error)
            continue
        return os.path.join(root, name)
    raise Refused("somebody else has made all of %d directories in %s: %s" % (len(names), root, taken))


def whole(directory: str, hashes: Dict[str, str]) -> bool:
    """Whether every file is there, and is what it should be."""
    for name, expected in hashes.items():
        path = os.path.join(directory, name)
        try:
            with open(path, "rb") as file:
                right = hashlib.sha256(file.read()).hexdigest() == expected
        except OSError:
            return False
        if not right or not stat.S_ISREG(os.lstat(path).st_mode):
            return False
    return True


def put(root: str, digest: str, files: Dict[str, str], hashes: Dict[str, str]) -> str:
    """The directory of this version, made in one piece if it is not there."""
    try:
        os.mkdir(root, 0o755)
    except FileExistsError:
        pass
    safe(root)
    # Several gateways, or one that asks twice at once, take turns.
    fd = os.open(os.path.join(root, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return put_alone(root, digest, files, hashes)
    finally:
        os.close(fd)


def put_alone(root: str, digest: str, files: Dict[str, str], hashes: Dict[str, str]) -> str:
    """The same, while nobody else does it."""
    target, aside = os.path.join(root, digest), os.path.join(root, ".%s.%d" % (digest, os.getpid()))
    if os.path.isdir(target):
        safe(target)
        if whole(target, hashes):
            os.utime(target)  # what cleans directories of temporary files goes by age
            return target
        shutil.rmtree(target)
    os.mkdir(aside, 0o755)
    try:
        for name, text in files.items():
            with open(os.path.join(aside, name), "w", encoding="utf-8") as file:
                file.write(text)
        if not whole(aside, hashes):
            raise Refused("what was written to %s is not what was sent" % aside)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def compiled(directory: str) -> str:
    """The agent, compiled where that can be: Python compiles a script anew at every start, for 25 ms of CPU."""
    source = os.path.join(directory, "agent.py")
    try:
        return py_compile.compile(source, doraise=True) or source
    except (OSError, py_compile.PyCompileError):
        return source


def main() -> None:
    os.umask(0o022)
    answer: Dict[str, Any]
    try:
        request = json.loads(sys.stdin.buffer.readline())
        root = chosen(request["root"], request["names"])
        directory = put(root, request["digest"], request["files"], request["hashes"])
        answer = {"ok": True, "directory": directory, "agent": compiled(directory)}
    except (Refused, OSError, KeyError, ValueError) as error:
        answer = {"ok": False, "error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


main()
