"""Chores that the training scripts share: one file a chore, each usable on its own."""


class UserError(Exception):
    """A mistake that the user can correct: what was given, what is expected, what to do. Shown without a traceback."""


def printable(text: str) -> str:
    """The text with control characters escaped: a file's name may hold commands for the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
