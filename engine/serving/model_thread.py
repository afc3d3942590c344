"""The thread that runs the model for all requests.

The model is used by this thread alone. Others queue jobs and take them back; what a job brings
forth is handed to its `post`, on this thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import EngineError
from engine.inference.batched import BatchedGenerator
from engine.inference.request import RequestSettings, TokenEvent
from engine.serving.openai.answers import AnswerPiece, AnswerPieces, ChosenToken
from engine.serving.openai.api_errors import ApiError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredPrompt:
    """The tokens of a prompt with their log-probabilities; the first has none."""

    tokens: tuple[ChosenToken, ...]


Post = Callable[[AnswerPiece | ScoredPrompt | ApiError], None]


@dataclass(eq=False)
class AnswerJob:
    """One answer to be made.

    Attributes:
        prompt: ids to go on from.
        settings: how the answer is made.
        pieces: makes pieces of its events.
        deadline: when it is given up, on `time.monotonic`'s clock.
        post: takes the scored prompt, where it is asked for, the pieces, and an error, if any.
        score_only: whether the answer itself is of no interest.
    """

    prompt: Sequence[int]
    settings: RequestSettings
    pieces: AnswerPieces
    deadline: float
    post: Post
    score_only: bool = False
    number: int | None = None


class ModelThread:
    """Runs jobs on a generator until it is stopped, or until the model fails.

    Args:
        generator: belongs to this thread from `start` on.
        most_waiting: jobs that may wait for a slot of the generator.
    """

    def __init__(self, generator: BatchedGenerator, most_waiting: int) -> None:
        self._generator, self._most_waiting = generator, most_waiting
        self._changed = threading.Condition()
        self._waiting: deque[AnswerJob] = deque()
        self._left: list[AnswerJob] = []
        self._running: dict[int, AnswerJob] = {}
        self._draining: ApiError | None = None
        self._stopping = False
        self.failure: ApiError | None = None
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def running(self) -> int:
        """Jobs that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that wait for one."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether jobs are still done."""
        return self.failure is None and self._thread.is_alive()

    def problem(self) -> ApiError | None:
        """Why no jobs are taken, if none are."""
        if self.failure is None and not self._thread.is_alive():
            return ApiError(500, "the model is not running", code="model_failed")
        problem = self.failure or self._draining
        return None if problem is None else problem.copy()

    def submit(self, jobs: Sequence[AnswerJob]) -> None:
        """Queue the jobs of one request, all or none.

        Raises `ApiError` 500 after a failure, 503 during a shutdown, 429 for a full queue.
        """
        with self._changed:
            problem = self.problem()
            if problem is not None:
                raise problem
            free = self._generator.slots - len(self._running)
            if len(self._waiting) + len(jobs) > self._most_waiting + max(0, free):
                raise ApiError(
                    429,
                    f"{len(self._waiting)} answers are waiting and {len(jobs)} more were asked "
                    f"for; at most {self._most_waiting} may wait. Try again later",
                    code="queue_full",
                    headers={"retry-after": "1"},
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def leave(self, jobs: Sequence[AnswerJob]) -> None:
        """Give up jobs that nobody waits for any more; those that have ended are passed over."""
        with self._changed:
            self._left += jobs
            self._changed.notify()

    def drain(self, reason: ApiError) -> None:
        """Take no more jobs, and refuse those that have not begun, for `reason`."""
        with self._changed:
            self._draining = reason
            refused, self._waiting = list(self._waiting), deque()
        for job in refused:
            job.post(reason.copy())

    def stop(self, reason: ApiError, patience: float = 5.0) -> None:
        """End the thread after its step; whatever still runs ends with `reason`."""
        self.drain(reason)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(patience)
        for job in self._running.values():
            job.post(reason.copy())
        self._running = {}

    def _run(self) -> None:
        try:
            while self._wait():
                self._take_back()
                self._admit()
                self._expire()
                for event in self._generator.step():
                    self._deliver(event)
                self.steps += 1
        except BaseException as error:
            self._fail(error)

    def _wait(self) -> bool:
        """Rest until there is something to do; whether the thread goes on."""
        with self._changed:
            while not (self._waiting or self._left or self._running or self._stopping):
                self._changed.wait()
            return not self._stopping

    def _take_back(self) -> None:
        with self._changed:
            left, self._left = self._left, []
            for job in left:
                if job in self._waiting:
                    self._waiting.remove(job)
        for job in left:
            if job.number is not None and job.number in self._running:
                self._end(job.number)

    def _end(self, number: int) -> None:
        """Forget a job, whether the generator has ended it or not."""
        self._generator.cancel(number)
        del self._running[number]

    def _admit(self) -> None:
        """Hand jobs to the generator while it has slots."""
        while len(self._running) < self._generator.slots:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                job.number = self._generator.submit(job.prompt, job.settings)
            except EngineError as error:
                job.post(ApiError(400, str(error), code="prompt_not_usable"))
            except BaseException:
                with self._changed:
                    self._waiting.appendleft(job)  # `_fail` tells it.
                raise
            else:
                self._running[job.number] = job

    def _expire(self) -> None:
        """Give up jobs whose time is over."""
        now = time.monotonic()
        with self._changed:
            late = [job for job in self._waiting if job.deadline < now]
            for job in late:
                self._waiting.remove(job)
        for job in [job for job in self._running.values() if job.deadline < now]:
            assert job.number is not None
            self._end(job.number)
            late.append(job)
        for job in late:
            job.post(
                ApiError(504, "the answer took longer than --request-timeout allows; ask for less",
                         code="timeout")
            )  # fmt: skip

    def _deliver(self, event: TokenEvent) -> None:
        job = self._running.get(event.request)
        if job is None:
            return
        if event.finish_reason is not None or job.score_only:
            self._end(event.request)
        if event.error is not None:
            job.post(ApiError(500, event.error, code="model_failed"))
            return
        if event.prompt is not None:
            told = (ChosenToken(entry.token, entry.logprob, entry.top) for entry in event.prompt)
            job.post(ScoredPrompt((ChosenToken(job.prompt[0]), *told)))
        job.post(AnswerPiece(finish="length") if job.score_only else job.pieces.push(event))

    def _fail(self, error: BaseException) -> None:
        """The model cannot go on: everybody who waits is told, and who comes later, too."""
        log.error("The model failed.", exc_info=error)
        what = str(error) if isinstance(error, EngineError) else type(error).__name__
        failure = ApiError(
            500, f"the model failed ({what}); restart the server", code="model_failed"
        )
        with self._changed:
            self.failure = failure
            jobs = [*self._waiting, *self._running.values()]
            self._waiting, self._running = deque(), {}
        for job in jobs:
            job.post(failure.copy())
