"""Scripts in child processes, as `python SCRIPT` runs them, without the seconds that importing torch takes.

A child is forked from a server that has imported slow libraries. It has its own environment. Libraries such as
huggingface_hub and datasets read variables during import. If such a variable differs, the child is forked from a server
that has not imported those libraries.
"""

import contextlib
import glob
import multiprocessing
import os
import re
import resource
import runpy
import signal
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
SLOW = ["torch._dynamo", "torch.utils.tensorboard", "scipy.stats", "sklearn.datasets", "matplotlib.figure", "pyarrow"]
SLOW += ["torch.distributed.elastic.multiprocessing"]
READERS = ["accelerate", "datasets", "diffusers.optimization", "diffusers.pipelines.ddpm.pipeline_ddpm"]
READERS += [f"diffusers.schedulers.scheduling_{name}" for name in ("ddpm", "ddim", "dpmsolver_multistep", "lcm")]
READ = re.compile("HF_|HUGGINGFACE|XDG_|HOME$|DIFFUSERS|TRANSFORMERS")  # environment variables that they read


def _server(libraries):
    server = forkserver.ForkServer()
    server.set_forkserver_preload(libraries)
    return server


def _read_by_libraries(environment):
    return frozenset((name, value) for name, value in environment.items() if READ.match(name))


BARE = _server(SLOW)
SERVERS = {_read_by_libraries(os.environ): _server(SLOW + READERS)}  # by the variables that libraries read


def keep_server(environment):
    """Make the next children in this environment start as fast as those in the environment of this process."""
    SERVERS.setdefault(_read_by_libraries(environment), _server(SLOW + READERS))


def start(what, *arguments, log, folder=None, environment=None, file_limit=None, machine=None):
    """Start a script, or a line of code that does not depend on this repository, in a child that writes to ``log``.

    Args:
        what: path of a script, or code.
        folder, environment: working folder and all variables, by default those of this process.
        file_limit: maximum size of a file in bytes.
        machine: machine of ``machines.Machines`` to run on, by default this one.
    """
    environment = dict(os.environ if environment is None else environment)
    arguments = (
        what,
        [str(argument) for argument in arguments],
        log,
        folder or Path.cwd(),
        environment,
        file_limit,
        machine,
    )
    child = multiprocessing.get_context("forkserver").Process(target=_child, args=arguments)
    read = _read_by_libraries(environment)
    server, unread = SERVERS.get(read, BARE), {key: value for key, value in os.environ.items() if not READ.match(key)}
    with (
        mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process),
        mock.patch.dict(
            os.environ, {**unread, **dict(read if server is not BARE else ())}, clear=True
        ),  # the environment of the server, if the server starts now
    ):
        child.start()
    child.log = Path(log)
    return child


def finish(child, seconds=120):
    """Wait for a child, and return its exit code and output."""
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise AssertionError(f"still running after {seconds} s: {child.log.read_text()[-2000:]}")
    return child.exitcode, child.log.read_text()


def run(what, *arguments, processes=1, environment=None, **options):
    """Start and finish a script in one or several processes, connected like those of torchrun.

    Returns:
        The exit code, or the first of several that is not 0, and the output.
    """
    environment = dict(os.environ if environment is None else environment)
    children = []
    port = free_port()  # the first process listens at this port
    with tempfile.NamedTemporaryFile() as log:
        for rank in range(processes):
            group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
            group = {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
            ranked = environment | group | {"ACCELERATE_USE_CPU": "true"} if processes > 1 else environment
            children.append(start(what, *arguments, log=log.name, environment=ranked, **options))
        codes, said = zip(*(finish(child) for child in children), strict=True)
    return next(filter(None, codes), 0), said[-1]


def _child(what, arguments, log, folder, environment, file_limit, machine):
    if machine:
        machine.enter()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that is not a child of a server
    os.chdir(folder)
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    places = {path: Path(path).resolve() for path in sys.path}
    sys.path[:] = [path for path, place in places.items() if place != ROOT and not place.is_relative_to(ROOT / "tests")]
    assert not {"utils", "conftest"} & set(sys.modules)
    if isinstance(what, Path):
        sys.argv = [str(what), *arguments]
        sys.path.insert(0, str(what.parent))
        runpy.run_path(str(what), run_name="__main__")
    else:
        sys.argv = ["-c", *arguments]
        exec(what, {"__name__": "__main__"})


DRIVER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_ddpm
{{patch}}
from utils.exits import run_script
run_script(train_ddpm.main, train_ddpm.parse_args)
"""


def patched(patch):
    """Return code that runs these lines and then train_ddpm.py, with it, sys and time imported."""
    return DRIVER.format(patch=patch)


LAUNCHER = """
import os, runpy, signal, subprocess, sys, threading
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

Popen = subprocess.Popen

class Fork(Popen):  # of this process, which has imported torch, instead of a new Python
    def __init__(self, command, env, start_new_session=False):
        self.args, self.returncode, self._child_created, self._waitpid_lock = command, None, True, threading.Lock()
        self.stdin = self.stdout = self.stderr = None
        self.pid = os.fork()
        if not self.pid:
            if start_new_session:
                os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(env)
            subprocess.Popen = Popen
            sys.argv, code = [part for part in command[1:] if part != "-u"], 1
            sys.path.insert(0, os.path.dirname(sys.argv[0]))
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as request:
                code = request.code or 0
            finally:
                sys.stdout.flush()
                os._exit(code)

subprocess.Popen = Fork
SubprocessHandler._popen = lambda handler, command, environment: Fork(command, environment, True)
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def launch(command, *arguments, log, **options):
    """Start a launcher, [python, "-m", module, flags and script ...], which forks the processes that it starts.

    Therefore neither the launcher nor its processes take eight seconds to import torch. All else is as usual.
    """
    assert command[:2] == [sys.executable, "-m"]
    return start(LAUNCHER, *command[2:], *arguments, log=log, **options)


def ended(child, seconds=120):
    """Finish a child, check that no process is left that writes to the log, and return exit code and output."""
    deadline = time.monotonic() + seconds
    code, _ = finish(child, seconds)
    while any(_points_to(path, child.log) for path in glob.glob("/proc/[0-9]*/fd/1")):
        assert time.monotonic() < deadline, f"a process still runs: {child.log.read_text()[-2000:]}"
        time.sleep(0.05)
    return code, child.log.read_text()


def _points_to(path, file):
    try:
        return os.readlink(path) == str(file)
    except OSError:  # the process has ended, or belongs to another user
        return False


def kill(launcher):
    """End a launcher and its processes at once."""
    for pid in [*(family(launcher) if launcher.is_alive() else []), launcher.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_port():
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def family(child):
    """Return the process ids below a child, by rank."""
    pids = {}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        if int(fields[1]) == child.pid and fields[0] != "Z":
            pids[pid] = fields
    return sorted(pids, key=lambda pid: int(pids[pid][19]))  # ranks are started in order
