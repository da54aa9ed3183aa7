"""Chores that the training scripts share: one file a chore, each usable on its own."""


class UserError(Exception):
    """A mistake that the user can mend: what was given, what is expected, what to do. Shown without a traceback."""
