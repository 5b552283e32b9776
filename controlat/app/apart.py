"""That samples which judge a network are none that it was trained on."""

from __future__ import annotations

import torch

from controlat.app.experiment import Experiment
from controlat.data import Samples, Split

__all__ = ["check_apart"]

_FEW = 0.05  # of the samples: some data sets have a few images twice


def check_apart(experiment: Experiment) -> None:
    """Check that samples of Phi are not trained on, and test samples neither trained on nor held out.

    The splits are other positions of a data set by construction; but the data set may bring the same images
    as training and as test samples. Only images in memory are compared, bit by bit.

    Raises:
        ValueError: more than a twentieth of the samples stand on both sides.
    """
    training, held_out = experiment.training, experiment.held_out
    for name, samples, others, where in (
        ("samples of Phi", experiment.phi, training, "trained on"),
        ("test samples", experiment.test, training, "trained on"),
        ("test samples", experiment.test, held_out, "held out for Phi and decisions in training"),
    ):
        common = len(_images(samples) & _images(others))
        if common > _FEW * len(samples):
            raise ValueError(
                f"{common} of {len(samples)} {name} are {where} too, so that they judge nothing: mend the "
                f"data set {experiment.data.name!r}"
            )


def _images(samples: Samples) -> set[int]:
    """A number for every image; none where they are not in memory."""
    if not isinstance(samples, Split):
        return set()
    stored = samples.x.reshape(len(samples), -1).contiguous().view(torch.uint8).cpu().numpy()
    return {hash(image.tobytes()) for image in stored}
