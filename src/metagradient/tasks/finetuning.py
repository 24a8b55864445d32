"""A language model's fine-tuning by configuration: what arms, baselines and descents over instructions share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient.data.batches import EpochBatches
from metagradient.data.chat import Buckets, Encoded
from metagradient.errors import ConfigError
from metagradient.models import Decoder
from metagradient.models.lora import LoRA
from metagradient.objectives import MeanOver, mean_over
from metagradient.step.programs import hold
from metagradient.tasks.classifier import one_cycle
from metagradient.training import Training
from metagradient.trees import PyTree

MULTIPLE = 32
"""Batches that are walked once (candidates, evaluation) are padded to a multiple of so many tokens."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How a language model is fine-tuned on instructions. The defaults are for a small decoder and a CPU."""

    lora_rank: int = 0
    """rank of LoRA adapters; 0 trains all parameters"""
    lora_alpha: float = 16.0
    """scale of LoRA's product, divided by the rank"""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """projections with adapters"""
    learning_rate: float = 1e-3
    """peak learning rate of Adam, in a one-cycle schedule"""
    peak: float = 0.2
    """where the schedule peaks, as a share of the run"""
    start: float = 0.1
    """learning rate at the first step, as a share of the peak"""
    end: float = 0.05
    """learning rate at the last step, as a share of the peak"""
    first_decay: float = 0.9
    """Adam's first decay"""
    second_decay: float = 0.99
    """Adam's second decay"""
    eps_root: float = 1e-8
    """inside Adam's root"""
    length: int = 128
    """tokens of a conversation; longer ones are truncated"""
    batch: int = 32
    """batch size"""
    steps: int = 64
    """training steps; a small data set is walked several times"""
    evaluation_batch: int = 64
    """conversations at once where nothing is trained"""

    def rates(self) -> np.ndarray:
        """Its learning rates, float32[steps]."""
        return one_cycle(self.steps, self.learning_rate, self.peak, self.start, self.end)


@dataclass(frozen=True, eq=False)
class Tuner:
    """A recipe for one model. Every training that one object makes runs the same compiled programs.

    Arguments:
        recipe: how it is fine-tuned.
        model: the decoder.
        start: its parameters before.
    """

    recipe: FineTuning
    model: Decoder
    start: PyTree

    @cached_property
    def lora(self) -> LoRA | None:
        """The adapters' configuration; None where all parameters are trained."""
        r = self.recipe
        return LoRA(rank=r.lora_rank, alpha=r.lora_alpha, targets=r.lora_targets) if r.lora_rank else None

    @property
    def args(self) -> PyTree:
        """Constants of its trainings and losses: the frozen parameters, or None."""
        return self.start if self.lora else None

    def initial(self, seed: int) -> PyTree:
        """Trained parameters at the start: adapters drawn from a seed, or the model's own."""
        return self.lora.init(self.start, jax.random.key(seed)) if self.lora else self.start

    def training(self, data: Encoded, seed: int, *, rows: np.ndarray | None = None) -> Training:
        """A fine-tuning at one seed, of adapters and of order. z may hold `weights`, `PerExample` `[n]`.

        Arguments:
            data: conversations.
            rows: train on these only, int[m]; one that is there twice counts twice.

        Errors: `ConfigError` for fewer conversations than a batch.
        """
        r = self.recipe
        count = len(data) if rows is None else len(rows)
        if count < r.batch:
            raise ConfigError(f"a training set of {count} conversations doesn't hold a batch of {r.batch}")
        batches = EpochBatches(data.arrays, batch=r.batch, steps=r.steps, seed=seed, rows=rows)
        training = Training.from_loss(self._loss, self.optimizer, self.initial(seed), batches, args=self.args)
        hold(self, training.programs)
        return training

    def candidates(self, data: Encoded, rows: np.ndarray | None = None) -> Buckets:
        """Conversations once through, for `losses`: those at `rows`, or all."""
        return Buckets(data, self.recipe.evaluation_batch, MULTIPLE, rows)

    def complete(self, params: PyTree, args: PyTree) -> PyTree:
        """All parameters of the model, from the trained ones and `args`."""
        return self.lora.attach(args, params) if self.lora else params

    @cached_property
    def losses(self) -> Callable[..., jax.Array]:
        """`(params, model_state, batch, args) -> [b]`: the mean loss over each conversation's learnt tokens."""

        def losses(params: PyTree, model_state: PyTree, batch: PyTree, args: PyTree = None) -> jax.Array:
            del model_state
            complete = self.complete(params, args)
            return self.model.token_losses(complete, batch["tokens"], batch["targets"], batch["weights"]).sum(-1)

        return losses

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam on the recipe's learning rates."""
        r, rates = self.recipe, jnp.asarray(self.recipe.rates())
        return optax.adam(lambda count: rates[count], r.first_decay, r.second_decay, eps_root=r.eps_root)

    def mean_loss(self, data: Encoded) -> MeanOver:
        """The objective: a tuned model's mean loss on conversations, each counting the same."""
        return mean_over(self.candidates(data), self._mean_loss, args=self.args)

    def scores(self, params: PyTree, data: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How well a tuned model knows the answers of conversations.

        Arguments:
            params: trained parameters.

        Returns: mean loss over the learnt tokens of each, float32[n]; the share of them that are the likeliest after
            those before them, float32[n]; and whether all are, bool[n]: greedy decoding says exactly that answer.
        """
        losses, shares = np.empty(len(data), np.float32), np.empty(len(data), np.float32)
        exact = np.empty(len(data), bool)
        answers = int(data.answers.max())
        for batch in self.candidates(data):
            # The positions of learnt tokens come first in the order of falling weights; others have weight 0.
            at = np.argsort(-batch["weights"], axis=1, kind="stable")[:, :answers]
            found = self._scored(params, {**batch, "at": at.astype(np.int32)}, self.args)
            rows = batch["index"]
            losses[rows], shares[rows], exact[rows] = (np.asarray(x) for x in found)
        return losses, shares, exact

    @cached_property
    def _scored(self) -> Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, jax.Array, jax.Array]]:
        def scored(params: PyTree, batch: PyTree, args: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
            complete = self.complete(params, args)
            logits = self.model.logits(complete, batch["tokens"], batch["at"])
            targets, weights = (jnp.take_along_axis(batch[name], batch["at"], 1) for name in ("targets", "weights"))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            right = logits.argmax(-1) == targets
            return (weights * losses).sum(-1), (weights * right).sum(-1), (right | (weights == 0)).all(-1)

        return jax.jit(scored)

    @cached_property
    def embeddings(self) -> Callable[[PyTree], jax.Array]:
        """`batch -> [b, hidden_size]`: mean of the untuned model's last hidden states over each conversation."""

        def embed(start: PyTree, batch: PyTree) -> jax.Array:
            hidden = self.model.hidden(start, batch["tokens"])
            real = (jnp.arange(hidden.shape[1]) < batch["used"][:, None]).astype(hidden.dtype)
            return jnp.einsum("bld,bl->bd", hidden, real) / real.sum(-1, keepdims=True)

        jitted = jax.jit(embed)
        return lambda batch: jitted(self.start, batch)

    @cached_property
    def _mean_loss(self) -> Callable[..., jax.Array]:
        return lambda state, batch, args=None: self.losses(state.params, None, batch, args).mean()

    @cached_property
    def _loss(self) -> Callable[..., jax.Array]:
        def loss(params: PyTree, batch: PyTree, z: PyTree, args: PyTree = None) -> jax.Array:
            losses = self.losses(params, None, batch, args)
            return jnp.mean(z["weights"] * losses if "weights" in z else losses)

        return loss
