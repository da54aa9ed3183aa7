"""Upload of a model to the Hub. The model is safe on disk if the upload fails.

The files that may be published are first copied to ``hub/`` in the output folder. A list names them, so that optimizer
states, checkpoints, links, and pictures that show training images are not published. The Hub gets a copy of that
folder, and nothing else writes to the folder.
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
from functools import cached_property
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from .. import UserError, write_record
from ..exits import UPLOAD_THREAD
from ..privacy import DATA, OWN_IMAGES, is_hub_id
from ..saved import AUTOENCODERS, NETS, net_folder
from ..signals import STOP_SIGNALS, progress
from ..training.last_lines import how_to_load
from ..training.output_dir import ARGUMENTS, read_arguments
from .model_card import DATA_TITLES, DATA_WITHOUT_PEOPLE, write_card

logger = logging.getLogger(__name__)

PUSH_FAILED = 75  # exit code, EX_TEMPFAIL of sysexits.h: try again
REQUEST_TIMEOUT = 60.0  # seconds without an answer; the client has no limit by default
ALLOWED = (  # code is allowed only if these scripts have written it
    "model_index.json", "config.json", "*.safetensors", "README.md", "pipeline.py", "linear_mix.py",
    *(f"{part}/{file}" for part in (*NETS, *AUTOENCODERS) for file in ("config.json", "*.safetensors")),
    *(f"{part}/*.safetensors.index.json" for part in NETS), "unet/basic_unet.py", "unet/own_net_*.py",
    "scheduler/scheduler_config.json", "scheduler/linear_mix.py", "adapter/*.json", "adapter/*.safetensors",
)  # fmt: skip
PICTURES = ("samples.png", "curves.png", "walk.png", "before_after.png", "guided.png", "samples/*.png")
# These files of an autoencoder, or of a model that draws from pictures, show its inputs and true images
SHOWN_IMAGES = {"samples.png", "samples/*.png", "condition.png"}


class Hub:
    """The repository of a model on the Hub. Only one process uses it.

    Args:
        folder: output folder of the run.
        repo_id: USER/NAME, or NAME; by default the folder's name in the user's account.
        private: True to create a private repository, and to refuse a public one. None: True unless ``data`` are public.
        revision: branch to push to.
        logs: True to push TensorBoard's files, too.
        timeout: seconds of failing requests after which the push is given up.
        data: name of the training images, or ``OWN_IMAGES``; by default that in the run's record.
        card: further arguments of ``model_card.write_card``.
    """

    # Kind of the repository, folder with the files to send, flag that names the repository, options to create it
    kind, sent, flag, options = "model", "hub", "--hub_model_id", {}

    def __init__(
        self, folder: Path, repo_id: str | None = None, private: bool | None = None, revision: str | None = None,
        logs: bool = False, timeout: float = 1800.0, data: str | None = None, **card,
    ):  # fmt: skip
        self.folder, self.repo_id, self.private, self.revision = Path(folder), repo_id, private, revision
        self.logs, self.timeout, self.card, self.failure = logs, timeout, card, None
        self.data = data or read_arguments(self.folder).get("public_data", OWN_IMAGES)
        self.asked_for_private = private
        huggingface_hub.set_client_factory(lambda: _with_timeout(min(REQUEST_TIMEOUT, timeout / 4)))
        constants.HF_HUB_DISABLE_XET = True  # Xet's client has no time limit for its requests
        disable_progress_bars()

    def check(self) -> None:
        """Check login, repository and the right to write.

        Raises:
            UserError: the user is not logged in or may not write there, or the repository is public instead of private.
        """
        if constants.ENDPOINT != constants._HF_DEFAULT_ENDPOINT:
            logger.warning(f"HF_ENDPOINT is set, so the model and your token are sent to {constants.ENDPOINT}")
        try:
            self._create()
        except Exception as error:  # httpx2's errors, the client's and ConnectionError have no common class
            if _is_refusal(error):
                raise UserError(f"cannot push: {self._explain(error)}") from error
            logger.warning(f"The Hub cannot be reached now: {self._explain(error)}. The push is tried again at the end")

    def _create(self) -> None:
        """Find the repository's full name, create it if it is missing, and check the right to write to it."""
        api = HfApi()
        if not self.repo_id or "/" not in self.repo_id:
            name = self.repo_id or re.sub(r"[^\w.-]+", "-", self.folder.resolve().name).strip("-.") or "model"
            self.repo_id = f"{api.whoami()['name']}/{name}"
        if self.private is None:
            self.private = not _is_public(self.data)
        api.create_repo(self.repo_id, repo_type=self.kind, private=self.private or None, exist_ok=True, **self.options)
        api.auth_check(self.repo_id, repo_type=self.kind, write=True)
        if self.private and not api.repo_info(self.repo_id, repo_type=self.kind).private:
            why, instead = "--hub_private_repo", ""
            if not self.asked_for_private:
                why = f"the training images ({self.data}) are not public"
                instead = ". If the model may be published, give --no-hub_private_repo"
            raise UserError(
                f"{why}: the {self.kind} {self.repo_id} exists and is public. Make it private in its settings on the "
                f"Hub, or choose another {self.flag}{instead}"
            )
        if self.revision:
            api.create_branch(self.repo_id, repo_type=self.kind, branch=self.revision, exist_ok=True)

    def push(self) -> None:
        """Upload the finished model and print the result; exit with ``PUSH_FAILED`` if the upload failed."""
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        # The thread is a daemon, so that a signal need not wait for it
        thread = threading.Thread(target=self._send, daemon=True, name=UPLOAD_THREAD)
        try:
            thread.start()
            while thread.is_alive():
                progress("upload")
                thread.join(1.0)
        except KeyboardInterrupt:
            self.failure = InterruptedError("stopped by a signal")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.failure is None:
            print(f"\nPushed to {constants.ENDPOINT}/{'spaces/' * (self.kind == 'space')}{self.repo_id}", flush=True)
            return
        print(
            f"\nNot pushed: {self._explain(self.failure)}.\nThe model is complete in {self.folder}. "
            f"This command sends what is missing:\n  {self._command()}",
            flush=True,
        )
        sys.exit(PUSH_FAILED)

    def _send(self) -> None:
        """Upload in this thread, and keep an error in ``failure``."""
        try:
            _retry(self._create, self.timeout)
            _retry(self._snapshot, self.timeout)
            upload = lambda: HfApi().upload_folder(  # noqa: E731
                repo_id=self.repo_id, repo_type=self.kind, folder_path=self.folder / self.sent,
                revision=self.revision, commit_message=f"Upload {self.kind}",
            )  # fmt: skip
            _retry(upload, self.timeout)
        except Exception as error:  # the disk, the network, or files that may not be published
            self.failure = error

    def _explain(self, error: Exception) -> str:
        return _explain(error, self.repo_id, self.flag)

    def _command(self, *more: str) -> str:
        script = os.path.relpath(Path(__file__).parents[2] / "push.py")
        parts = ["python", script, str(self.folder)]
        parts += ["--hub_model_id", self.repo_id] if self.repo_id else []
        asked = {True: ["--hub_private_repo"], False: ["--no-hub_private_repo"], None: []}
        parts += asked[self.asked_for_private]
        parts += ["--hub_revision", self.revision] if self.revision else []
        parts += ["--hub_logs"] if self.logs else []
        for flag, value in (
            ("hub_license", self.card.get("license")),
            ("hub_dataset_name", self.card.get("dataset_name")),
        ):
            parts += [f"--{flag}", value] if value else []
        return shlex.join([*parts, *more])

    def _snapshot(self) -> None:
        """Replace the folder with the files to send, once its new content is complete."""
        target, staging = self.folder / self.sent, self.folder / f"{self.sent}-staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        self._fill(staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)

    def _fill(self, staging: Path) -> None:
        """Copy the files that may be published.

        Raises:
            ValueError: a part of the pipeline is a link, or there are no weights.
        """
        logs = self.folder / "logs"
        files = [path for pattern in ALLOWED for path in sorted(self.folder.glob(pattern))]
        for path in files:
            if path.is_symlink() or path.parent.is_symlink():
                raise ValueError(
                    f"{path} is a link, or in a linked folder. Only files are pushed: put a copy in its place"
                )
        if not any(path.suffix == ".safetensors" for path in files):
            raise ValueError(f"{net_folder(self.folder)} has no weights (.safetensors)")
        pictures = {*PICTURES}
        record = self._hide_private_names(read_arguments(self.folder))
        push_logs = self.logs and not self._private_names
        shows_images = record.get("condition") or how_to_load(self.folder, self.folder).is_autoencoder
        if shows_images and not _is_public(record.get("public_data", OWN_IMAGES)):
            pictures -= SHOWN_IMAGES
            push_logs = False
            shown = ["samples.png", *(["condition.png"] if record.get("condition") else ["the pictures in samples/"])]
            logger.warning(
                f"{' and '.join(shown)} show images that may not be public, so they are not pushed, and neither are "
                f"TensorBoard's files. If they may be published, upload them: "
                f"hf upload {self.repo_id} {self.folder / 'samples.png'} samples.png"
            )
        elif record.get("condition"):
            pictures.add("condition.png")
        files += [path for pattern in sorted(pictures) for path in self.folder.glob(pattern)]
        files = [(path, path.relative_to(self.folder)) for path in files]
        for path in logs.glob("**/events.out.*") if push_logs and not logs.is_symlink() else ():
            # In events.out.tfevents.TIME.HOST.PID.NUMBER, HOST is private, so it is left out
            parts = path.name.split(".")
            files.append((path, Path("logs", ".".join(parts[:4] + parts[-2:]))))
        for path, place in files:
            if path.is_symlink() or path.parent.is_symlink():
                logger.warning(f"{path} is not pushed, because it is a link or in a linked folder")
                continue
            (staging / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / place)
        card = self.card | {"evaluation": self._hide_private_names(self.card.get("evaluation"))}
        write_card(staging, self.folder, final=True, name=self.repo_id, record=record, **card)
        if "public_arguments" in record:
            record["arguments"] = record.pop("public_arguments")
            record["constants"] = record.pop("public_constants", {})
            record.pop("fingerprint", None)  # someone who has the images could recognise them by it
            write_record(staging / ARGUMENTS, record)

    def _hide_private_names(self, values):
        """Return JSON values without the names of data sets of the Hub that are not public."""
        text = json.dumps(values)
        for name in self._private_names:
            text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])", OWN_IMAGES, text)
        return json.loads(text)

    @cached_property
    def _private_names(self) -> list[str]:
        """Return the names of data sets of this run that are not public on the Hub."""
        flags = read_arguments(self.folder).get("public_arguments", {})
        names = {flags.get(flag) for flag in DATA} | {(self.card.get("evaluation") or {}).get("public_reference")}
        names -= {None, self.card.get("dataset_name")}
        private = [name for name in sorted(names) if is_hub_id(name) and not _is_public(name, gated=True)]
        for name in private:
            logger.warning(
                f"{name} is not public on the Hub, so the pushed files call it {OWN_IMAGES}, and TensorBoard's files "
                "are not pushed. --hub_dataset_name names it on the model's page"
            )
        return private


def _is_public(data: str, gated: bool = False) -> bool:
    """Return whether a data set is public: one that these scripts know by name, or a public one of the Hub.

    Args:
        data: name of the data set.
        gated: whether gated data sets count, too. Their names are public, but not their images.
    """
    if data in DATA_TITLES:
        return gated or data in DATA_WITHOUT_PEOPLE  # faces are photographs from the news
    try:
        found = HfApi().dataset_info(data) if is_hub_id(data) else None
    except (HfHubHTTPError, OSError, ValueError) as error:  # a private data set of others is not found
        if _is_temporary(error):
            raise
        return False
    return bool(found) and not found.private and (gated or not found.gated)


def _with_timeout(seconds: float):
    """Return the Hub client's default HTTP client, with a time limit for each request."""
    # The module is private, so it is imported here, and only a run that pushes depends on it
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = seconds
    return client


def _retry(action: Callable[[], object], patience: float) -> None:
    """Repeat an action after temporary errors, until ``patience`` seconds after the first one.

    The Hub client repeats some requests, but not ``create_repo`` and not a commit without Xet.
    """
    wait, deadline = 1.0, None
    while True:
        try:
            action()
            return
        except Exception as error:  # as in ``Hub.check``
            deadline, response = deadline or time.monotonic() + patience, _response(error)
            asked_for = response.headers.get("retry-after", "") if response is not None else ""
            pause = max(wait, int(asked_for) if asked_for.isdigit() else 0)
            if not _is_temporary(error) or time.monotonic() + pause > deadline:
                raise
            logger.info(f"The Hub: {_explain(error, '')}. Trying again in {pause:.0f} s")
            time.sleep(pause)
            wait = min(2 * wait, 60)


def _response(error: BaseException | None):
    """Return the Hub's answer that led to an error; None if there was none."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error.response if error else None


def _status(error: Exception) -> int:
    response = _response(error)
    return response.status_code if response is not None else 0


def _is_refusal(error: Exception) -> bool:
    """Return whether the Hub or its client has refused the request."""
    if isinstance(error, (UserError, LocalTokenNotFoundError, HFValidationError)):
        return True
    return 400 <= _status(error) < 500 and not _is_temporary(error)


def _is_temporary(error: Exception) -> bool:
    """Return whether trying again may help: after a busy server, two commits at once, or a broken connection."""
    import httpx2  # the client's own HTTP library

    if _response(error) is not None:
        return _status(error) in (408, 409, 412, 429) or _status(error) >= 500
    broken = isinstance(error, (httpx2.TransportError, ConnectionError, TimeoutError))
    return broken and not isinstance(error, OfflineModeIsEnabled)


def _explain(error: Exception, repo_id: str | None, flag: str = "--hub_model_id") -> str:
    """Return one line about what failed and what to do about it."""
    status = _status(error)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "you are not logged in, or the token is not valid. Run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to push"
    advice = {
        403: f"The token may not write to {repo_id}. Use a token with the role write, or choose another {flag}",
        404: f"{repo_id} does not exist, or this token may not read it. Check {flag} and --hub_revision",
        413: "A file is too large for the Hub",
    }.get(status, "")
    reason = " ".join(str(error).split())[:300] or "no reason given"
    return f"{type(error).__name__}: {reason}{'. ' if advice else ''}{advice}"
