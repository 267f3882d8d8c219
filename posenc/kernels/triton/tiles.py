"""The table of tile sizes of the Triton kernels.

``python -m scripts.gpu_sweep`` measures candidates on a GPU and writes such a table; ``POSENC_TRITON_TILES`` names a
file whose entries come before those of the shipped table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posenc.errors import InvalidConfigError
from posenc.files import replacing

Kernel = Literal["prefill", "decode_kept", "decode_raw"]
VARIABLE = "POSENC_TRITON_TILES"
SHIPPED = "tiles.json"
Extent = Annotated[Literal[16, 32, 64, 128, 256], Field(description="a power of two that a tile may have")]


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work, and how the compiler schedules it.

    Parameters
    ----------
    rows, keys : int
        Queries (the most, for decoding) and keys of a tile.
    warps, stages : int
        ``num_warps``, and ``num_stages`` where shared memory holds them.
    tma : bool
        Tiles come through tensor memory accelerator descriptors made on the host; prefill only.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False


class TileEntry(BaseModel):
    """A tiling, and the cases that it is for.

    Parameters
    ----------
    kernel : {"prefill", "decode_kept", "decode_raw"}
        Decoding over kept rotated keys, or over raw ones.
    capability : (int, int)
        The least compute capability it is for.
    bits : {16, 32}
        Width of the elements of query, key and value.
    head_dim : int
        The widest head it is for, in channels.
    source : str
        Why it was chosen: a result file, or another reason.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: Kernel
    capability: tuple[int, int]
    bits: Literal[16, 32]
    head_dim: Extent
    rows: Extent
    keys: Extent
    warps: Literal[1, 2, 4, 8, 16]
    stages: Annotated[int, Field(ge=1, le=8)]
    tma: bool = False
    source: str

    @property
    def tiling(self) -> Tiling:
        """The tiling alone."""
        return Tiling(self.rows, self.keys, self.warps, self.stages, self.tma)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["posenc-tiles"]
    version: Literal[1]
    tiles: tuple[TileEntry, ...]


@dataclass(frozen=True, eq=False)
class TileTable:
    """Entries in order of preference."""

    entries: tuple[TileEntry, ...]

    def tiling(self, kernel: Kernel, *, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> Tiling:
        """The tiling of a case: the newest capability up to this one, the narrowest head that fits, the first entry.

        Parameters
        ----------
        capability : (int, int)
            The GPU's compute capability.
        head_dim : int
            Channels of the wider of query and value, at most 256.

        Raises
        ------
        InvalidConfigError
            If no entry fits, which the shipped table rules out.
        """
        return self._tiling(kernel, capability, 8 * dtype.itemsize, head_dim)

    @lru_cache(maxsize=64)  # noqa: B019  (tables are few and live as long as the process)
    def _tiling(self, kernel: Kernel, capability: tuple[int, int], bits: int, head_dim: int) -> Tiling:
        fitting = [
            entry
            for entry in self.entries
            if (entry.kernel, entry.bits) == (kernel, bits)
            and entry.capability <= capability
            and head_dim <= entry.head_dim
        ]
        if not fitting:
            raise InvalidConfigError(
                f"no tile of kernel {kernel!r} for {bits}-bit heads of {head_dim} channels and compute capability "
                f"{capability[0]}.{capability[1]}: add one to the file that {VARIABLE} names, or unset it."
            )
        newest = max(entry.capability for entry in fitting)
        return min((e for e in fitting if e.capability == newest), key=lambda entry: entry.head_dim).tiling

    def with_first(self, entries: Iterable[TileEntry]) -> TileTable:
        """The same table with other entries before its own."""
        return TileTable((*entries, *self.entries))

    def write(self, path: Path) -> None:
        """Write the table to a file that :meth:`read` reads."""
        tiles = [entry.model_dump(mode="json") for entry in self.entries]
        content = {"format": "posenc-tiles", "version": 1}
        lines = ",\n".join("  " + json.dumps(tile) for tile in tiles)
        head = json.dumps(content)[:-1]
        with replacing(path) as temporary:
            temporary.write_text(f'{head}, "tiles": [\n{lines}\n]}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> TileTable:
        """Read a table from a file.

        Raises
        ------
        InvalidConfigError
            If the file holds no table; the message names the file and the first thing that is wrong.
        """
        try:
            return cls(_File.model_validate_json(path.read_text(encoding="utf-8")).tiles)
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error})"
        except UnicodeDecodeError:
            reason = "is not UTF-8 text"
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"is no table of tiles ({'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']})"
        raise InvalidConfigError(f"{path} {reason}. Name another file in {VARIABLE}, or unset it.")

    @classmethod
    @cache
    def shipped(cls) -> TileTable:
        """The table of this package."""
        return cls.read(Path(str(files("posenc.kernels.triton").joinpath(SHIPPED))))


def in_force() -> TileTable:
    """The shipped table, after the entries of the file that ``POSENC_TRITON_TILES`` names."""
    name = os.environ.get(VARIABLE)
    return _preferred(name) if name else TileTable.shipped()


@cache
def _preferred(name: str) -> TileTable:
    return TileTable.shipped().with_first(TileTable.read(Path(name)).entries)
