"""One torch thread, no network, and a small trained SFT of each kind that several tests start from."""

import gc
import importlib
import os

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import pytest

from dpo_pipeline.config import compose
from dpo_pipeline.quiet import quiet
from dpo_pipeline.schema import Run

quiet()


@pytest.fixture(scope="session", autouse=True)
def light_garbage_collection():
    """What is imported need not be looked through each time that Accelerate collects garbage: half of all time."""
    importlib.import_module("dpo_pipeline.training.trainer")
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """What `datasets` writes while it reads a file goes with the tests."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Composes the embedded task shrunken to seconds, under one root for the session: `small("lora=r8")`."""
    from tests.helpers import SMALL  # which imports TRL: after `quiet`

    root = tmp_path_factory.mktemp("outputs")

    def run(*overrides: str) -> Run:
        given = {item.split("=")[0] for item in overrides}
        defaults = [item for item in (*SMALL, f"root={root}", "name=small") if item.split("=")[0] not in given]
        return compose([*defaults, *overrides])

    run.typed = list(SMALL)
    return run


@pytest.fixture(scope="session")
def sft(small):
    """The small SFT policies, trained once: full and LoRA."""
    from dpo_pipeline.sft import run_sft

    return {lora: run_sft(small(f"lora={lora}")) for lora in ("none", "r8")}
