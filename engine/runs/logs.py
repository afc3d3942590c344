"""Logging: everything from DEBUG to the file, from INFO to the console.

Other packages' chatter below WARNING reaches neither. A console that has gone away (`| head`, a
closed terminal) is given up quietly: it must not end a training run.
"""

import contextlib
import logging
import sys
from io import TextIOWrapper
from logging.handlers import MemoryHandler
from pathlib import Path

from engine.config.data_names.passwords import scrub
from engine.errors import printable
from engine.storage.safe_files import append_regular

OWN_LOGGERS = ("engine", "cli", "models", "optim", "kernels")


def _ours(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in OWN_LOGGERS


class ConsoleHandler(logging.Handler):
    """Writes messages to the error stream, without a traceback, until that is closed."""

    def __init__(self, level: str | int = logging.INFO) -> None:
        super().__init__(level)
        self.closed = False
        self.addFilter(_ours)

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message; levels from WARNING up are named."""
        text = printable(scrub(record.getMessage()), sys.maxsize)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if self.closed:
            return
        try:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            self.closed = True


_LONGEST_WAIT = 1 << 16
"""Lines that wait for a log file at most."""


class _FileHandler(logging.FileHandler):
    def _open(self) -> TextIOWrapper:
        """Never through a link, and no pipe that would wait for a reader."""
        return append_regular(Path(self.baseFilename), errors=self.errors or "strict")

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is found, and reported, by what the run has to write, not by its log."""

    def close(self) -> None:
        """Close the file; lines that a full disk refused are tried once more, and given up."""
        with contextlib.suppress(OSError):
            super().close()


class _ScrubbedFormatter(logging.Formatter):
    """Formats lines and tracebacks without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


class RunLog:
    """The handlers of one run, from construction until `close` puts back what was before.

    Lines wait in memory until `open_file` names the file. `console_level` None keeps the console
    silent. A second `RunLog` while one is open would write every line twice.
    """

    def __init__(self, console_level: str | None = "INFO") -> None:
        self._waiting = MemoryHandler(_LONGEST_WAIT, logging.CRITICAL + 1, flushOnClose=False)
        self._waiting.addFilter(_ours)
        self._handlers: list[logging.Handler] = [self._waiting]
        if console_level is not None:
            self._handlers.append(ConsoleHandler(console_level))
        self._levels = {name: logging.getLogger(name).level for name in OWN_LOGGERS}
        for name in OWN_LOGGERS:
            logging.getLogger(name).setLevel(logging.DEBUG)
        for handler in self._handlers:
            logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)

    def open_file(self, path: Path) -> None:
        """Append to `path` from now on, and first the lines so far.

        Raises `OSError` if it cannot be opened, or is no regular file, or a link.
        """
        file = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setLevel(logging.DEBUG)
        file.addFilter(_ours)
        file.setFormatter(
            _ScrubbedFormatter(
                "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s", "%F %T"
            )
        )
        self._waiting.setTarget(file)
        self._waiting.flush()
        self._drop(self._waiting)
        self._handlers.append(file)
        logging.getLogger().addHandler(file)

    def close_file(self) -> None:
        """Stop writing to the file; the console goes on."""
        for handler in [h for h in self._handlers if isinstance(h, logging.FileHandler)]:
            self._drop(handler)

    def _drop(self, handler: logging.Handler) -> None:
        logging.getLogger().removeHandler(handler)
        handler.close()
        self._handlers.remove(handler)

    def close(self) -> None:
        """Remove the handlers and restore the levels; a second call does nothing."""
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        if self._handlers:
            logging.captureWarnings(False)
            for name, level in self._levels.items():
                logging.getLogger(name).setLevel(level)
        self._handlers.clear()
