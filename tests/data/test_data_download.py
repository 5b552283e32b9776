"""Downloads from a server of our own that cuts, lies, hangs and ignores what it is asked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from forks import started
from helpers import GUARD
from hypothesis import given, settings
from hypothesis import strategies as st

from controlat._util import registry
from controlat.data import _cache
from controlat.data._download import PAUSES, Remote, fetch

CONTENT = bytes(i * i % 251 for i in range(1000))
NAME = "file.bin"


@dataclass
class Page:
    """What the server answers under one url, and what it was asked."""

    content: bytes = CONTENT
    cuts: list[int | None] = field(default_factory=list)  # body bytes sent by each answer in turn
    always: int | None = None  # body bytes sent by every further answer
    ranges: bool = True
    shift: int = 0  # by how much a 206 starts too early
    status: int = 200
    length: bool = True
    location: str = ""
    hang: bool = False  # after the body so far, until told otherwise
    url: str = ""
    asked: list[str | None] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    pages: dict[str, Page]

    def do_GET(self) -> None:
        page = self.pages[self.path]
        asked = self.headers["Range"]
        page.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and page.ranges else 0
        status = page.status
        if status == 200 and start >= len(page.content):
            status = 416
        if status != 200:
            self.send_response(status)
            if page.location:
                self.send_header("Location", page.location)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = max(start - page.shift, 0) if start else 0
        body = page.content[start:]
        self.send_response(206 if asked and page.ranges else 200)
        if asked and page.ranges:
            total = len(page.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if page.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: page.cuts.pop(0) if page.cuts else page.always]
        page.sent.append(len(body))
        self.wfile.write(body)
        if page.hang:
            self.wfile.flush()
            page.go_on.wait(GUARD)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:  # a client that went away
        pass


class Site:
    def __init__(self, server: Server) -> None:
        self.base, self.pages, self.numbers = f"http://127.0.0.1:{server.server_port}", {}, count()
        server.RequestHandlerClass = type("Here", (Handler,), {"pages": self.pages})
        self.pages: dict[str, Page]

    def page(self, **about: Any) -> Page:
        page = Page(**about)
        path = f"/{next(self.numbers)}"
        self.pages[path], page.url = page, self.base + path
        return page


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    proxies = pytest.MonkeyPatch()
    proxies.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        made = Site(server)
        yield made
        for page in made.pages.values():
            page.go_on.set()
        server.shutdown()
        thread.join()
    proxies.undo()


def remote(*pages: Page, content: bytes = CONTENT, name: str = NAME) -> Remote:
    sha256 = hashlib.sha256(content).hexdigest()
    return Remote(name, tuple(page.url for page in pages), sha256, len(content))


def get(folder: Path, *pages: Page, pauses: list[float] | None = None, timeout: float = GUARD) -> Path:
    wait = [] if pauses is None else pauses
    (path,) = fetch([remote(*pages)], folder, progress=False, pause=wait.append, timeout=timeout)
    return path


def refused(folder: Path, *pages: Page, **options: Any) -> str:
    with pytest.raises(ValueError, match=NAME) as caught:
        get(folder, *pages, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def only(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_arrives_once(site: Site, tmp_path: Path) -> None:
    page, other = site.page(), site.page(content=b"other")
    there = [remote(page), remote(other, content=b"other", name="b")]
    paths = fetch(there, tmp_path / "new" / "folder")
    assert paths == [tmp_path / "new" / "folder" / name for name in (NAME, "b")]
    assert only(paths[0].parent) == {NAME: CONTENT, "b": b"other"}
    stamp = paths[0].stat()
    assert fetch(there, str(paths[0].parent)) == paths
    assert (page.asked, page.sent, other.asked) == ([None], [1000], [None])
    assert paths[0].stat().st_mtime_ns == stamp.st_mtime_ns


def test_the_usual_permissions(site: Site, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert get(tmp_path, site.page()).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("mine", [b"", b"mine", CONTENT[:-1] + b"?", CONTENT + b"?"])
def test_the_users_file_stays(site: Site, tmp_path: Path, mine: bytes) -> None:
    page = site.page()
    (tmp_path / NAME).write_bytes(mine)
    message = refused(tmp_path, page)
    assert f"{tmp_path / NAME}: is in the way" in message
    assert "move it away or give another folder" in message
    assert ("SHA-256" if len(mine) == 1000 else f"expected 1000 bytes, found {len(mine)}") in message
    assert (only(tmp_path), page.asked) == ({NAME: mine}, [])


def test_a_wrong_file_stops_everything_before_the_first_download(site: Site, tmp_path: Path) -> None:
    first, second = site.page(), site.page()
    (tmp_path / "b").write_bytes(b"mine")
    with pytest.raises(ValueError, match="b: is in the way"):
        fetch([remote(first), remote(second, name="b")], tmp_path)
    assert first.asked == []


def test_folders_and_broken_links_in_the_way_stay(site: Site, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert "no regular file" in refused(tmp_path, site.page())
    (tmp_path / NAME).rmdir()
    (tmp_path / NAME).symlink_to(tmp_path / "gone")
    assert "no regular file" in refused(tmp_path, site.page())
    assert (tmp_path / NAME).is_symlink()
    (tmp_path / "plain").touch()
    with pytest.raises(ValueError, match="plain: is not a folder; give"):
        fetch([remote(site.page())], tmp_path / "plain")


def test_a_file_that_appears_meanwhile_stays(site: Site, tmp_path: Path) -> None:
    page = site.page(cuts=[400])
    with pytest.raises(ValueError, match=f"{NAME}: is in the way"):
        fetch(
            [remote(page)],
            tmp_path,
            pause=lambda _: (tmp_path / NAME).write_bytes(b"mine"),
        )
    assert only(tmp_path) == {NAME: b"mine", f"{NAME}.part": CONTENT}


@pytest.mark.parametrize("size", [1, 400, 999])
def test_a_part_is_continued(site: Site, tmp_path: Path, size: int) -> None:
    page = site.page()
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:size])
    get(tmp_path, page)
    assert only(tmp_path) == {NAME: CONTENT}
    assert (page.asked, page.sent) == ([f"bytes={size}-"], [1000 - size])


def test_a_complete_part_needs_no_connection(site: Site, tmp_path: Path) -> None:
    page = site.page()
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    get(tmp_path, page)
    assert (only(tmp_path), page.asked) == ({NAME: CONTENT}, [])


@pytest.mark.parametrize("wrong", [bytes(1000), CONTENT + b"more"])
def test_a_part_that_cannot_be_continued_starts_again(site: Site, tmp_path: Path, wrong: bytes) -> None:
    page = site.page()
    (tmp_path / f"{NAME}.part").write_bytes(wrong)
    get(tmp_path, page)
    assert (only(tmp_path), page.asked) == ({NAME: CONTENT}, [None])


def test_a_wrong_beginning_is_found_and_the_next_mirror_starts_again(site: Site, tmp_path: Path) -> None:
    first, second = site.page(), site.page()
    (tmp_path / f"{NAME}.part").write_bytes(bytes(400))
    get(tmp_path, first, second)
    assert (only(tmp_path), first.asked, second.asked) == ({NAME: CONTENT}, ["bytes=400-"], [None])
    (tmp_path / NAME).rename(tmp_path / f"{NAME}.part")
    (tmp_path / f"{NAME}.part").write_bytes(bytes(400))
    assert "wrong content" in refused(tmp_path, site.page())
    assert only(tmp_path) == {}


def test_one_cut(site: Site, tmp_path: Path) -> None:
    page, pauses = site.page(cuts=[300]), []
    get(tmp_path, page, pauses=pauses)
    assert only(tmp_path) == {NAME: CONTENT}
    assert (page.asked, page.sent, pauses) == ([None, "bytes=300-"], [300, 700], [PAUSES[0]])


@pytest.mark.parametrize("length", [True, False])
def test_cut_again_and_again(site: Site, tmp_path: Path, length: bool) -> None:
    page, pauses = site.page(always=10, length=length), []
    message = refused(tmp_path, page, pauses=pauses)
    assert f"({page.url}: the connection was cut, 6 times)" in message
    assert f"60 of 1000 bytes are kept in {tmp_path / NAME}.part: the same command goes on" in message
    assert (only(tmp_path), tuple(pauses)) == ({f"{NAME}.part": CONTENT[:60]}, PAUSES)
    assert list(PAUSES) == sorted(PAUSES)
    page.always = None
    get(tmp_path, page)
    assert (only(tmp_path), page.asked[-1], page.sent[-1]) == ({NAME: CONTENT}, "bytes=60-", 940)


def test_the_next_mirror_goes_on(site: Site, tmp_path: Path) -> None:
    first, second = site.page(always=10), site.page()
    get(tmp_path, first, second)
    assert (only(tmp_path), second.asked, second.sent) == ({NAME: CONTENT}, ["bytes=60-"], [940])


def test_a_server_without_ranges_starts_again(site: Site, tmp_path: Path) -> None:
    page = site.page(ranges=False, cuts=[300])
    get(tmp_path, page)
    assert (only(tmp_path), page.asked, page.sent) == ({NAME: CONTENT}, [None, "bytes=300-"], [300, 1000])


def test_a_range_that_starts_elsewhere_is_not_appended(site: Site, tmp_path: Path) -> None:
    page = site.page(cuts=[300], shift=7)
    get(tmp_path, page)
    assert (only(tmp_path), page.asked) == ({NAME: CONTENT}, [None, "bytes=300-", None])


def test_416_starts_again(site: Site, tmp_path: Path) -> None:
    short, page = site.page(content=CONTENT[:400]), site.page()
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:600])
    get(tmp_path, short, page)
    assert (only(tmp_path), short.asked, page.asked) == (
        {NAME: CONTENT},
        ["bytes=600-", None],
        ["bytes=600-"],
    )
    assert "HTTP 416" in refused(tmp_path / "new", site.page(status=416))


def test_wrong_content(site: Site, tmp_path: Path) -> None:
    lie = bytes(1000)
    page = site.page(content=lie)
    message = refused(tmp_path, page)
    for part in (CONTENT, lie):
        assert hashlib.sha256(part).hexdigest() in message
    assert "nothing is kept: the same command tries again" in message
    assert only(tmp_path) == {}
    good = site.page()
    get(tmp_path, page, good)
    assert (only(tmp_path), good.asked) == ({NAME: CONTENT}, [None])


@pytest.mark.parametrize("content", [b"<html>log in</html>", CONTENT * 2])
def test_another_size_leaves_the_part_alone(site: Site, tmp_path: Path, content: bytes) -> None:
    page = site.page(content=content, ranges=False)
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:400])
    assert f"expected 1000 bytes, the file there has {len(content)}" in refused(tmp_path, page)
    assert only(tmp_path) == {f"{NAME}.part": CONTENT[:400]}


def test_more_than_expected_without_a_length(site: Site, tmp_path: Path) -> None:
    page = site.page(content=CONTENT * 2, length=False)
    assert "sends more than the expected 1000 bytes" in refused(tmp_path, page)
    assert only(tmp_path) == {}


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (204, 1), (500, 6), (503, 6), (429, 6)])
def test_http_errors(site: Site, tmp_path: Path, status: int, tries: int) -> None:
    page, good, pauses = site.page(status=status), site.page(), []
    message = refused(tmp_path, page, pauses=pauses)
    assert f"HTTP {status}" in message
    assert "nothing is kept" in message
    assert (only(tmp_path), len(page.asked), len(pauses)) == ({}, tries, tries - 1)
    get(tmp_path, page, good)
    assert only(tmp_path) == {NAME: CONTENT}


def test_a_server_that_sends_nothing_is_given_up(site: Site, tmp_path: Path) -> None:
    message = refused(tmp_path, site.page(hang=True, always=0), timeout=0.05)
    assert "timed out, 6 times" in message
    assert only(tmp_path) == {}


def test_what_came_before_a_server_hangs_is_kept(site: Site, tmp_path: Path) -> None:
    page, timeout = site.page(hang=True, always=400), 0.05
    while not (tmp_path / NAME).exists():
        with contextlib.suppress(ValueError):  # a busy machine needs longer even for the first bytes
            get(tmp_path, page, timeout=timeout)
        timeout *= 2
        assert timeout < GUARD
    assert only(tmp_path) == {NAME: CONTENT}
    assert list(dict.fromkeys(page.asked)) == [None, "bytes=400-", "bytes=800-"]


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but not listening
        page = Page(url=f"http://127.0.0.1:{free.getsockname()[1]}/")
        message = refused(tmp_path, page)
    assert "Connection refused, 6 times" in message
    assert f"or put the file into {tmp_path} by other means" in message
    assert only(tmp_path) == {}


def test_redirections(site: Site, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(CONTENT)
    get(tmp_path, site.page(status=302, location=site.page().url))
    for wrong in ((tmp_path / "secret").as_uri(), "ftp://127.0.0.1/a", "data:,a"):
        message = refused(tmp_path / "new", site.page(status=302, location=wrong))
        assert "HTTP 302" in message or "unknown url type: ftp" in message
        assert only(tmp_path / "new") == {}


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    cuts=st.lists(st.integers(0, 1000), max_size=5),
    kept=st.integers(0, 1300),
    ranges=st.booleans(),
    length=st.booleans(),
)
def test_any_cuts_give_the_file(site: Site, cuts: list[int], kept: int, ranges: bool, length: bool) -> None:
    page = site.page(cuts=list(cuts), ranges=ranges, length=length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"{NAME}.part").write_bytes((CONTENT + bytes(300))[:kept])
        get(folder, page)
        assert only(folder) == {NAME: CONTENT}
    if ranges:
        assert sum(page.sent) == (1000 - kept if kept <= 1000 else 1000)


def test_after_kill_9_the_next_run_goes_on(site: Site, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    page = site.page(content=content, always=200_000, hang=True)
    there = remote(page, content=content)
    part = tmp_path / f"{NAME}.part"
    process = started(fetch, [there], tmp_path, False)
    try:
        late = time.monotonic() + GUARD
        while not (part.exists() and part.stat().st_size == 200_000):
            assert process.is_alive()
            assert time.monotonic() < late
            time.sleep(0.02)
        with pytest.raises(ValueError, match=r"part: another process is downloading it; wait"):
            fetch([there], tmp_path)
    finally:
        process.kill()
        process.join()
    assert only(tmp_path) == {f"{NAME}.part": content[:200_000]}
    page.always, page.hang = None, False
    page.go_on.set()
    fetch([there], tmp_path)
    assert only(tmp_path) == {NAME: content}
    assert (page.asked, page.sent) == ([None, "bytes=200000-"], [200_000, 100_000])


def test_several_at_once_give_one_right_file(site: Site, tmp_path: Path) -> None:
    page, faults = site.page(), []
    start = threading.Barrier(4)

    def one() -> None:
        start.wait()
        try:
            get(tmp_path, page)
        except ValueError as error:
            faults.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert only(tmp_path) == {NAME: CONTENT}
    assert len(faults) < 4
    assert all("another process" in fault for fault in faults)


def test_a_full_disk_names_the_file(site: Site, tmp_path: Path) -> None:
    page = site.page()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OSError, match=f"too large: '{tmp_path / NAME}.part'"):
            get(tmp_path, page)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert only(tmp_path) == {f"{NAME}.part": CONTENT[:500]}
    get(tmp_path, page)
    assert (only(tmp_path), page.asked) == ({NAME: CONTENT}, [None, "bytes=500-"])


def test_interrupted_by_the_user(site: Site, tmp_path: Path) -> None:
    page = site.page(cuts=[400])

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch([remote(page)], tmp_path, pause=interrupt)
    assert only(tmp_path) == {f"{NAME}.part": CONTENT[:400]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name must be a file name without folders, got 'a/b'"),
        ({"name": ".."}, "without folders"),
        ({"name": "."}, "without folders"),
        ({"name": ""}, "without folders"),
        ({"urls": ()}, "a: give at least one url"),
        ({"urls": ("http://a", "file:///etc/hosts")}, "a: url 'file:///etc/hosts' must start with http://"),
        ({"sha256": "0" * 63}, "a: sha256 must be 64 hexadecimal digits"),
        ({"size": 0}, "a: size must be > 0 bytes, got 0"),
    ],
)
def test_remotes_are_checked(change: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"name": "a", "urls": ("http://a",), "sha256": "0" * 64, "size": 1}
    with pytest.raises(ValueError, match=message):
        Remote(**(usual | change))


@pytest.mark.parametrize(("name", "files"), [("mnist", 4), ("cifar10", 1), ("cifar100", 1), ("svhn", 2)])
def test_what_the_data_sets_ask_for(name: str, files: int) -> None:
    remotes = registry.member("controlat.data", name).REMOTES
    assert len({remote.sha256 for remote in remotes}) == len(remotes) == files
    assert all(url.endswith(f"/{remote.name}") for remote in remotes for url in remote.urls)


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONTROLAT_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _cache.cache() == tmp_path / ".cache" / "controlat"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _cache.cache() == tmp_path / ".cache" / "controlat"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _cache.folder("mnist", None) == tmp_path / "xdg" / "controlat" / "mnist"
    monkeypatch.setenv("CONTROLAT_DATA", "~/data")
    assert _cache.folder("mnist", None) == tmp_path / "data" / "mnist"
    assert _cache.folder("mnist", Path("given")) == Path("given")
    assert only(tmp_path) == {}
