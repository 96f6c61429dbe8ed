"""Archives of arrays (.npz) that come from somewhere else: read without pickles and without believing what they claim."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from thalweg.errors import ConfigurationError, ThalwegError

__all__ = ["read_arrays", "senseless_is_an_error"]


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file that `np.savez` wrote, by name.

    Raises ConfigurationError if the file is not there or is another one: arrays of objects (pickles), compressed ones (a
    small file must not become a large one), and sizes that the file does not have.
    """
    with senseless_is_an_error(path), zipfile.ZipFile(path) as archive:
        arrays = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED or name == member.filename or name in arrays:
                raise ValueError(f"'{member.filename[:60]}' is not what np.savez writes")
            raw = archive.read(member)
            arrays[name] = _array(raw)
        return arrays


def _array(raw: bytes) -> np.ndarray:
    import io

    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the format .npy is not known here")
    shape, in_columns, dtype = read[version](file)
    if dtype.kind not in "fiubU" or not dtype.itemsize:
        raise ValueError(f"an array of {dtype}")
    if math.prod(shape) * dtype.itemsize != len(raw) - file.tell():
        raise ValueError(f"an array of {dtype}, {shape} in {len(raw)} bytes")
    flat = np.frombuffer(raw, dtype, offset=file.tell())
    return (flat.reshape(shape[::-1]).T if in_columns else flat.reshape(shape)).copy(order="C")


@contextlib.contextmanager
def senseless_is_an_error(path: str | Path) -> Iterator[None]:
    """One ConfigurationError for whatever comes of a file that holds something else."""
    try:
        yield
    except ThalwegError:
        raise
    except OSError as problem:
        raise ConfigurationError(f"cannot read {path}: {problem.strerror or problem}") from problem
    except Exception as problem:  # zipfile, NumPy's header and JSON know a dozen kinds
        text = " ".join(str(problem).split())[:200]
        raise ConfigurationError(f"{path} does not hold what it should ({type(problem).__name__}: {text})") from problem
