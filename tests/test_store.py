"""Tiers: what is stored comes back bit for bit and placed as it was, and nothing stays behind."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagradient as mg
from metagradient.replay.store import Stores

pytestmark = pytest.mark.core

TIERS = ("device", "host", "disk")


def state() -> dict:
    """One leaf of every sort that a state may hold."""
    return {
        "f32": jnp.linspace(-1, 1, 7).reshape(7, 1),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "bf16": jnp.ones((2, 3), jnp.bfloat16) / 3,
        "count": jnp.int32(5),
        "flag": jnp.array([True, False]),
        "key": jax.random.key(3),
        "old_key": jax.random.PRNGKey(4),
        "empty": jnp.zeros((0, 2)),
    }


def raw(tree: dict) -> list[bytes]:
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
        for x in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize("tier", TIERS)
def test_a_state_comes_back_bit_for_bit(tier: str, tmp_path: Path):
    saved = state()
    with Stores(tmp_path) as stores:
        stores.save(3, saved, tier)
        stores.save(4, {"other": jnp.zeros(2)}, tier)
        found = stores.restore(3)
        assert jax.tree.structure(found) == jax.tree.structure(saved)
        assert raw(found) == raw(saved)
        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(saved)]
        assert [x.committed for x in jax.tree.leaves(found)] == [x.committed for x in jax.tree.leaves(saved)]
        stores.drop(3)
        with pytest.raises(KeyError):
            stores.restore(3)
        assert stores.peak_states == {tier: 2}
    assert not list(tmp_path.iterdir())


def test_a_committed_state_comes_back_committed(tmp_path: Path):
    placed = jax.device_put(jnp.ones(3), jax.devices()[0])
    with Stores(tmp_path) as stores:
        for at, tier in enumerate(TIERS):
            stores.save(at, placed, tier)
            assert stores.restore(at).sharding == placed.sharding
            assert stores.restore(at).committed


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_an_error_that_names_it(damage: str, tmp_path: Path):
    with Stores(tmp_path) as stores:
        stores.save(0, {"w": jnp.arange(1000.0)}, "disk")
        stores.save(1, {"w": jnp.arange(3.0)}, "disk")
        stores.drop(1)  # waits for the writes before it
        (file,) = tmp_path.glob("*/0.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        match damage:
            case "flip":
                file.write_bytes(content)
            case "cut":
                file.write_bytes(content[: len(content) // 2])
            case "gone":
                file.unlink()
        with pytest.raises(mg.errors.StoreError, match=r"0\.safetensors"):
            stores.restore(0)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with Stores(tmp_path / "file") as stores, pytest.raises(mg.errors.StoreError, match="file"):
        stores.save(0, {"w": jnp.ones(1)}, "disk")


def test_files_are_removed_when_a_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reads = 0

    class Changing:
        def __len__(self) -> int:
            return 20

        def __getitem__(self, t: int) -> dict:
            nonlocal reads
            reads += 1
            assert reads < 20, "the source broke"
            return {"x": np.full(3, t + 1.0, np.float32)}

    training = mg.Training(jnp.ones(3), lambda s, b, z: s * (1 - z / 10 * b["x"].mean() / 20), Changing())
    evaluate = mg.value_and_metagrad(
        training,
        lambda s, z: s.sum(),
        schedule=mg.schedule.TwoLevel(tier="disk"),
        segment=mg.Segment(1, "steps", "state"),
    )
    with pytest.raises(AssertionError, match="the source broke"):
        evaluate(jnp.asarray(0.5))
    assert not list(tmp_path.iterdir())
