"""How training on a CPU scales: one process on one core, two on two, and two machines of one core each.

    python benchmarks/scaling.py

The machines are network namespaces joined by a cable, where the kernel and the user's rights allow it (Linux, root).
Each process has one core, one thread and its own 64 images a step. Prints images/s and the ratio to one process, of
rounds in which the three alternate, and the share of a step in which a process waits for the sum of the gradients.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRIVER = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_ddpm
from utils.training import TrainingCurves
wrapped, rates, result = [], [], sys.argv.pop(1)
prepare, step = torch.nn.parallel.DistributedDataParallel.__init__, TrainingCurves.step
def init(self, *arguments, **options):
    prepare(self, *arguments, **options)
    self._set_ddp_runtime_logging_sample_rate(1)
    wrapped.append(self)
def log(self, curves, **options):
    rates.append(curves.get("images_per_second"))
torch.nn.parallel.DistributedDataParallel.__init__ = init
import accelerate
accelerate.Accelerator.log = log
train_ddpm.main(train_ddpm.parse_args(sys.argv[1:]))
data = wrapped[0]._get_ddp_logging_data() if wrapped else {{}}
json.dump([rates, {{name: value for name, value in data.items() if name.startswith("avg_")}}], open(result, "w"))
"""


def run(processes: int, namespaces: list[str], steps: int, unet: str, resolution: int) -> tuple[float, float]:
    """Images/s of all processes (median over the points of a curve), and the share of waiting (in the mean)."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        children = []
        for rank in range(processes):
            flags = ["--dataset_name=digits", f"--unet={unet}", f"--resolution={resolution}", "--report_to=none"]
            flags += [f"--max_train_steps={steps}", "--logging_steps=5", "--num_samples=1", "--num_inference_steps=1"]
            command = [sys.executable, "-c", DRIVER, f"{folder}/{rank}.json", *flags, f"--output_dir={folder}/run"]
            command = ["taskset", "-c", str(rank), *command]
            group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
            group |= dict(OMP_NUM_THREADS=1, ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1")
            group |= dict(ACCELERATE_MIXED_PRECISION="bf16")
            if namespaces:
                command = ["ip", "netns", "exec", namespaces[rank], *command]
                group |= dict(
                    MASTER_ADDR="10.78.0.1", GLOO_SOCKET_IFNAME=f"scaling{rank}", LOCAL_RANK=0, LOCAL_WORLD_SIZE=1
                )
            environment = os.environ | {name: str(value) for name, value in group.items()}
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            children.append(process)
        said = [child.communicate()[0].decode() for child in children]
        for child, text in zip(children, said, strict=True):
            if child.returncode:
                sys.exit(text)
        rates, data = json.loads(Path(folder, "0.json").read_text(encoding="utf-8"))
    rate = statistics.median([value for value in rates if value][1:])
    exposed = data.get("avg_backward_comm_time", 0) - data.get("avg_backward_compute_comm_overlap_time", 0)
    return rate, exposed / 1e9 / (64 * processes / rate)


def join_namespaces() -> list[str]:
    """Two network namespaces joined by a cable; none where that is not possible."""
    names = [f"scaling-{os.getpid()}-{rank}" for rank in range(2)]
    steps = [["netns", "add", name] for name in names]
    steps += [["link", "add", "scaling0", "type", "veth", "peer", "name", "scaling1"]]
    for rank, name in enumerate(names):
        steps += [["link", "set", f"scaling{rank}", "netns", name]]
        steps += [["-n", name, "addr", "add", f"10.78.0.{rank + 1}/24", "dev", f"scaling{rank}"]]
        steps += [["-n", name, "link", "set", device, "up"] for device in (f"scaling{rank}", "lo")]
    try:
        for step in steps:
            subprocess.run(["ip", *step], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"No two machines here: {getattr(error, 'stderr', None) or error}")
        remove_namespaces(names)
        return []
    return names


def remove_namespaces(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--unet", default="small")
    parser.add_argument("--resolution", type=int, default=28)
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("At least two cores are needed")
    names = join_namespaces()
    cases = {"1 process, 1 core": (1, []), "2 processes, 2 cores": (2, [])}
    if names:
        cases["2 machines, 1 core each"] = (2, names)
    found = {name: [] for name in cases}
    try:
        for number in range(options.rounds):
            for name, case in cases.items():
                found[name].append(run(*case, options.steps, options.unet, options.resolution))
                print(f"round {number + 1}, {name}: {found[name][-1][0]:.0f} images/s", file=sys.stderr)
    finally:
        remove_namespaces(names)
    base = [rate for rate, _ in found["1 process, 1 core"]]
    print("| | images/s | times one process, by round | waiting for gradients |\n|---|---|---|---|")
    for name, results in found.items():
        ratios = ", ".join(f"{rate / one:.2f}" for (rate, _), one in zip(results, base, strict=True))
        share = statistics.median(share for _, share in results)
        print(f"| {name} | {statistics.median(rate for rate, _ in results):.0f} | {ratios} | {share:.0%} |")


if __name__ == "__main__":
    main()
