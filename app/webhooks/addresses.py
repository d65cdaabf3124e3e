"""Webhook addresses: may this URL be called? Private and special networks are refused (SSRF)."""

import ipaddress
import re
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

from app.config import Settings
from app.jobs import problems

#: Networks that are not public although Python 3.11's `is_global` says so: IETF protocol assignments (RFC 6890), 6to4
#: relays (RFC 7526), site-local addresses (RFC 3879), documentation (RFC 9637), segment routing (RFC 9602), and the
#: address of Azure's services for its own hosts.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "fec0::/10", "3fff::/20", "5f00::/16")
)


class Refused(ValueError):
    """A URL that may not be called; the text says why."""


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # An IPv4 address inside an IPv6 address must be public, too (RFC 4291, 6052, 3056, 4380).
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in ipaddress.ip_network("64:ff9b::/96") or ip in ipaddress.ip_network("::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None and not _is_public(str(inner)):
            return False
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Receiver(NamedTuple):
    """The receiver of a URL: the addresses to connect to, and the path to ask for."""

    scheme: str
    host: str
    port: int
    path: str
    addresses: list[str]


def check_url(url: str, *, allow_private: bool) -> Receiver:
    """Check that a webhook may call this URL, and resolve its host.

    Raises:
        Refused: it is not an http or https URL, or its host has no address, or an address that is not public.
    """
    if len(url) > 2000 or not re.fullmatch(r"[!-~]+", url):
        raise Refused("it must be a URL of at most 2000 visible ASCII characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Refused("it is not a URL") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise Refused("it is not an http or https URL")
    if parts.username is not None or parts.password is not None or "\\" in url:
        raise Refused("it has a user, a password or a backslash")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Refused(f"the host {host!r} cannot be resolved") from None
    addresses = [str(address[0]) for *_, address in found]
    if not allow_private and not all(map(_is_public, addresses)):
        raise Refused(f"the host {host!r} has an address that is not public")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Receiver(parts.scheme, host, port, path, addresses)


def check_webhook(url: str | None, settings: Settings) -> None:
    """Check the webhook of a request, if it names one. The delivery checks the address once more.

    Raises:
        InvalidRequest: the service has no webhooks, or this URL may not be called.
    """
    if url is None:
        return
    try:
        if not settings.webhook_secrets:
            raise Refused("this service has no webhooks: WEBHOOK_SECRETS is not set")
        check_url(url, allow_private=settings.webhook_allow_private)
    except Refused as refused:
        error: problems.ErrorItem = {"loc": ["query", "webhook"], "msg": f"{refused}"}
        raise problems.InvalidRequest("The webhook is not allowed.", errors=[error]) from None
