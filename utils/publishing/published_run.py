"""Publication of a run's model: its model card, and its repository on the Hub."""

import accelerate

from ..privacy import OWN_IMAGES, public_data
from ..training.process import on_main_process
from .hub import Hub
from .model_card import add_to_record, write_card


class PublishedRun:
    """Part of a training run that publishes its model, see ``training.loop.Run``."""

    hub = None

    def claimed(self, run) -> None:
        """Check login, repository and the right to write, before anything is trained.

        Raises:
            UserError: on every process, see ``Hub.check``.
        """
        if not run.args.push_to_hub:
            return
        if run.accelerator.is_main_process:
            named = vars(run.args).get("dataset_name") and not vars(run.args).get("train_data_dir")
            data = public_data(run.args.dataset_name) if named else OWN_IMAGES  # they are not loaded yet
            self.hub = Hub(run.output_dir, run.args.hub_model_id, run.args.hub_private_repo, data=data)
        on_main_process(run.accelerator, lambda: self.hub.check())  # other processes have no hub

    def started(self, run) -> None:
        if run.accelerator.is_main_process:
            state = accelerate.state.AcceleratorState()
            add_to_record(run.output_dir, run.args, run.title, run.caption, state)

    def saved(self, run, folder) -> None:
        if folder != run.output_dir:  # the card of the output folder is written at the end, with pictures
            write_card(folder, run.output_dir)

    def finished(self, run) -> None:
        if run.accelerator.is_main_process:
            write_card(run.output_dir, run.output_dir, trust=True)

    def released(self, run) -> None:
        if self.hub:
            self.hub.push()
