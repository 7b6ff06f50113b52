"""What a user did wrong, said in one line.

`UserError` is for mistakes that the user can mend: the command line prints its message without a traceback and exits with 2.
Anything else keeps its traceback, because it is ours to mend.
"""

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake: what is wrong, where (file:line or field), what to do; one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence that ends an "unknown X" message: the nearest known name, or the names there are.

    >>> nearest("stpes", ["steps", "seed"])
    'did you mean steps?'
    """
    names = sorted({str(entry) for entry in known})
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    if not names:
        return "there are none"
    shown = ", ".join(names[:12])
    return f"known: {shown}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")


_OS_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, it goes on from here",
    errno.EDQUOT: "your disk quota is used up; free some space and run the same command again, it goes on from here",
    errno.EACCES: "no permission to write there; choose another --workdir",
    errno.EPERM: "no permission to write there; choose another --workdir",
    errno.EROFS: "the file system is read-only; choose another --workdir",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "that is a folder, not a file; choose another path",
}


def from_os_error(error: OSError, path: str | os.PathLike[str], doing: str) -> UserError:
    """An operating-system error on a path the user chose, as a `UserError` that says what to do.

    Args:
      error: what the operating system said.
      path: the path that the user knows.
      doing: the verb of the message, such as "write" or "read".
    """
    advice = _OS_ADVICE.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot {doing} {path}: {advice}")
