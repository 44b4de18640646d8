"""TensorBoard's files of a run. They are no result: where they cannot be written, a warning says so, and it goes on."""

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

from linvision.extras import needed

_logger = logging.getLogger(__name__)


class Events:
    """TensorBoard's files, written while they can be.

    Args:
        folder: Where they go; None writes nothing.
        step: Steps taken; points after it, of an interrupted run, are dropped.

    Raises:
        MissingPackage: TensorBoard is not installed, which is said before a run and not at its end.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self.folder, self.writer, self.hook = folder, None, threading.excepthook
        if folder is None:
            return
        with needed('TensorBoard of a run'):
            from torch.utils.tensorboard import SummaryWriter
        threading.excepthook = self.unless_ours
        try:
            self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        except Exception as error:
            self.give_up(error)

    def unless_ours(self, args: Any) -> None:
        """What is told of errors in threads: of TensorBoard's own, which raises them again here, nothing."""
        if not type(args.thread).__module__.startswith('tensorboard.'):
            self.hook(args)

    def write(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of TensorBoard's writer; with the first error it is given up, in words."""
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args, **kwargs)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Say what cannot be written, and write no more."""
        self.writer = None
        try:
            free = f'; {shutil.disk_usage(self.folder.parent).free / 2**30:.2f} GiB are free' if self.folder else ''
        except OSError:
            free = ''
        _logger.warning(
            f'TensorBoard cannot write to {self.folder} ({type(error).__name__}: {error}{free}). The run goes on '
            'without it; checkpoints, score and model are written as ever. Make room there, or let the folder be '
            'written, and the next start writes to it again.'
        )

    def close(self) -> None:
        """Write what is left."""
        self.write('close')
        self.writer, threading.excepthook = None, self.hook
