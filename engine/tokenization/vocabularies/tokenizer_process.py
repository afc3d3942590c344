"""Run a tokenizer in a process that ends in time.

Nothing can stop a call of `tokenizers` that an expression keeps busy but the end of its process. So
a tokenizer that holds such an expression works in one: `faulthandler` ends it in time, whatever
the library does, and the next text gets a new one. It ends with the process that asks, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Encoding

from engine.errors import CheckpointError
from engine.tokenization.vocabularies import answering_process

_SECONDS, _RATE = 3.0, 20_000
"""What a text may take at least, and the characters a second that a slow machine does."""

_START_SECONDS = 60.0
_PROGRAM = """
import faulthandler, json, os, sys
silent = open(os.devnull, "w")
faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True, file=silent)
from tokenizers import Tokenizer
backend = Tokenizer.from_str(json.loads(sys.stdin.readline()))
def answer(method, values, options):
    made = getattr(backend, method)(values, **options)
    return made if isinstance(made, str) else [e.__getstate__().decode() for e in made]
print("{}", flush=True)
faulthandler.cancel_dump_traceback_later()
for line in sys.stdin:
    seconds, *request = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True, file=silent)
    try:
        said = {"made": answer(*request)}
    except BaseException as error:
        said = {"error": str(error)[:300], "typed": isinstance(error, TypeError)}
    print(json.dumps(said), flush=True)
    faulthandler.cancel_dump_traceback_later()
"""


class TokenizerProcess:
    """A `tokenizers` tokenizer, as it is saved, whose calls end in time. Threads take turns.

    `where` is what errors call the model.
    """

    def __init__(self, serialised: str, where: str) -> None:
        self._serialised, self._where = serialised, where
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoding]:
        """The encodings of texts. Raises `CheckpointError` where that takes too long."""
        options = {"add_special_tokens": add_special_tokens}
        encodings = []
        for state in self._made("encode_batch", list(texts), options, sum(map(len, texts))):
            encoding = Encoding()
            encoding.__setstate__(state.encode())
            encodings.append(encoding)
        return encodings

    def decode(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        """The text of ids. Raises `CheckpointError` where that takes too long."""
        plain, options = list(ids), {"skip_special_tokens": skip_special_tokens}
        return str(self._made("decode", plain, options, len(plain)))

    def _made(self, method: str, values: list[Any], options: dict[str, bool], size: int) -> Any:
        seconds = _SECONDS + size / _RATE
        with self._lock:
            line = json.dumps([seconds, method, values, options])
            said = _asked(self._running(), line)
            if said is None:
                self._end()
                raise CheckpointError(
                    f"{self._where}: its tokenizer needs more than {seconds:.0f} s, or all memory, "
                    f"for a text of {size} characters: a regular expression in it takes for ever. "
                    "Take another tokenizer."
                )
        if "error" in said:
            # As the library does; the caller names the model.
            raise (TypeError if said["typed"] else Exception)(said["error"])
        return said["made"]

    def _running(self) -> subprocess.Popen[str]:
        # A process that was forked has no share in the one of the process that it comes from.
        if self._owner != os.getpid():
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = self._started()
        return self._process

    def _started(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-c", _PROGRAM, str(_START_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=_environment(),
            start_new_session=True,  # an interrupt from the keyboard is not for it
        )
        weakref.finalize(self, _ended, process, os.getpid())
        if _asked(process, json.dumps(self._serialised)) is None:
            _ended(process, os.getpid())
            raise CheckpointError(
                f"{self._where}: its tokenizer may take long, so it works in a process of its own, "
                f"and that ended as it began. Check that {sys.executable} can import tokenizers, "
                "or take another tokenizer."
            )
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _ended(process, self._owner)


def _environment() -> dict[str, str]:
    """What the process gets of this one's environment: where the library is, and its threads."""
    folder = str(Path(tokenizers.__file__).parent.parent)
    passed = ("SYSTEMROOT", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM", "LD_LIBRARY_PATH")
    own = {name: os.environ[name] for name in passed if name in os.environ}
    return own | {"PYTHONPATH": folder, "PYTHONIOENCODING": "utf-8"}


def _asked(process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
    """What the process answers to a line; None where it ended."""
    said = answering_process.ask(process, line)
    return None if said is None else dict(json.loads(said))


def _ended(process: subprocess.Popen[str], owner: int) -> None:
    """End the process, where it is a child of this one."""
    if owner == os.getpid():
        answering_process.end(process)
