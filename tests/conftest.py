import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Directory of a real data set by name; skips the test where it is absent."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("METAGRADIENT_DATA", beside))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{root / name} is absent: set METAGRADIENT_DATA to a directory that holds {name}")
        return root / name

    return find
