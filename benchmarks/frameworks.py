"""One example for each framework, as docs/frameworks.md: its code, and what it prints.

python benchmarks/frameworks.py [--out docs/frameworks.md]
"""

import argparse
import ast
import datetime
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples" / "frameworks"
EXAMPLES = {
    "flax nnx": ("flax_nnx", "flax"),
    "flax linen": ("flax_linen", "flax"),
    "equinox": ("equinox_model", "equinox"),
    "haiku": ("haiku_model", "dm-haiku"),
    "grain": ("grain_batches", "grain"),
}
HEAD = """# Frameworks

A model is any pytree of parameters and a pure loss, so that those of every JAX library serve as they are. Each of these
examples trains one on digits, a fifth of whose labels are wrong, and asks the metagradient for the harmful ones
(`examples/frameworks/digits.py` is what they share).

| what a library has | where it goes |
|---|---|
| parameters | `params`, floating: of `nnx.split(model, nnx.Param, ...)`, `eqx.partition`, `variables["params"]` |
| running statistics, counters, keys of dropout | `model_state` (`has_model_state=True`): steps hand it on |
| a frozen base model, a teacher | `args=` |
| fixed structure (`graphdef`, static fields) | closed over |
| an input pipeline | `batches`: a random-access sequence, such as a `grain.MapDataset` |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/frameworks.md"))
    out = parser.parse_args().out
    parts = [HEAD]
    for name, (module, package) in EXAMPLES.items():
        file = FOLDER / f"{module}.py"
        start = time.monotonic()
        done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{file} failed:\n{done.stderr}")
        seconds = time.monotonic() - start
        text = file.read_text(encoding="utf-8")
        told = ast.get_docstring(ast.parse(text)) or ""
        code = text.split('"""', 2)[2].strip()
        parts.append(
            f"## {name} {version(package)}\n\n{told}\n\n```python\n{code}\n```\n\n"
            f"Prints, in {seconds:.0f} s: `{done.stdout.strip()}`\n"
        )
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, jax {version('jax')}"
    parts.append(f"{machine}, {datetime.date.today()}. Made by `python benchmarks/frameworks.py`.\n")
    out.write_text("\n".join(parts), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
