"""Decoders in Hugging Face's layout: `config.json`, `*.safetensors`, `tokenizer.json` in a directory.

No PyTorch and no pickle: tensors are memory-mapped, and become float32. `metagradient.models.gguf` reads GGUF files.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metagradient.errors import DataError
from metagradient.files import replace_file, write_text
from metagradient.models.decoder import Decoder, Llama3Rope
from metagradient.trees import PyTree

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# Tensors of a layer, by their place in the parameters; projections are [out, in].
LAYER = {
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    **{f"self_attn.{name}_proj": ("self_attn", f"{name}_proj") for name in "qkvo"},
    **{f"mlp.{name}_proj": ("mlp", f"{name}_proj") for name in ("gate", "up", "down")},
}

# Settings that change what is computed, and that a `Decoder` doesn't have, with the values that change nothing.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "sliding_window": (None,),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}


@dataclass(frozen=True)
class Family:
    """What the models of one `model_type` have in common.

    Arguments:
        defaults: settings of a `config.json` that leaves them out, by Hugging Face's names.
        fixed: fields of a `Decoder` that its `config.json` has no name for.
    """

    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]


FAMILIES = {
    # SmolLM2 is a Llama.
    "llama": Family({"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}, {}),
    "gemma": Family(
        {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256},
        {"scale_embeddings": True, "norm_offset": 1.0},
    ),
}


def load(directory: str | Path) -> tuple[Decoder, dict]:
    """A decoder and its parameters, from a directory in Hugging Face's layout.

    Arguments:
        directory: holds `config.json`, and `model.safetensors` or shards with `model.safetensors.index.json`. Families
            are Llama (SmolLM2 is one; Llama 3's scaled rotary positions too) and Gemma, the first generation.

    Returns: the decoder, and parameters like those of `Decoder.init`, float32.

    Errors: `DataError` for a file, setting or tensor that is absent, damaged or of another shape, and for a setting
        that a `Decoder` doesn't have (biases, soft-capping, sliding windows, other activations or positions); it names
        which.

    Cost: the parameters once, in float32; weights in half precision take one tensor more on the way.
    """
    directory = Path(directory)
    model = decoder(_json(directory / CONFIG), str(directory / CONFIG))
    with _Tensors(directory) as tensors:
        return model, gathered(model, tensors.get)


def save(model: Decoder, params: PyTree, directory: str | Path) -> None:
    """Write a decoder to a directory that `load`, and `transformers`, read.

    Arguments:
        directory: made where absent; `config.json` and `model.safetensors` in it are replaced.
        params: from `Decoder.init` or `load`, without adapters.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    layers, tensors = params["layers"], {"model.norm.weight": params["norm"]["weight"]}
    for name, place in LAYER.items():
        stacked = np.asarray(_at(layers, place)["weight"])
        tensors |= {f"model.layers.{i}.{name}.weight": stacked[i] for i in range(model.num_hidden_layers)}
    tensors["model.embed_tokens.weight"] = params["embed_tokens"]["weight"]
    if not model.tie_word_embeddings:
        tensors["lm_head.weight"] = params["lm_head"]["weight"]
    arrays = {name: np.ascontiguousarray(np.asarray(x)) for name, x in tensors.items()}
    replace_file(directory / WEIGHTS, lambda partial: save_file(arrays, partial, {"format": "pt"}))
    write_text(directory / CONFIG, json.dumps(_settings(model), indent=2) + "\n")


def decoder(settings: Mapping[str, Any], where: str) -> Decoder:
    """The decoder of a `config.json`. `DataError` as in `load`; `where` names the file."""
    kind = settings.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise DataError(f"{where}: model_type {kind!r} can't be loaded; these can: {', '.join(FAMILIES)}")
    found = {**family.defaults, **settings}
    # Gemma's first releases say `gelu`, and mean its approximation; `hidden_activation` came to correct it.
    if kind == "gemma":
        activation = found.get("hidden_activation") or found["hidden_act"]
        found["hidden_act"] = "gelu_pytorch_tanh" if activation == "gelu" else activation
    for name, harmless in _ABSENT.items():
        if found.get(name) not in harmless:
            raise DataError(f"{where}: {name} = {found[name]!r} is not supported")
    if found["hidden_act"] not in ("silu", "gelu_pytorch_tanh"):
        raise DataError(f"{where}: hidden_act = {found['hidden_act']!r} is not supported")
    theta, scaling = _rope(found, where)

    def size(name: str) -> int:
        value = found.get(name)
        if not isinstance(value, int) or value < 1:
            raise DataError(f"{where}: {name} must be a positive integer, got {value!r}")
        return value

    heads = size("num_attention_heads")
    return Decoder(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads") if found.get("num_key_value_heads") is not None else heads,
        head_dim=size("head_dim") if found.get("head_dim") is not None else None,
        rope_theta=theta,
        rope_scaling=scaling,
        hidden_act=found["hidden_act"],
        rms_norm_eps=float(found["rms_norm_eps"]),
        tie_word_embeddings=bool(found["tie_word_embeddings"]),
        **family.fixed,
    )


def gathered(model: Decoder, tensor: Callable[[str], np.ndarray]) -> dict:
    """Parameters from tensors by Hugging Face's names.

    Arguments:
        tensor: the float32 array of a name; `DataError` where it is absent.

    Errors: `DataError` for a tensor of another shape than the model's.
    """
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))

    def checked(name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = tensor(name)
        if found.shape != shape:
            raise DataError(f"tensor {name} has shape {list(found.shape)}, but the configuration says {list(shape)}")
        return found

    layers: dict = {}
    for name, place in LAYER.items():
        shape = _at(shapes["layers"], place)["weight"].shape
        stacked = np.empty(shape, np.float32)
        for i in range(model.num_hidden_layers):
            stacked[i] = checked(f"model.layers.{i}.{name}.weight", shape[1:])
        inner = layers
        for part in place:
            inner = inner.setdefault(part, {})
        inner["weight"] = jnp.asarray(stacked)
    params = {"layers": layers}
    names = {"norm": "model.norm", "embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    for place, name in names.items():
        if place in shapes:
            params[place] = {"weight": jnp.asarray(checked(f"{name}.weight", shapes[place]["weight"].shape))}
    return params


class _Tensors:
    """The tensors of a directory by name, as float32; files are opened when first needed."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._of: Mapping[str, str] | None = None
        if (directory / INDEX).exists():
            self._of = _json(directory / INDEX).get("weight_map")
            if not isinstance(self._of, dict) or not all(isinstance(f, str) for f in self._of.values()):
                raise DataError(f"{directory / INDEX} has no weight_map of file names")
        elif not (directory / WEIGHTS).exists():
            raise DataError(f"{directory} holds neither {WEIGHTS} nor {INDEX}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.__exit__(*exception)

    def get(self, name: str) -> np.ndarray:
        file = WEIGHTS if self._of is None else self._of.get(name)
        if file is None:
            raise DataError(f"{self._directory / INDEX} names no file for tensor {name}")
        path = self._directory / file
        # A shard is a file beside its index, wherever that may point.
        if Path(file).name != file or not path.is_file():
            raise DataError(f"{self._directory} has no file {file}, which should hold tensor {name}")
        try:
            if file not in self._files:
                self._files[file] = safe_open(path, framework="np").__enter__()
            tensors = self._files[file]
            if name not in tensors.keys():  # noqa: SIM118
                raise DataError(f"{path} has no tensor {name}")
            found = tensors.get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{path} can't be read: {error}") from error
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise DataError(f"{path}: tensor {name} is {found.dtype}, not floating: quantised weights can't be read")
        return np.asarray(found, np.float32)


def _rope(settings: Mapping[str, Any], where: str) -> tuple[float, Llama3Rope | None]:
    """Base of the rotary positions, and their scaling: under either of the names that configurations use."""
    # Hugging Face moved `rope_theta` and `rope_scaling` into one dictionary in its version 5.
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or settings.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if given.get("partial_rotary_factor") not in (None, 1.0):
        raise DataError(f"{where}: partial_rotary_factor = {given['partial_rotary_factor']!r} is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise DataError(f"{where}: rope_type = {kind!r} is not supported")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if not isinstance(given.get(name), (int, float))]
    if missing:
        raise DataError(f"{where}: the llama3 rotary scaling lacks {', '.join(missing)}")
    return theta, Llama3Rope(**{name: given[name] for name in names})


def _settings(model: Decoder) -> dict[str, Any]:
    """The `config.json` of a decoder."""
    gemma = model.norm_offset == 1.0 and model.scale_embeddings
    if not gemma and (model.norm_offset or model.scale_embeddings):
        raise DataError("a decoder with only one of scale_embeddings and norm_offset = 1 is of no family")
    rope: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if model.rope_scaling:
        rope |= {**vars(model.rope_scaling), "rope_type": "llama3"}
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
    )
    return {
        "model_type": "gemma" if gemma else "llama",
        "architectures": ["GemmaForCausalLM" if gemma else "LlamaForCausalLM"],
        **{name: getattr(model, name) for name in same},
        "head_dim": model.head_dim or model.hidden_size // model.num_attention_heads,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope,
        "torch_dtype": "float32",
    }


def _at(tree: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    for part in place:
        tree = tree[part]
    return tree


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object")
    return found
