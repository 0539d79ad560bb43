"""A chat-completions server on this machine, in a thread: answers by a function, counts what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

Answer = tuple[int, dict[str, str], Any]  # status, headers, body (a str is sent as it is)


def completion(text: str, prompt_tokens: int = 100, completion_tokens: int = 20) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


def trace_in(body: dict[str, Any]) -> str:
    """The trace a request asks about."""
    asked: str = body["messages"][-1]["content"]
    return asked.split("<trace>\n", 1)[1].rsplit("\n</trace>", 1)[0]


class ChatServer:
    """answer(body) -> Answer, called in the server's thread; `delay` seconds pass before each. Of all requests only the
    first `limit` are answered, until that is raised; None: all."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer], delay: float = 0.0) -> None:
        self.answer, self.delay = answer, delay
        self.limit: int | None = None
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._talks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        await self._over.wait()
        server.close()
        for talk in list(self._talks):
            talk.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._talks.add(task)
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.asked.append(body)
                self.headers.append(head)
                number = len(self.asked)
                await asyncio.sleep(self.delay)
                while self.limit is not None and number > self.limit:
                    await asyncio.sleep(0.01)
                status, headers, said = self.answer(body)
                data = (said if isinstance(said, str) else json.dumps(said)).encode()
                lines = [f"HTTP/1.1 {status} X", f"content-length: {len(data)}"]
                lines += [f"{name}: {value}" for name, value in headers.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._talks.discard(task)
            writer.close()
