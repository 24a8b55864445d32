"""What is trained: sizes, data, order and initial parameters, as NumPy arrays that both frameworks read."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass
class Settings:
    """One problem.

    Arguments:
        model: a name in `PROBLEMS`.
        steps, batch: T, and examples a step (and in the validation batch).
        rate: learning rate. The rest of AdamW is the same everywhere, with epsilons inside and outside the root.
        repeats: timed runs of every contender.
    """

    model: str
    steps: int
    batch: int
    rate: float
    repeats: int
    decay: float = 0.01
    eps: float = 1e-8
    eps_root: float = 1e-8


PROBLEMS = {
    "mlp": Settings("mlp", steps=144, batch=256, rate=3e-3, repeats=5),
    "convnet": Settings("convnet", steps=9, batch=16, rate=1e-3, repeats=3),
    "decoder": Settings("decoder", steps=9, batch=8, rate=1e-3, repeats=2),
}

DESCRIPTIONS = {
    "mlp": "MLP 64-128-10 on scikit-learn's digits",
    "convnet": "ResNet-9-like, widths 32-64-128, batch norm (statistics of the batch), CIFAR-10 32x32",
    "decoder": "decoder LM, 4 layers, d 256, 4 heads, sequence 128, vocabulary 4096, synthetic tokens",
}

VOCABULARY, WIDTH, LAYERS, SEQUENCE = 4096, 256, 4, 128
CONVOLUTIONS = {
    "conv1": (3, 32),
    "conv2": (32, 64),
    "res1a": (64, 64),
    "res1b": (64, 64),
    "conv3": (64, 128),
    "res2a": (128, 128),
    "res2b": (128, 128),
}

Arrays = dict[str, np.ndarray]


def write(settings: Settings, cifar10: Path | None, path: Path) -> None:
    """Draw a problem and save it: `params/*`, `x`, `y`, `valid_x`, `valid_y`, `order` int[T, batch], `settings`."""
    rng = np.random.default_rng(0)
    used, held_out = settings.steps * settings.batch, settings.batch
    if settings.model == "mlp":
        data, params = _digits(rng, held_out), _mlp(rng)
    elif settings.model == "convnet":
        if cifar10 is None:
            raise FileNotFoundError("the convnet needs --cifar10, a directory with CIFAR-10 in parquet files")
        data, params = _cifar10(cifar10, used // 2, held_out), _convnet(rng)
    else:
        data, params = _tokens(rng, used // 2, held_out), _decoder(rng)
    order = _epochs(rng, len(data["x"]), settings.batch, settings.steps)
    named = {f"params/{name}": value.astype(np.float32) for name, value in params.items()}
    np.savez(path, order=order, settings=np.array(json.dumps(asdict(settings))), **data, **named)


@dataclass
class Problem:
    """A problem as a worker reads it."""

    settings: Settings
    params: Arrays
    data: Arrays

    @classmethod
    def read(cls, path: Path) -> "Problem":
        with np.load(path) as file:
            arrays = dict(file)
        settings = Settings(**json.loads(str(arrays.pop("settings"))))
        params = {k.removeprefix("params/"): arrays.pop(k) for k in list(arrays) if k.startswith("params/")}
        return cls(settings, params, arrays)

    @property
    def examples(self) -> int:
        return len(self.data["x"])

    def batches(self) -> Iterator[Arrays]:
        """What every step trains on."""
        for index in self.data["order"]:
            yield {"x": self.data["x"][index], "y": self.data["y"][index], "index": index}


def _epochs(rng: np.random.Generator, examples: int, batch: int, steps: int) -> np.ndarray:
    """Batches without replacement, epoch after epoch."""
    drawn: list[np.ndarray] = []
    while len(drawn) < steps:
        drawn += list(rng.permutation(examples)[: examples // batch * batch].reshape(-1, batch))
    return np.stack(drawn[:steps])


def _digits(rng: np.random.Generator, held_out: int) -> Arrays:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    train = slice(held_out, None)
    return {"x": x[train], "y": y[train], "valid_x": x[:held_out], "valid_y": y[:held_out]}


def _cifar10(directory: Path, train: int, held_out: int) -> Arrays:
    import pyarrow.parquet as pq
    from PIL import Image

    rows = next(pq.ParquetFile(next(directory.glob("train*.parquet"))).iter_batches(train + held_out)).to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))) for row in rows])
    x = ((images / 255 - 0.47) / 0.25).astype(np.float32)  # [n, 32, 32, 3]
    y = np.array([row["label"] for row in rows], np.int32)
    return {"x": x[:train], "y": y[:train], "valid_x": x[train:], "valid_y": y[train:]}


def _tokens(rng: np.random.Generator, train: int, held_out: int) -> Arrays:
    """Sequences in which every other token follows from the one before, and the rest are drawn by Zipf's law."""
    rows = train + held_out
    often = 1 / np.arange(1, VOCABULARY + 1)
    drawn = rng.choice(VOCABULARY, (rows, SEQUENCE + 1), p=often / often.sum())
    successor = rng.permutation(VOCABULARY)
    drawn[:, 1::2] = successor[drawn[:, :-1:2]]
    x, y = drawn[:, :-1].astype(np.int32), drawn[:, 1:].astype(np.int32)
    return {"x": x[:train], "y": y[:train], "valid_x": x[train:], "valid_y": y[train:]}


def _mlp(rng: np.random.Generator) -> Arrays:
    return {
        "w1": rng.normal(size=(64, 128)) / 8,
        "b1": np.zeros(128),
        "w2": rng.normal(size=(128, 10)) / np.sqrt(128),
        "b2": np.zeros(10),
    }


def _convnet(rng: np.random.Generator) -> Arrays:
    params: Arrays = {}
    for name, (inputs, outputs) in CONVOLUTIONS.items():
        params[f"{name}_w"] = rng.normal(size=(3, 3, inputs, outputs)) * np.sqrt(2 / (9 * inputs))
        params[f"{name}_scale"] = np.ones(outputs)
        params[f"{name}_bias"] = np.zeros(outputs)
    params["head_w"] = rng.normal(size=(128, 10)) / np.sqrt(128)
    params["head_b"] = np.zeros(10)
    return params


def _decoder(rng: np.random.Generator) -> Arrays:
    def matrix(inputs: int, outputs: int) -> np.ndarray:
        return rng.normal(size=(inputs, outputs)) * 0.02

    params = {"embedding": matrix(VOCABULARY, WIDTH), "positions": matrix(SEQUENCE, WIDTH)}
    for i in range(LAYERS):
        for name, inputs, outputs in (("qkv", 1, 3), ("out", 1, 1), ("up", 1, 4), ("down", 4, 1)):
            params[f"layer{i}_{name}_w"] = matrix(inputs * WIDTH, outputs * WIDTH)
            params[f"layer{i}_{name}_b"] = np.zeros(outputs * WIDTH)
    for name in [f"layer{i}_norm{j}" for i in range(LAYERS) for j in (1, 2)] + ["norm"]:
        params[f"{name}_scale"], params[f"{name}_bias"] = np.ones(WIDTH), np.zeros(WIDTH)
    params["head_w"] = matrix(WIDTH, VOCABULARY)
    return params
