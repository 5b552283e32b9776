"""controlat data and controlat models."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from controlat import data, models
from controlat.app.cli import main
from controlat.data import mnist
from controlat.data._download import Remote


def test_models_lists_every_network_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for entry in models.describe():
        (line,) = [line for line in lines if line.startswith(f"| {entry['name']} ")]
        assert entry["parameters"] is None or f" {entry['parameters']:,} " in line
        assert " x ".join(map(str, entry["input"])) in line
    assert len(lines) == len(models.names()) + 4


def test_models_counts_for_other_classes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--num-classes", "100"])
    assert f"{11_172_170 + 90 * 513:,}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["models", "--num-classes", "1"])
    assert "num_classes must be a whole number >= 2, got 1" in capsys.readouterr().err


def test_data_lists_every_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTROLAT_DATA", str(tmp_path / "cache"))
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    for name in ("cifar10", "cifar100", "digits", "folder", "mnist", "svhn", "torchvision-NAME"):
        assert f"| {name} " in out
    assert out.count("not in the cache (") == 4
    assert not (tmp_path / "cache").exists()
    for remote in mnist.REMOTES:
        path = tmp_path / "cache" / "mnist" / remote.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    main(["data"])
    assert f"in {tmp_path / 'cache' / 'mnist'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digits", "folder", "torchvision-Flowers102", "mnist-x"])
def test_sets_without_files_to_fetch(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", name])
    message = f"data set '{name}' has no files to download; choose from: cifar10, cifar100, mnist, svhn"
    assert message in capsys.readouterr().err


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    handler = functools.partial(_Quiet, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()
        thread.join()


@pytest.mark.parametrize("chosen", [False, True])
def test_a_downloaded_set_is_found_where_it_was_put(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chosen: bool,
) -> None:
    content = b"four idx files"
    (tmp_path / "served" / "f.gz").write_bytes(content)
    remote = Remote("f.gz", (f"{server}/f.gz",), hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setattr(mnist, "REMOTES", (remote,))
    monkeypatch.setenv("CONTROLAT_DATA", str(tmp_path / "cache"))
    folder = tmp_path / "mine" if chosen else tmp_path / "cache" / "mnist"
    words = ["--data-dir", str(folder)] if chosen else []
    assert main(["data", "mnist", *words]) == 0
    assert (folder / "f.gz").read_bytes() == content
    told = f"mnist is in {folder}; use it with --data mnist" + (f" --data-dir {folder}" if chosen else "")
    assert capsys.readouterr().out.strip() == told
    assert data.download("mnist", folder if chosen else None) == folder


def test_methods_lists_every_file_of_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from controlat import methods

    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in methods.names():
        assert f"| {name} " in out
    for entry in methods.describe():
        assert entry["what"]
        assert entry["source"]
        assert "gradient evaluation" in entry["cost"]
