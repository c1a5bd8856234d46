"""The weight files of a model's part in a folder: which there are, and what tells their tensors from others."""

import hashlib
import json
from pathlib import Path

from alignkit.errors import ModelError
from alignkit.remembered import memory, stamp

NAMES = ("diffusion_pytorch_model", "model")  # diffusers', transformers'
CHUNK = 1 << 24
FINGERPRINT = "fingerprint"
UNTOLD = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype")
"""Of a part's config.json, what says nothing of its weights."""


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a part, one or several shards; empty where there are none of this `variant`."""
    middle = f".{variant}" if variant else ""
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
    """`weight_files`; raises ModelError, naming the file that should be there, and what is, where there are none."""
    files = weight_files(folder, variant)
    if files:
        return files
    there = sorted(file.name for file in folder.glob("*.safetensors*"))
    others = {name.split(".")[1] for name in there if name.count(".") == 2 and name.endswith(".safetensors")}
    hint = f"set model.variant={min(others)}" if others else "safetensors files are needed"
    wanted = folder / f"{NAMES[0]}{f'.{variant}' if variant else ''}.safetensors"
    raise ModelError(
        f"model.path: {wanted}: cannot load: no such file; {hint} (there is {', '.join(there[:4]) or 'none'})"
    )


def fingerprint_of(folder: Path, variant: str | None = None) -> str:
    """SHA-256 of a part's tensors, by name, dtype, shape and bytes, and of its settings: the same for the same weights
    in one file or in shards. Where there are no safetensors files, of the bytes of all its files.

    Remembered by path, size and time of every file, for all processes of this machine, which take turns.
    """
    files = weight_files(folder, variant) or weight_files(folder)  # a variant's other parts may have the usual names
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


def _tensors(file: Path) -> list[tuple[str, list[str | list[int]], bytes]]:
    """Name, dtype and shape, and digest of each tensor of a safetensors file."""
    try:
        with file.open("rb") as stream:
            start = 8 + (size := int.from_bytes(stream.read(8), "little"))
            if start > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            found = []
            for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                first, last = told["data_offsets"]
                stream.seek(start + first)
                digest, left = hashlib.sha256(), last - first
                while left and (chunk := stream.read(min(left, CHUNK))):
                    digest.update(chunk)
                    left -= len(chunk)
                if left:
                    raise ValueError(f"{name} is cut off")
                found.append((name, [told["dtype"], told["shape"]], digest.digest()))
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.path: {file}: cannot read: {error}") from error
