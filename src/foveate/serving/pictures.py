"""Pictures of a request: data URIs, and, where allowed, public addresses. Never paths.

Nothing is fetched from this machine or its neighbours. Every address that a host name resolves to
is checked, and the connection goes to a checked address itself, so that a name which resolves to
something else a moment later changes nothing. Redirects are checked in the same way. Proxies of the
environment are not used.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator

from PIL import Image

from ..base.errors import FoveateError
from ..base.images import TooManyPixels, pixels
from .decoders import SECONDS, Crowded, Decoders
from .wire import Busy, Settings, TooLarge


def read_pictures(urls: list[str], settings: Settings, decoders: Decoders) -> list[Image.Image]:
    """The pictures behind the ``image_url`` parts of a request, decoded.

    Raises:
        TooLarge: over a limit. Busy: other pictures take too long. FoveateError: anything but a
            picture.
    """
    if len(urls) > settings.images:
        raise FoveateError(
            f"A request may hold {settings.images} images, and this has {len(urls)}."
        )
    deadline = time.monotonic() + settings.seconds
    contents = [_content(url, settings, deadline) for url in urls]
    pictures: list[Image.Image] = []
    for data in contents:
        left = settings.pixels - sum(pixels(picture.size) for picture in pictures)
        try:
            pictures.append(decoders.decode(data, max(1, left)))
        except TooManyPixels as error:
            raise TooLarge(
                f"The images of a request may have {settings.pixels:,} pixels together: make them "
                "smaller."
            ) from error
        except Crowded:
            raise Busy(round(SECONDS)) from None
    return pictures


def _content(url: str, settings: Settings, deadline: float) -> bytes:
    scheme = url[:5].lower()
    if scheme == "data:":
        return _data(url, settings.image_bytes)
    if not scheme.startswith("http"):
        raise FoveateError(
            "An image is a data URI such as data:image/png;base64,...: files are not read from "
            "here, so encode the file's content."
        )
    if not settings.remote_images:
        raise FoveateError(
            "This server fetches no images (--allow-remote-images is off): send a data URI."
        )
    return fetch(url, settings.image_bytes, max(0.0, deadline - time.monotonic()))


def _data(uri: str, limit: int) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise FoveateError("A data URI begins with data:image/png;base64, or the like.")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FoveateError("The data URI does not hold valid base64.") from error
    if len(data) > limit:
        raise TooLarge(f"An image may have {limit:,} bytes: make it smaller.")
    return data


# -- from the network ------------------------------------------------------------------------------


REDIRECTS = 3
CHUNK = 2**16
AZURE = "168.63.129.16"  # where Azure answers its own machines, in a range that others may reach
_TRANSLATED = tuple(  # IPv6 addresses with an IPv4 address inside, which a gateway may unpack
    map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96"))
)


def fetch(url: str, limit: int, seconds: float) -> bytes:
    """The content of a public http or https address.

    Args:
        limit: most bytes. seconds: that all of it may take.

    Raises:
        FoveateError: an address that is not public, a redirect to one, too many bytes, too slow,
            or no answer.
    """
    deadline = time.monotonic() + seconds
    for _ in range(1 + REDIRECTS):
        parts = _parse(url)
        try:
            with _connection(parts, deadline) as connection:
                body = _read(connection, parts, limit)
            if time.monotonic() >= deadline:  # the end may be where it was cut off
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            why = (str(error) or type(error).__name__).rstrip(".")
            if time.monotonic() >= deadline:
                why = f"its host took longer than {seconds:g} seconds"
            raise FoveateError(f"The image cannot be fetched: {why}.") from error
        if isinstance(body, bytes):
            return body
        url = urllib.parse.urljoin(url, body)  # a redirect
    raise FoveateError(f"The image's address redirects more than {REDIRECTS} times.")


def is_public(address: str) -> bool:
    """Whether an IP address is one that everybody on the internet may reach."""
    if address == AZURE:
        return False
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.is_site_local or any(ip in network for network in _TRANSLATED):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _parse(url: str) -> urllib.parse.SplitResult:
    if not url.isascii() or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise FoveateError("The image's address holds characters that must be percent-encoded.")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FoveateError("The image's address cannot be read: check it.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise FoveateError("An image's address begins with http:// or https:// and names a host.")
    if "@" in parts.netloc:
        raise FoveateError("An image's address may not hold a user name: leave it out.")
    return parts


def _addresses(host: str, port: int) -> list[str]:
    """What a host name resolves to, all of it public."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FoveateError("The image's host cannot be found: check the address.") from error
    addresses = [str(info[4][0]) for info in infos]
    if not all(map(is_public, addresses)):
        raise FoveateError("The image's host is not a public one: send the image as a data URI.")
    return addresses


@contextlib.contextmanager
def _connection(
    parts: urllib.parse.SplitResult, deadline: float
) -> Iterator[http.client.HTTPConnection]:
    """A connection to a checked address of the host; cut at the deadline."""
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    with _connected(_addresses(host, port), port, deadline) as plain:
        sock = plain
        if secure:
            context = ssl.create_default_context()
            sock = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
        # a host that sends a byte now and then never meets the socket's own time limit
        over = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [sock])
        over.start()
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            connection = http.client.HTTPConnection(host, port)
            connection.sock, connection.auto_open = sock, 0  # type: ignore[assignment]
            yield connection
        finally:
            over.cancel()
            sock.close()


def _connected(addresses: list[str], port: int, deadline: float) -> socket.socket:
    failure: OSError = TimeoutError("timed out")
    for address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return socket.create_connection((address, port), timeout=left)
        except OSError as error:
            failure = error
    raise failure


def _read(
    connection: http.client.HTTPConnection, parts: urllib.parse.SplitResult, limit: int
) -> bytes | str:
    """The body, or where a redirect leads."""
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    headers = {"Host": parts.netloc, "User-Agent": "foveate", "Accept": "image/*"}
    connection.request("GET", target, headers=headers | {"Connection": "close"})
    answer = connection.getresponse()
    if answer.status in (301, 302, 303, 307, 308):
        return answer.getheader("Location") or "/"
    if answer.status != 200:
        raise FoveateError(f"The image's host answered {answer.status}: check the address.")
    data = bytearray()
    while chunk := answer.read(CHUNK):
        data += chunk
        if len(data) > limit:
            raise FoveateError(f"The image has more than {limit:,} bytes: make it smaller.")
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return bytes(data)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which another thread uses
