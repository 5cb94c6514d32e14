"""A default DPO run loads and hashes each thing once: the base's config, each set of weights, each weights file."""

import hashlib
import inspect
import shutil
from collections import Counter

from transformers import AutoConfig, AutoModelForCausalLM

from dpo_pipeline import content_hash
from dpo_pipeline.dpo import run_dpo


def test_a_default_dpo_run_with_its_tracker_loads_little(small, sft, tmp_path, monkeypatch):
    unmeasured = shutil.ignore_patterns("eval.json", "validation.json", "dpo", "records", ".*")
    shutil.copytree(small().home, tmp_path / "small", ignore=unmeasured)
    content_hash.file_hash.cache_clear()
    configs, models, hashes = Counter(), Counter(), Counter()
    load_config, load_model = AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained
    digest = hashlib.file_digest

    def count_config(path, *args, **options):
        if inspect.stack()[1].filename.endswith("load_errors.py"):  # not those that a model or a tokenizer loads
            configs[str(path)] += 1
        return load_config(path, *args, **options)

    def count_model(path, *args, **options):
        models[str(path)] += 1
        return load_model(path, *args, **options)

    def count_hash(stream, *args):
        hashes[stream.name] += 1
        return digest(stream, *args)

    monkeypatch.setattr(AutoConfig, "from_pretrained", count_config)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", count_model)
    monkeypatch.setattr(hashlib, "file_digest", count_hash)
    run = small(f"root={tmp_path}", "variant=counted", "evaluation.tracker_prompts=4", "++dpo.max_steps=4")
    run_dpo(run)
    assert configs[run.model.path] <= 2, configs
    assert models.total() <= 5, models
    weights = {file: count for file, count in hashes.items() if str(file).endswith(".safetensors")}
    assert set(weights.values()) == {1}, weights
    assert len(weights) == 3  # of the base, the SFT and the DPO
