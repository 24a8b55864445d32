"""One PyTorch peer on one problem: `peer_torch.py CONTENDER PROBLEM.npz RESULTS.npz`, started by run.py.

Models are written as PyTorch's own operations, with attention as matrix products: the fused one has no double backward
on CPUs. Parameters keep the names and shapes of our side, except convolutions (`_torch_layout`).
"""

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from problems import LAYERS, Problem
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from worker import serve

Params = dict[str, Tensor]
Run = Callable[[], dict[str, np.ndarray]]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def mlp(p: Params, x: Tensor) -> Tensor:
    return torch.addmm(p["b2"], gelu(torch.addmm(p["b1"], x, p["w1"])), p["w2"])


def convnet(p: Params, x: Tensor) -> Tensor:
    def block(name: str, x: Tensor) -> Tensor:
        x = F.conv2d(x, p[f"{name}_w"], padding=1)
        scale, bias = p[f"{name}_scale"], p[f"{name}_bias"]
        return gelu(F.batch_norm(x, None, None, scale, bias, training=True, eps=1e-5))

    x = F.avg_pool2d(block("conv2", block("conv1", x)), 2)
    x = x + block("res1b", block("res1a", x))
    x = F.avg_pool2d(block("conv3", x), 2)
    x = x + block("res2b", block("res2a", x))
    return torch.addmm(p["head_b"], x.mean((2, 3)), p["head_w"])


def decoder(p: Params, x: Tensor) -> Tensor:
    def dense(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}_w"].T, p[f"{name}_b"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}_scale"], p[f"{name}_bias"], eps=1e-5)

    b, s = x.shape
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    h = F.embedding(x, p["embedding"]) + p["positions"][:s]  # [b, s, d]
    for i in range(LAYERS):
        qkv = dense(f"layer{i}_qkv", norm(f"layer{i}_norm1", h)).view(b, s, 3, 4, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [b, heads, s, d/heads]
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1)
        h = h + dense(f"layer{i}_out", mixed)
        h = h + dense(f"layer{i}_down", gelu(dense(f"layer{i}_up", norm(f"layer{i}_norm2", h))))
    return F.linear(norm("norm", h), p["head_w"].T)


MODELS: dict[str, Callable[[Params, Tensor], Tensor]] = {"mlp": mlp, "convnet": convnet, "decoder": decoder}


class Model(nn.Module):
    """A model and its loss, called as bergson calls one: keyword arguments in, a scalar loss out."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.logits = MODELS[problem.settings.model]
        for name, value in problem.params.items():
            self.register_parameter(name, nn.Parameter(_torch_layout(torch.from_numpy(value)).clone()))

    def forward(self, input_ids: Tensor, targets: Tensor, example_weight: Tensor | None = None) -> Tensor:
        logits = self.logits(dict(self.named_parameters()), input_ids)
        losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        if example_weight is None:
            return losses.mean()
        return (example_weight * losses.view(len(targets), -1).mean(1)).mean()


def _torch_layout(x: Tensor) -> Tensor:
    """Convolutions: [h, w, in, out] -> [out, in, h, w]."""
    return x.permute(3, 2, 0, 1) if x.ndim == 4 else x


def _our_layout(x: Tensor) -> np.ndarray:
    x = x.detach()
    return (x.permute(2, 3, 1, 0) if x.ndim == 4 else x).numpy().copy()


def _inputs(x: np.ndarray, y: np.ndarray) -> dict[str, Tensor]:
    """Images as [b, c, h, w], channels last in memory, which is the faster order here too."""
    images = torch.from_numpy(x)
    return {
        "input_ids": images.permute(0, 3, 1, 2) if x.ndim == 4 else images,
        "targets": torch.from_numpy(y.astype(np.int64)),
    }


def _validation(problem: Problem) -> dict[str, Tensor]:
    return _inputs(problem.data["valid_x"], problem.data["valid_y"])


def _batches(problem: Problem) -> list[tuple[dict[str, Tensor], Tensor]]:
    return [(_inputs(b["x"], b["y"]), torch.from_numpy(b["index"])) for b in problem.batches()]


def _results(value: Tensor, weights: Tensor, params: Params) -> dict[str, np.ndarray]:
    final = {f"params/{k}": _our_layout(v) for k, v in params.items()}
    return {"value": value.detach().numpy(), "weights": weights.detach().numpy(), **final}


def plain(problem: Problem) -> Run:
    """Eager training with PyTorch's own fused AdamW (which has no epsilon inside the root)."""
    s, batches = problem.settings, _batches(problem)

    def run() -> dict[str, np.ndarray]:
        model = Model(problem)
        optimizer = torch.optim.AdamW(model.parameters(), s.rate, eps=s.eps, weight_decay=s.decay, fused=True)
        for inputs, _ in batches:
            optimizer.zero_grad()
            model(**inputs).backward()
            optimizer.step()
        return {f"params/{k}": _our_layout(v) for k, v in model.named_parameters()}

    return run


def torchopt_unrolled(problem: Problem, accelerated: bool) -> Run:
    """TorchOpt's differentiable AdamW, with the graph of the whole run kept."""
    import torchopt

    s, batches, validation = problem.settings, _batches(problem), _validation(problem)

    def run() -> dict[str, np.ndarray]:
        model, weights = Model(problem), torch.ones(problem.examples, requires_grad=True)
        optimizer = torchopt.MetaAdamW(
            model,
            s.rate,
            eps=s.eps,
            eps_root=s.eps_root,
            weight_decay=s.decay,
            use_accelerated_op=accelerated,
        )
        for inputs, index in batches:
            optimizer.step(model(**inputs, example_weight=weights[index]))
        value = model(**validation)
        (gradient,) = torch.autograd.grad(value, [weights])
        return _results(value, gradient, dict(model.named_parameters()))

    return run


def bergson(problem: Problem, save_mode: str) -> Run:
    """bergson's metagradient, driven as its own command line drives it (`bergson.magic.cli`), without its files."""
    import torchopt
    from bergson.magic import BackwardState, DataStream, Trainer
    from torchopt.pytree import tree_iter

    s, batches, validation = problem.settings, _batches(problem), _validation(problem)

    class Stream(DataStream):
        def __init__(self) -> None:
            self.weights = nn.Parameter(torch.ones(problem.examples))
            self.device = torch.device("cpu")
            self.num_batches = len(batches)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            inputs, index = batches[i]
            return {**inputs, "example_weight": self.weights[index]}

    def run() -> dict[str, np.ndarray]:
        stream, model = Stream(), Model(problem)
        optimizer = torchopt.adamw(s.rate, eps=s.eps, eps_root=s.eps_root, weight_decay=s.decay)
        trainer, state = Trainer.initialize(model, optimizer)
        with tempfile.TemporaryDirectory() as directory:
            state = trainer.train(state, stream, inplace=True, save_dir=directory, save_mode=save_mode)
            final = {k: v.detach().clone() for k, v in state.params.items()}
            with state.activate(model) as params:
                value = model(**validation)
                query = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
            moments = [x for x in tree_iter(state.opt_state) if isinstance(x, Tensor) and x.is_floating_point()]
            cotangent = BackwardState(query, [torch.zeros_like(x) for x in moments], torch.zeros_like(stream.weights))
            stream.requires_grad = True
            found = trainer.backward(directory, stream, cotangent, state, inplace=True, save_mode=save_mode)
        return _results(value, found.weight_grads, final)

    return run


CONTENDERS: dict[str, Callable[[Problem], Run]] = {
    "plain": plain,
    "torchopt": lambda problem: torchopt_unrolled(problem, accelerated=False),
    "torchopt, accelerated": lambda problem: torchopt_unrolled(problem, accelerated=True),
    "bergson all": lambda problem: bergson(problem, "all"),
    "bergson sqrt": lambda problem: bergson(problem, "sqrt"),
    "bergson log": lambda problem: bergson(problem, "log"),
}


def main(contender: str, problem: str, results: str) -> None:
    serve(lambda: CONTENDERS[contender](Problem.read(Path(problem))), Path(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
