"""Pushing a model to the Hub, so that it never costs the model.

What is pushed is copied to ``hub/`` in the output folder first, by a list of what may be published: never optimizer
states, checkpoints, links, or pictures that hold training images. That folder is what the Hub shows, and nothing else
writes to it. Checkpoints are uploaded in a thread beside training; only the main process talks to the network.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from .. import UserError
from ..exits import UPLOAD
from ..signals import STOP_SIGNALS
from ..training.output_dir import ARGUMENTS, read_arguments

logger = logging.getLogger(__name__)

PUSH_FAILED = 75  # exit code, EX_TEMPFAIL of sysexits.h: try again
REQUEST_TIMEOUT = 60.0  # seconds without an answer; the client's default is to wait for ever
ALLOWED = (
    "model_index.json", "README.md", "*.py", "unet/config.json", "unet/*.safetensors", "unet/*.safetensors.index.json",
    "unet/*.py", "scheduler/scheduler_config.json", "scheduler/*.py", "adapter/*.json", "adapter/*.safetensors",
)  # fmt: skip
PICTURES = ("samples.png", "curves.png", "walk.png", "before_after.png", "guided.png", "samples/*.png")


class Hub:
    """A model's place on the Hub. Every method does nothing without ``--push_to_hub``; call them on all processes.

    Args:
        accelerator: says which process talks.
        args: ``push_to_hub``, ``hub_model_id``, ``hub_private_repo``, ``hub_revision``, ``hub_strategy``, ``hub_logs``,
            ``hub_timeout``, ``push_required``, ``output_dir``, ``logging_dir``.

    Raises:
        UserError: on every process: not logged in, no right to write there, a public repository where a private one is
            asked for; with ``push_required`` also if the Hub cannot be reached.
    """

    # Of repository; the folder with what is sent; the flag that names it; how it is created
    kind, sent, flag, options = "model", "hub", "--hub_model_id", {}

    def __init__(self, accelerator, args):
        self.accelerator, self.args, self.folder = accelerator, args, Path(args.output_dir).resolve()
        self.repo_id, self.thread, self.failure = args.hub_model_id, None, None
        self.active = args.push_to_hub and accelerator.is_main_process
        problem = [None]
        if self.active:
            factory = lambda: _with_timeout(min(REQUEST_TIMEOUT, args.hub_timeout / 4))  # noqa: E731
            huggingface_hub.set_client_factory(factory)
            constants.HF_HUB_DISABLE_XET = True  # another client, of its own, on whose requests there is no time limit
            disable_progress_bars()
            try:
                self._check()
            except UserError as error:
                problem[0] = str(error)
        if args.push_to_hub and broadcast_object_list(problem)[0]:
            raise UserError(problem[0])

    def _check(self) -> None:
        """Login, repository and the right to write, before anything is trained."""
        if constants.ENDPOINT != constants._HF_DEFAULT_ENDPOINT:
            logger.warning(f"HF_ENDPOINT is set: the model and your token go to {constants.ENDPOINT}")
        try:
            self._create()
        except Exception as error:  # httpx2's errors, the client's and ConnectionError share no class
            if _is_refusal(error):
                raise UserError(f"cannot push: {self._explain(error)}") from error
            if self.args.push_required:
                raise UserError(f"cannot push: the Hub cannot be reached: {self._explain(error)}") from error
            logger.warning(f"The Hub cannot be reached now: {self._explain(error)}. The push is tried again at the end")

    def _create(self) -> None:
        """Find out the repository's full name, create it if need be, and see that it can be written to."""
        api, private = HfApi(), self.args.hub_private_repo
        if not self.repo_id or "/" not in self.repo_id:
            name = self.repo_id or re.sub(r"[^\w.-]+", "-", self.folder.name).strip("-.") or "model"
            self.repo_id = f"{api.whoami()['name']}/{name}"
        api.create_repo(self.repo_id, repo_type=self.kind, private=private or None, exist_ok=True, **self.options)
        api.auth_check(self.repo_id, repo_type=self.kind, write=True)
        if private and not api.repo_info(self.repo_id, repo_type=self.kind).private:
            raise UserError(
                f"--hub_private_repo: the {self.kind} {self.repo_id} exists and is public. Make it private in its "
                f"settings on the Hub, or choose another {self.flag}"
            )
        if self.args.hub_revision:
            api.create_branch(self.repo_id, repo_type=self.kind, branch=self.args.hub_revision, exist_ok=True)

    def push_checkpoint(self, step: int) -> None:
        """With ``--hub_strategy every_checkpoint``, upload ``checkpoint-<step>`` beside training.

        While an upload runs, a further one is left out; the end is always pushed.
        """
        if not self.active or self.args.hub_strategy != "every_checkpoint":
            return
        if self.thread and self.thread.is_alive():
            logger.info(f"An upload is still under way: checkpoint-{step} is not pushed")
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.flush()
        try:
            self._snapshot(self.folder / f"checkpoint-{step}")
        except Exception as error:  # a full disk, a file that cannot be copied: no reason to stop training
            logger.warning(f"checkpoint-{step} is not pushed: {type(error).__name__}: {error}")
            return
        self._upload(f"checkpoint-{step}")

    def push(self) -> None:
        """Upload the finished model, and say what became of it; exit with ``PUSH_FAILED`` if it was not pushed."""
        if not self.active:
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        try:
            if self.thread:  # the upload of a checkpoint; it ends, for no request waits for ever
                self.thread.join()
            self._snapshot(self.folder)
            self._upload("end of training")
            self.thread.join()
        except KeyboardInterrupt:
            self.failure = InterruptedError("stopped by a signal")
        except Exception as error:  # the disk, the network, or files that may not be published
            self.failure = error
        if self.failure is None:
            print(f"\nPushed to {constants.ENDPOINT}/{'spaces/' * (self.kind == 'space')}{self.repo_id}", flush=True)
            return
        print(
            f"\nNot pushed: {self._explain(self.failure)}.\nThe model is complete in {self.args.output_dir}. "
            f"This sends what is missing:\n  {self._command()}",
            flush=True,
        )
        sys.exit(PUSH_FAILED)

    def _explain(self, error: Exception) -> str:
        return _explain(error, self.repo_id, self.flag)

    def _command(self) -> str:
        script = os.path.relpath(Path(__file__).parents[2] / "push.py")
        parts = ["python", script, self.args.output_dir]
        parts += ["--hub_model_id", self.repo_id] if self.repo_id else []
        parts += ["--hub_private_repo"] if self.args.hub_private_repo else []
        parts += ["--hub_revision", self.args.hub_revision] if self.args.hub_revision else []
        parts += ["--hub_logs"] if self.args.hub_logs else []
        space = vars(self.args).get("space")
        return shlex.join([*parts, *(["--space"] if space == "" else ["--space", space] if space else [])])

    def _snapshot(self, source: Path) -> None:
        """Renew the folder with what is sent, of a saved pipeline; it is complete, or as it was."""
        target, staging = self.folder / self.sent, self.folder / f"{self.sent}-staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        self._fill(staging, source)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)

    def _fill(self, staging: Path, source: Path) -> None:
        """Copy what may be published, of a saved pipeline and of the run's folder.

        Raises:
            ValueError: a part of the pipeline is a link, or it has no weights.
        """
        logs = self.folder / self.args.logging_dir
        files = [(path, path.relative_to(source)) for pattern in ALLOWED for path in sorted(source.glob(pattern))]
        for path, _ in files:
            if path.is_symlink() or path.parent.is_symlink():
                raise ValueError(f"{path} is, or is below, a link, and only files are pushed: put a copy in its place")
        if not any(place.suffix == ".safetensors" for _, place in files):
            raise ValueError(f"{source}/unet has no weights (.safetensors)")
        for pattern in PICTURES:
            files += [(path, path.relative_to(self.folder)) for path in self.folder.glob(pattern)]
        for path in logs.glob("**/events.out.*") if self.args.hub_logs else ():
            parts = path.name.split(".")  # events.out.tfevents.TIME.HOST.PID.NUMBER, without the name of this machine
            files.append((path, Path("logs", ".".join(parts[:4] + parts[-2:]))))
        for path, place in files:
            if path.is_symlink() or path.parent.is_symlink():
                logger.warning(f"{path} is, or is below, a link: not pushed")
                continue
            (staging / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / place)
        self._write_arguments(staging)

    def _write_arguments(self, folder: Path) -> None:
        """``training_args.json`` without paths of this machine."""
        record = read_arguments(self.folder)
        if "public_arguments" in record:
            record["arguments"] = record.pop("public_arguments")
            (folder / ARGUMENTS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _upload(self, message: str) -> None:
        """Start the upload of ``hub/`` in a thread; what goes wrong in it is kept in ``failure``."""

        def send():
            try:
                _persist(self._create, self.args.hub_timeout)
                self._finish_card()
                upload = lambda: HfApi().upload_folder(  # noqa: E731
                    repo_id=self.repo_id, repo_type=self.kind, folder_path=self.folder / self.sent,
                    revision=self.args.hub_revision or None, commit_message=f"Upload {self.kind}, {message}",
                )  # fmt: skip
                _persist(upload, self.args.hub_timeout)
                self.failure = None
                logger.info(f"Sent to the Hub: {message}")
            except Exception as error:  # as in ``_check``; training must not stop for it
                self.failure = error
                logger.warning(f"{message} is not pushed: {self._explain(error)}")

        self.thread = threading.Thread(target=send, daemon=True, name=UPLOAD)
        self.thread.start()

    def _finish_card(self) -> None:
        """The card's snippet loads the model from the Hub."""
        card = self.folder / self.sent / "README.md"
        if card.is_file():
            text = re.sub(
                r"(from_pretrained\(|custom_pipeline=)'[^']*'", rf"\1'{self.repo_id}'", card.read_text(encoding="utf-8")
            )
            card.write_text(text, encoding="utf-8")


def _with_timeout(seconds: float):
    """The client's own HTTP client, but no request waits for ever."""
    from huggingface_hub.utils._http import default_client_factory  # private: only a run that pushes depends on it

    client = default_client_factory()
    client.timeout = seconds
    return client


def _persist(action: Callable[[], object], patience: float) -> None:
    """Try again what may succeed later, for so many seconds after it failed first.

    The client tries some requests again by itself; ``create_repo`` and a commit without Xet it does not.
    """
    wait, deadline = 1.0, None
    while True:
        try:
            action()
            return
        except Exception as error:  # as in ``_check``
            deadline, response = deadline or time.monotonic() + patience, _response(error)
            asked_for = response.headers.get("retry-after", "") if response is not None else ""
            pause = max(wait, int(asked_for) if asked_for.isdigit() else 0)
            if not _may_pass(error) or time.monotonic() + pause > deadline:
                raise
            logger.info(f"The Hub: {_explain(error, '')}; trying again in {pause:.0f} s")
            time.sleep(pause)
            wait = min(2 * wait, 60)


def _response(error: BaseException | None):
    """The Hub's answer that led to an error; None if there was none."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error.response if error else None


def _status(error: Exception) -> int:
    response = _response(error)
    return response.status_code if response is not None else 0


def _is_refusal(error: Exception) -> bool:
    """Whether the Hub, or the client for it, has said no."""
    if isinstance(error, (UserError, LocalTokenNotFoundError, HFValidationError)):
        return True
    return 400 <= _status(error) < 500 and not _may_pass(error)


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: a server that is busy, two commits at once, a connection that broke."""
    import httpx2  # the client's own HTTP library

    if _response(error) is not None:
        return _status(error) in (408, 409, 412, 429) or _status(error) >= 500
    broken = isinstance(error, (httpx2.TransportError, ConnectionError, TimeoutError))
    return broken and not isinstance(error, OfflineModeIsEnabled)


def _explain(error: Exception, repo_id: str | None, flag: str = "--hub_model_id") -> str:
    """One line: what failed, and what to do about it."""
    status = _status(error)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "you are not logged in, or the token is not valid. Run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    advice = {
        403: f"the token may not write to {repo_id}: it needs the role write; or choose another {flag}",
        404: f"{repo_id} is not there, or this token may not see it; check {flag} and --hub_revision",
        413: "a file is too large for the Hub",
    }.get(status, "")
    reason = " ".join(str(error).split())[:300] or "no reason given"
    return f"{type(error).__name__}: {reason}{'. ' if advice else ''}{advice}"
