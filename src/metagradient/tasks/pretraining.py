"""A small decoder to fine-tune, pre-trained on the texts at hand: everything in minutes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient._train import train
from metagradient.data.batches import EpochBatches
from metagradient.data.vocabulary import TOKENIZER, trained
from metagradient.errors import ConfigError, DataError
from metagradient.files import replace_file
from metagradient.models import Decoder, checkpoints
from metagradient.step.segment import SINGLE_STEPS
from metagradient.tasks.classifier import one_cycle
from metagradient.training import Training
from metagradient.trees import PyTree

_FOR_VOCABULARY = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A small decoder, and how it is pre-trained."""

    vocabulary: int = 2048
    """tokens of its vocabulary, byte-level BPE learnt from the texts"""
    hidden_size: int = 128
    """width"""
    layers: int = 2
    """layers"""
    heads: int = 4
    """attention heads"""
    intermediate_size: int = 384
    """width inside the feed-forward layers"""
    length: int = 128
    """tokens of a training window"""
    batch: int = 32
    """windows a batch"""
    steps: int = 800
    """training steps"""
    learning_rate: float = 3e-3
    """peak learning rate of Adam, in a one-cycle schedule"""

    @property
    def model(self) -> Decoder:
        """The decoder; attention in one chunk, losses in large ones, activations kept: it is small."""
        return Decoder(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            rope_theta=10_000.0,
            attention_chunk=self.length,
            loss_chunk=2048,
            rematerialise=False,
        )


def pretrain(config: Pretraining, texts: Sequence[str], marks: tuple[str, ...], seed: int, directory: Path) -> None:
    """Learn a vocabulary and a decoder from texts, and leave them in a directory in Hugging Face's layout.

    Texts are joined end to end and cut into windows; every token of a window is learnt.

    Arguments:
        texts: what to learn from.
        marks: single tokens that the vocabulary must hold besides; no text holds them, so their embeddings stay as
            they were drawn.
        seed: of initial parameters and order.
        directory: made, and filled, at the end.

    Errors: `ConfigError` for texts too short for a batch, and as in `trained`.

    Cost: `steps` training steps.
    """
    tokenizer = trained(_some(texts, seed), config.vocabulary, marks)
    tokenizer.encode_special_tokens = True
    ids = [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    stream = np.fromiter((token for one in ids for token in one), np.int32)
    windows = stream[: len(stream) // (config.length + 1) * (config.length + 1)].reshape(-1, config.length + 1)
    if len(windows) < config.batch:
        raise ConfigError(f"{len(windows)} windows of {config.length + 1} tokens don't fill a batch of {config.batch}")
    model = config.model
    rates = jnp.asarray(one_cycle(config.steps, config.learning_rate, 0.1, 0.05, 0.05))
    optimizer = optax.adam(lambda count: rates[count], eps_root=1e-10)

    def loss(params: PyTree, batch: PyTree, z: PyTree) -> jax.Array:
        del z
        return model.token_losses(params, batch["tokens"][:, :-1], batch["tokens"][:, 1:]).mean()

    batches = EpochBatches({"tokens": windows}, batch=config.batch, steps=config.steps, seed=seed)
    params, _ = model.init(jax.random.key(seed))
    state = train(Training.from_loss(loss, optimizer, params, batches), {}, segment=SINGLE_STEPS, progress=True)
    checkpoints.save(model, state.params, directory)
    replace_file(directory / TOKENIZER, lambda partial: tokenizer.save(str(partial)))


def read_texts(path: Path) -> list[str]:
    """The paragraphs of a text file, or of all `*.txt` files of a directory. `DataError` where there is none."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        found = [p for file in files for p in file.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as text in UTF-8: {error}") from error
    if not found:
        raise DataError(f"{path} holds no text")
    return found


def _some(texts: Sequence[str], seed: int) -> list[str]:
    """A random part of the texts, large enough to learn a vocabulary from."""
    order: list[int] = np.random.default_rng((seed, 11)).permutation(len(texts)).tolist()
    ends = np.cumsum([len(texts[i]) for i in order])
    many = int(np.searchsorted(ends, _FOR_VOCABULARY)) + 1
    return [texts[i] for i in order[:many]]
