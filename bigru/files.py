"""Files that are written whole or not at all, JSON without NaN, and paths as text that can be printed."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import secrets
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:
    # Windows has none.
    fcntl = None  # type: ignore[assignment]

ESCAPE = "bigru.printable"
"""Error handler of every encoder: a byte of a path that is no UTF-8 becomes \\xe4, and nothing fails."""
# A name may have 255 bytes, and the temporary one must not be longer than that.
LONGEST_STEM = 32


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which takes its place when the block ends without an error.

    A reader of `path` finds the old file or the new one, whole, also after a kill or a power cut.

    Raises:
        OSError: with `path` in it; the old file is as it was, and the temporary one is gone.
    """
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name[:LONGEST_STEM]}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        # Windows can neither open nor sync a folder.
        if os.name == "posix":
            _sync(path.parent)
    except OSError as error:
        raise named(error, path) from error
    finally:
        # On a full disk it would be in the way. Not after a kill: see remove_partials.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_partials(folder: Path, name: str = "*", age_s: float = 0.0) -> None:
    """Removes what killed processes left of files that they were writing.

    Args:
        folder: where those files are.
        name: of the file that was written; default: any.
        age_s: least seconds since the last write; 0 only where no other process writes.
    """
    for partial in folder.glob(f".{name[:LONGEST_STEM]}.*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime >= age_s:
                partial.unlink()


def lock(file: IO[Any], wait: bool) -> bool:
    """Locks an open file until it is closed or its process ends; returns False where that cannot be done.

    Some network file systems have no locks, and Windows has others, for which nothing is done.

    Raises:
        BlockingIOError: another process has it, and `wait` is False.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines of text, atomically."""
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors=ESCAPE))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; NaN and infinities become null."""
    write_lines(path, [json.dumps(without_nan(value), indent=2, allow_nan=False)])


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays, and texts as arrays of them, as .npz, atomically."""
    buffer = io.BytesIO()
    converted: dict[str, Any] = {name: np.asarray(values) for name, values in arrays.items()}
    np.savez(buffer, **converted)
    write_atomically(path, buffer.getvalue())


def as_json(value: Any) -> str:
    """Returns a value as one line of JSON in ASCII; NaN and infinities, which JSON lacks, become null.

    A path that is not UTF-8 comes back from it as it was, since its surrogates are escaped.
    """
    return json.dumps(without_nan(value), allow_nan=False)


def without_nan(value: Any) -> Any:
    """Returns a value of JSON's kinds with None for every NaN and infinity in it."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def named(error: OSError, path: Path) -> OSError:
    """Returns the error with the file's path in it, which that of a write lacks."""
    return type(error)(error.errno, error.strerror, str(path)) if error.errno is not None else error


def user_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path with the home folder in place of a leading ~, which a shell leaves as it is in --out=~/runs.

    The ~ of a user whom the system does not know stays, as in a shell.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111, which fails for an unknown user


def printable(text: str | os.PathLike[str]) -> str:
    r"""Returns a path, or text from a file, as it can be shown and encoded anywhere.

    Bytes of a path that are no UTF-8 become \xe4, control characters \n or \x1b; all else stays.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in os.fspath(text))


def shell_line(words: Sequence[str | os.PathLike[str]]) -> str:
    """Returns the command line that a shell reads as these words, printable: $'...' quotes what is not."""
    return " ".join(_quoted(os.fspath(word)) for word in words)


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"


def _escaped(letter: str) -> str:
    # Python reads a byte that is no UTF-8 as one of these surrogates.
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    # Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_escaped, error.object[error.start : error.end])), error.end


codecs.register_error(ESCAPE, _escape)
