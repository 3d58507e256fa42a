"""Where the server listens, who may ask, and how much."""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import re
import socket

from ratioctl.errors import UsageError

TOKEN_VARIABLE = "RATIOCTL_SERVE_TOKEN"
MIN_TOKEN = 16  # characters
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one server, checked.

    Attributes:
        host: address to listen on; port 0 takes a free one.
        token: what requests must carry as `Authorization: Bearer TOKEN`; None: nothing.
        allowed_hosts: further names under which the server is reached (the Host header).
        max_body: bytes of one request; max_pixels: of one image; max_images: of one request.
        max_held: bytes of all bodies that are held at the same time.
        max_queue: images that wait to be scored; max_jobs: searches that wait.
        max_requests: requests at the same time; max_connections: open connections.
        timeout: seconds for reading a request, and again for answering it; header_timeout: for its head.
        job_timeout: seconds of one search.

    Raises:
        UsageError: an address that others can reach without a token, or a token that is easy to guess.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = dataclasses.field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = 32 * MIB
    max_pixels: int = 50_000_000
    max_images: int = 64
    max_held: int = 256 * MIB
    max_queue: int = 2048
    max_jobs: int = 8
    max_requests: int = 256
    max_connections: int = 512
    timeout: float = 30.0
    header_timeout: float = 10.0
    job_timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(rf"[!-~]{{{MIN_TOKEN},}}", self.token):
            reason = f"must be at least {MIN_TOKEN} printable ASCII characters without spaces"
            raise UsageError("--token", reason, "For example the output of: openssl rand -hex 16")
        if self.token is None and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host}",
                "can be reached by others, who must then give a token",
                f"Add --token, or set {TOKEN_VARIABLE}; or listen on 127.0.0.1.",
            )

    @functools.lru_cache(maxsize=64)  # noqa: B019 - clients repeat one header; a server has one Settings
    def accepts_host(self, header: str) -> bool:
        """Whether a request with this Host header is for this server, and not sent here by DNS rebinding.

        Addresses cannot be rebound, so any is accepted where others may connect.
        """
        name = host_name(header)
        if name in ("localhost", *(known.casefold() for known in self.allowed_hosts)):
            return True
        if is_loopback(self.host):
            return is_loopback(name)
        return is_address(name) or name in _own_names()


@functools.cache
def _own_names() -> frozenset[str]:
    return frozenset({socket.gethostname().casefold(), socket.getfqdn().casefold()})


def host_name(header: str) -> str:
    """The name or address of a Host header, without the port, in lower case."""
    bracketed = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](:\d*)?", header)
    return bracketed[1].casefold() if bracketed else header.rpartition(":")[0].casefold() or header.casefold()


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    return host.casefold() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
