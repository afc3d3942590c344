"""Do work in a thread, a few items ahead of its user."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_PATIENCE = 0.2


class Ahead(Generic[T]):
    """The items of an iterable, made by a thread that stays at most `depth` items ahead.

    An error of the iterable is raised where its item would have come. Leaving the iteration, or
    `close`, ends the thread.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None, bool]]
        self._queue = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(iter(items),), name="rows", daemon=True
        )
        self._thread.start()

    def _work(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None, False)):
                    return
            self._put((None, None, True))
        except BaseException as error:
            self._put((None, error, True))

    def _put(self, entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=_PATIENCE)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stopped.is_set():
            raise StopIteration
        item, error, last = self._queue.get()
        if error is not None:
            self.close()
            raise error
        if last:
            self.close()
            raise StopIteration
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread; items that wait are dropped."""
        self._stopped.set()
        self._thread.join()
