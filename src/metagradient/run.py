"""A run that has passed every check which costs no training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import jax

from metagradient._jax import trace
from metagradient.errors import ImpureStepError, PrecisionError, StructureError
from metagradient.given import Given
from metagradient.layout import check_mesh
from metagradient.metaparameters import check_concrete, check_steps, index_bound, needs_index
from metagradient.step.choose import choose
from metagradient.step.contract import Contract
from metagradient.step.explain import Call, bare_arrays_explained, explained
from metagradient.step.feed import Feed
from metagradient.step.programs import Programs, signature
from metagradient.step.runner import Runner
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, floating, same_bits

_PRECISE = ("highest", "float32")


@dataclass(frozen=True)
class Run:
    """A training at one z, checked and ready to be walked.

    Arguments:
        training: the training.
        given: what its steps are given.
        feed: its batches.
        state: its initial state.
        contract: its step, traced.
        begin: first differentiated step.
    """

    training: Training
    given: Given
    feed: Feed
    state: PyTree
    contract: Contract
    begin: int

    @classmethod
    def prepared(cls, training: Training, z: PyTree, window: int | None = None, *, retrace: bool = True) -> Self:
        """Check everything that can be known before compute is spent.

        Batches in memory are read through, and a step is traced twice, the first time for a training and shapes of z.

        Arguments:
            z: canonical metaparameters.
            window: as in `value_and_metagrad`.
            retrace: trace a step that was checked before once more, to find it altered. Else that is left to the
                caller, beside the device's work, by `contract.recheck`.
        """
        steps = len(training.batches)
        given = Given.of(z, training.args)
        feed = Feed(training.batches, needs_index(z), index_bound(z))
        programs, about = training.programs, signature(z)
        first = about not in programs.checked.get(training, ())
        feed.check(whole=first)
        if window is not None and not 1 <= window <= steps:
            raise StructureError(f"window must be between 1 and T = {steps}, got {window}")
        check_steps(z, steps)
        check_mesh(given, feed.first, () if training.starts_from_z else training.init)
        state = training.initial(z)
        check_concrete("args", training.args)
        check_concrete("the initial state", state)
        if training.starts_from_z:
            again = training.initial(z)
            if not same_bits(state, again):
                raise ImpureStepError(
                    "init gave another state the second time: it draws on something outside z. Make keys of a fixed "
                    "seed"
                )
        contract = Contract(programs, state, feed.first, given, allow_low_precision=training.allow_low_precision)
        if first:
            with bare_arrays_explained(z, feed.first, steps):
                contract.check()
            programs.checked.setdefault(training, set()).add(about)
        elif retrace:
            contract.recheck()
        return cls(training, given, feed, state, contract, 0 if window is None else steps - window)

    def check_derivatives(self, z: PyTree) -> None:
        """Raise `DerivativeError` or `StructureError` where its start or its steps can't be differentiated in z.

        That is found out the first time for a training and shapes of z.
        """
        known, about = self.programs.checked[self.training], ("derivatives", self.begin, *signature(z))
        if about in known:
            return
        self.contract.check_adjoint()
        if self.training.starts_from_z and not self.begin:
            call = Call("init function", self.training.init, ("z",))
            with explained(call, program=lambda: trace(self.training.initial, z)[0]):
                jax.eval_shape(self._pulled_start, z)
        known.add(about)

    def _pulled_start(self, z: PyTree) -> PyTree:
        values, vjp = jax.vjp(lambda z: floating(self.training.initial(z))[0], z)
        return vjp(values)

    @property
    def programs(self) -> Programs:
        """The programs of its step."""
        return self.training.programs

    @property
    def signature(self) -> tuple:
        """What a choice about its programs depends on: the shapes of what they take, and the run's length."""
        return *signature(self.state, self.feed.first, self.given), len(self.feed)

    def chosen(self, segment: Segment | int | None) -> Segment:
        """How its steps are compiled, measured where `segment` leaves it open.

        That is done once for a step and the shapes that it works on, whatever asks first.
        """
        if isinstance(segment, Segment):
            return segment
        key, known = (self.signature, segment), self.programs.segments
        if key not in known:
            known[key] = choose(self.programs, segment, self.feed, self.given, self.state)
        return known[key]

    def runner(self, segment: Segment, *, queries: bool = False, hold_bytes: int = 0) -> Runner:
        """A walker at the start of the run."""
        return Runner(self.programs, segment, self.feed, self.given, queries, self.begin, hold_bytes)


@contextmanager
def full_precision(allow_low_precision: bool) -> Iterator[None]:
    """Matrix products in full precision, which on accelerators isn't the default."""
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if allow_low_precision or asked in _PRECISE:
        yield
    elif asked is not None:
        raise PrecisionError(
            f"jax_default_matmul_precision is {asked!r}: metagradients in lowered precision are often noise. Set it to "
            "'highest', or pass allow_low_precision=True"
        )
    else:
        with jax.default_matmul_precision("highest"):
            yield
