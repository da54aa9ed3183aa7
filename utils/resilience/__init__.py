"""Runs that look after themselves: a watchdog, rollbacks, restarts, lost processes, advice where memory ends."""

import os
import signal

from ..args import Parser, integer, real

LAUNCHER = os.getppid()


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flags of rollbacks and of the watchdog."""
    group = parser.group("run")
    group.add_argument("--max_rollbacks", metavar="N", type=integer(0), default=0, help="where loss or gradient are not finite, return to the newest checkpoint and leave out the images of that step, at most N times in a run; then stop")
    group.add_argument("--hang_timeout", metavar="SECONDS", type=real(0), default=300.0, help="seconds without any progress, after the first step, until a run ends with the stacks of its threads; 0: never")
# fmt: on


def take_part(run):
    """Guard a training run, see ``guard.Guard``."""
    from .guard import Guard

    return Guard(run.args.max_rollbacks, run.args.hang_timeout)


def explain(error: Exception, args) -> tuple[int, str, bool] | None:
    """Advise about lost processes and memory, see ``exits.explain``."""
    from .advice import lost, memory

    if message := lost(error):
        return EXIT_PEER_LOST, message, False
    if message := memory(error, vars(args) if args else {}):
        return 1, message, True
    return None


EXIT_PEER_LOST = (
    124  # exit code: nothing moved any more, or another process of the run is gone; the same command resumes
)


def ended(code: int, final: bool) -> None:
    """Keep the launcher from starting a run again (``--max_restarts``) that would end in the same way.

    Its agent, torchrun's, restarts whatever does not end with 0, even for a mistake in a flag; only a signal stops it.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not code or not final or left <= 0:
        return
    if not hasattr(os, "getsid") or os.getsid(0) != os.getpid():  # the agent's workers lead their sessions
        return
    if os.getppid() == LAUNCHER:  # it lives: otherwise the parent is another process by now
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which it passes on to all
        os.kill(LAUNCHER, signal.SIGTERM)
