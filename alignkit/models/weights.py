"""The weight files of a model's part in a folder: which there are, and what tells their tensors from others."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import ModelError
from alignkit.remembered import memory, stamp

NAMES = ("diffusion_pytorch_model", "model")  # diffusers', transformers'
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CHUNK = 1 << 24  # bytes, of whole numbers of any dtype
FINGERPRINT = "fingerprint"
UNTOLD = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype")
"""Of a part's config.json, what says nothing of its weights."""


def variant_of(folder: Path, variant: str | None) -> str | None:
    """`variant` for a part that has files of it; None for one that has the usual ones alone, as some parts of a model
    have."""
    return variant if variant and _named(folder, f".{variant}") else None


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a part, one or several shards: those of `variant`, else the usual ones; may be empty."""
    return (_named(folder, f".{variant}") if variant else []) or _named(folder, "")


def _named(folder: Path, middle: str) -> list[Path]:
    for name in NAMES:
        listing = folder / f"{name}.safetensors.index{middle}.json"
        if listing.is_file():
            try:
                return sorted({folder / file for file in json.loads(listing.read_text())["weight_map"].values()})
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise ModelError(f"model.path: {listing}: cannot read: {error}") from error
        if (folder / f"{name}{middle}.safetensors").is_file():
            return [folder / f"{name}{middle}.safetensors"]
    return []


def check_weight_files(folder: Path, variant: str | None) -> list[Path]:
    """`weight_files`; raises ModelError, naming the file that should be there, and what is, where there are none, and
    for a file that is damaged or holds tensors of whole numbers."""
    files = weight_files(folder, variant)
    for file in files:
        for tensor, told in _header(file)[1]:
            kind = str(told.get("dtype"))
            if not kind.removeprefix("B").startswith("F"):  # F32, BF16 and the like
                raise ModelError(f"model.path: {file}: cannot load: {tensor} is {kind}, of whole numbers")
    if files:
        return files
    there = sorted(file.name for file in folder.glob("*.safetensors*"))
    others = {name.split(".")[1] for name in there if name.count(".") == 2 and name.endswith(".safetensors")}
    hint = f"set model.variant={min(others).split('-')[0]}" if others else "safetensors files are needed"
    name = NAMES[1] if folder.name == "text_encoder" else NAMES[0]
    wanted = folder / f"{name}{f'.{variant}' if variant else ''}.safetensors"
    raise ModelError(
        f"model.path: {wanted}: cannot load: no such file; {hint} (there is {', '.join(there[:4]) or 'none'})"
    )


def fingerprint_of(folder: Path, variant: str | None = None) -> str:
    """SHA-256 of a part's tensors, by name, dtype, shape and bytes, and of its settings: the same for the same weights
    in one file or in shards. Where there are no safetensors files, of the bytes of all its files.

    Remembered by path, size and time of every file, for all processes of this machine, which take turns.
    """
    files = weight_files(folder, variant)
    read = [*files, folder / "config.json"] if files else sorted(folder.glob("*"))
    read = [file for file in read if file.is_file()]
    with memory("weights", [[str(file.resolve()), *stamp(file)] for file in read]) as known:
        if FINGERPRINT not in known:
            known.note(FINGERPRINT, _compute(files, read))
        return str(known[FINGERPRINT])


def _compute(files: list[Path], read: list[Path]) -> str:
    digest = hashlib.sha256()
    if not files:
        for file in read:
            digest.update(file.name.encode() + file_digest(file))
        return digest.hexdigest()[:16]
    for file in read[len(files) :]:
        digest.update(_settings(file))
    for name, told, content in sorted(part for file in files for part in _tensors(file)):
        digest.update(json.dumps([name, told]).encode() + content)
    return digest.hexdigest()[:16]


def file_digest(file: Path) -> bytes:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _settings(file: Path) -> bytes:
    content = file.read_bytes()
    try:
        settings = {key: value for key, value in json.loads(content).items() if key not in UNTOLD}
    except (ValueError, AttributeError):
        return content
    return json.dumps(settings, sort_keys=True).encode()


def _header(file: Path) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """Where the tensors of a safetensors file begin, and what it tells of each, in their order."""
    try:
        with file.open("rb") as stream:
            if (first := stream.read(8)) == b"version ":
                raise ValueError("a pointer of Git LFS, not the file itself: git lfs pull")
            start = 8 + (size := int.from_bytes(first, "little"))
            if start > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            return start, sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.path: {file}: cannot load: {error}") from error


def _tensors(file: Path) -> list[tuple[str, list[str | list[int]], bytes]]:
    """Name, dtype and shape, and digest of each tensor of a safetensors file. Raises ModelError for a
    damaged file, and for NaN or infinity."""
    start, told_of = _header(file)
    try:
        with file.open("rb") as stream:
            found = []
            for name, told in told_of:
                first, last = told["data_offsets"]
                stream.seek(start + first)
                digest, left, kind = hashlib.sha256(), last - first, FLOATS.get(told["dtype"])
                while left and (chunk := bytearray(stream.read(min(left, CHUNK)))):
                    digest.update(chunk)
                    left -= len(chunk)
                    if kind and not _finite(chunk, kind):
                        raise ValueError(f"{name} holds NaN or infinity")
                if left:
                    raise ValueError(f"{name} is cut off")
                found.append((name, [told["dtype"], told["shape"]], digest.digest()))
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.path: {file}: cannot load: {error}") from error


def _finite(content: bytearray, kind: torch.dtype) -> bool:
    whole = len(content) // kind.itemsize  # of a file that is cut off
    if not whole:
        return True
    least, most = torch.frombuffer(content, dtype=kind, count=whole).aminmax()  # NaN, where there is any
    return math.isfinite(least) and math.isfinite(most)
