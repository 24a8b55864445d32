"""Models to differentiate trainings of. The core imports none of them; any pure functions of pytrees do as well.

Each is an immutable configuration with two pure functions, over plain nested dicts of arrays:
`params, model_state = model.init(key)` and `logits, model_state = model.apply(params, model_state, x, train=True)`.
They compute in the dtype of their parameters. A model without state of its own passes an empty one on.
"""

from metagradient.models.attention import causal_attention as causal_attention
from metagradient.models.clip import CLIP as CLIP
from metagradient.models.convolution import conv3x3 as conv3x3
from metagradient.models.decoder import Decoder as Decoder
from metagradient.models.losses import chunked_cross_entropy as chunked_cross_entropy
from metagradient.models.mlp import MLP as MLP
from metagradient.models.resnet9 import ResNet9 as ResNet9
