"""F7: one chat completion of an OpenAI-compatible server: limits, retries, usage.

429, 408, 5xx, timeouts, lost connections, answers that are none    again, after Retry-After or 1, 2, 4, ... seconds
401, 403, 404                                                       RequestError: no other request would fare better
other 4xx                                                           EndpointError: this request is at fault
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import TYPE_CHECKING, Any

from splitdecode.annotate.limits import Clock, Pace
from splitdecode.errors import MissingExtraError, RequestError, SplitDecodeError

if TYPE_CHECKING:
    import httpx

HOPELESS = (401, 403, 404)
CHARACTERS_PER_TOKEN = 3  # a guess, until the answer says how many they were
LONGEST_WAIT = 60.0
MOST_TOKENS = 1 << 40  # what counts more counts nothing


class EndpointError(SplitDecodeError):
    """A request that failed for good, while others may not."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where and how to ask.

    base_url      up to and including /v1        key       sent as a bearer token; "" sends none
    timeout       seconds for one answer         retries   after the first try
    requests_per_minute, tokens_per_minute       None: no limit
    max_tokens    of an answer; 0 leaves it to the server
    """

    base_url: str
    model: str
    key: str = ""
    timeout: float = 300.0
    retries: int = 6
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_tokens: int = 4096

    def __repr__(self) -> str:  # the key stays out of logs and tracebacks
        return f"Server({self.base_url!r}, {self.model!r})"


@dataclass(frozen=True, slots=True)
class Reply:
    """What was said, and the tokens the server counted; counted: it did (else they are 0)."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    counted: bool


def key_from(variable: str | None) -> str:
    """The key in an environment variable; "" without a name. Raises RequestError when the variable is not set."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RequestError(f"--api-key-env: found no variable {variable} in the environment, expected a key in it")
    if not key.isascii() or not key.isprintable():
        raise RequestError(f"--api-key-env: found characters in {variable} that no header can carry")
    return key


def load_httpx() -> ModuleType:
    """httpx. Raises MissingExtraError when it is absent."""
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("httpx", "annotate", "asking an endpoint") from error
    return httpx


class Client:
    """Asks a Server. To be made, used and closed inside one event loop."""

    def __init__(
        self, server: Server, *, transport: httpx.AsyncBaseTransport | None = None, clock: Clock | None = None
    ) -> None:
        """transport: instead of the network, for tests. Raises RequestError for a URL that is none."""
        self._httpx = load_httpx()
        self._server, self._clock = server, clock or Clock()
        self._random = random.Random()
        self._calls = Pace(server.requests_per_minute, self._clock)
        self._tokens = Pace(server.tokens_per_minute, self._clock)
        headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
        url = server.base_url.rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise RequestError(f"--base-url: found {server.base_url!r}, expected http(s)://host/v1")
        self._url = f"{url}/chat/completions"
        limits = self._httpx.Limits(max_connections=None)
        self._http = self._httpx.AsyncClient(
            headers=headers, timeout=server.timeout, transport=transport, limits=limits
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, messages: Sequence[dict[str, str]], temperature: float) -> Reply:
        """One answer. Raises EndpointError when the retries are used up or the request is refused, RequestError when
        the server takes none."""
        body: dict[str, Any] = {
            "model": self._server.model,
            "messages": list(messages),
            "temperature": temperature,
        }
        if self._server.max_tokens:
            body["max_tokens"] = self._server.max_tokens
        guess = sum(len(m["content"]) for m in messages) / CHARACTERS_PER_TOKEN
        reason = ""
        for attempt in range(self._server.retries + 1):
            await self._calls.take()
            await self._tokens.take(guess)
            wait = None
            try:
                response = await self._http.post(self._url, json=body)
            except self._httpx.HTTPError as error:
                reason = f"{type(error).__name__} {error}".strip()
            except self._httpx.InvalidURL as error:
                raise RequestError(f"--base-url: found {self._server.base_url!r} ({error})") from None
            else:
                reply = self._reply(response)
                if isinstance(reply, Reply):
                    self._tokens.settle(guess, reply.prompt_tokens + reply.completion_tokens or guess)
                    return reply
                reason, wait = reply, _retry_after(response.headers.get("retry-after"))
            if attempt < self._server.retries:
                await self._clock.sleep(self._backoff(attempt) if wait is None else wait)
        raise EndpointError(f"no answer after {self._server.retries + 1} tries, the last one: {reason}")

    def _reply(self, response: httpx.Response) -> Reply | str:
        """The reply, or why to try again."""
        code = response.status_code
        if code in HOPELESS:
            raise RequestError(f"{self._url}: answered {code} ({_short(response.text)}) for model "
                               f"{self._server.model!r}, expected 200: check URL, model and key")  # fmt: skip
        if 400 <= code < 500 and code not in (408, 425, 429):
            raise EndpointError(f"refused with {code} ({_short(response.text)})")
        if code != 200:
            return f"status {code} ({_short(response.text)})"
        try:
            found: dict[str, Any] = response.json()
            text = found["choices"][0]["message"]["content"]
            usage = found.get("usage") or {}
            given = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            prompt, said = (int(count or 0) for count in given)
            if not (0 <= prompt < MOST_TOKENS and 0 <= said < MOST_TOKENS):
                raise ValueError(f"usage of {given} tokens")
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            return f"status 200, but no chat completion ({_short(response.text)})"
        return Reply(text if isinstance(text, str) else "", prompt, said, None not in given)

    def _backoff(self, attempt: int) -> float:
        """Doubling, with jitter: those who failed together do not come back together."""
        return min(LONGEST_WAIT, 2.0**attempt) * self._random.uniform(0.5, 1.0)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from seconds or an HTTP date; None when there is none to be understood. At most ten minutes."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(600.0, max(0.0, seconds)) if seconds == seconds else None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."
