"""The bytes of a file on a server, from some position on."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator

__all__ = ["Cut", "Refused", "bytes_from", "chunks"]

CHUNK = 1 << 16


class Cut(Exception):
    """The connection broke or never came about; another try may help."""


class Refused(Exception):
    """This url will not give the file."""


def chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it arrives; here an OSError comes from the network, so it is told apart from the disk's."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise Cut(_reason(error)) from None
        if not chunk:
            return
        yield chunk


def bytes_from(url: str, start: int, size: int, timeout: float) -> tuple[http.client.HTTPResponse, int]:
    """Ask for the bytes from `start` on; returns the response and where its body really starts."""
    headers = {"User-Agent": "controlat"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return bytes_from(url, 0, size, timeout)
        kind = Cut if error.code in (408, 429) or error.code >= 500 else Refused
        raise kind(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Cut(_reason(error)) from None
    begin, total = _extent(response)
    if begin in (0, start) and total in (None, size):
        return response, begin
    response.close()
    if begin in (0, start):
        raise Refused(f"expected {size} bytes, the file there has {total}")
    if start:
        return bytes_from(url, 0, size, timeout)
    raise Refused(f"HTTP {response.status}, but not with the file from its first byte on")


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where the body starts (-1: no telling), and the length of the whole file if the server says it."""
    if response.status == 200:
        return 0, response.length
    extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status != 206 or extent is None:
        return -1, None
    return int(extent[1]), None if extent[2] == "*" else int(extent[2])


def _opener() -> urllib.request.OpenerDirector:
    """The usual one without ftp, file and data urls, so that a redirection cannot lead there either."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split()) or type(reason).__name__
