"""What the terminal shows: our own log with the time of every line, and other libraries only where it matters."""

from __future__ import annotations

import logging
import sys
import warnings

from opd_ds.utils.progress import CONSOLE


class _Line(logging.Formatter):
    """Time, rank where it is not 0, level where it is not information, text."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(asctime)s", "%Y-%m-%d %H:%M:%S")
        self._where = f"[rank {rank}] " if rank else ""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{record.asctime} {self._where}{level}{record.message}"


class _Terminal(logging.Handler):
    """Information on stdout, above the progress bars; warnings on stderr."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.setFormatter(_Line(rank))

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            CONSOLE.print(self.format(record), markup=False, highlight=False)
        else:
            print(self.format(record), file=sys.stderr, flush=True)


def log_to_terminal(rank: int = 0) -> None:
    """Show the log of opd_ds: everything on rank 0, warnings on the others. May be called again."""
    logger = logging.getLogger("opd_ds")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Terminal)]:
        logger.removeHandler(handler)
    logger.addHandler(_Terminal(rank))
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def quiet_notes() -> None:
    """No notes of libraries about what else could be installed; before they are imported."""
    # transformers (5.x) says which image processors torchvision would make faster, while diffusers imports them.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # torchao (0.18) says which of its kernels fit this machine, and how torch (2.13) would like its enums registered.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Leave the terminal to our own progress: no loading bars, no notes about optional image backends."""
    quiet_notes()
    # tqdm (4.67) asks notebooks for ipywidgets, for bars that are not shown.
    warnings.filterwarnings("ignore", message="IProgress not found")
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
