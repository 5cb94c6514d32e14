"""One torch thread, no network, and a small trained SFT of each kind that several tests start from."""

import gc
import importlib
import os
import signal

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import pytest

from dpo_pipeline.config import compose
from dpo_pipeline.hardware import STOPS
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


@pytest.fixture(autouse=True)
def signal_handlers():
    """Those of pytest outlive a command, which leaves its own."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """A GPT-2 of random weights with a token for each byte, in a folder."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = GPT2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=1024, bos_token_id=end, eos_token_id=end
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
