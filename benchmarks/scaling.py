"""Measure how training scales on a CPU: one process, two processes, and two machines, with one core per process.

Two independent runs, one on each core, show the upper limit that the machine sets.

    python benchmarks/scaling.py

The machines are network namespaces with a virtual cable, if the kernel and the user's rights allow it (Linux, root).
Each process has one core, one thread and its own 64 images per step. In every round, all cases run once. The output has
the images/s, their ratios in each round, and the share of a step in which a process waits for the sum of the gradients.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from machines import Machine, Machines  # noqa: E402

DRIVER = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_ddpm
wrapped, rates, result = [], [], sys.argv.pop(1)
prepare = torch.nn.parallel.DistributedDataParallel.__init__
def init(self, *arguments, **options):
    prepare(self, *arguments, **options)
    self._set_ddp_runtime_logging_sample_rate(1)
    wrapped.append(self)
def log(self, curves, **options):
    rates.append(curves.get("system/images_per_second"))
torch.nn.parallel.DistributedDataParallel.__init__ = init
import accelerate
accelerate.Accelerator.log = log
train_ddpm.main(train_ddpm.parse_args(sys.argv[1:]))
data = wrapped[0]._get_ddp_logging_data() if wrapped else {{}}
json.dump([rates, {{name: value for name, value in data.items() if name.startswith("avg_")}}], open(result, "w"))
"""


def run(processes: int, how: list[Machine] | str, steps: int, unet: str, resolution: int) -> tuple[float, float]:
    """Return the images/s of all processes (median over the points of a curve), and the mean share of waiting.

    Args:
        processes: number of processes.
        how: machines of the processes, an empty list for this machine, or "apart" for independent runs.
        steps: number of optimizer steps.
        unet, resolution: flags of the training script.
    """
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        children = []
        for rank in range(processes):
            flags = ["--dataset_name=digits", f"--unet={unet}", f"--resolution={resolution}", "--report_to=none"]
            flags += [f"--max_train_steps={steps}", "--logging_steps=5", "--num_samples=1", "--num_inference_steps=1"]
            command = [sys.executable, "-c", DRIVER, f"{folder}/{rank}.json", *flags, f"--output_dir={folder}/run"]
            command[-1] += str(rank) * (how == "apart")
            command = ["taskset", "-c", str(rank), *command]
            group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
            group |= dict(OMP_NUM_THREADS=1, ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1")
            group |= dict(ACCELERATE_MIXED_PRECISION="bf16")
            if how == "apart":
                group |= dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, MASTER_PORT=port + rank)
            elif how:
                group |= dict(MASTER_ADDR=how[0].name, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
            environment = os.environ | {name: str(value) for name, value in group.items()}
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                preexec_fn=how[rank].enter if how and how != "apart" else None,
            )  # fmt: skip
            children.append(process)
        outputs = [child.communicate()[0].decode() for child in children]
        for child, text in zip(children, outputs, strict=True):
            if child.returncode:
                sys.exit(text)
        results = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    rates = [statistics.median([value for value in points if value][1:]) for points, _ in results]
    rate, data = (sum(rates) if how == "apart" else rates[0]), results[0][1]
    exposed = data.get("avg_backward_comm_time", 0) - data.get("avg_backward_compute_comm_overlap_time", 0)
    return rate, exposed / 1e9 / (64 * processes / rate)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="number of optimizer steps of each run")
    parser.add_argument("--unet", default="small")
    parser.add_argument("--resolution", type=int, default=28)
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("One usable core was found. Expected at least two")
    cases = {"1 process": (1, []), "2 separate runs": (2, "apart"), "2 processes": (2, [])}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            machines = Machines(Path(folder))
            stack.callback(machines.close)
            cases["2 machines"] = (2, machines.all)
        except OSError as error:
            print(f"Two machines cannot be set up here: {error}")
        found = {name: [] for name in cases}
        for number in range(options.rounds):
            for name, case in cases.items():
                found[name].append(run(*case, options.steps, options.unet, options.resolution))
                print(f"round {number + 1}, {name}: {found[name][-1][0]:.0f} images/s", file=sys.stderr)
    print(
        "| | images/s | ratio to 1 process | ratio to 2 separate runs | waiting for gradients |\n|---|---|---|---|---|"
    )
    for name, results in found.items():
        rates = [rate for rate, _ in results]
        ratios = [
            ", ".join(f"{rate / other:.2f}" for rate, (other, _) in zip(rates, found[base], strict=True))
            for base in ("1 process", "2 separate runs")
        ]
        share = statistics.median(share for _, share in results)
        print(f"| {name} | {statistics.median(rates):.0f} | {' | '.join(ratios)} | {share:.0%} |")


if __name__ == "__main__":
    main()
