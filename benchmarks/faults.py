"""Faults that were found in use: what metagradient 0.1 did, what it does now, and what is right; docs/faults.md.

    git worktree add ../before 71238c5
    python benchmarks/faults.py --before ../before [--out docs/faults.md]

Every probe below uses the public interface alone, and runs once against each source tree, in a process of its own. A
number is compared with the right one, which comes from an unrolled float64 `jax.grad` of a plain loop, from float64
finite differences or by hand; for the rest, the type and the words of what is raised are shown.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagradient as mg

# Before the right values are computed.
jax.config.update("jax_enable_x64", True)

PROBES: list[tuple[str, str, Callable[[], Any], Any]] = []
T, N = 4, 8
X = np.random.default_rng(0).normal(size=(N, 5))
BATCHES = [{"x": X[i : i + 4], "index": np.arange(i, i + 4)} for i in (0, 4, 2, 3)]
W = np.linspace(-0.5, 0.5, 5)


def probe(row: str, what: str, right: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """A row of the table: a number (or several), or words that what is raised or printed must hold."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        PROBES.append((row, what, function, right() if callable(right) else right))
        return function

    return add


def final(state: Any, z: Any) -> Any:
    return jnp.sum(jnp.square(state.params))


# W1: derivative rules of a loss's own.


@jax.custom_vjp
def reversal(y):
    return y


reversal.defvjp(lambda y: (y, None), lambda _, g: (-0.7 * g,))


@jax.custom_vjp
def clipped(y):
    return y


clipped.defvjp(lambda y: (y, None), lambda _, g: (jnp.clip(g, -0.05, 0.05),))


@jax.custom_jvp
def tangent(y):
    return jnp.sum(jnp.sin(y) ** 2)


@tangent.defjvp
def _(y, t):
    return tangent(y[0]), jnp.sum(jnp.cos(y[0]) * t[0] * jnp.sqrt(1 + jnp.roll(y[0], 1) ** 2))


@probe("W1", "loss x R(y), R a reversal by -0.7, two SGD steps from (1, 2): d x₂ / d rate", -4.14)
def _reversal():
    training = mg.Training.from_loss(
        lambda p, b, z: p[0] * reversal(p[1]), lambda z: optax.sgd(z), jnp.array([1.0, 2.0]), [{}, {}]
    )
    return mg.value_and_metagrad(training, lambda s, z: s.params[0])(jnp.asarray(0.1))[1]


def run_of(loss: Callable[..., Any], rate: Any, start: Any, steps: int = 3) -> Any:
    p = jnp.asarray(start)
    for _ in range(steps):
        p = p - rate * jax.grad(loss)(p)
    return p


def net(rule: Callable[..., Any]) -> Callable[..., Any]:
    x = jnp.asarray(X)
    return lambda p: jnp.mean((jnp.tanh(rule(jnp.tanh(x * p))) @ p - 0.3) ** 2)


def rule_probe(name: str, loss: Callable[..., Any]) -> None:
    def right() -> Any:
        return jax.grad(lambda rate: jnp.sum(run_of(loss, rate, W) ** 2))(0.3)

    def found() -> Any:
        training = mg.Training.from_loss(lambda p, b, z: loss(p), lambda z: optax.sgd(z), jnp.asarray(W), [{}] * 3)
        return mg.value_and_metagrad(training, final)(jnp.asarray(0.3))[1]

    probe("W1", name, right)(found)


rule_probe("a small net with gradient reversal, d |w|² / d rate", net(reversal))
rule_probe("the same with clipping in the backward pass", net(clipped))
rule_probe("a custom_jvp whose tangent isn't the derivative", lambda p: tangent(p) * jnp.sum(p))


@probe("W1", "sum(z R(p)): z's gradient, though p has no Hessian", [0.4641, 0.86205])
def _by_z():
    training = mg.Training.from_loss(
        lambda p, b, z: jnp.sum(z * reversal(p)), optax.sgd(0.1), jnp.array([1.0, 2.0]), [{}] * 3
    )
    return mg.value_and_metagrad(training, final)(jnp.array([0.5, 0.25]))[1]


@probe("W1", "slope of a candidate's loss in a count surrogate, loss R(p) at p = 1, push 1.2", None)
def _candidate():
    training = mg.Training.from_loss(
        lambda p, b, z: jnp.sum(p * b["x"]) * 0.0, optax.sgd(1.0), jnp.array([1.0]), [{"x": np.ones(1)}] * 3
    )
    pool = [{"index": np.arange(1)}]
    surrogate = mg.CountSurrogate(lambda c: training, pool, lambda p, s, b: reversal(p), 0)
    z = {"c": mg.PerExample(jnp.ones(1))}
    return surrogate.evaluate(lambda s, z: 1.2 * s.params[0], z)[0].grad["c"].value


PROBES[-1] = (*PROBES[-1][:3], [0.84])


# W2: the compiler's fault with vmapped pull-backs of norms.


@probe("W2", "vector=True, queries back through an RMS norm of 1024 x 64, float32: largest error beside alone", 0.0)
def _queries():
    rng, picked = np.random.default_rng(0), (0, 2, 9)
    y, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 1024, 64), (1024, 64)))

    def norm(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + np.float32(1e-5))

    def objective(state: Any, z: Any) -> Any:
        return jnp.einsum("qij,ij->q", y, norm(state))

    training = mg.Training(w, lambda state, batch, z: state - z["rate"] * norm(state) * batch["y"], [{"y": y[0]}] * 2)
    z = {"rate": mg.PerStep(jnp.full(2, 0.5, jnp.float32))}
    together = mg.value_and_metagrad(training, objective, vector=True)(z)[1]["rate"].value
    alone = [mg.value_and_metagrad(training, lambda s, z, q=q: objective(s, z)[q])(z)[1]["rate"].value for q in picked]
    errors = [jnp.linalg.norm(together[q] - b) / jnp.linalg.norm(b) for q, b in zip(picked, alone, strict=True)]
    return round(float(max(errors)), 4)


# W3, W4: the examples' axis.


def weighted(params: Any, batch: Any, z: Any) -> Any:
    scores = batch["x"] @ params
    return jnp.mean(z["weights"] * batch["class_weights"][batch["y"]] * (scores - batch["y"]) ** 2)


def class_batches() -> list[Any]:
    y = np.array([0, 5, 1, 2])
    return [{**b, "y": y, "class_weights": 2.0 ** np.arange(6)} for b in BATCHES]


def by_microbatches(m: int) -> Any:
    z = {"weights": mg.PerExample(jnp.ones(N))}
    training = mg.Training.from_loss(weighted, optax.sgd(0.02), jnp.asarray(W), class_batches(), microbatches=m)
    return mg.value_and_metagrad(training, final)(z)[1]["weights"].value[:3]


probe(
    "W3", "class weights float[6] in the batch, two micro-batches of two: weights' gradient", lambda: by_microbatches(1)
)(lambda: by_microbatches(2))


def mean(batches: Any) -> Any:
    return mg.mean_over(batches, lambda s, b: jnp.mean(b["x"]))(None, None)


@probe("W4", "mean_over, class_weights [3] beside x [10] of 0 and x [2] of 12", 2.0)
def _mean_over():
    return mean([{"class_weights": np.ones(3), "x": np.full(n, v)} for n, v in ((10, 0.0), (2, 12.0))])


PROBES[-1] = (*PROBES[-1][:3], "StructureError: which leaves of the batch hold examples")


@probe("W4", 'the same with examples="x"', 2.0)
def _mean_over_named():
    batches = [{"class_weights": np.ones(3), "x": np.full(n, v)} for n, v in ((10, 0.0), (2, 12.0))]
    return mg.mean_over(batches, lambda s, b: jnp.mean(b["x"]), examples="x")(None, None)


@probe("W4", "mean_over, a scalar leaf first", 2.0)
def _mean_over_scalar():
    return mean([{"a": np.float64(1), "x": np.full(n, v)} for n, v in ((10, 0.0), (2, 12.0))])


@probe("W4", "mean_over a generator", "BatchError")
def _mean_over_generator():
    return mean({"x": np.ones(2)} for _ in range(2))


# W5: numbers that optax keeps in its state.


@probe("W5", "inject_hyperparams(sgd)(learning_rate=z) with PerStep rates", "StructureError")
def _injected():
    training = mg.Training.from_loss(
        lambda p, b, z: jnp.mean((b["x"] @ p - 1) ** 2),
        lambda z: optax.inject_hyperparams(optax.sgd)(learning_rate=z["lr"]),
        jnp.asarray(W),
        BATCHES,
    )
    return mg.value_and_metagrad(training, final)({"lr": mg.PerStep(jnp.full(T, 0.1))})[1]["lr"].value


# W6: a resumed descent.


@probe("W6", "a descent resumed with another inner learning rate", "ConfigError: .*digest of the training step")
def _resumed():
    def descent(rate: float, out: str) -> Any:
        training = mg.Training.from_loss(
            lambda p, b, z: jnp.mean(z["weights"] * (b["x"] @ p - 1) ** 2), optax.sgd(rate), jnp.asarray(W), BATCHES
        )
        z = {"weights": mg.PerExample(jnp.ones(N))}
        return list(mg.descend(training, final, z, mg.updates.sign(0.1), 1 if rate == 0.1 else 2, out=out))

    with tempfile.TemporaryDirectory() as out:
        descent(0.1, out)
        return f"went on: {len(descent(0.2, out))} meta-step"


# R1: optimisers.


def plain(optimizer: Any, **options: Any) -> Any:
    training = mg.Training.from_loss(
        lambda p, b, z: jnp.mean(z["weights"] * (b["x"] @ p - 1) ** 2), optimizer, jnp.asarray(W), BATCHES, **options
    )
    return mg.value_and_metagrad(training, final)({"weights": mg.PerExample(jnp.ones(N))})[1]["weights"].value[:3]


def looped(optimizer: Any) -> Any:
    made = optax.with_extra_args_support(optimizer)

    def value(weights: Any) -> Any:
        p = jnp.asarray(W)
        state = made.init(p)
        for b in BATCHES:
            loss = lambda p, b=b: jnp.mean(weights[b["index"]] * (b["x"] @ p - 1) ** 2)  # noqa: E731
            v, g = jax.value_and_grad(loss)(p)
            updates, state = made.update(g, state, p, value=v, grad=g)
            p = jnp.asarray(optax.apply_updates(p, updates))
        return jnp.sum(p**2)

    return jax.grad(value)(jnp.ones(N))[:3]


for _name, _made in {
    "optax.MultiSteps object": lambda: optax.MultiSteps(optax.adam(0.05, eps_root=1e-6), 2),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.3),
    "contrib.momo": lambda: optax.contrib.momo(0.1),
}.items():
    _loop = (lambda m: lambda: looped(optax.GradientTransformationExtraArgs(m().init, m().update)))(_made)
    probe("R1", f"{_name}, four steps", _loop)((lambda m: lambda: plain(m()))(_made))
for _name, _value in {"lookahead": optax.lookahead(optax.sgd(0.1), 2, 0.5), "lbfgs": optax.lbfgs()}.items():
    probe("R1", f"optax.{_name}", f"StructureError: .*{'lookahead' if _name == 'lookahead' else 'search'}")(
        (lambda v: lambda: plain(v))(_value)
    )
for _name, _value in {"optax.adam": optax.adam, "0.1": 0.1, '"adam"': "adam"}.items():
    probe("R1", f"optimizer={_name}", "StructureError")((lambda v: lambda: plain(v))(_value))


# R2: input of the wrong kind.


def with_batches(batches: Any) -> Any:
    training = mg.Training.from_loss(
        lambda p, b, z: jnp.mean(z["weights"] * (b["x"] @ p - 1) ** 2), optax.sgd(0.1), jnp.asarray(W), batches
    )
    return mg.value_and_metagrad(training, final)({"weights": mg.PerExample(jnp.ones(N))})[0]


class OnlyIterates:
    def __iter__(self) -> Any:
        return iter(BATCHES)


for _name, _value in {
    "a generator": lambda: (b for b in BATCHES),
    "a loader with __iter__ alone": OnlyIterates,
    "a dictionary of stacks": lambda: {k: np.stack([b[k] for b in BATCHES]) for k in BATCHES[0]},
    "None": lambda: None,
    "strings in a leaf": lambda: [{**b, "name": np.array(["a"] * 4)} for b in BATCHES],
    "objects in a leaf": lambda: [{**b, "name": np.array([None] * 4)} for b in BATCHES],
    "datetimes in a leaf": lambda: [{**b, "at": np.array(["2026-01-01"] * 4, "datetime64[D]")} for b in BATCHES],
    "an index shorter than the batch": lambda: [{**b, "y": np.ones(4), "index": b["index"][:2]} for b in BATCHES],
}.items():
    probe("R2", f"batches: {_name}", "BatchError")((lambda v: lambda: with_batches(v()))(_value))


def with_loss(loss: Any, objective: Any = final, params: Any = W, **options: Any) -> Any:
    params = jax.tree.map(jnp.asarray, params) if isinstance(params, np.ndarray) else params
    training = mg.Training.from_loss(loss, optax.sgd(0.1), params, BATCHES, **options)
    return mg.value_and_metagrad(training, objective)({"weights": mg.PerExample(jnp.ones(N))})[0]


def sound(p: Any, b: Any, z: Any) -> Any:
    return jnp.mean(z["weights"] * (b["x"] @ p - 1) ** 2)


def module() -> Any:
    import equinox as eqx

    return eqx.nn.MLP(5, 1, 4, 1, key=jax.random.key(0))


for _name, _run in {
    "a whole eqx.nn.MLP as parameters": lambda: with_loss(sound, params=module()),
    "strings among the parameters": lambda: with_loss(sound, params={"w": W, "name": "mlp"}),
    "has_model_state=True without a state": lambda: with_loss(
        lambda p, s, b, z: (sound(p, b, z), s), has_model_state=True
    ),
    "a loss that returns (loss, aux)": lambda: with_loss(lambda p, b, z: (sound(p, b, z), {})),
    "a loss of two arguments": lambda: with_loss(lambda p, b: jnp.sum(p)),
    "an objective of one": lambda: with_loss(sound, lambda s: jnp.sum(s.params)),
    "float() in the objective": lambda: with_loss(sound, lambda s, z: float(jnp.sum(s.params))),
    "PerExample of a string": lambda: (
        with_loss(sound)
        and mg.value_and_metagrad(mg.Training.from_loss(sound, optax.sgd(0.1), jnp.asarray(W), BATCHES), final)(
            {"weights": mg.PerExample("abc")}
        )
    ),
}.items():
    probe("R2", _name, "StructureError")(_run)
for _name, _run in {
    "a while loop in the loss": lambda: with_loss(
        lambda p, b, z: jax.lax.while_loop(lambda x: x < 3, lambda x: 2 * x + 0.1, sound(p, b, z))
    ),
    "a callback in the loss": lambda: with_loss(
        lambda p, b, z: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), p.dtype), sound(p, b, z))
    ),
}.items():
    probe("R2", _name, "DerivativeError")(_run)


# P1 to P5: alarms and messages.


def dropped_out() -> Any:
    def loss(params: Any, key: Any, batch: Any, z: Any) -> Any:
        key, here = jax.random.split(key)
        x = batch["x"] * jax.random.bernoulli(here, 0.7, batch["x"].shape)
        return jnp.mean(z["weights"] * jnp.tanh(x @ params - 1) ** 2), key

    batches = [{"x": b["x"].astype(np.float32), "index": b["index"]} for b in BATCHES]
    init = jnp.asarray(W, jnp.float32), jax.random.key(0)
    training = mg.Training.from_loss(loss, optax.sgd(0.5), init, batches, has_model_state=True)
    with jax.enable_x64(False):
        return mg.check(training, final, {"weights": mg.PerExample(jnp.ones(N, jnp.float32))})


probe("P1", "mg.check of a model with dropout, in float32: ok", True)(lambda: dropped_out().ok)


@probe("P2", "mg.check of Adam, eps_root 1e-8, zero weights, an input that is always 0: ok", True)
def _adam_at_zero():
    x = X.copy()
    x[:, 0] = 0
    batches = [{"x": x[b["index"]], "index": b["index"]} for b in BATCHES]
    training = mg.Training.from_loss(sound, optax.adam(0.05, eps_root=1e-8), jnp.zeros(5), batches * 8)
    return mg.check(training, final, {"weights": mg.PerExample(jnp.ones(N))}).ok


@probe("P3", "losses still alive, of three made in a loop and dropped", 0)
def _leak():
    import gc

    class Captured:
        pass

    def one() -> Any:
        captured = Captured()
        with_loss(lambda p, b, z, captured=captured: sound(p, b, z))
        return weakref.ref(captured)

    references = [one() for _ in range(3)]
    gc.collect()
    return sum(r() is not None for r in references)


@probe("P4", "rmsprop with zeros in nu is told", "NonFiniteError: .*rmsprop")
def _rmsprop():
    x = X.copy()
    x[:, 0] = 0
    batches = [{"x": x[b["index"]], "index": b["index"]} for b in BATCHES]
    training = mg.Training.from_loss(sound, optax.rmsprop(0.01, eps=1e-6, eps_in_sqrt=False), jnp.zeros(5), batches)
    return mg.value_and_metagrad(training, final)({"weights": mg.PerExample(jnp.ones(N))})[0]


@probe("P5", "bare jnp.ones(n) where PerExample was meant", "StructureError: .*PerExample")
def _bare():
    training = mg.Training.from_loss(sound, optax.sgd(0.1), jnp.asarray(W), BATCHES)
    return mg.value_and_metagrad(training, final)({"weights": jnp.ones(N)})[0]


# The table.


def outcome(function: Callable[[], Any]) -> Any:
    try:
        found = function()
    except Exception as error:
        kind = type(error)
        name = kind.__name__ if kind.__module__.startswith("metagradient") else f"{kind.__module__}.{kind.__name__}"
        words = re.sub(r"(?:/[\w.-]+)+/|,? at 0x[0-9a-f]+", "", " ".join(str(error).split()))
        return f"{name.removeprefix('builtins.')}: {words}"
    if isinstance(found, str | bool):
        return found
    return np.asarray(found, np.float64).tolist()


def measured() -> list[Any]:
    return [outcome(function) for _, _, function, _ in PROBES]


def of(tree: Path) -> list[Any]:
    path = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src")}
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, env=path, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def written(value: Any) -> str:
    if isinstance(value, str):
        return (value if len(value) < 220 else f"{value[:200]}...").replace("|", "\\|")
    if isinstance(value, list):
        return "[" + ", ".join(written(x) for x in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def agrees(found: Any, right: Any) -> bool:
    if isinstance(right, str):
        return isinstance(found, str) and re.match(right, found) is not None
    if isinstance(found, str) or isinstance(found, bool) != isinstance(right, bool):
        return False
    return bool(np.allclose(found, right, rtol=1e-3, atol=1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--out", type=Path, default=Path("docs/faults.md"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured()))
        return
    before, now = of(options.before), of(Path(__file__).parents[1])
    lines = [
        "# Faults found in use\n",
        "W: a wrong number without a word. R: a foreign traceback where a typed error is due. P: a false alarm, a",
        "leak, or a message that misleads. Numbers to three digits after the point count as right.\n",
        "| | what | 0.1 (71238c5) | now | right | |",
        "|---|---|---|---|---|---|",
    ]
    rights = [right for *_, right in PROBES]
    for (row, what, _, _), then, found, right in zip(PROBES, before, now, rights, strict=True):
        value = right if isinstance(right, str | bool) else np.asarray(right, np.float64).tolist()
        shown = value.replace(": .*", ", naming ") if isinstance(value, str) else written(value)
        verdict = "right" if agrees(found, value) else "**WRONG**"
        lines.append(f"| {row} | {what} | {written(then)} | {written(found)} | {shown} | {verdict} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
    lines.append(
        f"\n{platform.machine()}, Python {platform.python_version()}, {versions}, {datetime.date.today()}. Made by "
        "`python benchmarks/faults.py --before CHECKOUT`."
    )
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
