"""The z of every n-th meta-step, in memory or in a journal's directory."""

from pathlib import Path
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metagradient.errors import StoreError
from metagradient.files import replace_file
from metagradient.trees import PyTree, paths

KEPT = "kept"


class Kept:
    """Metaparameters by the number of the meta-step that started from them.

    Arguments:
        every: n; None keeps none.
        like: a z, whose structure all have.
        folder: where files go, one for each; None keeps them in memory.
        step: meta-steps that are done: files of later ones, of a process that was killed, are none of this descent's.
    """

    def __init__(self, every: int | None, like: PyTree, folder: Path | None, step: int):
        self._every, self._like, self._folder = every, like, folder
        self._held: dict[int, PyTree] = {}
        for number, file in self._files():
            if number >= step:
                file.unlink()

    def add(self, step: int, z: PyTree) -> None:
        """Keep the z of a meta-step, if it is one of those."""
        if self._every is None or step % self._every:
            return
        if self._folder is None:
            self._held[step] = z
            return
        arrays = {path: np.asarray(x) for path, x in paths(z)}
        sums = {path: str(crc32(x.tobytes())) for path, x in arrays.items()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._folder / f"{step:06}.safetensors", lambda path: save_file(arrays, path, metadata=sums))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"z of meta-step {step} can't be written to {self._folder}: {error}") from error

    def read(self) -> dict[int, PyTree]:
        """All that were kept, in order."""
        return self._held or {number: self._read(file) for number, file in self._files()}

    def _files(self) -> list[tuple[int, Path]]:
        if self._folder is None or not self._folder.is_dir():
            return []
        return sorted((int(file.stem), file) for file in self._folder.glob("[0-9]*.safetensors"))

    def _read(self, file: Path) -> PyTree:
        leaves = []
        try:
            with safe_open(file, framework="numpy") as stored:
                sums = stored.metadata() or {}
                for path, like in paths(self._like):
                    x = stored.get_tensor(path)
                    if sums.get(path) != str(crc32(x.tobytes())) or x.shape != like.shape:
                        raise StoreError(f"{file} was changed on disk: z{path} fails its checksum")
                    leaves.append(jax.device_put(jnp.asarray(x), like.sharding if like.committed else None))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{file} can't be read: {error}") from error
        return jax.tree.unflatten(jax.tree.structure(self._like), leaves)
