"""Find mislabelled training examples, and train better in spite of them: the library's main job in small."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from metagradient.data.batches import EpochBatches
from metagradient.data.images import Images, load_cifar10, load_digits
from metagradient.descent import updates
from metagradient.descent.loop import descend, fresh_seed
from metagradient.errors import ConfigError
from metagradient.metaparameters import PerExample
from metagradient.models import Classifier, mlp, resnet9
from metagradient.report.figures import least_trusted, lines, weights_by_group
from metagradient.report.page import Page, Section
from metagradient.run import train
from metagradient.tasks.directory import RunDirectory, free_directory, versions
from metagradient.training import Training, TrainState
from metagradient.trees import PyTree


@dataclass(frozen=True)
class LabelNoise:
    """Find mislabelled examples with metagradients: learn a weight for each from a small clean set.

    Without --data: scikit-learn's 1,797 handwritten digits, a share of whose training labels is flipped. With it:
    CIFAR-10 and CIFAR-10N's human labels, as parquet files in that directory.
    """

    data: Path | None = None
    """directory with CIFAR-10 and CIFAR-10N in parquet; none takes the digits"""
    out: Path | None = None
    """directory of this run; none takes a free one under runs/"""
    seed: int = 0
    """seed of the split, the flips and the inner seeds"""
    flipped: float = 0.4
    """share of the digits' training labels to flip (human labels come with their own noise)"""
    examples: int = 1000
    """training examples"""
    target: int = 150
    """clean examples that the descent aims at"""
    held_out: int = 500
    """examples on which accuracies are measured"""
    steps: int = 200
    """training steps"""
    batch: int = 128
    """batch size"""
    learning_rate: float = 0.01
    """peak learning rate of an inner training"""
    meta_steps: int = 15
    """meta-steps, each with a fresh seed"""
    rate: float = 0.3
    """how far a typical weight moves in the first meta-step"""
    final_rate: float = 0.05
    """... and in the last"""
    momentum: float = 0.8
    """momentum of the descent"""
    seeds: int = 5
    """fresh seeds on which results are measured"""
