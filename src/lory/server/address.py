"""Where a server listens, and who may call it there."""

from __future__ import annotations

import socket
from pathlib import Path

from lory.runtime import UsageError, is_loopback

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def choose_hosts(host: str, key: str) -> tuple[str, ...] | None:
    """The names that requests may call a server by; None: any.

    Raises:
        UsageError: other machines can reach the address, and there is no key.
    """
    if key:
        return None
    if not is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from other machines, so an API key is needed; put one into the environment "
            "variable LORY_API_KEY, or into a file that --api-key-file names."
        )
    return (*_LOOPBACK_NAMES, host)


def write_url(host: str, port: int) -> str:
    """The address of the API, for people and clients."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def find_free_port(host: str) -> int:
    """A port that nothing listens on just now.

    Raises:
        UsageError: the address is none of this machine's.
    """
    try:
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise UsageError(f"Could not listen on {host}; choose another --host.") from error


def name_model(model: str) -> str:
    """What clients call a MODEL that was given no name: a folder's last part, or as it is."""
    return Path(model).resolve().name if Path(model).exists() else model
