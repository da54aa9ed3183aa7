"""Properties of the machine: launcher, cores, devices and memory."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
from pathlib import Path

import torch

from . import counted

LAUNCHER_SETS = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # variables of `accelerate launch` and torchrun


def is_launched() -> bool:
    """Return whether a launcher started this process: one of its variables is set, and the parent process is Python.

    A variable alone is not enough, because a user may have exported it, and the end of a shell must not end the run.
    """
    try:
        parent_is_python = "python" in os.path.basename(os.readlink(f"/proc/{os.getppid()}/exe"))
    except OSError:  # not Linux, or the parent belongs to another user
        parent_is_python = True
    return parent_is_python and bool(LAUNCHER_SETS & set(os.environ))


def set_up_process() -> None:
    """Make this process end with its launcher, which does not forward SIGTERM, and keep freed memory (Linux only)."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if is_launched():
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    with contextlib.suppress(AttributeError):  # not glibc
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: activations are not mapped and unmapped, page by page, every step
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def use_all_cores(device: torch.device) -> None:
    """Use this process's share of the cores on a CPU.

    This is done if the launcher set one thread or torch ignores a container's quota. A number of threads that the user
    has set is kept.
    """
    if device.type != "cpu":
        return
    cores = usable_cores()
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # torch takes all cores and ignores the quota of a container
    in_container = cores < affinity() and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > threads
    if in_container or _launcher_chose_one_thread():
        torch.set_num_threads(threads)


def affinity() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of cores that this process may use: by affinity and the quota of its container (cgroup v2)."""
    cores = affinity()
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
        group = next(line.split(":", 2)[2] for line in lines if line.startswith("0::")).strip("/")
    except (OSError, StopIteration):  # not Linux, or an older kernel
        return cores
    for folder in (root / group, *(root / group).parents):
        with contextlib.suppress(OSError, ValueError):  # "max 100000" where there is no quota
            quota, period = map(int, (folder / "cpu.max").read_text(encoding="utf-8").split())
            cores = min(cores, max(1, -(-quota // period)))
        if folder == root:
            break
    return cores


def waiting_seconds() -> float | None:
    """Return the seconds that the threads of this process have waited for a core, or None if they are unknown."""
    try:
        files = [task / "schedstat" for task in Path("/proc/self/task").iterdir()]
        return sum(int(file.read_text(encoding="utf-8").split()[1]) for file in files) / 1e9
    except (OSError, IndexError, ValueError):  # not Linux, or a thread has ended meanwhile
        return None


def _launcher_chose_one_thread() -> bool:
    """Return whether OMP_NUM_THREADS=1 comes from ``accelerate launch`` or ``torchrun``, which set it by default."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or not is_launched():
        return False
    try:
        launcher = Path(f"/proc/{os.getppid()}/environ").read_bytes()  # as it was when the launcher started
    except OSError:  # not Linux: the origin is unknown
        return True
    return not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in launcher.split(b"\0"))


def device_name(device: torch.device) -> str:
    """Return the name of a device, for example "NVIDIA H100", "MPS" or "CPU, 2 threads"."""
    if device.type == "cpu":
        return f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware computes in bf16, as far as is known."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in checks if check) or platform.machine() in ("arm64", "aarch64")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes, of the GPU or, on a CPU, of this process. 0 means unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
