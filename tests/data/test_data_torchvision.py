"""Sets of torchvision from files faked here: parts, labels, pixels, and what is refused."""

from __future__ import annotations

import struct
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from controlat._util.vision import torchvision
from controlat.data import Samples, Split, augmentation, load

try:
    torchvision()
    MISSING = ""
except ValueError as error:
    MISSING = str(error)
needed = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def everything(samples: Samples) -> tuple[Tensor, Tensor]:
    return samples.take(torch.arange(len(samples)))


def idx(array: NDArray[np.uint8]) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_idx(raw: Path, part: str, n: int, seed: int) -> Path:
    """n random grey images 28 x 28, with labels 0, 1, ... 9 in turn."""
    raw.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(256, size=(n, 28, 28), dtype=np.uint8)
    (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx((np.arange(n) % 10).astype(np.uint8)))
    return raw


def fashion(root: Path) -> Path:
    """Files of FashionMNIST as torchvision wants them; gives the folder that holds them."""
    raw = root / "FashionMNIST" / "raw"
    write_idx(raw, "train", 12, 0)
    return write_idx(raw, "t10k", 10, 1)


def picture(path: Path, seed: int, width: int = 5, height: int = 4) -> Tensor:
    """Write a picture without loss under whatever name, and give its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return torch.from_numpy(pixels).movedim(2, 0).float().div(255)


# -------------------------------------------------------------------------------------------- sets with parts


@needed
@pytest.mark.parametrize("in_memory", [False, True])
def test_fashion_mnist_is_what_the_reader_of_idx_files_finds(tmp_path: Path, in_memory: bool) -> None:
    expected = load("mnist", fashion(tmp_path))
    found = load("torchvision-FashionMNIST", tmp_path, channels=1, in_memory=in_memory)
    assert (found.name, found.num_classes, found.in_shape) == ("torchvision-FashionMNIST", 10, (1, 28, 28))
    assert isinstance(found.train, Split) == in_memory
    for a, b in ((found.train, expected.train), (found.test, expected.test)):
        assert same(everything(a), everything(b))
    colour = load("torchvision-FashionMNIST", tmp_path)
    assert same(everything(colour.test)[0], everything(expected.test)[0].expand(-1, 3, -1, -1))
    small = load("torchvision-FashionMNIST", tmp_path, channels=1, size=20, resize=28)
    assert same(everything(small.test)[0], everything(expected.test)[0][:, :, 4:24, 4:24])


@needed
def test_emnist_has_both_parts_of_the_split_that_is_asked_for(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    write_idx(raw, "emnist-digits-train", 12, 0)
    write_idx(raw, "emnist-digits-test", 10, 1)
    found = load("torchvision-EMNIST", tmp_path, split="digits", channels=1)
    assert (len(found.train), len(found.test), found.num_classes) == (12, 10, 10)
    pixels = np.random.default_rng(1).integers(256, size=(10, 1, 28, 28), dtype=np.uint8)
    assert same(everything(found.test)[0], torch.from_numpy(pixels).float().div(255))
    with pytest.raises(ValueError, match=r"^torchvision-EMNIST: .*'split'"):
        load("torchvision-EMNIST", tmp_path)


@needed
def test_dtd_has_a_split_for_training_and_for_testing(tmp_path: Path) -> None:
    images: dict[str, list[Tensor]] = {"train": [], "test": []}
    for part in images:
        names = [f"{name}/{part}{i}.jpg" for name in ("dotted", "banded") for i in range(2)]
        images[part] = [picture(tmp_path / "dtd" / "dtd" / "images" / n, i) for i, n in enumerate(names)]
        file = tmp_path / "dtd" / "dtd" / "labels" / f"{part}1.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(names))
    found = load("torchvision-DTD", tmp_path, workers=2)
    assert (found.num_classes, found.in_shape) == (2, (3, 4, 5))
    for part, samples in (("train", found.train), ("test", found.test)):
        assert same(everything(samples), (torch.stack(images[part]), torch.tensor([1, 1, 0, 0])))


@needed
def test_gtsrb_keeps_its_labels_with_the_files(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    train = [picture(base / "GTSRB" / "Training" / f"0000{i % 2}" / f"{i}.ppm", i) for i in (0, 2, 1, 3)]
    test = [picture(base / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm", i) for i in (4, 5)]
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n4.ppm;1\n5.ppm;0\n")
    found = load("torchvision-GTSRB", tmp_path)
    assert same(everything(found.train), (torch.stack(train), torch.tensor([0, 0, 1, 1])))
    assert same(everything(found.test), (torch.stack(test), torch.tensor([1, 0])))


@needed
def test_imagenette_calls_its_test_part_val_and_has_a_size_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "imagenette2-160"
    for i in range(8):
        part, name = ("train", "val")[i % 2], ("n01440764", "n02102040")[i // 4]
        picture(base / part / name / f"{i}.jpeg", i)
    found = load("torchvision-Imagenette", tmp_path, size_="160px", size=4)
    assert (found.in_shape, len(found.train)) == ((3, 4, 4), 4)
    assert found.test.y.tolist() == [0, 0, 1, 1]
    assert same(everything(found.test)[0][0], picture(tmp_path / "again", 1)[:, :, :4])
    with pytest.raises(ValueError, match="torchvision-Imagenette: Dataset not found"):
        load("torchvision-Imagenette", tmp_path, size=4)  # there are only the small pictures


@needed
@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("ImageNet", ["train", "val"]),
        ("OxfordIIITPet", ["trainval", "test"]),
        ("Flowers102", ["train", "test"]),
        ("Country211", ["train", "test"]),
        ("SVHN", ["train", "test"]),
    ],
)
def test_how_splits_are_called(name: str, splits: list[str]) -> None:
    from controlat.data.torchvision import _kind, _part_arguments

    assert _part_arguments(_kind(name), {}) == [{"split": split} for split in splits]


# ----------------------------------------------------------------------------------------- sets without parts


FAKE: dict[str, Any] = {"size_": 20, "num_classes": 3, "image_size": (3, 6, 5)}


@needed
def test_fake_data_has_neither_root_nor_parts() -> None:
    before = torch.random.get_rng_state()
    found = load("torchvision-FakeData", **FAKE, workers=1)
    assert (len(found.train), len(found.test)) == (16, 4)
    assert (found.num_classes, found.in_shape) == (3, (3, 6, 5))
    with torch.random.fork_rng():
        kind = torchvision().datasets.FakeData(size=20, num_classes=3, image_size=(3, 6, 5))
        expected = [(torch.from_numpy(np.array(x)).movedim(2, 0).float() / 255, y) for x, y in kind]
    x, y = torch.cat([everything(found.train)[0], everything(found.test)[0]]), [*found.train.y, *found.test.y]
    assert sorted(int(label) for label in y) == sorted(label for _, label in expected)
    for image, label in expected:
        assert any(torch.equal(image, a) and b == label for a, b in zip(x, y, strict=True))
    assert same(everything(load("torchvision-FakeData", **FAKE).test), everything(found.test))
    cut = load("torchvision-FakeData", **FAKE, size=4, resize=5, test_share=0.5, in_memory=True)
    assert (cut.in_shape, len(cut.test)) == ((3, 4, 4), 10)
    assert torch.equal(torch.random.get_rng_state(), before)


@needed
def test_a_set_without_parts_is_divided_in_proportion(tmp_path: Path) -> None:
    for name in ("River", "Forest"):
        for i in range(5):
            picture(tmp_path / "eurosat" / "2750" / name / f"{i}.jpg", i)
    found = load("torchvision-EuroSAT", tmp_path)
    assert (found.train.y.bincount().tolist(), found.test.y.bincount().tolist()) == ([4, 4], [1, 1])


@needed
def test_one_part_that_is_asked_for_is_divided(tmp_path: Path) -> None:
    fashion(tmp_path)
    found = load("torchvision-FashionMNIST", tmp_path, train=True, test_share=0.25)
    assert (len(found.train), len(found.test)) == (9, 3)
    x = torch.cat([everything(found.train)[0], everything(found.test)[0]])
    assert len(x.flatten(1).unique(dim=0)) == 12  # no picture is in both


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_pickled_sets_are_refused(tmp_path: Path, name: str) -> None:
    message = (
        f"torchvision-{name}: torchvision unpickles these files; use the data set {name.lower()} instead"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        load(f"torchvision-{name}", tmp_path)


@needed
@pytest.mark.parametrize(
    "name", ["torchvision", "torchvision-Nothing", "torchvision-wrap_dataset_for_transforms_v2"]
)
def test_unknown_sets(name: str) -> None:
    with pytest.raises(ValueError, match=r"^torchvision has no data set '.*'; write torchvision-NAME with a"):
        load(name, "somewhere")


@needed
@pytest.mark.parametrize(
    "name", ["FashionMNIST", "DTD", "GTSRB", "EuroSAT", "Flowers102", "STL10", "ImageNet"]
)
def test_missing_files_are_one_line_that_names_the_set(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^torchvision-{name}: ") as caught:
        load(f"torchvision-{name}", tmp_path)
    assert "\n" not in str(caught.value)
    assert f"torchvision.datasets.{name}(root, download=True)" in str(caught.value)
    with pytest.raises(
        ValueError, match=f"^torchvision-{name}: give the folder of its files, --data-dir FOLDER"
    ):
        load(f"torchvision-{name}")


@needed
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": 3}, "torchvision-FakeData: .*'colour'"),
        ({"size": 0}, "size must be a whole number >= 1, got 0"),
        ({"channels": 4}, "channels must be 3"),
        ({"workers": 0}, "workers must be a whole number >= 1, got 0"),
        ({"in_memory": "no"}, "in_memory must be true or false, got 'no'"),
        ({"test_share": 1}, "test_share must be in"),
        ({"resize": 4}, "resize must be at least size, got resize 4, size None"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("torchvision-FakeData", **FAKE | options)


@needed
def test_bad_pictures_are_named(tmp_path: Path) -> None:
    base = tmp_path / "eurosat" / "2750"
    for i in range(8):
        picture(base / "ab"[i % 2] / f"{i}.jpg", i)
    (base / "a" / "6.jpg").write_text("x")
    with pytest.raises(ValueError, match=r"^torchvision-EuroSAT, picture 3: cannot be read \(.*\)$"):
        load("torchvision-EuroSAT", tmp_path, in_memory=True)
    picture(base / "a" / "6.jpg", 0, width=7)
    with pytest.raises(ValueError, match=r"picture 3 has 7 x 4 .*, the first picture 5 x 4 .*; give a size"):
        load("torchvision-EuroSAT", tmp_path, in_memory=True)
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


@needed
def test_labels_are_transformed_and_must_be_classes(tmp_path: Path) -> None:
    fashion(tmp_path)
    found = load("torchvision-FashionMNIST", tmp_path, target_transform=lambda label: label % 2)
    assert (found.num_classes, found.test.y.tolist()) == (2, [0, 1] * 5)
    with pytest.raises(
        ValueError, match=r"^torchvision-FashionMNIST: the label of picture 0 is '0', not one c"
    ):
        load("torchvision-FashionMNIST", tmp_path, target_transform=str)


@needed
def test_a_bad_picture_met_while_looking_for_labels_is_named(tmp_path: Path) -> None:
    fashion(tmp_path)

    def broken(label: int) -> int:
        raise OSError("broken")

    with pytest.raises(ValueError, match=r"^torchvision-FashionMNIST, picture 0: cannot be read \(broken\)$"):
        load("torchvision-FashionMNIST", tmp_path, target_transform=broken)


@needed
def test_no_picture_is_decoded_for_the_labels_where_the_set_lists_them(tmp_path: Path) -> None:
    base = tmp_path / "imagenette2"
    for part in ("train", "val"):
        for i in range(4):
            picture(base / part / ("n01440764", "n02102040")[i // 2] / f"{i}.jpeg", i)
            if i:
                (base / part / ("n01440764", "n02102040")[i // 2] / f"{i}.jpeg").write_text("x")
    found = load("torchvision-Imagenette", tmp_path)
    assert found.train.y.tolist() == [0, 0, 1, 1]
    found.train.take(torch.tensor([0]))
    with pytest.raises(ValueError, match="torchvision-Imagenette, picture 2: cannot be read"):
        found.train.take(torch.tensor([2]))


def test_torchvision_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"torchvision is not installed: pip install 'controlat\[vision\]'"):
        load("torchvision-FakeData")


def test_usual_augmentation() -> None:
    assert augmentation("torchvision-Flowers102") == "none"
