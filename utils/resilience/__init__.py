"""Resilience of runs: a watchdog, rollbacks, restarts, and advice about lost processes and memory."""

import os
import signal

from ..args import Parser, integer, real

LAUNCHER = os.getppid()


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flags of rollbacks and of the watchdog."""
    group = parser.group("run")
    group.add_argument("--max_rollbacks", metavar="N", type=integer(0), default=0, help="maximum number of rollbacks in a run. If the loss or the gradient is not finite, a rollback returns to the newest checkpoint and skips the images of that step")
    group.add_argument("--hang_timeout", metavar="SECONDS", type=real(0), default=300.0, help="seconds without progress, after the first step, until the run aborts with the stack traces of its threads (0: never)")
# fmt: on


def take_part(run):
    """Return the guard of a training run, see ``guard.Guard``."""
    from .guard import Guard

    return Guard(run.args.max_rollbacks, run.args.hang_timeout)


def explain(error: Exception, args) -> tuple[int, str, bool] | None:
    """Return advice about a lost process or a lack of memory, see ``exits.explain``."""
    from .advice import lost, memory

    if message := lost(error):
        return EXIT_PEER_LOST, message, False
    if message := memory(error, vars(args) if args else {}):
        return 1, message, True
    return None


# Exit code of a run that hung or lost another of its processes. The same command resumes the run
EXIT_PEER_LOST = 124


def ended(code: int, final: bool) -> None:
    """Keep the launcher from restarting a run (``--max_restarts``) that would fail in the same way.

    torchrun's agent restarts processes that exit with a non-zero code, even after a mistake in a flag. Only a
    signal stops the agent.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not code or not final or left <= 0:
        return
    if not hasattr(os, "getsid") or os.getsid(0) != os.getpid():  # each worker of the agent leads its own session
        return
    if os.getppid() == LAUNCHER:  # otherwise the launcher has ended
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher passes the signal on to its workers
        os.kill(LAUNCHER, signal.SIGTERM)
