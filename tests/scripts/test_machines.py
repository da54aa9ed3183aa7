"""Several machines: two network namespaces of this machine, with a virtual cable."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
from conftest import equal_weights, tiny
from machines import Machines
from PIL import Image

import train_ddpm

SCRIPT = Path(train_ddpm.__file__)
ROOT = SCRIPT.parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = ROOT / "configs" / "multi_node.yaml"


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    try:
        pair = Machines(tmp_path_factory.mktemp("machines"))
    except OSError as error:
        pytest.skip(f"no two machines: {error}")
    yield pair.all
    pair.close()


@pytest.fixture
def launch(tmp_path, machines):
    """Return a function for ``accelerate launch`` with configs/multi_node.yaml on both machines."""
    launched = []

    def start(*flags):
        for rank, machine in enumerate(machines):
            log = tmp_path / f"log-{rank}"
            log.unlink(missing_ok=True)
            command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(CONFIG)]
            command += ["--machine_rank", str(rank), "--main_process_ip", "head", "--num_processes", "2"]
            command += ["--mixed_precision", "no", str(SCRIPT)]
            environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            where = dict(folder=tmp_path, machine=machine, environment=environment)
            launched.append(children.launch(command, *flags, log=log, **where))
        return launched[-2:]

    yield start
    for launcher in launched:
        children.kill(launcher)


def test_two_machines_of_one_process_equal_one_machine_of_two(tmp_path, launch):
    flags = tiny("--random_flip")
    code, said = children.run(SCRIPT, *flags, f"--output_dir={tmp_path / 'one'}", processes=2, folder=tmp_path)
    assert code == 0, said
    pair = launch(*flags, f"--output_dir={tmp_path / 'two'}")
    results = [children.ended(launcher) for launcher in pair]
    assert [code for code, _ in results] == [0, 0], results
    assert sum("Finished, after 6 optimizer steps" in said for _, said in results) == 1
    assert equal_weights(tmp_path / "one" / WEIGHTS, tmp_path / "two" / WEIGHTS)
    assert not list((tmp_path / "two").glob(".tmp*"))


@pytest.mark.slow
def test_a_lost_machine_is_named_and_the_same_command_resumes(tmp_path, launch):
    flags = tiny(f"--output_dir={tmp_path / 'run'}", "--max_train_steps=200", "--checkpointing_steps=5")
    pair = launch(*flags)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert time.monotonic() < deadline, pair[0].log.read_text()
        time.sleep(0.05)
    children.kill(pair[1])
    code, said = children.ended(pair[0])
    assert code not in (0, None)
    assert re.search(
        r"error: another process of this run, at 10\.77\.0\.\d, has ended or cannot be reached.*resumes", said
    )
    assert 'Traceback (most recent call last):\n  File "' + str(SCRIPT) not in said
    step = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    results = [children.ended(launcher) for launcher in launch(*flags, f"--max_train_steps={step + 3}")]
    assert [code for code, _ in results] == [0, 0] and any(
        f"{step} optimizer steps done" in said for _, said in results
    )


def own_folders(tmp_path, script_flags, name):
    """Run two processes that find different folders under one name."""
    port, started = children.free_port(), []
    for rank in range(2):
        group = dict(RANK=rank, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=1, MASTER_PORT=port)
        environment = {**os.environ, **{key: str(value) for key, value in group.items()}, "MASTER_ADDR": "127.0.0.1"}
        flags = [flag.replace(name, f"{name}-{rank}") for flag in script_flags]
        started.append(
            children.start(SCRIPT, *flags, log=tmp_path / f"log-{rank}", folder=tmp_path, environment=environment)
        )
    return [children.finish(child) for child in started]


@pytest.mark.slow
def test_an_output_folder_of_each_machines_own_is_refused_everywhere(tmp_path):
    results = own_folders(tmp_path, tiny(f"--output_dir={tmp_path / 'run'}"), str(tmp_path / "run"))
    for code, said in results:
        assert code == 1 and said.count("error: ") == 1, said
        assert re.search(
            r"run-\d must be on a file system that all machines share\. A file written by process 0 ", said
        )
        assert "is missing for process 1 on " in said and "Traceback" not in said
    assert not [path for rank in range(2) for path in tmp_path.glob(f"run-{rank}/*") if path.name != ".lock"]


@pytest.mark.parametrize(
    "count, message", [(0, "there is no such folder|holds no image"), (9, "has other images than")]
)
def test_images_that_only_one_machine_has_are_refused_everywhere(tmp_path, count, message):
    for rank, number in enumerate((40, count)):
        for k in range(number):
            (tmp_path / f"pictures-{rank}").mkdir(exist_ok=True)
            Image.new("L", (8, 8), k).save(tmp_path / f"pictures-{rank}" / f"{k}.png")
    name = str(tmp_path / "pictures")
    flags = tiny(f"--train_data_dir={name}", "--train_batch_size=2", f"--output_dir={tmp_path / 'run'}")
    for code, said in own_folders(tmp_path, flags, name):
        assert code == 1 and said.count("error: ") == 1 and "Traceback" not in said, said
        assert re.search(message, said), said


SRUN = """#!{python}
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from machines import Machine
pids = []
for rank, machine in enumerate({machines}):
    pid = os.fork()
    if not pid:
        machine.enter()
        os.environ["SLURM_NODEID"] = str(rank)
        os.execvp(sys.argv[2], sys.argv[2:])  # behind --cpus-per-task
    pids.append(pid)
signal.signal(signal.SIGUSR1, lambda number, frame: [os.kill(pid, number) for pid in pids])  # as srun does
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


@pytest.mark.slow
def test_a_slurm_job_on_two_machines_restarts_saves_and_queues_itself_again(tmp_path, machines):
    """Run the unchanged configs/slurm.sbatch with --nodes=2, except that Slurm's own programs are replaced."""
    programs = {
        "srun": SRUN.format(python=sys.executable, tests=str(Path(__file__).parents[1]), machines=machines),
        "scontrol": '#!/bin/bash\nif [ "$1" = show ]; then echo head; echo worker; else echo "$@" > requeued; fi\n',
        "accelerate": f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.launch "${{@:2}}"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    slurm = dict(SLURM_JOB_ID="17", SLURM_NNODES="2", SLURM_JOB_NODELIST="both", SLURM_SUBMIT_DIR=str(tmp_path))
    environment = {**os.environ, **slurm, "PROCESSES": "1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    flags = tiny(f"--output_dir={tmp_path / 'run'}", "--max_train_steps=150", "--checkpointing_steps=5")

    def start(*more):
        with open(tmp_path / "log", "w") as log:
            command = ["bash", str(ROOT / "configs" / "slurm.sbatch"), str(SCRIPT), *flags, *more]
            return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)

    def said(text, times=1):
        deadline = time.monotonic() + 120
        while (tmp_path / "log").read_text().count(text) < times:
            assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)

    job = start()
    said("Saved")
    workers = subprocess.run(["pgrep", "-f", f"{SCRIPT} .*{tmp_path}"], capture_output=True, text=True).stdout.split()
    ranks = {}
    for pid in workers:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {entry[5:]: int(pid) for entry in variables if entry.startswith(b"RANK=")}
    os.kill(ranks[b"1"], signal.SIGKILL)
    said("INFO Resuming from")
    said("Saved", 3)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) not in (0, None), (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert "worker: waiting up to 10 minutes for 2 machines at head:20017" in text
    assert text.count("Stopped by SIGTERM") == 1 and (tmp_path / "requeued").read_text() == "requeue 17\n", text
    step = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert f"after {step} of 150 optimizer steps" in text
    job = start(f"--max_train_steps={step + 3}")
    assert job.wait(120) == 0 and f"{step} optimizer steps done" in (tmp_path / "log").read_text()
