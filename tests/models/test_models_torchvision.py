"""The networks of torchvision, and its import beside any build of torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import GUARD

from controlat._util import vision
from controlat.models import build

COLOUR = (3, 32, 32)
installed = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


@installed
def test_resnet18() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("torchvision-resnet18", COLOUR, 10)
    assert sum(p.numel() for p in model.parameters()) == 11_181_642
    normalize, network = model.children()
    x = torch.rand(2, *COLOUR)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    torch.testing.assert_close(normalize(x), (x - mean) / std)
    model.eval()
    torch.testing.assert_close(model(x), network((x - mean) / std))


@installed
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("-resnet1", "no model 'torchvision-resnet1'; .* such as torchvision-resnet18"),
        ("-NAME", "write torchvision-NAME with a name of torchvision.models.list_models"),
        ("-fcn_resnet50", "there is no model 'torchvision-fcn_resnet50'"),
        ("", "there is no model 'torchvision'; .* such as torchvision-resnet18, torchvision-resnet50"),
        ("-squeezenet1_1", r"fails on images of shape \(2, 3, 12, 12\)"),
    ],
)
def test_what_does_not_fit_is_refused(variant: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(f"torchvision{variant}", (3, 12, 12), 10)


@pytest.mark.parametrize("variant", ["googlenet", "inception_v3"])
def test_auxiliary_logits_are_refused(variant: str) -> None:
    with pytest.raises(ValueError, match=f"torchvision-{variant} returns auxiliary logits"):
        build(f"torchvision-{variant}", COLOUR, 10)


def test_grey_images_are_refused() -> None:
    with pytest.raises(ValueError, match="torchvision-resnet18 takes images of 3 channels, got 1"):
        build("torchvision-resnet18", (1, 28, 28), 10)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"torchvision is not installed: pip install 'controlat\[vision\]'"):
        build("torchvision-resnet18", COLOUR, 10)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("import no_such_module", ModuleNotFoundError), ("raise RuntimeError('another')", RuntimeError)],
)
def test_another_error_of_the_import_is_not_hidden(
    text: str, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    kept = list(vision._libraries)
    with pytest.raises(kind, match=r"no_such_module|another"):
        vision.torchvision()
    assert vision._libraries == kept


_TRIED_BEFORE = """
import contextlib
with contextlib.suppress(RuntimeError):
    import torchvision
"""

_FRESH = """
from controlat._util import vision
module = vision.torchvision()
assert vision.torchvision() is module
import torchvision, torchvision.datasets, torchvision.models, torchvision.transforms
assert torchvision is module
print(torchvision.models.resnet18(num_classes=3).fc.out_features, torchvision.datasets.Caltech256.__name__)
"""


@installed
@pytest.mark.slow
@pytest.mark.parametrize("before", ["", _TRIED_BEFORE])
def test_a_fresh_process_imports_it(before: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", before + _FRESH],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=GUARD,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "Caltech256"]
