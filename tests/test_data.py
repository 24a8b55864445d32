from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metagradient.data.batches import EpochBatches
from metagradient.data.images import Images, load_cifar10, load_digits
from metagradient.errors import BatchError, DataError

SharedData = Callable[[str], Path]


def epoch_batches(n: int = 10, **options: Any) -> EpochBatches:
    arrays = {"x": np.arange(n * 2.0).reshape(n, 2), "y": np.arange(n)}
    return EpochBatches(arrays, **{"batch": 4, "steps": 9, "seed": 3, **options})


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch_depends_on_its_step_alone():
    batches = epoch_batches()
    forward = [batches[t] for t in range(len(batches))]
    backward = epoch_batches()
    assert len(forward) == 9
    for t in [8, 0, 5, 5, 1, 7, 2, 6, 3, 4]:
        assert same(backward[t], forward[t])


def test_a_batch_holds_the_rows_that_its_index_names():
    batches = epoch_batches()
    for batch in (batches[t] for t in range(len(batches))):
        assert batch["index"].dtype == np.int32
        np.testing.assert_array_equal(batch["y"], batch["index"])
        np.testing.assert_array_equal(batch["x"][:, 0], 2.0 * batch["index"])


def test_an_epoch_visits_no_example_twice_and_epochs_and_seeds_differ():
    batches = epoch_batches(n=8, steps=4)
    first, second = (np.concatenate([batches[t]["index"] for t in steps]) for steps in ((0, 1), (2, 3)))
    assert sorted(first) == sorted(second) == list(range(8))
    assert not np.array_equal(first, second)
    assert not same(epoch_batches(seed=1)[0], epoch_batches(seed=2)[0])


def test_rows_restrict_the_walk_and_index_still_counts_in_the_arrays():
    rows = np.array([9, 2, 5, 7])
    batch = epoch_batches(rows=rows)[0]
    assert sorted(batch["index"]) == sorted(rows)
    np.testing.assert_array_equal(batch["y"], batch["index"])


def test_writing_into_a_batch_changes_no_later_read():
    batches = epoch_batches()
    before = {k: v.copy() for k, v in batches[0].items()}
    for array in batches[0].values():
        array[...] = 0
    assert same(batches[0], before)


@pytest.mark.parametrize("t", [-1, 9])
def test_steps_outside_the_run_raise(t: int):
    with pytest.raises(IndexError, match="of 9"):
        epoch_batches()[t]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 11}, "batch must be between 1 and the 10"),
        ({"batch": 0}, "batch must be"),
        ({"batch": 4, "rows": np.arange(3)}, "the 3 examples"),
        ({"steps": 0}, "steps must be"),
        ({"seed": -1}, "seed must be"),
        ({"rows": np.array([10])}, "rows must be"),
        ({"rows": np.array([0.5])}, "rows must be"),
    ],
)
def test_impossible_walks_raise(options: dict[str, Any], words: str):
    with pytest.raises(BatchError, match=words):
        epoch_batches(**options)


@pytest.mark.parametrize("arrays", [{}, {"x": np.zeros(4), "y": np.zeros(5)}, {"index": np.zeros(4)}])
def test_arrays_that_make_no_batch_raise(arrays: dict[str, np.ndarray]):
    with pytest.raises(BatchError, match="array"):
        EpochBatches(arrays, batch=1, steps=1, seed=0)


def test_digits():
    digits = load_digits()
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.dtype == np.float32
    assert digits.labels.dtype == np.int32
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    assert digits.observed is None
    assert digits.classes == tuple("0123456789")


def test_take_keeps_rows_together():
    images = Images(np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1), np.arange(4), 10 + np.arange(4), ("a",))
    taken = images.take([3, 1])
    assert taken.observed is not None
    assert (taken.images.ravel().tolist(), taken.labels.tolist(), taken.observed.tolist()) == ([3, 1], [3, 1], [13, 11])


def test_shrunk_averages_squares():
    images = Images(np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1), np.zeros(1), None, ("a",))
    assert images.shrunk(2).images[0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    with pytest.raises(DataError, match="divide"):
        images.shrunk(3)


def test_cifar10_with_human_labels(shared_data: SharedData):
    images = load_cifar10(shared_data("cifar10"), limit=2000)
    assert images.images.shape == (2000, 32, 32, 3)
    assert images.images.dtype == np.float32
    assert 0 <= images.images.min() < images.images.max() <= 1
    assert images.observed is not None
    # 40.21 % of all 50,000 differ; 0.05 is over four standard errors of 2,000.
    assert (images.observed != images.labels).mean() == pytest.approx(0.4021, abs=0.05)
    assert images.classes[images.labels[0]] == "frog"


def test_cifar10_test_split_has_true_labels_alone(shared_data: SharedData):
    assert load_cifar10(shared_data("cifar10"), split="test", limit=10).observed is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "worst"}, "no column worst; it has index, clean"),
        ({"limit": 0}, "limit must be between"),
        ({"split": "validation"}, "split must be"),
    ],
)
def test_cifar10_refuses(shared_data: SharedData, options: dict[str, Any], words: str):
    with pytest.raises(DataError, match=words):
        load_cifar10(shared_data("cifar10"), **{"limit": 5, **options})


def small_set(directory: Path, shared: Path, **changed: Any) -> Path:
    """The first four rows of the real files, with columns of the human labels changed."""
    name = "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(shared / name).slice(0, 4), directory / name)
    labels = pq.read_table(shared / "cifar10n.parquet").slice(0, 4).to_pydict()
    pq.write_table(pa.table({**labels, **changed}), directory / "cifar10n.parquet")
    return directory


def test_cifar10_human_labels_are_matched_by_index(tmp_path: Path, shared_data: SharedData):
    shared = shared_data("cifar10")
    whole = load_cifar10(shared, limit=4)
    labels = pq.read_table(shared / "cifar10n.parquet").slice(0, 4).to_pydict()
    turned = {name: column[::-1] for name, column in labels.items()}
    loaded = load_cifar10(small_set(tmp_path, shared, **turned))
    np.testing.assert_array_equal(loaded.observed, whole.observed)


def test_cifar10_refuses_human_labels_of_other_images(tmp_path: Path, shared_data: SharedData):
    with pytest.raises(DataError, match="other images"):
        load_cifar10(small_set(tmp_path, shared_data("cifar10"), clean=[9, 9, 9, 8]))


def test_cifar10_without_human_labels(tmp_path: Path, shared_data: SharedData):
    directory = small_set(tmp_path, shared_data("cifar10"))
    (directory / "cifar10n.parquet").unlink()
    assert load_cifar10(directory, labels=None).observed is None
    with pytest.raises(DataError, match="labels=None"):
        load_cifar10(directory)


def test_absent_and_broken_files_raise(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no train-\*\.parquet"):
        load_cifar10(tmp_path)
    file = tmp_path / "train-0.parquet"
    file.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="can't be read as Parquet"):
        load_cifar10(tmp_path)
    pq.write_table(pa.table({"img": [{"bytes": b"no jpeg", "path": None}], "label": [0]}), file)
    with pytest.raises(DataError, match="image 0 can't be decoded"):
        load_cifar10(tmp_path, labels=None)
