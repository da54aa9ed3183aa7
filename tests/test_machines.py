"""Several machines: two that are network namespaces of this one, joined by a cable."""

import os
import re
import signal
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
    """A function: ``accelerate launch`` with configs/multi_node.yaml on both machines; nothing of it is left behind."""
    launched = []

    def start(*flags, restarts=0, processes=2, only=(0, 1)):
        for rank in only:
            log = tmp_path / f"log-{rank}"
            log.unlink(missing_ok=True)
            command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", CONFIG]
            command += ["--machine_rank", rank, "--main_process_ip", "head", "--mixed_precision", "no"]
            command += ["--num_processes", processes, "--max_restarts", restarts, SCRIPT]
            environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            launched.append(
                children.launch(
                    [str(part) for part in command], *flags, log=log, folder=tmp_path, machine=machines[rank],
                    environment=environment,
                )
            )  # fmt: skip
        return launched[-len(only) :]

    yield start
    for launcher in launched:
        for pid in children.family(launcher) if launcher.is_alive() else []:
            os.kill(pid, signal.SIGKILL)
        launcher.kill()


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


def test_a_machine_that_goes_is_named_and_the_same_command_goes_on(tmp_path, launch):
    flags = tiny(f"--output_dir={tmp_path / 'run'}", "--max_train_steps=200", "--checkpointing_steps=5")
    pair = launch(*flags)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert time.monotonic() < deadline, pair[0].log.read_text()
        time.sleep(0.05)
    for pid in [*children.family(pair[1]), pair[1].pid]:
        os.kill(pid, signal.SIGKILL)
    code, said = children.ended(pair[0])
    assert code not in (0, None)
    assert re.search(
        r"error: another process of this run, at 10\.77\.0\.\d, has ended or cannot be reached.*goes on", said
    )
    assert 'Traceback (most recent call last):\n  File "' + str(SCRIPT) not in said
    step = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    results = [children.ended(launcher) for launcher in launch(*flags, f"--max_train_steps={step + 3}")]
    assert [code for code, _ in results] == [0, 0] and any(
        f"{step} optimizer steps done" in said for _, said in results
    )


def own_folders(tmp_path, script_flags, name):
    """Two processes, each of which sees another folder by the name."""
    port, started = children.free_port(), []
    for rank in range(2):
        group = dict(RANK=rank, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=1, MASTER_PORT=port)
        environment = {**os.environ, **{key: str(value) for key, value in group.items()}, "MASTER_ADDR": "127.0.0.1"}
        flags = [flag.replace(name, f"{name}-{rank}") for flag in script_flags]
        started.append(
            children.start(SCRIPT, *flags, log=tmp_path / f"log-{rank}", folder=tmp_path, environment=environment)
        )
    return [children.finish(child) for child in started]


def test_an_output_folder_of_each_machines_own_is_refused_everywhere(tmp_path):
    results = own_folders(tmp_path, tiny(f"--output_dir={tmp_path / 'run'}"), str(tmp_path / "run"))
    for code, said in results:
        assert code == 1 and said.count("error: ") == 1, said
        assert re.search(r"run-\d must be on a file system that all machines share: what process 0 on ", said)
        assert "process 1 on " in said and "Traceback" not in said
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
