"""Two simulated machines: network namespaces with a virtual cable between them, each with its own hostname."""

import ctypes
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET, MS_BIND, MS_REC, MS_PRIVATE = (
    0x20000,
    0x4000000,
    0x40000000,
    4096,
    16384,
    1 << 18,
)


def _ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@dataclass
class Machine:
    """One of the two machines.

    Attributes:
        name: hostname of the machine.
        hosts: path of a file with the addresses of both machines, for /etc/hosts.
    """

    namespace: str
    name: str
    address: str
    hosts: str

    def enter(self):
        """Move the calling process, and the processes that it starts, to this machine."""
        libc = ctypes.CDLL(None, use_errno=True)

        def call(name, *arguments):
            if getattr(libc, name)(*arguments):
                raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

        with open(f"/var/run/netns/{self.namespace}") as file:
            call("setns", file.fileno(), CLONE_NEWNET)
        call("unshare", CLONE_NEWUTS | CLONE_NEWNS)
        call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        socket.sethostname(self.name)
        call("mount", self.hosts.encode(), b"/etc/hosts", None, MS_BIND, None)


class Machines:
    """Two machines, ``head`` and ``worker``. ``close`` removes them.

    Raises:
        OSError: the kernel or this user's rights do not allow network namespaces.
    """

    def __init__(self, folder: Path):
        if not shutil.which("ip"):
            raise OSError("iproute2 is not installed")
        hosts, tag = folder / "hosts", f"dm{os.getpid() % 100000}"
        addresses = {"head": "10.77.0.1", "worker": "10.77.0.2"}
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items()))
        self.all = [Machine(f"{tag}-{name}", name, ip, str(hosts)) for name, ip in addresses.items()]
        steps = [["netns", "add", machine.namespace] for machine in self.all]
        ends = [f"{tag}{end}" for end in "ab"]
        steps += [["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]]
        for end, machine in zip(ends, self.all, strict=True):
            inside = ["-n", machine.namespace]
            steps += [["link", "set", end, "netns", machine.namespace]]
            steps += [[*inside, "addr", "add", f"{machine.address}/24", "dev", end]]
            steps += [[*inside, "link", "set", device, "up"] for device in (end, "lo")]
        for step in steps:
            result = _ip(*step)
            if result.returncode:
                self.close()
                raise OSError(f"ip {' '.join(step)}: {result.stderr.strip()}")

    def close(self):
        for machine in self.all:
            _ip("netns", "del", machine.namespace)
