"""A language model's logits here and in `transformers`: what benchmarks/instruction_selection.py takes as --agreement.

    python benchmarks/peers_torch/logits.py --model FILE.gguf --out agreement.json

Runs where torch, transformers and accelerate (requirements.txt) and `metagradient[lm]` are installed together.
`transformers` reads the file by itself; both compute in float32.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from metagradient.models.gguf import GGUFFile

TEXT = (
    "<|im_start|>user\nThree red books lie to the left of the blue one. Which book is the rightmost?<|im_end|>\n"
    "<|im_start|>assistant\nThe blue book is the rightmost.<|im_end|>\n"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    file = GGUFFile(given.model)
    tokens = np.array([file.tokenizer().encode(TEXT, add_special_tokens=False).ids])
    model, params = file.load()
    ours = np.asarray(model.logits(params, jnp.asarray(tokens), jnp.arange(tokens.shape[1])[None]))
    other = AutoModelForCausalLM.from_pretrained(
        given.model.parent, gguf_file=given.model.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = other(torch.from_numpy(tokens)).logits.numpy()
    found = {
        "largest difference": float(np.abs(ours - theirs).max()),
        "largest logit": float(np.abs(theirs).max()),
        "tokens": tokens.shape[1],
    }
    given.out.write_text(json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
