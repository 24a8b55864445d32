"""Makes `fixtures/checkpoints`: tiny random models, and what `transformers` computes with them.

Run where torch and transformers are installed: `python tests/make_checkpoint_fixtures.py`.
"""

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    # Half precision, in shards.
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, **HEADS, head_dim=8, tie_word_embeddings=False), "bfloat16"),
    "llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, **HEADS, head_dim=8, rope_parameters=LLAMA3), "float16"),
    "smollm2": (
        LlamaForCausalLM,
        LlamaConfig(
            **{**SIZES, "hidden_size": 27},
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=4,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        ),
        "float32",
    ),
    "gemma": (
        GemmaForCausalLM,
        GemmaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, head_dim=16),
        "float32",
    ),
}


def main() -> None:
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 40))
    for name, (kind, config, dtype) in MODELS.items():
        torch.manual_seed(0)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than at a usual start, norms too: errors show.
                parameter += 0.3 * torch.randn_like(parameter)
        directory = FIXTURES / name
        model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="12KB" if name == "llama" else "1MB")
        # What the stored weights compute in full precision: read anew, for `to` rounds rotary frequencies too.
        with torch.no_grad():
            logits = kind.from_pretrained(directory, dtype=torch.float32).eval()(torch.tensor(tokens)).logits
        np.savez_compressed(directory / "expected.npz", tokens=tokens.astype(np.int32), logits=logits.numpy())
        (directory / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
