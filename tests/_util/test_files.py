"""Files: complete or old, never in between; errors that name them."""

import json
import math
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import guarded

from controlat._util.files import (
    append_json_line,
    left_over,
    open_file,
    read_bytes,
    read_json,
    read_json_lines,
    write,
    write_json,
    write_text,
)

# ----------------------------------------------------------------------------------------------- atomicity

_WRITER = """
import sys
from controlat._util.files import write
def fill(file):
    for part in range(64):
        if part == int(sys.argv[2]):
            print("writing", flush=True)
            sys.stdin.read()  # until the kill
        file.write(b"b" * 4096)
        file.flush()
write(sys.argv[1], fill)
"""


@pytest.mark.parametrize("part", [0, 1, 63])
def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path: Path, part: int) -> None:
    target = tmp_path / "result.bin"
    target.write_bytes(b"a" * 4096)
    command = [sys.executable, "-c", _WRITER, str(target), str(part)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert target.read_bytes() == b"a" * 4096
    assert [path.stat().st_size for path in left_over(tmp_path)] == [part * 4096]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fill(file) -> None:
        file.write(b"new, half")
        file.flush()
        assert target.read_text() == "old"
        assert len(os.listdir(tmp_path)) == 2  # the temporary file is on the same file system
        file.write(b" and whole")

    with target.open() as opened_before:
        write(target, fill)
        assert opened_before.read() == "old"  # renamed over, not rewritten
    assert target.read_text() == "new, half and whole"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fill(file) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write(target, fill)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        write_json(target, {"a": object()})
    assert read_json(target) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_folders_are_created(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "folder" / "a.txt", "text")
    assert (tmp_path / "new" / "folder" / "a.txt").read_text() == "text"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_respected_and_kept(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "text")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


# ----------------------------------------------------------------------------------------------------- JSON


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, "ü", None, True], "b": {"c": 0.1 + 0.2, "d": 5e-324}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_numbers_that_are_not_finite_are_written_as_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": math.nan, 3: (math.inf, [-math.inf])})
    text = (tmp_path / "a.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"a": "nan", "3": ["inf", ["-inf"]]}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'no.json'}: no such file")):
        read_json(tmp_path / "no.json")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_malformed_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{file}: not valid JSON")):
        read_json(file)


# ------------------------------------------------------------------------------------------------ JSON lines


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    for i in range(3):
        append_json_line(file, {"epoch": i, "loss": math.nan, "text": "two\nlines ü\u2028"})
    assert [line["epoch"] for line in read_json_lines(file)] == [0, 1, 2]
    assert read_json_lines(file)[0]["text"] == "two\nlines ü\u2028"
    assert file.read_bytes().count(b"\n") == 3


def test_a_missing_log_has_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "log.jsonl") == []


@pytest.mark.parametrize("tail", ['{"epoch": 2, "lo', '{"epoch": 2}', "{"])
def test_a_last_line_cut_short_is_left_out(tmp_path: Path, tail: str) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"epoch": 0}\n{"epoch": 1}\n' + tail)
    assert read_json_lines(file) == [{"epoch": 0}, {"epoch": 1}]


@pytest.mark.parametrize("start", ["", '{"epoch": 0}\n{"epoch": 1}\n'])
def test_a_line_is_never_glued_to_one_cut_short(tmp_path: Path, start: str) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(start + '{"epoch": 2, "lo')
    append_json_line(file, {"epoch": 2})
    assert read_json_lines(file) == [*map(json.loads, start.splitlines()), {"epoch": 2}]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2: not valid JSON")):
        read_json_lines(file)


# ----------------------------------------------------------------------------------------- what is no file


def _special(folder: Path) -> dict[str, tuple[Path, str]]:
    """One path of each kind that is no regular file, and the word for it; links to two of them."""
    pipe, link, door = folder / "pipe", folder / "link", folder / "socket"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    (folder / "zero.json").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(door))
    return {
        "pipe": (pipe, "named pipe"),
        "link to a pipe": (link, "named pipe"),
        "socket": (door, "socket"),
        "folder": (folder, "folder"),
        "device": (folder / "zero.json", "device"),
    }


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "folder", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path, word = _special(tmp_path)[kind]
    for read in (open_file, lambda p: read_bytes(p, 10), read_json):
        with guarded(), pytest.raises(ValueError, match=f"{re.escape(str(path))}: is a {word}"):
            read(path)


def test_a_file_is_read_up_to_its_limit_and_no_further(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(ValueError, match="a: has 5 bytes, but at most 4"):
        read_bytes(file, 4)
    os.truncate(file, 1 << 40)  # sparse: a terabyte that takes no space on disk
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        read_json(file)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "missing", 4)
