"""Checkpoints: everything that a run consists of between two batches, under a checksum.

A checkpoint is a file of `torch.save`, readable by ``torch.load(..., weights_only=True)``: a zip archive. Its
comment, at the end, holds the SHA-256 of all bytes before, so that any change is noticed: torch itself checks
nothing. In checkpoints of before, which have no comment, the archive's own CRC-32 of every record is checked.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlat._util.files import read_bytes, write
from controlat.records import Checkpoint, checked
from controlat.records.reading import short

__all__ = ["check_optimizer", "check_weights", "load_checkpoint", "load_weights", "read_checkpoint", "save"]

FORMAT, VERSION = "controlat checkpoint", 1
_LIMIT = 1 << 36  # bytes
_MARK = b"controlat sha256 "
_DIGEST = 64  # hexadecimal digits
_END, _END_SIZE = b"PK\5\6", 22  # the record that ends a zip archive, without a comment


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint with its checksum, under a temporary name first."""
    buffer = io.BytesIO()  # torch hides a full disk behind an error of its own when it writes itself
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    body = buffer.getbuffer()[:-2]  # without the length of the comment, which is 0
    mark = struct.pack("<H", len(_MARK) + _DIGEST) + _MARK
    digest = hashlib.sha256(body)
    digest.update(mark)
    write(path, lambda file: file.writelines([body, mark, digest.hexdigest().encode()]))


def _check_seal(content: bytes) -> None:
    """Raise ValueError unless the content is an archive whose checksum, or checksums, are right."""
    mark = content[-_DIGEST - len(_MARK) : -_DIGEST]
    if mark == _MARK:
        body, digest = memoryview(content)[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise ValueError("its checksum is wrong")
        return
    end = content[-_END_SIZE:]
    if not (end.startswith(_END) and end.endswith(b"\0\0")):
        raise ValueError("it does not end as one")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = archive.infolist()
        if any(r.compress_type != zipfile.ZIP_STORED for r in records):
            raise ValueError("its records are compressed")
        if sum(r.file_size for r in records) > len(content):
            raise ValueError("its records overlap")
        if (record := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its record {record} is wrong")


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", content: bytes | None = None
) -> dict[str, Any]:
    """Read a checkpoint without unpickling code.

    Args:
        path: ``last.pt`` or ``best.pt`` of a run directory.
        device: where its tensors go.
        content: what is in it, where that was read already.

    Returns:
        ``model``, ``optimizer``, ``memory``, ``schedule``, ``tally``, ``settings``, ``environment``; ``log``
        (a copy of log.jsonl) and ``data`` (fingerprints of the samples), which those of before do not have.

    Raises:
        ValueError: the file is missing, damaged, not a checkpoint of controlat, or holds a wrong value; the
            message names it.
    """
    if content is None:
        content = read_checkpoint(path)
    try:
        _check_seal(content)
        stored = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds for a damaged file
        raise ValueError(f"{path} is damaged or not a checkpoint ({_reason(error)})") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of controlat")
    if stored.get("version") != VERSION:
        raise ValueError(
            f"{path} has checkpoint version {stored.get('version')!r}; this release reads {VERSION}"
        )
    return dict(checked(stored, Checkpoint, str(path)))


def read_checkpoint(path: str | Path) -> bytes:
    """The bytes of a checkpoint, as yet unchecked.

    Raises:
        ValueError: the file is missing, no regular file, or larger than any checkpoint.
    """
    if not Path(path).exists() or Path(path).is_dir():
        raise ValueError(f"{path}: no such checkpoint")
    return read_bytes(path, _LIMIT)


def _reason(error: Exception) -> str:
    """What went wrong, without torch's advice to unpickle code, in one line."""
    if type(error) is ValueError:
        return str(error)
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition("\n")[0]
    return text.partition(" Please ")[0].strip() or type(error).__name__


def load_weights(
    model: nn.Module, weights: Mapping[str, Any], where: str, network: str = "the network"
) -> None:
    """Put stored parameters and buffers into a network.

    Args:
        model: the network; unchanged where an error is raised.
        weights: its state dict.
        where: the file, for the error.
        network: what it is, for the error.

    Raises:
        ValueError: a name, shape or dtype differs from the network's, a parameter is not finite, or a buffer
            is not a number.
    """
    check_weights(model, weights, where, network)
    model.load_state_dict(dict(weights))


def check_weights(
    model: nn.Module, weights: Mapping[str, Any], where: str, network: str = "the network"
) -> None:
    """Raise ValueError for what `load_weights` refuses."""
    _check_same(model.state_dict(), weights, f"{where} holds weights that do not fit {network}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, t in weights.items():
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            continue
        if bool(torch.isnan(t).any()) or (name in parameters and not bool(torch.isfinite(t).all())):
            raise ValueError(f"{where}: {name} has values that are not finite")


def check_optimizer(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless a state dict is one of this optimiser's, the learning rate apart."""
    ours, theirs = optimizer.state_dict()["param_groups"], state_dict["param_groups"]
    if len(ours) != len(theirs):
        raise ValueError(f"{where}: optimizer.param_groups has {len(theirs)} groups, here are {len(ours)}")
    for a, b in zip(ours, theirs, strict=True):
        for name in a.keys() & b.keys() - {"lr"}:  # others are of another release of torch
            if type(a[name]) is not type(b[name]) or a[name] != b[name]:
                raise ValueError(f"{where}: optimizer {name} is {short(b[name])} there, {a[name]!r} here")
        if lost := {"lr", "params"} - b.keys():
            raise ValueError(f"{where}: optimizer.param_groups lacks {', '.join(sorted(lost))}")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for i, values in state_dict["state"].items():
        buffers = {name: t for name, t in values.items() if t is not None}
        wanted = dict.fromkeys(buffers, parameters.get(i))
        _check_same(wanted, buffers, f"{where}: optimizer.state that does not fit parameter {i}")
        for name, t in buffers.items():
            if not bool(torch.isfinite(t).all()):
                raise ValueError(f"{where}: optimizer.state.{i}.{name} has values that are not finite")


def _check_same(ours: Mapping[Any, Any], theirs: Mapping[Any, Any], what: str) -> None:
    """Raise ValueError, which begins with `what`, unless names, shapes and dtypes are the same."""
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        a, b = _form(ours, name), _form(theirs, name)
        if a != b:
            raise ValueError(f"{what}: {name} is {b} there, {a} here")


def _form(values: Mapping[Any, Any], name: Any) -> str:
    if name not in values:
        return "missing"
    value = values[name]
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
