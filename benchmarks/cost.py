"""What a metagradient costs, over three models; prints Markdown tables.

    python benchmarks/cost.py ratios|planner|long ... [--repeats 5] [--processes 3] [--models MLP] [--out docs/cost.md]

ratios: times plain training, by schedule and by what a step keeps: medians of processes, each the median of rounds in
turns. planner: predicted against measured, three budgets a model. long: T = 10,000 within twenty states. How cost grows
with steps, weights, queries and width: benchmarks/growth.py.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from points import machine, parsed, point
from sklearn.datasets import load_digits

import metagradient as mg
from metagradient.data.batches import EpochBatches
from metagradient.metaparameters import canonical
from metagradient.models import MLP, Decoder, ResNet9
from metagradient.run import Run, full_precision
from metagradient.trees import floating, nbytes, zeros

KEEP_ALL, TWO_LEVEL = mg.schedule.KeepAll(), mg.schedule.TwoLevel()


@dataclass(frozen=True)
class Problem:
    """A training, its metaparameters and objective, and the loop in which it trains fastest here."""

    name: str
    training: mg.Training
    objective: Callable[[Any, Any], jax.Array]
    z: dict
    segment: mg.Segment

    def metagradient(self, **options: Any) -> Callable[[], Any]:
        options = {"segment": self.segment, **options}
        evaluate = mg.value_and_metagrad(self.training, self.objective, **options)
        return lambda: evaluate.with_stats(self.z)

    def programs(self, segment: mg.Segment, *, replays: int = 0) -> Callable[[], Any]:
        """The floor: every step and every adjoint step, batches at hand, and nothing else.

        Arguments:
            replays: 0 keeps what pull-backs need on the way, 1 runs every segment again for it.
        """
        with full_precision(False):
            run = Run.prepared(self.training, canonical(self.z))
        runner = run.runner(segment, hold_bytes=2**40)

        def walk() -> Any:
            state, kept = run.state, []
            for i in range(len(runner)):
                if replays:
                    kept.append(state)
                    state = runner.advance(i, state).state
                else:
                    left, end = runner.keep(i, state)
                    kept.append(left)
                    state = end().state
            cotangent, total = floating(state)[0], zeros(runner.given.z)
            for i in reversed(range(len(runner))):
                left = runner.keep(i, kept.pop())[0] if replays else kept.pop()
                pulled = runner.pull(i, left, cotangent, total)
                cotangent, total = pulled.cotangent, pulled.total
            return total

        return walk

    def plain(self) -> Callable[[], Any]:
        """The same steps without metagradients: one scan, or single steps that reuse their state's memory."""
        rule, batches = self.training.rule, self.training.batches
        weights, start = self.z["weights"].value, self.training.initial(self.z)

        def step(state: Any, batch: Any) -> Any:
            return rule.advance(state, batch, {"weights": mg.PerExample(weights[batch["index"]])})[0]

        if self.segment.loop == "scan":
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *[batches[t] for t in range(len(batches))])
            whole = jax.jit(lambda state, xs: jax.lax.scan(lambda s, x: (step(s, x), None), state, xs)[0])
            return lambda: whole(start, stacked)
        single = jax.jit(step)

        def run() -> Any:
            state = start
            for t in range(len(batches)):
                state = single(state, batches[t])
            return state

        return run


def weighted(per_example: Callable) -> Callable:
    return lambda params, state, batch, z: (lambda out: (jnp.mean(z["weights"] * out[0]), out[1]))(
        per_example(params, state, batch)
    )


def digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    return (np.asarray(pixels) / 16).astype(np.float32), np.asarray(labels).astype(np.int32)


def classifier(name: str, model: Any, images: np.ndarray, steps: int, batch: int, segment: mg.Segment) -> Problem:
    labels = digits()[1]
    optimizer = optax.adam(1e-3, eps_root=1e-8)

    def losses(params: Any, state: Any, data: Any, train: bool = True) -> tuple[jax.Array, Any]:
        logits, state = model.apply(params, state, data["x"], train=train)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"]), state

    batches = EpochBatches({"x": images[:1200], "y": labels[:1200]}, batch=batch, steps=steps, seed=0)
    init = model.init(jax.random.key(0))
    training = mg.Training.from_loss(weighted(losses), optimizer, init, batches, has_model_state=True)
    target = {"x": images[1200 : 1200 + batch], "y": labels[1200 : 1200 + batch]}
    return Problem(
        name,
        training,
        lambda s, z: losses(s.params, s.model_state, target, train=False)[0].mean(),
        {"weights": mg.PerExample(jnp.ones(1200))},
        segment,
    )


def mlp(steps: int = 512, length: int = 32, hidden: int = 128) -> Problem:
    return classifier("MLP", MLP(sizes=(64, hidden, 10)), digits()[0], steps, 256, mg.Segment(length))


def resnet9(steps: int = 48) -> Problem:
    images = digits()[0].reshape(-1, 8, 8, 1).repeat(2, 1).repeat(2, 2)
    model = ResNet9.smooth(widths=(16, 32, 64), channels=1)
    return classifier("ResNet-9", model, images, steps, 64, mg.Segment(1, "steps", "state"))


def decoder(corpus: Path, steps: int = 16) -> Problem:
    """A language model of four layers; its tokens are the most frequent pairs of characters."""
    text = np.frombuffer(corpus.read_bytes(), np.uint8).astype(np.int32)
    pairs, ids, counts = np.unique(text[0 : len(text) // 2 * 2 : 2] * 256 + text[1::2][: len(text) // 2],
                                   return_inverse=True, return_counts=True)  # fmt: skip
    rank = np.empty(len(pairs), np.int32)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(pairs))
    vocabulary, length, windows = 4096, 128, 1000
    tokens = np.minimum(rank[ids], vocabulary - 1)
    rows = np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(windows)])
    model = Decoder(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, attention_chunk=length, loss_chunk=8 * length, rematerialise=False,
    )  # fmt: skip
    optimizer = optax.adamw(1e-3, eps_root=1e-8)

    def losses(params: Any, state: Any, data: Any) -> tuple[jax.Array, Any]:
        return model.token_losses(params, data["tokens"][:, :-1], data["tokens"][:, 1:]).mean(-1), state

    batches = EpochBatches({"tokens": rows[:900]}, batch=8, steps=steps, seed=0)
    init = model.init(jax.random.key(0))
    training = mg.Training.from_loss(weighted(losses), optimizer, init, batches, has_model_state=True)
    target = {"tokens": rows[900:908]}
    z = {"weights": mg.PerExample(jnp.ones(900))}
    return Problem(
        "decoder", training, lambda s, z: losses(s.params, s.model_state, target)[0].mean(), z,
        mg.Segment(1, "steps", "gradient"),
    )  # fmt: skip


MADE: dict[str, Callable[[Path | None], Problem]] = {
    "MLP": lambda corpus: mlp(),
    "MLP, T = 2,048": lambda corpus: mlp(2048),
    "ResNet-9": lambda corpus: resnet9(),
    "decoder": lambda corpus: decoder(corpus) if corpus else sys.exit("the decoder needs --corpus"),
}


def asked(given: argparse.Namespace) -> list[str]:
    """Names of the models asked for; without a corpus, the decoder is left out."""
    return [name for name in given.models if name != "decoder" or given.corpus]


def seconds(work: Callable[[], Any]) -> float:
    start = perf_counter()
    with full_precision(False):
        jax.block_until_ready(jax.tree.leaves(work())[0])
    return perf_counter() - start


def interleaved(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    for work in works.values():
        seconds(work)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work))
    return times


def against(times: dict[str, list[float]], base: str) -> dict[str, float]:
    return {name: median(a / b for a, b in zip(ts, times[base], strict=True)) for name, ts in times.items()}


def ways(problem: Problem) -> dict[str, Callable[[], Any]]:
    leaf = problem.segment
    every = 1 if leaf.loop == "scan" else None
    found = {
        "plain": problem.plain(),
        "every state": problem.metagradient(schedule=KEEP_ALL),
        "every state, the programs alone": problem.programs(leaf),
        "two-level": problem.metagradient(schedule=mg.schedule.TwoLevel(every)),
        "two-level, the programs alone": problem.programs(leaf, replays=1),
    }
    if leaf.loop == "scan":
        return {**found, "ten states": problem.metagradient(schedule=mg.schedule.Binomial(10))}
    linearised = mg.Segment(1, "steps", "linearisation")
    return {
        **found,
        "linearisations": problem.metagradient(schedule=KEEP_ALL, segment=linearised),
        "linearisations, the programs alone": problem.programs(linearised),
        "two-level, linearisations": problem.metagradient(schedule=TWO_LEVEL, segment=linearised),
    }


def measured(name: str, repeats: str, corpus: str = "") -> dict[str, tuple[float, float]]:
    """Seconds and ratio to plain training of every way, in this process."""
    times = interleaved(ways(MADE[name](Path(corpus) if corpus else None)), int(repeats))
    return {way: (median(times[way]), ratio) for way, ratio in against(times, "plain").items()}


def ratios(given: argparse.Namespace) -> list[str]:
    rows = []
    for name in asked(given):
        processes = [point(__file__, name, given.repeats, given.corpus or "") for _ in range(given.processes)]
        for way in processes[0]:
            took, ratio = (median(p[way][part] for p in processes) for part in (0, 1))
            spread = sorted(p[way][1] for p in processes)
            rows.append(f"| {name} | {way} | {took:.3f} | {ratio:.2f} | {spread[0]:.2f} to {spread[-1]:.2f} |")
            print(rows[-1], flush=True)
    head = f"| model | way | seconds | ratio | of {given.processes} processes |"
    return ["## Times plain training", "", head, "|---|---|---|---|---|", *rows]


def planner(given: argparse.Namespace) -> list[str]:
    rows = []
    for name in asked(given):
        problem = MADE[name](given.corpus)
        state = nbytes(problem.training.initial(problem.z))
        for states in (1000, 40, 12):
            memory = mg.Memory(device=states * state)
            plan = mg.plan(problem.training, problem.z, memory=memory)
            work = problem.metagradient(schedule=plan, segment=None)
            work()
            stats = [work()[2] for _ in range(given.repeats)]
            took = median(s.seconds for s in stats)
            held = sum(stats[0].peak_bytes.values())
            rows.append(
                f"| {name} | {states} | {plan.length} | {plan.keep} | {stats[0].forward_steps} "
                f"| {plan.seconds:.2f} | {took:.2f} | {plan.seconds / took - 1:+.0%} "
                f"| {plan.estimate.bytes['device'] / 2**20:.1f} | {held / 2**20:.1f} |"
            )
    head = "| model | budget in states | segment | keeps | forward steps | predicted s | measured s | error |"
    return [
        "## Predicted and measured",
        "",
        f"{head} planned MiB, states at work included | stored and kept MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def long(given: argparse.Namespace) -> list[str]:
    del given
    problem = mlp(steps=10_000)
    state = nbytes(problem.training.initial(problem.z))
    plan = mg.plan(problem.training, problem.z, memory=mg.Memory(device=20 * state))
    _, planned, stats = problem.metagradient(schedule=plan, segment=None)()
    _, kept, _ = problem.metagradient(schedule=KEEP_ALL, segment=plan.segment)()
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(kept), strict=True))
    held = sum(stats.peak_bytes.values()) / state
    return [
        "## T = 10,000 within twenty states",
        "",
        f"Plan: {plan.estimate.name}, segments of {plan.length} that keep {plan.keep}; {stats.forward_steps} forward "
        f"steps, {stats.seconds:.1f} s (predicted {plan.seconds:.1f}); at most {held:.1f} states stored and kept, "
        f"{plan.estimate.bytes['device'] / state:.1f} with the states at work; gradient "
        f"{'bit-equal to' if same else 'NOT equal to'} that of KeepAll with the same segments.",
    ]


TABLES = {f.__name__: f for f in (ratios, planner, long)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", help=", ".join(TABLES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=3, help="of ratios")
    parser.add_argument("--models", nargs="+", default=["MLP", "ResNet-9", "decoder"], help="of ratios and planner")
    parser.add_argument("--corpus", type=Path, help="a text file, for the decoder; without it, the decoder is left out")
    given = parsed(parser, measured)
    if not given.tables or set(given.tables) - set(TABLES):
        parser.error(f"give some of the tables {', '.join(TABLES)}")
    blocks = [["# What a metagradient costs"], *(TABLES[name](given) for name in given.tables)]
    tunables = f"GLIBC_TUNABLES={found} " if (found := os.environ.get("GLIBC_TUNABLES")) else ""
    made = (
        f"Made by `{tunables}python benchmarks/cost.py {' '.join(given.tables)}`: {machine()}; medians of "
        f"{given.repeats} rounds in turns; the long run once."
    )
    text = "\n\n".join("\n".join(block) for block in [*blocks, [made]])
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
