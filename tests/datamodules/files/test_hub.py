"""Whether the hub can be reached, on loopback."""

import socket
from collections.abc import Iterator

import pytest

from datamodules.files.hub import check_hub_connection

ENDPOINT, OFFLINE = "huggingface_hub.constants.ENDPOINT", "huggingface_hub.constants.HF_HUB_OFFLINE"


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process without proxies."""
    monkeypatch.setattr(OFFLINE, False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    check_hub_connection.cache_clear()
    yield
    check_hub_connection.cache_clear()


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def test_a_hub_that_can_be_reached_is_asked(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENDPOINT, f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert check_hub_connection()
    assert not offline()


@pytest.mark.parametrize("address", ["http://127.0.0.1:{closed}", "http://host.invalid"])
def test_a_hub_that_cannot_be_reached_is_not_asked_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setattr(ENDPOINT, address.format(closed=closed))
    assert not check_hub_connection()
    assert offline()


def test_a_hub_behind_a_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENDPOINT, "http://host.invalid")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert check_hub_connection()
    assert not offline()


def test_offline_mode_stays(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENDPOINT, f"http://127.0.0.1:{listening.getsockname()[1]}")
    monkeypatch.setattr(OFFLINE, True)
    assert not check_hub_connection()
