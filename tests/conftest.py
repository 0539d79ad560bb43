"""One thread for every test: the machines that run them are shared, and two contended OpenMP threads crawl.

Triton is interpreted, except by `pytest -m gpu`: it chooses when it is imported, so the choice is made here.

No network: a test that looks up or connects to anything but this machine fails by it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # trl reports who trains, by a thread; read when it is imported

import pytest
import torch

torch.set_num_threads(1)


def here(host: Any) -> bool:
    """Whether an address is this machine's own."""
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(where: Any) -> None:
    # No Exception: whoever goes on without a network must not make a test pass that asked for one.
    pytest.fail(f"no network in tests: found {where!r}, expected this machine (127.0.0.1, ::1, a Unix socket)")


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuses what would leave this machine; set up once, looked at by nobody who opens no connection."""
    connect, look_up = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}, socket.getaddrinfo

    def guarded(name: str) -> Callable[[socket.socket, Any], Any]:
        def connects(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not here(address[0]):
                refuse(address)
            return connect[name](self, address)

        return connects

    def looks_up(host: Any, *rest: Any, **named: Any) -> Any:
        if not here(host):
            refuse(host)
        return look_up(host, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name in connect:
            patch.setattr(socket.socket, name, guarded(name))
        patch.setattr(socket, "getaddrinfo", looks_up)
        yield


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TRITON_INTERPRET"] = "0" if config.option.markexpr == "gpu" else "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel runs: in Triton's interpreter, and on a GPU by `pytest -m gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
