"""utils/hardware.py: the origin of the number of threads. (test_launch.py tests the launchers themselves.)"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from utils import hardware
from utils.hardware import LAUNCHER_SETS, is_launched, usable_cores, use_all_cores, waiting_seconds

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PROC = Path("/proc/self/environ").exists()
OTHER = CORES + 1  # an unusual number of threads


@pytest.fixture
def threads(monkeypatch):
    """Return a function for the number of threads that ``use_all_cores`` sets, given an environment and a launcher."""
    before = torch.get_num_threads()
    for name in (*LAUNCHER_SETS, "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def threads(launcher=None, device="cpu", **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        parent = None
        if launcher is not None:
            parent = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(60)"], env={"PATH": os.environ["PATH"], **launcher}
            )
            while PROC and not Path(f"/proc/{parent.pid}/environ").read_bytes():
                time.sleep(0.001)  # the kernel has not shown the new process yet
            monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        try:
            torch.set_num_threads(OTHER)
            use_all_cores(torch.device(device))
            return torch.get_num_threads()
        finally:
            if parent:
                parent.kill()
                parent.wait()

    yield threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(LAUNCHER_SETS))
def test_one_thread_of_the_launcher_becomes_a_share_of_the_cores(threads, name):
    assert threads(launcher={}, OMP_NUM_THREADS="1", **{name: "no"}) == CORES
    assert threads(launcher={}, LOCAL_WORLD_SIZE=str(CORES)) == 1
    assert threads(launcher={}, LOCAL_WORLD_SIZE=str(2 * CORES)) == 1


@pytest.mark.skipif(not PROC, reason="only Linux shows the environment of a launcher")
@pytest.mark.parametrize("name", sorted(LAUNCHER_SETS))
def test_one_thread_of_the_user_stays(threads, name):
    """Protection: ``/proc`` in ``hardware._launcher_chose_one_thread``."""
    assert threads(OMP_NUM_THREADS="1") == OTHER  # no launcher
    assert threads(launcher={"OMP_NUM_THREADS": "1"}, **{name: "no"}) == OTHER


def test_other_numbers_and_other_devices_are_left_alone(threads):
    assert threads(launcher={}, TORCHELASTIC_RUN_ID="x") == OTHER  # OMP_NUM_THREADS is not set, so torch uses all cores
    assert threads(launcher={}, OMP_NUM_THREADS="2") == OTHER
    assert threads(launcher={}, OMP_NUM_THREADS="1", device="meta") == OTHER


def test_where_the_launcher_cannot_be_asked_it_is_taken_for_its_choice(threads, monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 2**31 - 1)  # no such process
    assert threads(OMP_NUM_THREADS="1", ACCELERATE_MIXED_PRECISION="no") == CORES


@pytest.mark.skipif(not PROC, reason="only Linux shows the program of a parent process")
@pytest.mark.parametrize("program, launched", [(["sleep", "60"], False), ([sys.executable, "-c", "input()"], True)])
def test_a_variable_that_a_shell_has_exported_is_no_launcher(monkeypatch, program, launched):
    """Otherwise a run with ``nohup`` would end with the shell that started it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with subprocess.Popen(program, stdin=subprocess.PIPE) as parent:
        deadline = time.monotonic() + 5
        name = "python" if launched else "sleep"
        while name not in os.readlink(f"/proc/{parent.pid}/exe") and time.monotonic() < deadline:
            time.sleep(0.001)
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        assert is_launched() is launched
        parent.kill()


@pytest.mark.parametrize("quota, cores", [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64)])
def test_the_quota_of_a_container_counts(threads, monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(hardware, "affinity", lambda: 64)
    (tmp_path / "cgroup" / "pod" / "container").mkdir(parents=True)
    (tmp_path / "own").write_text("12:cpu:/other\n0::/pod/container\n")
    (tmp_path / "cgroup" / "pod" / "cpu.max").write_text(f"{quota}\n")  # the limit of an enclosing group
    assert usable_cores(tmp_path / "cgroup", tmp_path / "own") == cores
    assert usable_cores(tmp_path / "cgroup", tmp_path / "nothing") == 64
    monkeypatch.setattr(hardware, "usable_cores", lambda: cores)
    assert threads() == (min(cores, OTHER) if cores < 64 else OTHER)
    assert threads(OMP_NUM_THREADS="3") == OTHER  # the user's choice


@pytest.mark.skipif(not PROC, reason="only Linux says how long threads wait")
def test_threads_that_wait_for_a_core_are_noticed():
    before = waiting_seconds()
    core = min(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: 1"])]
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})
        until = time.monotonic() + 1
        while time.monotonic() < until:
            pass
    finally:
        os.sched_setaffinity(0, allowed)
        for process in busy:
            process.kill()
            process.wait()
    assert waiting_seconds() - before > 0.2
