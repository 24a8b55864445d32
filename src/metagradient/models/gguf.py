"""Decoders and tokenizers in GGUF, llama.cpp's format, through the `gguf` library: any of its quantisations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metagradient.errors import DataError
from metagradient.models.checkpoints import decoder, gathered
from metagradient.models.decoder import Decoder
from metagradient.optional import library

# llama.cpp's names for Hugging Face's, a layer's without its prefix.
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CONTROL, _USER_DEFINED = 3, 4


class GGUFFile:
    """An open GGUF file.

    Arguments:
        path: the file.

    Errors: `ConfigError` where the `gguf` library isn't installed; `DataError` for a file that is absent or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._library = library("gguf", "lm")
        if not self.path.is_file():
            raise DataError(f"{path}: no such file")
        try:
            self._reader: Any = self._library.GGUFReader(self.path)
        except Exception as error:  # the library raises whatever a damaged file led it to
            raise DataError(f"{path} can't be read as GGUF: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the metadata, as plain Python values; the default where it is absent."""
        found = self._reader.get_field(name)
        return default if found is None else found.contents()

    def load(self) -> tuple[Decoder, dict]:
        """The decoder and its parameters, dequantised to float32.

        Returns: as `metagradient.models.checkpoints.load`. llama.cpp's order of rotary pairs in queries and keys is
            turned back into Hugging Face's.

        Errors: `DataError` for another architecture than Llama or Gemma, a field or tensor that is absent or of another
            shape, a quantisation that the library can't undo, and rotary frequencies of the file's own (Llama 3.1's).

        Cost: the parameters once, in float32; seconds for a hundred million of them.
        """
        model = decoder(self._settings(), str(self.path))
        gemma = model.norm_offset == 1.0

        def tensor(name: str) -> np.ndarray:
            found = self._dequantised(_renamed(name))
            if gemma:
                # llama.cpp stores a Gemma's norms with the one added.
                return found - 1 if "norm" in name else found
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = model.num_attention_heads if "q_proj" in name else model.num_key_value_heads
                return _unpermuted(found, heads)
            return found

        return model, gathered(model, tensor)

    def tokenizer(self) -> Any:
        """The tokenizer in the metadata, a `tokenizers.Tokenizer`.

        Errors: `ConfigError` where the `tokenizers` library isn't installed; `DataError` for a vocabulary that isn't
            byte-level BPE with a known pre-tokeniser (GPT-2's, SmolLM's, Llama 3's).
        """
        tokenizers = library("tokenizers", "lm")
        kind, pre = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or pre not in ("default", "gpt-2", "smollm", "llama-bpe"):
            raise DataError(
                f"{self.path}: a tokenizer of model {kind!r}, pre-tokeniser {pre!r} can't be built; name a directory "
                "with its tokenizer.json"
            )
        tokens, merges = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.merges")
        if not tokens or not merges:
            raise DataError(f"{self.path} lacks tokenizer.ggml.tokens or tokenizer.ggml.merges")
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        model = tokenizers.models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe")
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = _pre_tokenizer(tokenizers, pre)
        made.decoder = tokenizers.decoders.ByteLevel()
        kinds = self.field("tokenizer.ggml.token_type") or []
        for token, of in zip(tokens, kinds, strict=False):
            if of in (_CONTROL, _USER_DEFINED):
                made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
        return made

    def _settings(self) -> dict[str, Any]:
        """The metadata under Hugging Face's names."""
        family = self.field("general.architecture")

        def of(name: str, default: Any = None) -> Any:
            return self.field(f"{family}.{name}", default)

        scaling = of("rope.scaling.type")
        if "rope_freqs.weight" in self._tensors or scaling not in (None, "none"):
            what = "rope_freqs.weight" if scaling in (None, "none") else f"{family}.rope.scaling.type = {scaling!r}"
            raise DataError(f"{self.path}: rotary positions by {what} are not supported; use its safetensors")
        embedding = self._tensors.get("token_embd.weight")
        return {
            "model_type": family,
            "vocab_size": None if embedding is None else int(embedding.shape[-1]),
            "hidden_size": of("embedding_length"),
            "intermediate_size": of("feed_forward_length"),
            "num_hidden_layers": of("block_count"),
            "num_attention_heads": of("attention.head_count"),
            "num_key_value_heads": of("attention.head_count_kv"),
            "head_dim": of("attention.key_length"),
            "rms_norm_eps": of("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_theta": of("rope.freq_base", 10_000.0),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def _dequantised(self, name: str) -> np.ndarray:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise DataError(f"{self.path} has no tensor {name}")
        try:
            return np.asarray(self._library.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError as error:
            raise DataError(f"{self.path}: tensor {name}: {error}") from error


def _renamed(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, number, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{number}.{_IN_LAYER[inner]}.weight"


def _unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of `[heads * size, in]` from pairs (2i, 2i + 1) of each head to Hugging Face's (i, i + size / 2)."""
    rows, inputs = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def _pre_tokenizer(tokenizers: Any, kind: str) -> Any:
    pre: Mapping[str, Any] = vars(tokenizers.pre_tokenizers)
    if kind == "smollm":
        return pre["Sequence"]([pre["Digits"](individual_digits=True), pre["ByteLevel"](add_prefix_space=False)])
    if kind == "llama-bpe":
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        )
        split = pre["Split"](tokenizers.Regex(words), behavior="isolated")
        return pre["Sequence"]([split, pre["ByteLevel"](add_prefix_space=False, use_regex=False)])
    return pre["ByteLevel"](add_prefix_space=False)
