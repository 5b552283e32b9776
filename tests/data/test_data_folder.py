"""Folders of pictures: both layouts, every kind of picture, exact pixels, and what is refused."""

from __future__ import annotations

import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import guarded, same
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import controlat
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.data import (
    Dataset,
    Samples,
    Split,
    augmentation,
    load,
)
from controlat.data._stream import Streamed
from controlat.dynamics.run_spec import RunSpec

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10_jpeg.tar.gz"


def pixels(seed: int, height: int = 4, width: int = 4, channels: int = 3) -> NDArray[np.uint8]:
    found = torch.randint(256, (height, width, channels), generator=torch.Generator().manual_seed(seed))
    return found.numpy().astype(np.uint8).squeeze()


def write(path: Path, image: NDArray[Any] | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def folder(root: Path, n: int = 5, splits: tuple[str, ...] = ("",), **size: int) -> Path:
    """n pictures of each of three classes; no two pictures are the same."""
    seed = 0
    for part in splits:
        for name in ("cat", "ant", "Bee"):
            for i in range(n):
                write(root / part / name / f"{i}.png", pixels(seed, **size))
                seed += 1
    return root


def everything(samples: Samples) -> tuple[Tensor, Tensor]:
    return samples.take(torch.arange(len(samples)))


def read(path: Path) -> Tensor:
    """An independent reading of an RGB picture."""
    return torch.tensor(np.asarray(Image.open(path).convert("RGB"))).movedim(2, 0).float().div(255)


# ---------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_a_folder_with_a_split(tmp_path: Path, test: str) -> None:
    data = load("folder", folder(tmp_path / "mine", 2, ("train", test)))
    assert (data.name, data.num_classes, data.in_shape) == ("mine", 3, (3, 4, 4))
    for part, samples in (("train", data.train), (test, data.test)):
        assert samples.y.tolist() == [0, 0, 1, 1, 2, 2]
        names = [f"{label}/{i}.png" for label in ("Bee", "ant", "cat") for i in range(2)]
        expected = torch.stack([read(tmp_path / "mine" / part / name) for name in names])
        assert same(everything(samples), (expected, samples.y))


def test_test_comes_before_val(tmp_path: Path) -> None:
    data = load("folder", folder(tmp_path, 1, ("train", "val", "test")))
    assert same(everything(data.test)[0][0], read(tmp_path / "test" / "Bee" / "0.png"))


def test_a_folder_without_a_split(tmp_path: Path) -> None:
    data = load("folder", folder(tmp_path, 5))  # a fifth of every class
    assert data.test.y.tolist() == [0, 1, 2]
    assert data.train.y.bincount().tolist() == [4, 4, 4]
    found = torch.cat([everything(data.train)[0], everything(data.test)[0]])
    files = sorted(tmp_path.glob("*/*.png"))
    assert {tuple(x.flatten().tolist()) for x in found} == {tuple(read(f).flatten().tolist()) for f in files}
    assert len(found) == len(files)
    again = load("folder", str(tmp_path))  # always the same part
    assert same(everything(again.test), everything(data.test))
    assert load("folder", tmp_path, test_share=0.6).test.y.bincount().tolist() == [3, 3, 3]


def test_what_is_passed_over(tmp_path: Path) -> None:
    folder(tmp_path, 2, ("train", "test"))
    for name in (".hidden.png", "notes.txt", "Thumbs.db", "a.npy", "png", ".DS_Store"):
        (tmp_path / "train" / "ant" / name).write_text("no picture")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "list.csv").write_text("no class")
    (tmp_path / "readme.txt").write_text("no split")
    data = load("folder", tmp_path)
    assert (len(data.train), len(data.test), data.num_classes) == (6, 6, 3)


def test_every_ending_in_any_case(tmp_path: Path) -> None:
    grey = Image.new("L", (4, 4), 128)
    endings = ("jpg", "JPEG", "Png", "bmp", "gif", "webp", "tif", "TIFF", "ppm", "pgm")
    for i, end in enumerate(endings):
        write(tmp_path / "a" / f"{i}.{end}", grey)
        write(tmp_path / "b" / f"{i}.{end}", grey)
    x = everything(load("folder", tmp_path).train)[0]
    assert len(x) == 16
    assert (x - 128 / 255).abs().max() <= 1 / 255


def test_pictures_of_many_sizes(tmp_path: Path) -> None:
    for i in range(6):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", pixels(i, 5 + i, 9 - i))
    data = load("folder", tmp_path, size=4, resize=5, channels=1)
    assert data.in_shape == (1, 4, 4)
    assert everything(data.train)[0].shape == (5, 1, 4, 4)
    with pytest.raises(ValueError, match=r", the first picture 9 x 5 \(width x height\); give a size"):
        everything(load("folder", tmp_path).train)


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("options", [{}, {"size": 3, "resize": 4}, {"channels": 1}])
def test_in_memory_is_the_same_as_streamed(tmp_path: Path, options: dict[str, Any]) -> None:
    folder(tmp_path)
    streamed = load("folder", tmp_path, workers=3, **options)
    memory = load("folder", tmp_path, in_memory=True, workers=1, **options)
    assert isinstance(memory.train, Split)
    assert not isinstance(streamed.train, Split)
    for a, b in ((streamed.train, memory.train), (streamed.test, memory.test)):
        assert same(everything(a), everything(b))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a whole number >= 1, got 0"),
        ({"size": 2.5}, "size must be a whole number >= 1, got 2.5"),
        ({"size": "32"}, "size must be a whole number >= 1, got '32'"),
        ({"size": True}, "size must be a whole number >= 1, got True"),
        ({"resize": 8}, "resize must be at least size, got resize 8, size None"),
        ({"size": 8, "resize": 7}, "resize must be at least size, got resize 7, size 8"),
        ({"size": 8, "resize": 9.5}, "resize must be a whole number >= 1, got 9.5"),
        ({"channels": 2}, r"channels must be 3 \(RGB\) or 1 \(grey\), got 2"),
        ({"channels": "rgb"}, "channels must be 3 .* got 'rgb'"),
        ({"test_share": 0}, r"test_share must be in \(0, 1\) and leave both parts samples, got 0"),
        ({"test_share": 1}, "test_share must be .* got 1"),
        ({"test_share": -0.5}, "test_share must be .* got -0.5"),
        ({"test_share": float("nan")}, "test_share must be .* got nan"),
        ({"test_share": "half"}, "test_share must be .* got 'half'"),
        ({"test_share": 0.01}, "leave both parts samples, got 0.01"),
        ({"workers": 0}, "workers must be a whole number >= 1, got 0"),
        ({"workers": "2"}, "workers must be a whole number >= 1, got '2'"),
        ({"in_memory": "false"}, "in_memory must be true or false, got 'false'"),
        ({"in_memory": 1}, "in_memory must be true or false, got 1"),
        (
            {"sise": 3},
            r"'folder' has no option 'sise'; did you mean 'size'\? it takes size, resize, channels",
        ),
        ({"variant": "x"}, "has no option 'variant'"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        load("folder", tmp_path, **options)


def test_usual_augmentation_and_variants() -> None:
    assert augmentation("folder") == "crop-flip:pad=4"
    with pytest.raises(ValueError, match="data set 'folder-mine' is unknown: folder has no variants"):
        load("folder-mine")


# ---------------------------------------------------------------------------------------------- what is wrong


def emptied(root: Path) -> None:
    for path in (root / "ant").iterdir():
        path.rename(path.with_suffix(".txt"))


def without_a_class(root: Path) -> None:
    folder(root, 1, ("train", "val"))
    (root / "val" / "ant" / "0.png").unlink()
    (root / "val" / "ant").rmdir()


def with_a_class_too_many(root: Path) -> None:
    folder(root, 1, ("train", "val"))
    write(root / "val" / "dog" / "0.png", pixels(0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "x").mkdir(), "one folder per class, two or more; found "),
        (lambda root: write(root / "ant" / "0.png", pixels(0)), r"two or more; found \['ant'\]"),
        (lambda root: write(root / "0.png", pixels(0)), "one folder per class, two or more; found none"),
        (lambda root: emptied(folder(root)), r"ant: no pictures in this class folder \(\.jpg, "),
        (
            lambda root: folder(root, 1, ("train",)),
            "has a folder train but none of test, val, valid, validat",
        ),
        (without_a_class, "class 'ant' is in train only; both splits need the same"),
        (with_a_class_too_many, "class 'dog' is in val only; both splits need the same"),
        (
            lambda root: (folder(root, 1, ("train",)), (root / "test").mkdir()),
            "test must hold one folder per",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load("folder", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder: give the folder of the pictures, --data-dir FOLDER"):
        load("folder")
    with pytest.raises(ValueError, match="nowhere: no such folder of pictures"):
        load("folder", tmp_path / "nowhere")
    file = write(tmp_path / "x.png", pixels(0))
    with pytest.raises(ValueError, match=r"x\.png: no such folder of pictures"):
        load("folder", file)


def text(path: Path) -> None:
    path.with_suffix(".jpg").write_text("not a picture at all")


def cut_short(path: Path) -> None:
    file = write(path.with_suffix(".jpg"), pixels(0, 64, 64))
    file.write_bytes(file.read_bytes()[:-600])


def nothing(path: Path) -> None:
    path.with_suffix(".jpg").write_bytes(b"")


def directory(path: Path) -> None:
    path.with_suffix(".jpg").mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".jpg"))


def device(path: Path) -> None:
    path.with_suffix(".jpg").symlink_to("/dev/zero")


def huge(path: Path) -> None:
    path.with_suffix(".jpg").touch()
    os.truncate(path.with_suffix(".jpg"), 1 << 40)


def postscript(path: Path) -> None:  # Pillow would hand it to Ghostscript
    path.with_suffix(".jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("spoil", [text, cut_short, nothing, directory, pipe, device, huge, postscript])
def test_pictures_that_cannot_be_read_are_named(
    tmp_path: Path, spoil: Callable[[Path], None], in_memory: bool
) -> None:
    folder(tmp_path, 3, ("train", "test"))
    spoil(tmp_path / "train" / "cat" / "bad")
    message = r"cat.bad\.jpg: cannot be read as a picture \(.*\); mend or remove it$"
    with guarded(), pytest.raises(ValueError, match=message) as caught:
        everything(load("folder", tmp_path, size=4, in_memory=in_memory).train)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_first_picture_is_looked_at_at_once_the_others_when_they_are_needed(tmp_path: Path) -> None:
    folder(tmp_path, 3, ("train", "test"))
    bad = tmp_path / "train" / "cat" / "1.png"
    bad.write_text("x")
    data = load("folder", tmp_path)
    data.train.take(torch.tensor([0, 6, 8]))
    everything(data.test)
    with pytest.raises(ValueError, match=r"cat.1\.png"):
        data.train.take(torch.tensor([7]))
    (tmp_path / "train" / "Bee" / "0.png").write_text("x")
    with pytest.raises(ValueError, match=r"Bee.0\.png"):
        load("folder", tmp_path)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_thirty_two_bits_are_refused(tmp_path: Path, kind: type) -> None:
    folder(tmp_path)
    write(tmp_path / "Bee" / "0.tif", np.array([[0, 70000]]).astype(kind))
    with pytest.raises(ValueError, match=r"0\.tif: cannot be read as a picture \(grey values of 32 bits, "):
        everything(load("folder", tmp_path, size=2).train)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_picture_of_another_size_is_named_with_both_sizes_and_the_cure(tmp_path: Path, part: str) -> None:
    folder(tmp_path, 2, ("train", "test"))
    path = write(tmp_path / part / "ant" / "1.png", pixels(0, 6, 5))
    data = load("folder", tmp_path)
    with pytest.raises(ValueError, match="has 5 x 6") as caught:
        everything(data.train if part == "train" else data.test)
    cure = "give a size to resize and crop all of them, such as --data-options.size 64"
    assert (
        str(caught.value)
        == f"{path} has 5 x 6 (width x height), the first picture 4 x 4 (width x height); {cure}"
    )


# --------------------------------------------------------------------------------------------------- training


def trained(root: Path, out: Path, **options: Any) -> Any:
    return controlat.train(
        out,
        data="folder",
        data_dir=str(root),
        data_options={"size": 16} | options,
        model="mlp",
        eps="8/255",
        epochs=1,
        batch_size=4,
        held_out=4,
        device="cpu",
        progress=False,
    )


def weights(out: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(out / "last.pt", weights_only=True)["model"]
    return found


def test_training_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    folder(tmp_path / "pictures", 8, height=18, width=20)
    found = []
    for i, options in enumerate(({"workers": 1}, {"workers": 4}, {"in_memory": True})):
        trained(tmp_path / "pictures", tmp_path / f"out{i}", **options)
        found.append(weights(tmp_path / f"out{i}"))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_a_bad_picture_in_mid_epoch_is_one_clear_error(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures", 8)
    training, _ = load("folder", root).hold_out(4)
    assert isinstance(training, Streamed)
    p = RunSpec(training, 4, 1, parse_schedule("none", 1), parse_rate(0.1), seed=0)
    position = training.positions[list(p.batches(0))[2].indices[1]]
    path = sorted(root.glob("*/*.png"))[position]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be read as a picture") as caught:
        trained(root, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


# ---------------------------------------------------------------------------------------------- real pictures


@pytest.mark.skipif(not REAL.is_file(), reason=f"no file {REAL}")
def test_real_pictures(tmp_path: Path) -> None:
    files: list[Path] = []
    with tarfile.open(REAL, "r|gz") as archive:  # one folder after the other, test before train
        for member in archive:
            _, part, label, name = member.name.split("/")
            if part != "test" or (label, int(name[:4])) >= ("truck", 20):
                break
            if int(name[:4]) < 20:
                content = archive.extractfile(member)
                assert content is not None
                files.append(tmp_path / label / name)
                files[-1].parent.mkdir(exist_ok=True)
                files[-1].write_bytes(content.read())
    assert len(files) == 200
    data: Dataset = load("folder", tmp_path, workers=2)
    assert (data.num_classes, data.in_shape, len(data.train), len(data.test)) == (10, (3, 32, 32), 160, 40)
    assert data.train.y.bincount().tolist() == [16] * 10
    x = torch.cat([everything(data.train)[0], everything(data.test)[0]])
    expected = torch.stack([read(f) for f in sorted(files)])
    assert same(x.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)
    assert same(everything(load("folder", tmp_path, in_memory=True).train), everything(data.train))
    cats = torch.stack([read(f) for f in sorted(files) if f.parent.name == "cat"])
    assert all(
        (cats == image).flatten(1).all(1).any() for image in everything(data.train)[0][data.train.y == 3]
    )


# ------------------------------------------------------------------------------------------------ fingerprint


def test_a_fingerprint_of_a_folder_sees_files_that_change(tmp_path: Path) -> None:
    def known(root: str, **options: Any) -> str:
        return load("folder", tmp_path / root, **options).train.fingerprint()

    folder(tmp_path / "a", 2, ("train", "test"))
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")  # with its times
    before = known("a")
    assert known("elsewhere") == known("a", workers=1) == before
    picture = tmp_path / "a" / "train" / "cat" / "1.png"
    content, times = picture.read_bytes(), picture.stat()
    write(picture, pixels(99))
    assert known("a") != before
    picture.write_bytes(content)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known("a") == before
    os.replace(picture, picture.with_name("2.png"))
    assert known("a") != before
    write(tmp_path / "elsewhere" / "test" / "cat" / "0.png", pixels(98))  # plays no part in training
    assert known("elsewhere") == before
    assert len(known("a", in_memory=True)) == len(before) == 64
