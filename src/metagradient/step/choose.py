"""Choosing how steps are compiled, by measuring them."""

from dataclasses import replace
from math import isqrt
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np

from metagradient.given import Given
from metagradient.step.feed import Feed
from metagradient.step.programs import Programs
from metagradient.step.rule import Choices, Rule
from metagradient.step.runner import Runner
from metagradient.step.segment import Segment
from metagradient.trees import PyTree, floating

_REPEATS = 3
# A compiled loop can save the dispatch of its steps. It is tried where that is a share of a step worth having, and
# where it could pay for its compilation over some tens of metagradients.
_PROGRAMS_A_STEP = 5
_DISPATCH_SHARE = 0.03
_SECONDS_A_METAGRADIENT = 0.02
_LONGEST = 32
_UNROLLED = 4


def default_length(steps: int) -> int:
    """Steps a compiled segment: near the root of the run, at most 32, a divisor of the run where one is close."""
    target = max(1, min(_LONGEST, isqrt(steps)))
    near = range(max(1, target // 2), min(steps, 2 * target) + 1)
    return min((n for n in near if steps % n == 0), key=lambda n: abs(n - target), default=target)


def choose(programs: Programs, length: int | None, feed: Feed, given: Given, state: PyTree) -> Segment:
    """The fastest way to compile steps.

    Arguments:
        length: of a segment; None leaves that to be measured too.

    A loop of convolutions isn't tried on CPUs, where it is known to be some 45 times slower.

    Cost: a few steps and their adjoints, and one or two compilations a form; nothing where there is no choice.
    """

    def seconds(segment: Segment) -> float:
        return _seconds(Runner(programs, segment, feed, given), state)

    choices = first_choices(programs.rule, feed, given, state)
    single = [Segment(1, "steps", choices.keep, unroll) for unroll in choices.unrolls]
    one = single[0] if len(single) == 1 else min(single, key=seconds)
    unroll = one.unroll_microbatches
    steps = len(feed)
    tried = length or default_length(steps)
    stepping = replace(one, length=length or 1)
    if tried == 1:
        return stepping
    dispatch = _PROGRAMS_A_STEP * _dispatch_seconds(feed, given, state)
    if length is None and dispatch * steps < _SECONDS_A_METAGRADIENT:
        return stepping
    baseline = seconds(one)
    if dispatch < _DISPATCH_SHARE * baseline:
        return stepping
    scan = Segment(tried, "scan", unroll_microbatches=unroll)
    if not (choices.convolves and jax.default_backend() == "cpu") and seconds(scan) < baseline:
        return scan
    written_out = Segment(length or min(_UNROLLED, steps), "unroll", unroll_microbatches=unroll)
    return written_out if seconds(written_out) < baseline else stepping


def first_choices(rule: Rule, feed: Feed, given: Given, state: PyTree) -> Choices:
    """What may be chosen for the steps of a run: one trace of its first."""
    found: list[Choices] = []

    def look(state: PyTree, given: Given, batch: PyTree) -> None:
        found.append(rule.bound(given.args).choices(state, batch, given.seen(jnp.int32(0), batch)))

    jax.eval_shape(look, state, given, feed.first)
    return found[0]


def _seconds(runner: Runner, state: PyTree) -> float:
    """Seconds a step of keeping a segment and pulling back through it, compilation apart."""
    total = runner.programs.zeros(runner.given.z)
    times = []
    for _ in range(1 + _REPEATS):
        start = perf_counter()
        kept, end = runner.keep(0, state)
        pulled = runner.pull(0, kept, floating(state)[0], total)
        jax.block_until_ready((pulled, end().state))
        times.append(perf_counter() - start)
        total = pulled.total
    return min(times[1:]) / len(runner.steps(0))


def _dispatch_seconds(feed: Feed, given: Given, state: PyTree) -> float:
    """Seconds that Python and the runtime take to start one program on a step's arguments, with as many results."""

    @jax.jit
    def nothing(state: PyTree, batch: PyTree, given: Given) -> PyTree:
        del batch, given
        # No copy of the state: large ones would take longer than their dispatch.
        return jax.tree.map(lambda _: np.int32(0), state)

    def once() -> float:
        start = perf_counter()
        jax.block_until_ready(nothing(state, feed.first, given))
        return perf_counter() - start

    once()
    # The least: on a busy machine a mean holds waits, which would have loops compiled for nothing.
    return min(once() for _ in range(20))
