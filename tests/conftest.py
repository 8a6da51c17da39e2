"""One thread for every test process, set before torch is imported: many small tensors, two cores. Property tests try the same examples in
every run, so that a red run is a change's doing; `HYPOTHESIS_PROFILE=default pytest tests` searches on."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
