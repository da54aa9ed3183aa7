"""Signs of life of this process: counted, so that a watchdog can tell a slow run from one that hangs."""

count = 0
activity = "starting"


def progress(doing: str) -> None:
    """Record that something has moved. Whatever takes long calls this for each of its parts.

    Args:
        doing: what begins or continues now: ``data``, ``step``, ``sampling``, ``saving`` ...
    """
    global count, activity
    count, activity = count + 1, doing
