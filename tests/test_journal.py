"""Journals of descents: killed anywhere, they end in the same bits; and they are nobody else's."""

import json
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from journalled import STEPS, decay, descent, fail_at, training

import metagradient as mg
from metagradient.descent import journal
from metagradient.descent.journal import RECORDS, STATE, TIMINGS, read_lines
from metagradient.errors import ConfigError, StoreError

pytestmark = pytest.mark.core

WRITES = 3  # in a meta-step: timings, state, record


class Killed(BaseException):
    """What a kill is in a test that goes on in the same process."""


def kill() -> None:
    raise Killed


def content(out: Path) -> tuple[bytes, bytes]:
    return (out / RECORDS).read_bytes(), (out / STATE).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    list(descent(out))
    return out


def test_a_journal_holds_what_the_records_say(uninterrupted: Path, tmp_path: Path):
    taken = descent(tmp_path / "run")
    records = list(taken)
    lines = read_lines(uninterrupted / RECORDS)
    assert lines == [r.found() for r in records]
    assert [t["step"] for t in read_lines(uninterrupted / TIMINGS)] == list(range(STEPS))
    assert not any(name in line for line in lines for name in ("seconds", "training_runs", "forward_steps"))
    assert content(tmp_path / "run") == content(uninterrupted)
    assert len({file.stat().st_mode for file in uninterrupted.iterdir()}) == 1
    again = descent(uninterrupted)
    assert list(again) == []
    assert taken.best
    assert again.best
    assert 0 < again.best.step < STEPS - 1
    assert (again.step, again.best.step, again.best.score) == (STEPS, taken.best.step, taken.best.score)
    for a, b in ((again.z, taken.z), (again.best.z, taken.best.z), (again.best.z, records[again.best.step].z)):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_journal_follows_a_descent_that_is_left_and_taken_up(uninterrupted: Path, tmp_path: Path):
    for step in range(STEPS):
        taken = descent(tmp_path)
        assert taken.step == step
        assert next(taken).step == step
    assert content(tmp_path) == content(uninterrupted)


def test_the_budget_may_grow(uninterrupted: Path, tmp_path: Path):
    list(descent(tmp_path, steps=1))
    list(descent(tmp_path, steps=3, patience=1))
    assert [r.step for r in descent(tmp_path, patience=9)] == [3]
    assert content(tmp_path) == content(uninterrupted)


FAULTS = st.tuples(st.integers(0, STEPS * WRITES), st.sampled_from(["before", "torn", "after"]))


@given(faults=st.lists(FAULTS, max_size=3))
@example(faults=[(1, "after"), (WRITES + 1, "torn"), (2, "torn")])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_at_any_writes_it_ends_in_the_same_bits(
    uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory, faults: list[tuple[int, str]]
):
    out = tmp_path_factory.mktemp("killed")
    for call, phase in faults:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(call, phase, kill, patch.setattr)
            with suppress(Killed):
                list(descent(out))
    list(descent(out))
    assert content(out) == content(uninterrupted)
    assert [t["step"] for t in read_lines(out / TIMINGS)] == list(range(STEPS))


@pytest.mark.parametrize(("call", "phase"), [(1, "torn"), (2 * WRITES + 2, "torn")])
def test_a_killed_process_ends_in_the_same_bits(uninterrupted: Path, tmp_path: Path, call: int, phase: str):
    script = Path(__file__).with_name("journalled.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path), str(call), phase], check=False)
    assert done.returncode == -signal.SIGKILL
    taken = descent(tmp_path)
    assert taken.step == (call + 1) // WRITES
    list(taken)
    assert content(tmp_path) == content(uninterrupted)


def test_the_segment_that_was_measured_stays(tmp_path: Path):
    measured = descent(tmp_path, segment=2)
    next(measured)
    assert measured.segment
    again = descent(tmp_path, segment=2)
    assert again.segment == measured.segment
    assert next(again).stats.segment == measured.segment


def other_update() -> Any:
    return mg.updates.normalised(0.3, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"seeds": 3}, "seeds was 2, now it is 3"),
        ({"z": {"rate": mg.PerStep(jnp.full(4, 0.1))}}, r"z\['unused'\] was float32\[\], now it is None"),
        ({"z": {"rate": mg.Shared(jnp.full(4, 0.1)), "unused": jnp.zeros(())}}, "PerStep.*now it is Shared"),
        ({"z": {"rate": mg.PerStep(jnp.full(4, 0.2)), "unused": jnp.zeros(())}}, "checksum of the first z"),
        ({"update": mg.updates.sign(0.1)}, "memory of the update"),
        ({"project": mg.updates.box(0.0, 0.8)}, "digest of update and projection"),
        ({"held_out": None}, "held_out was [0-9a-f]+, now it is absent"),
        ({"seeds": 1, "training": training()}, "training was drawn by seed, now it is fixed"),
        ({"window": 2}, "window was None, now it is 2"),
        ({"segment": None}, "segment was"),
    ],
)
def test_a_journal_of_another_descent_is_refused(uninterrupted: Path, changes: dict[str, Any], message: str):
    before = content(uninterrupted)
    with pytest.raises(ConfigError, match=message):
        descent(uninterrupted, **changes)
    assert content(uninterrupted) == before


def test_the_digest_of_an_update_goes_by_the_content_of_its_constants(tmp_path: Path):
    def begun(originals: jax.Array) -> mg.Descent:
        project = mg.updates.ball({"rate": mg.PerStep(originals[:4]), "unused": originals.sum()}, 0.5)
        return descent(tmp_path, project=project, steps=1)

    list(begun(jnp.full(5000, 0.25)))
    assert list(begun(jnp.full(5000, 0.25))) == []
    with pytest.raises(ConfigError, match="digest"):
        begun(jnp.full(5000, 0.5))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (STATE, lambda b: b[:-1] + bytes([b[-1] ^ 1]), "fails its checksum"),
        (STATE, lambda b: b[: len(b) // 2], "damaged"),
        (STATE, lambda b: b.replace(b'\\"step\\": 4', b'\\"step\\": 3'), "header fails its checksum"),
        (RECORDS, lambda b: b.replace(b'"step": 1', b'"step": 7'), "not what the descent wrote"),
        (RECORDS, lambda b: b[:40], "not what the descent wrote"),
        (RECORDS, lambda b: b + b"{}\n", "not what the descent wrote"),
    ],
)
def test_damage_is_told_from_a_kill(uninterrupted: Path, tmp_path: Path, name: str, damage: Any, message: str):
    for file in (RECORDS, STATE, TIMINGS):
        whole = (uninterrupted / file).read_bytes()
        (tmp_path / file).write_bytes(damage(whole) if file == name else whole)
        assert file != name or damage(whole) != whole
    with pytest.raises(StoreError, match=message):
        descent(tmp_path)


def test_records_of_something_else_are_left_alone(tmp_path: Path):
    (tmp_path / RECORDS).write_text("{}\n")
    with pytest.raises(ConfigError, match="can't be resumed"):
        descent(tmp_path)
    assert (tmp_path / RECORDS).read_text() == "{}\n"


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        next(descent(tmp_path / "file" / "run"))


def test_leaves_of_every_dtype_and_keys_come_back(tmp_path: Path):
    memory = {"key": jax.random.key(3), "half": jnp.ones(2, jnp.bfloat16), "flag": jnp.asarray(True), "none": None}
    start = journal.Position(0, {"a": jnp.zeros((0, 2))}, memory, None, None)
    after = journal.Position(1, start.z, memory, journal.Best(0, 0.1, start.z), mg.Segment(3))
    journal.Journal(tmp_path, {}, start).commit(after, {"step": 0}, {"step": 0})
    found = journal.Journal(tmp_path, {}, start).position
    assert (found.step, found.segment, found.best and found.best.score) == (1, mg.Segment(3), 0.1)
    assert jax.tree.structure(found.memory) == jax.tree.structure(memory)
    assert (jax.random.key_data(found.memory["key"]) == jax.random.key_data(memory["key"])).all()
    assert (found.memory["half"].dtype, found.memory["flag"].dtype) == (jnp.bfloat16, jnp.bool_)


def events(folder: Path) -> dict[tuple[str, int], float]:
    """Scalars by tag and step, as TensorBoard reads them: in the order of files, purged where a later one says so."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found: dict[tuple[str, int], float] = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                found = {key: v for key, v in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_event_files_hold_the_curves_across_a_resume(tmp_path: Path):
    first = list(descent(tmp_path, steps=2, tensorboard=True))
    rest = list(descent(tmp_path, tensorboard=True))
    expected = {
        (name, r.step): pytest.approx(getattr(r, name))
        for r in first + rest
        for name in ("value", "held_out", "grad_norm", "agreement")
    }
    assert events(tmp_path / "tensorboard") == expected
    assert all(a.step < b.step for a, b in pairwise(first + rest))


def test_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"metagradient\[tensorboard\]"):
        descent(tmp_path, tensorboard=True)


def test_lines_are_json(uninterrupted: Path):
    for line in (uninterrupted / RECORDS).read_text().splitlines():
        assert set(json.loads(line)) == {"step", "value", "held_out", "grad_norm", "agreement", "seeds"}


# What a journal's descent is one of: the programs, and the data.


def slower(seed: int) -> mg.Training:
    made = training(seed)
    return mg.Training(made.init, lambda state, batch, z: state - 0.5 * z["rate"] * state, made.batches)


def on_other_batches(seed: int) -> mg.Training:
    return mg.Training(training(seed).init, decay, [{"step": np.int32(2 * t)} for t in range(4)])


def from_elsewhere(seed: int) -> mg.Training:
    return mg.Training(2 * training(seed).init, decay, training(seed).batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": slower}, "digest of the training step was"),
        ({"training": on_other_batches}, "checksum of the last batch was"),
        ({"training": from_elsewhere}, "checksum of the initial state was"),
        ({"objective": lambda state, z: jnp.sum(jnp.abs(state))}, "digest of the objective was"),
        ({"held_out": lambda state, z: jnp.sum(state)}, "held_out was"),
        ({"objective": mg.mean_over([{"x": np.ones(3)}], lambda s, b: jnp.sum(s * b["x"]))}, "digest of the objective"),
    ],
)
def test_another_program_or_other_data_is_refused_by_name(uninterrupted: Path, changes: dict[str, Any], message: str):
    before = content(uninterrupted)
    with pytest.raises(ConfigError, match=message):
        descent(uninterrupted, **changes)
    assert content(uninterrupted) == before


def test_another_number_of_steps_is_refused_by_name(tmp_path: Path):
    def run(steps: int) -> mg.Descent:
        made = mg.Training(jnp.ones(3), decay, [{"step": np.int32(t)} for t in range(steps)])
        return descent(tmp_path, training=made, seeds=1, z={"rate": jnp.asarray(0.1)}, held_out=None)

    next(run(4))
    with pytest.raises(ConfigError, match="number of training steps was 4, now it is 5"):
        run(5)


def test_another_jax_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    next(descent(tmp_path))
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    with pytest.raises(ConfigError, match=r"JAX was .*, now it is 0\.0\.1"):
        descent(tmp_path)


def test_an_objective_over_other_batches_is_refused(tmp_path: Path):
    def over(number: float) -> Any:
        return mg.mean_over([{"x": np.full(3, number)}], lambda s, b: jnp.sum(s * b["x"]) ** 2)

    next(descent(tmp_path, objective=over(1)))
    next(descent(tmp_path, objective=over(1)))
    with pytest.raises(ConfigError, match="digest of the objective"):
        descent(tmp_path, objective=over(2))
