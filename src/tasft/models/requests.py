"""Many questions to OpenAI-compatible servers at a time, each answered once, whatever fails on the way.

Needs the packages of `tasft[server]`.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from tasft.core import ranks
from tasft.core.errors import UserError
from tasft.models.engine import WITHHELD
from tasft.models.responses import (
    ErrorInside,
    Unreadable,
    Withheld,
    is_about_content,
    is_about_one,
    may_pass,
    read,
    status_of,
    words_of,
)
from tasft.models.server_settings import Server

Loop = tuple[asyncio.AbstractEventLoop, "asyncio.Task[Any]"]

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 2.0  # Before the first repetition, at most; each pause may be twice as long as the one before.
LONGEST_PAUSE_S = 60.0
LONGEST_PAUSE_ASKED_S = 300.0  # A server that asks for more is asked again after this.
ENOUGH_REFUSED = 8  # Refused requests from which on their share is looked at.
HINTS = {
    401: "does the environment variable {key_env} hold a key that it takes?",
    403: "does the environment variable {key_env} hold a key that it takes?",
    404: "does the address end in /v1, and does the server know a model {model!r}?",
}


class Question(NamedTuple):
    """A request.

    Attributes:
        number: Its place among the others.
        name: What a message calls it.
        body: Of chat completions where it has `messages`, else of completions.
    """

    number: int
    name: str
    body: dict[str, Any]


class Answer(NamedTuple):
    """What a server wrote.

    Attributes:
        number: The question's.
        text: Without what it was asked to go on from.
        finish: As in `Reply`.
        thought: As in `Reply`, where the server gives it apart.
        note: As in `Reply`.
    """

    number: int
    text: str
    finish: str
    thought: str = ""
    note: str = ""


@dataclass
class Tally:
    """How many requests were answered, and how many were refused or got nothing, over all calls.

    One request that a provider refuses is no reason to end a run; a provider that refuses most of them is.

    Attributes:
        most: Largest share that may be refused.
        answered: Requests with a reply.
        refused: Requests without one.
        unexplained: Of these, those of which nobody said that it was for their content.
    """

    most: float
    answered: int = 0
    refused: int = 0
    unexplained: int = 0

    def refuse(self, words: str, for_content: bool) -> None:
        """Count one more.

        Raises:
            UserError: They are too many.
        """
        self.refused += 1
        self.unexplained += not for_content
        asked = self.answered + self.refused
        if self.refused >= ENOUGH_REFUSED and self.refused > self.most * asked:
            raise UserError(
                f"{words}: {self.refused} of {asked} requests were refused or got no reply, which is more than "
                f"max_refused {self.most:g} allows"
            )

    def end(self, words: str) -> None:
        """See that a call in which something was refused has not failed as a whole.

        Raises:
            UserError: Nothing was ever answered, and nobody said that it was for the content.
        """
        if self.unexplained and not self.answered:
            raise UserError(words) from None


@dataclass
class _Alive:
    """Whether an address answers: when the request was sent that it answered and that was sent last."""

    latest: float = float("-inf")

    def is_the_requests_fault(self, error: BaseException, failed_at: Sequence[float]) -> bool:
        """Whether a request that failed as often as it may failed by itself, since the address answers others.

        Args:
            error: The last failure: of a rate limit or an overload no request is to blame.
            failed_at: When it failed before, each time.
        """
        status = status_of(error)
        if status is not None and status != 500:
            return False
        if failed_at and self.latest > failed_at[0]:
            return True
        # There was nothing else to ask. An address that says something is there.
        return self.latest > float("-inf") and (status == 500 or isinstance(error, Unreadable))


@dataclass(frozen=True)
class Asker:
    """Asks addresses that share the work; one that fails is left out while others answer.

    A request that a server refuses for good, or answers with nothing, gets an empty answer with the server's words;
    so does one that fails as often as it may while others that were sent later are answered.

    Attributes:
        server: Where, and how patiently.
        key: Sent to all addresses; in no sentence.
        tally: Counts over all calls.
    """

    server: Server
    key: str = field(repr=False)
    tally: Tally

    def answers(self, questions: Sequence[Question]) -> Iterator[Answer]:
        """Answers as they come, in any order.

        The requests have a thread of their own: a notebook's event loop is not disturbed, and they go on while an
        answer is dealt with. When the caller stops early they are given up. Those without a reply come last: where too
        many end the call, they are asked again by the next.

        Raises:
            UserError: A server refuses all requests or too many, or all have failed as often as they may; names each.
        """
        empty: list[Answer] = []
        arrived: SimpleQueue[Answer | None] = SimpleQueue()
        started: Future[Loop] = Future()
        faults: list[BaseException] = []

        async def ask() -> None:
            task = asyncio.current_task()
            assert task
            started.set_result((asyncio.get_running_loop(), task))
            await self._ask_all(questions, arrived.put)

        def run() -> None:
            try:
                asyncio.run(ask())
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                faults.append(error)
            started.cancel()
            arrived.put(None)

        thread = Thread(target=run, name="requests", daemon=True)
        thread.start()
        try:
            while (answer := arrived.get()) is not None:
                if answer.note:
                    empty.append(answer)
                else:
                    yield answer
            if faults:
                raise faults[0]
            if empty:
                self.tally.end(f"{empty[0].note} (request {questions[empty[0].number].name})")
            yield from empty
        finally:
            with suppress(RuntimeError, CancelledError):  # The loop is closed, or never began.
                loop, task = started.result()
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _ask_all(self, questions: Sequence[Question], arrived: Callable[[Answer], None]) -> None:
        waiting: asyncio.Queue[Question] = asyncio.Queue()
        for question in questions:
            waiting.put_nowait(question)
        left = len(questions)
        complete = asyncio.Event()

        def take(answer: Answer) -> None:
            nonlocal left
            arrived(answer)
            left -= 1
            if left == 0:
                complete.set()

        addresses = {asyncio.create_task(self._keep_busy(url, waiting, take)): url for url in self.server.urls}
        end = asyncio.create_task(complete.wait())
        faults = []
        try:
            while addresses and left:
                await asyncio.wait([*addresses, end], return_when=asyncio.FIRST_COMPLETED)
                for failed in [address for address in addresses if address.done()]:
                    url, error = addresses.pop(failed), failed.exception()
                    assert error
                    if not may_pass(error):
                        raise error
                    faults.append(f"{self._fault(url, error)} (tries: {self.server.retries + 1})")
                    if addresses:
                        logger.warning("%s: left out, other addresses go on: %d", faults[-1], len(addresses))
            if left:
                raise UserError(faults)
        finally:
            end.cancel()
            for address in addresses:
                address.cancel()
            await asyncio.gather(*addresses, return_exceptions=True)

    async def _keep_busy(self, url: str, waiting: "asyncio.Queue[Question]", take: Callable[[Answer], None]) -> None:
        """Give one address as much to do as it may have, until it fails for good or is stopped."""
        timeout, most = self.server.timeout_s, max(1, self.server.concurrency // ranks.world_size())
        async with AsyncOpenAI(base_url=url, api_key=self.key or "none", max_retries=0, timeout=timeout) as client:
            unanswered: list[Question] = []
            alive = _Alive()
            workers = [
                asyncio.create_task(self._work(url, client, waiting, unanswered, take, alive)) for _ in range(most)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                # For other addresses. Not before: one of these workers would take them again.
                for question in unanswered:
                    waiting.put_nowait(question)

    async def _work(
        self,
        url: str,
        client: AsyncOpenAI,
        waiting: "asyncio.Queue[Question]",
        unanswered: list[Question],
        take: Callable[[Answer], None],
        alive: "_Alive",
    ) -> None:
        while True:
            question = await waiting.get()
            failed_at: list[float] = []

            def tell(state: RetryCallState, failed_at: list[float] = failed_at) -> None:
                failed_at.append(time.monotonic())
                if error := state.outcome.exception() if state.outcome else None:
                    logger.info("%s: again in %.1f s", self._fault(url, error), state.upcoming_sleep)

            retrying = AsyncRetrying(
                retry=retry_if_exception(may_pass),
                wait=pause,
                stop=stop_after_attempt(self.server.retries + 1),
                before_sleep=tell,
                reraise=True,
            )
            refused: tuple[str, bool] | None = None
            try:
                answer = Answer(question.number, *await retrying(self._ask, client, question.body, alive))
            except BaseException as error:
                fault = self._fault(url, error)
                if may_pass(error) and alive.is_the_requests_fault(error, failed_at):
                    fault += f" (tries: {self.server.retries + 1})"
                elif not is_about_one(error):
                    unanswered.append(question)
                    if isinstance(error, APIStatusError | ErrorInside) and not may_pass(error):
                        raise UserError(f"{fault} (request {question.name})") from None
                    raise
                refused = fault, is_about_content(error)
                answer = Answer(question.number, "", WITHHELD, note=fault)
            # Out of reach of the error, which may show the key.
            if refused:
                self.tally.refuse(*refused)
            else:
                self.tally.answered += 1
            take(answer)

    async def _ask(self, client: AsyncOpenAI, body: Mapping[str, Any], alive: "_Alive") -> tuple[str, str, str]:
        fields, began = dict(body), time.monotonic()
        model = fields.pop("model")
        try:
            # The client's own limit begins anew with every byte.
            async with asyncio.timeout(self.server.timeout_s):
                response: Any
                if is_chat := "messages" in body:
                    messages = fields.pop("messages")
                    response = await client.chat.completions.create(model=model, messages=messages, extra_body=fields)
                else:
                    prompt = fields.pop("prompt")
                    response = await client.completions.create(model=model, prompt=prompt, extra_body=fields)
            reply = read(response, is_chat, body.get("stop"))
            alive.latest = max(alive.latest, began)
            return reply
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise Unreadable("not JSON") from None

    def _fault(self, url: str, error: BaseException) -> str:
        """What went wrong at an address, without the key."""
        match error:
            case APIStatusError():
                hint = HINTS.get(error.status_code, "").format_map(self.server.model_dump())
                return f"{url}: status {error.status_code} ({self._own_words(error.body)})" + (hint and f": {hint}")
            case TimeoutError() | APITimeoutError():
                return f"{url}: no reply within {self.server.timeout_s:g} s"
            case APIConnectionError():
                return f"{url}: no connection ({self._own_words(str(error.__cause__ or error))})"
            case ErrorInside():
                return f"{url}: an error in place of a reply ({self._own_words(error.body)})"
            case Withheld():
                return f"{url}: no reply ({self._own_words(str(error))})"
            case _:
                return f"{url}: a reply that cannot be read ({self._own_words(str(error))})"

    def _own_words(self, reason: object) -> str:
        """What a server gave as the reason: on one line, at most 300 characters, without the key if it repeats that."""
        text = words_of(reason) or str(reason or "no reason given")
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:300]


def pause(state: RetryCallState) -> float:
    """Seconds before a repetition: at random, so that not all come back at once; at least what the server asks for."""
    backoff = wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)
    return max(backoff(state), _asked_for(state.outcome.exception() if state.outcome else None))


def _asked_for(error: BaseException | None) -> float:
    """Seconds that a server asks to be left alone, by `Retry-After`; 0 if it does not."""
    value = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_PAUSE_ASKED_S)
