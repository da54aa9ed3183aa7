"""Helpers that the scripts share. The files here do not import the folders beside them."""

import errno
import json
import os
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct, shown without a traceback.

    The message says what was given, what is expected and what to do.
    """


def counted(number: int, noun: str) -> str:
    """Return the number with its noun in the singular or plural: "1 thread", "2 threads"."""
    return f"{number} {noun}{('es' if noun.endswith('s') else 's') * (number != 1)}"


def printable(text: str) -> str:
    """Escape control characters, because the name of a file may contain commands for the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def sync(path: Path) -> None:
    """Flush a file or folder from the system's cache to the disk."""
    if os.name == "nt":  # Windows opens no folders, and syncs no files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # CIFS and vboxsf cannot sync folders, but a file that cannot be synced is an error
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def read_record(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, broken, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        problem = f"it holds a {type(found).__name__}"
        if isinstance(found, dict):
            return found
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"{path} cannot be read: {problem}. Expected a JSON object. Restore or remove the file")


def write_record(path: Path, content) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(f".tmp-{path.name}")
    text = json.dumps(content, indent=2, ensure_ascii=False)  # YAML reads escaped characters beyond 16 bits wrongly
    temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # file names may be other bytes
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
