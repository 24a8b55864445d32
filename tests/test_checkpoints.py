"""Checkpoints: logits equal to those of `transformers`, GGUF with its permutation undone, and every fault by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from metagradient.errors import ConfigError, DataError
from metagradient.models import Decoder, checkpoints
from metagradient.models.decoder import Llama3Rope
from metagradient.models.gguf import GGUFFile
from metagradient.optional import library

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"


def logits(model: Decoder, params: dict, tokens: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.apply(params, {}, jnp.asarray(tokens))[0])


@pytest.mark.parametrize("name", ["llama", "llama3", "smollm2", "gemma"])
def test_logits_are_those_of_transformers_on_the_same_weights(name: str):
    """The fixtures hold bfloat16 in shards, float16, and tied and untied embeddings."""
    model, params = checkpoints.load(FIXTURES / name)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    with np.load(FIXTURES / name / "expected.npz") as expected:
        assert float(np.abs(expected["logits"]).max()) > 1
        np.testing.assert_allclose(logits(model, params, expected["tokens"]), expected["logits"], rtol=0, atol=1e-4)


def test_the_families_settings_are_read():
    llama, llama3, smollm2, gemma = (
        checkpoints.load(FIXTURES / name)[0] for name in ("llama", "llama3", "smollm2", "gemma")
    )
    assert len(list((FIXTURES / "llama").glob("*.safetensors"))) > 1
    assert not llama.tie_word_embeddings
    assert llama3.rope_scaling == Llama3Rope(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    )
    assert (smollm2.rope_theta, smollm2.num_key_value_heads, smollm2.tie_word_embeddings) == (100_000.0, 3, True)
    assert (gemma.norm_offset, gemma.scale_embeddings, gemma.hidden_act) == (1.0, True, "gelu_pytorch_tanh")


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_what_is_saved_is_loaded_again(name: str, tmp_path: Path):
    model, params = checkpoints.load(FIXTURES / name)
    checkpoints.save(model, params, tmp_path / "copy")
    again, same = checkpoints.load(tmp_path / "copy")
    assert replace(again, head_dim=model.head_dim) == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.fixture
def damaged(tmp_path: Path):
    """A copy of a fixture, changed."""

    def make(name: str = "smollm2", **settings: Any) -> Path:
        directory = tmp_path / name
        shutil.copytree(FIXTURES / name, directory)
        config = json.loads((directory / "config.json").read_text())
        config = {k: v for k, v in {**config, **settings}.items() if v != "absent"}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "model_type 'gemma2'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"hidden_size": "absent"}, "hidden_size must be"),
        ({"hidden_size": 30}, "tensor model.layers.0.input_layernorm.weight has shape"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2.input_layernorm.weight"),
        ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_setting_or_tensor_that_cannot_be_used_is_named(damaged: Any, settings: dict, message: str):
    with pytest.raises(DataError, match=message):
        checkpoints.load(damaged(**settings))


def test_older_names_of_rotary_settings_mean_the_same(damaged: Any):
    scaling = {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    older = damaged("llama3", rope_parameters="absent", rope_theta=10_000.0, rope_scaling=scaling)
    assert checkpoints.load(older)[0] == checkpoints.load(FIXTURES / "llama3")[0]


def test_files_that_are_absent_or_damaged_are_named(damaged: Any, tmp_path: Path):
    directory = damaged("llama")
    index = directory / checkpoints.INDEX
    (shard,) = sorted(directory.glob("*.safetensors"))[-1:]
    shard.rename(directory / "elsewhere")
    with pytest.raises(DataError, match=f"no file {shard.name}"):
        checkpoints.load(directory)
    shard.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(DataError, match="can't be read"):
        checkpoints.load(directory)
    shutil.copy(directory / "elsewhere", shard)
    names = json.loads(index.read_text())
    names["weight_map"]["model.norm.weight"] = "../llama/elsewhere"
    index.write_text(json.dumps(names))
    with pytest.raises(DataError, match=r"no file \.\./llama/elsewhere"):
        checkpoints.load(directory)
    index.unlink()
    with pytest.raises(DataError, match="holds neither"):
        checkpoints.load(directory)
    with pytest.raises(DataError, match=r"config\.json can't be read"):
        checkpoints.load(tmp_path / "nowhere")
    (directory / "config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        checkpoints.load(directory)


def test_quantised_safetensors_are_refused(damaged: Any):
    directory = damaged()
    tensors = load_file(directory / checkpoints.WEIGHTS)
    tensors["model.norm.weight"] = np.zeros(27, np.int8)
    save_file(tensors, directory / checkpoints.WEIGHTS)
    with pytest.raises(DataError, match=r"model\.norm\.weight is int8"):
        checkpoints.load(directory)


# GGUF


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys, as its conversion script makes it."""
    rows, inputs = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def write_gguf(path: Path, model: Decoder, params: dict, quantised: bool = False, **fields: Any) -> Path:
    gguf = pytest.importorskip("gguf")
    family = "gemma" if model.norm_offset else "llama"
    writer = gguf.GGUFWriter(path, family)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    if "tokens" in fields:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(fields.get("pre", "smollm"))
        writer.add_token_list(fields["tokens"])
        writer.add_token_types(fields["types"])
        writer.add_token_merges(fields["merges"])

    def add(name: str, array: Any) -> None:
        array = np.asarray(array) + (1 if family == "gemma" and "norm" in name else 0)
        if quantised and array.ndim == 2 and array.shape[-1] % 32 == 0:
            data = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)

    layers, attention, mlp = params["layers"], params["layers"]["self_attn"], params["layers"]["mlp"]
    add("token_embd.weight", params["embed_tokens"]["weight"])
    add("output_norm.weight", params["norm"]["weight"])
    if not model.tie_word_embeddings:
        add("output.weight", params["lm_head"]["weight"])
    for i in range(model.num_hidden_layers):
        add(f"blk.{i}.attn_norm.weight", layers["input_layernorm"]["weight"][i])
        add(f"blk.{i}.ffn_norm.weight", layers["post_attention_layernorm"]["weight"][i])
        for name, heads in (("q", model.num_attention_heads), ("k", model.num_key_value_heads)):
            weight = np.asarray(attention[f"{name}_proj"]["weight"][i])
            add(f"blk.{i}.attn_{name}.weight", weight if family == "gemma" else permuted(weight, heads))
        add(f"blk.{i}.attn_v.weight", attention["v_proj"]["weight"][i])
        add(f"blk.{i}.attn_output.weight", attention["o_proj"]["weight"][i])
        for name in ("gate", "up", "down"):
            add(f"blk.{i}.ffn_{name}.weight", mlp[f"{name}_proj"]["weight"][i])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "smollm2", "gemma"])
def test_gguf_holds_the_same_model(name: str, tmp_path: Path):
    model, params = checkpoints.load(FIXTURES / name)
    path = write_gguf(tmp_path / "model.gguf", replace(model, head_dim=model._head_size), params)
    found, same = GGUFFile(path).load()
    assert replace(found, rms_norm_eps=model.rms_norm_eps) == replace(model, head_dim=model._head_size)
    assert found.rms_norm_eps == pytest.approx(model.rms_norm_eps)
    close = {"rtol": 0, "atol": 1e-6}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), same, params)


def test_quantised_gguf_is_dequantised(tmp_path: Path):
    model = Decoder(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    params = model.init(jax.random.key(0))[0]
    found, same = GGUFFile(write_gguf(tmp_path / "model.gguf", model, params, quantised=True)).load()
    assert found.num_key_value_heads == 2
    weight, expected = (p["layers"]["self_attn"]["q_proj"]["weight"] for p in (same, params))
    off = np.abs(np.asarray(weight - expected)).max()
    assert 0 < off < 0.01 * float(np.abs(expected).max())


def test_a_gguf_vocabulary_becomes_a_tokenizer(tmp_path: Path):
    pytest.importorskip("tokenizers")
    model, params = checkpoints.load(FIXTURES / "smollm2")
    tokens = ["<|im_end|>", *"abcdefghij", *"0123456789", "Ġ", "ab", "Ġab", *(f"unused{i}" for i in range(36))]
    merges = ["a b", "Ġ ab"]
    types = [3, *[1] * (len(tokens) - 1)]
    model = replace(model, head_dim=4)
    path = write_gguf(tmp_path / "model.gguf", model, params, tokens=tokens, merges=merges, types=types)
    tokenizer = GGUFFile(path).tokenizer()
    text = "ab ab12<|im_end|>c"
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert encoded.tokens == ["ab", "Ġab", "1", "2", "<|im_end|>", "c"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text

    strange = write_gguf(
        tmp_path / "other.gguf", model, params, tokens=tokens, merges=merges, types=types, pre="tekken"
    )
    with pytest.raises(DataError, match="tekken"):
        GGUFFile(strange).tokenizer()


def test_faulty_gguf_files_are_named(tmp_path: Path):
    pytest.importorskip("gguf")
    with pytest.raises(DataError, match="no such file"):
        GGUFFile(tmp_path / "absent.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(DataError, match=r"broken\.gguf can't be read as GGUF"):
        GGUFFile(tmp_path / "broken.gguf")
    model, params = checkpoints.load(FIXTURES / "smollm2")
    path = write_gguf(tmp_path / "fewer.gguf", replace(model, num_hidden_layers=1, head_dim=4), params)
    file = GGUFFile(path)
    del file._tensors["blk.0.ffn_up.weight"]
    with pytest.raises(DataError, match=r"no tensor blk\.0\.ffn_up\.weight"):
        file.load()


def test_a_library_that_is_absent_is_asked_for():
    with pytest.raises(ConfigError, match=r"pip install 'metagradient\[lm\]'"):
        library("no_such_library_at_all", "lm")
