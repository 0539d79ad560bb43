"""The guard in conftest.py: nothing but this machine can be reached, and asking for more fails the test."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import httpx
import pytest

ELSEWHERE = "192.0.2.1"  # reserved for documentation: nobody is there


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, ELSEWHERE), (socket.AF_INET6, "2001:db8::1")])
def test_other_machines_are_refused(family: socket.AddressFamily, host: str, method: str) -> None:
    with socket.socket(family) as one, pytest.raises(pytest.fail.Exception, match=r"no network in tests: found .*443"):
        getattr(one, method)((host, 443))


def test_other_names_are_refused() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"no network in tests: found 'example\.org'"):
        socket.create_connection(("example.org", 80), timeout=5)


def test_whoever_forgives_a_lost_connection_is_refused_all_the_same() -> None:
    def forgiving() -> None:
        with httpx.Client(trust_env=False, timeout=5) as client, contextlib.suppress(Exception):
            client.get(f"http://{ELSEWHERE}")

    with pytest.raises(pytest.fail.Exception, match=r"no network in tests: found '192\.0\.2\.1'"):
        forgiving()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.53"])
def test_this_machine_is_not(host: str) -> None:
    with socket.create_server((host if host != "localhost" else "127.0.0.1", 0)) as server:
        socket.create_connection((host, server.getsockname()[1]), timeout=5).close()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")
def test_unix_sockets_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # their names must be short
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("s")
        server.listen()
        client.connect("s")
