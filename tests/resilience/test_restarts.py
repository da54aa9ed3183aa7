"""Runs without supervision: killed runs resume by themselves, and hanging runs abort and print where they hang."""

import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import children
import pytest
from children import finish
from conftest import equal_weights, slow, tiny

import train_ddpm
from utils.resilience import EXIT_PEER_LOST
from utils.training.checkpoints import verify_checkpoint

SCRIPT = Path(train_ddpm.__file__)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor_interval=0.1"]


def flags_of(folder, steps):
    return tiny("--checkpointing_steps=1", f"--max_train_steps={steps}", f"--output_dir={folder}")


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def newest(folder):
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


@pytest.fixture(autouse=True)
def launch(tmp_path):
    """Return a function that starts a script under an agent, and end all agents afterwards."""
    agents = []

    def start(*flags, restarts, processes=2):
        command = [*TORCHRUN, f"--max_restarts={restarts}", f"--nproc_per_node={processes}", str(SCRIPT)]
        agents.append(children.launch(command, *flags, log=tmp_path / "log", folder=tmp_path))
        return agents[-1]

    yield start
    for agent in agents:
        children.kill(agent)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return a function that gives the weights of two processes after a number of undisturbed steps."""
    folder, made = tmp_path_factory.mktemp("straight"), {}

    def train(steps):
        if steps not in made:
            code, said = children.run(SCRIPT, *flags_of(folder / str(steps), steps), processes=2, folder=folder)
            assert code == 0, said
            made[steps] = folder / str(steps) / WEIGHTS
        return made[steps]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("kills, steps", [(3, 16), (8, 40)])
def test_kill_9_of_a_random_rank_and_the_run_resumes_by_itself(tmp_path, launch, straight, kills, steps):
    """Protection: ``process._rendezvous``, without which a restarted process would look for a rendezvous that no longer
    exists. Also the lock on the folder, which ends with its process, and ``resilience.EXIT_PEER_LOST`` of the other
    processes."""
    rng, folder, log = random.Random(0), tmp_path / "run", tmp_path / "log"
    agent = launch(*flags_of(folder, steps), restarts=kills)
    for kill in range(kills):
        goal = newest(folder) + rng.randint(1, max(1, steps // kills - 1))
        pids = wait_for(lambda goal=goal: newest(folder) >= goal and children.family(agent))
        time.sleep(rng.random() * 0.05)
        os.kill(rng.choice(pids), signal.SIGKILL)
        wait_for(lambda kill=kill: log.read_text().count("INFO Resuming from") == kill + 1)
        for path in folder.glob("checkpoint-*"):
            verify_checkpoint(path)
    code, said = finish(agent)
    assert code == 0 and said.count("Finished, after") == 1, said
    assert equal_weights(folder / WEIGHTS, straight(steps))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_sampels=4"], "Did you mean --num_samples?"),  # exit code 2
        (["--dataset_split=trian"], "trian"),  # exit code 1
        slow(
            ["--learning_rate=1e30", "--lr_warmup_steps=1", "--max_grad_norm=0"],
            "a new run with a lower --learning_rate",
        ),
    ],
)
def test_a_mistake_burns_no_restarts(tmp_path, launch, flags, message):
    """Protection: ``resilience.ended``. Without it each mistake would be tried and reported four times."""
    flags = [*flags_of(tmp_path / "run", 4), *flags]
    code, said = finish(launch(*flags, restarts=3, processes=1))
    assert code not in (0, None) and said.count("error: ") == 1 and message in said, said


@pytest.mark.slow
def test_a_stop_and_a_finished_run_burn_none_either(tmp_path, launch, straight):
    """A Slurm job signals the processes, not the launcher."""
    folder = tmp_path / "run"
    flags = flags_of(folder, 16)
    agent = launch(*flags, restarts=3)
    pids = wait_for(lambda: newest(folder) >= 2 and children.family(agent))
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    code, said = finish(agent)
    assert code not in (0, None) and said.count("Stopped by SIGUSR1") == 1 and "Resuming" not in said, said
    code, said = finish(launch(*flags, restarts=3))
    assert code == 0 and said.count("Resuming from") == 1
    assert equal_weights(folder / WEIGHTS, straight(16))
    code, said = finish(launch(*flags, restarts=3))
    assert code == 0 and said.count("This run is already finished") == 1


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
def test_a_hang_ends_says_where_and_the_run_resumes_by_itself(tmp_path, launch, straight, stopped):
    """One of two processes is stopped, and the other waits for it. Protection: ``watchdog.Watchdog``."""
    folder = tmp_path / "run"
    flags = [*flags_of(folder, 16), "--hang_timeout=2"]
    agent = launch(*flags, restarts=1)
    pids = wait_for(lambda: newest(folder) >= 3 and children.family(agent))
    started = time.monotonic()
    os.kill(pids[stopped], signal.SIGSTOP)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds=30)
    assert 2 <= time.monotonic() - started < 10
    code, said = finish(agent)
    assert code == 0, said
    assert re.search(
        rf"no progress for 2 s \(--hang_timeout\): process {1 - stopped} of 2 on .* has done \d+ optimizer "
        rf"steps and is in: (step|saving)\. Process {stopped} does not answer\. "
        r"The threads of this process:", said
    ), said  # fmt: skip
    assert "most recent call first" in said and "in main" in said  # the stacks
    assert equal_weights(folder / WEIGHTS, straight(16))


DATA = """
import utils.data.columns as m
original = m.from_uint8
calls = []
m.from_uint8 = lambda images: calls.append(time.sleep(99 * (len(calls) == 3))) or original(images)
"""
SAMPLING = """
import utils.diffusion.sampling as m
original = m.starting_noise
calls = []
m.starting_noise = lambda *a: calls.append(time.sleep(99 * (len(calls) == 1))) or original(*a)
"""


@pytest.mark.parametrize("place, patch", [slow("data", DATA), ("sampling", SAMPLING)])
def test_a_hang_names_the_place(tmp_path, place, patch):
    """Protection: ``signals.progress``. There is one process, without a launcher that restarts it."""
    flags = [*flags_of(tmp_path / "run", 5), "--hang_timeout=2", "--sample_steps=2"]
    code, said = children.run(children.patched(patch), *flags, folder=tmp_path)
    assert code == EXIT_PEER_LOST and f"optimizer steps and is in: {place}. The threads of this process:" in said, said
    assert said.rstrip().endswith("The same command resumes from the newest checkpoint.")


SLOW = """
from diffusers import UNet2DModel
original = UNet2DModel.forward
def forward(self, *a, **k):
    time.sleep(0.6 * (not self.training))
    return original(self, *a, **k)
UNet2DModel.forward = forward
"""


@pytest.mark.slow
def test_slow_is_not_hung(tmp_path):
    """Sampling takes more than twice the limit, but each function evaluation takes less. Protection: ``progress``."""
    flags = [*flags_of(tmp_path / "run", 3), "--hang_timeout=2", "--sample_steps=2", "--num_inference_steps=8"]
    code, said = children.run(children.patched(SLOW), *flags, "--num_samples=8", processes=2, folder=tmp_path)
    assert code == 0 and "--hang_timeout" not in said, said
