"""Export a policy as one whole model in 16 bits: `python -m dpo_pipeline.export key=value ...`.

It merges an adapter into its base, compares export and run on real rows, and writes a model card with the results.
"""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from dpo_pipeline.cli import main
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, run_logging, write_json
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.export")  # __name__ is __main__ when run as a command

MAX_KL = 0.01  # nats a token: rounding to 16 bits costs some 1e-5
SAMPLE_TEXT = (
    "The quick brown fox jumps over the lazy dog, and then it lies down in the sun to sleep until the evening."
)


def run_export(run: Run) -> Path | None:
    """Write the policy that `target` names to `export/` in the folder of its run; that folder, or None with `check`.

    Raises PipelineError where the run is not finished, the disk has no room, the export does not predict what the run
    predicts, or `push` names a repository and nobody is logged in.
    """
    from huggingface_hub import get_token

    from dpo_pipeline.base_model import base_model
    from dpo_pipeline.content_hash import weights_hash
    from dpo_pipeline.evaluation.policies import target_policies
    from dpo_pipeline.models import with_base_of

    if processes() > 1:
        raise PipelineError("one process is enough to export: type the command without the launcher")
    with run_logging(None), base_model(run) as run:
        policy = target_policies(run)[0]
        if run.target not in ("dpo", "sft", "base"):
            run = with_base_of(run, policy.path)
        if run.push and not get_token():
            raise PipelineError(f"push={run.push} needs a login: type `hf auth login`, or set HF_TOKEN")
        folder, source = policy.folder / "export", weights_hash(policy.path, run.model.revision)
        if run.check:
            return None
        facts = {"source": source, "dtype": run.export.dtype}
        earlier = read_json(folder / "export.json") or {}
        if facts.items() <= earlier.items():
            log.info("already exported: %s", folder)
        else:
            write_export(run, policy, folder, facts)
        if run.push:
            upload(folder, run.push)
        return folder


def write_export(run: Run, policy: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Write the whole model, its tokenizer, its model card and `export.json` to a folder, whole or not at all."""
    import gc

    from dpo_pipeline.evaluation.model_card import write_model_card
    from dpo_pipeline.tokenizer import load_tokenizer
    from dpo_pipeline.training.merge import add_older_keys

    has_tokenizer = any(Path(policy.path).glob("tokenizer*"))
    tokenizer = load_tokenizer(run.model, policy.path if has_tokenizer else None)
    manifest = read_json(policy.folder / "manifest.json") or {}
    rows = probe_rows(manifest, tokenizer)
    merged, logprobs = merge_policy(run, policy.path, manifest, rows)
    merged.to(export_dtype(run))
    check_room(folder, merged)
    partial = folder.with_name("export.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill
    try:
        merged.save_pretrained(partial)
        parameters, dtype = merged.num_parameters(), str(merged.dtype).removeprefix("torch.")
        del merged
        gc.collect()
        tokenizer.save_pretrained(partial)
        if (file := Path(policy.path) / "generation_config.json").is_file():
            shutil.copy(file, partial)
        add_older_keys(partial)
        divergence = compare_export(run, partial, rows, logprobs)
        facts |= {"kl_per_token": divergence, "saved_dtype": dtype, "parameters": parameters}
        write_model_card(partial / "README.md", policy, manifest, facts)
        write_json(partial / "export.json", facts)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("exported %s to %s in %s: %.2g nats a token from the run", policy.path, folder, dtype, divergence)


def probe_rows(manifest: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    """Token ids to compare on: the training rows that a run keeps to recognise its policy, else a sentence."""
    if "final" in manifest:
        probe = manifest["final"]["probe"]
        return [prompt + answer for prompt, answer in zip(probe["prompts"], probe["answers"], strict=True)]
    return [tokenizer(SAMPLE_TEXT)["input_ids"]]


def merge_policy(run: Run, path: str | Path, manifest: dict[str, Any], rows: list[list[int]]) -> tuple[Any, list[Any]]:
    """The policy as one whole model, and its next-token log-probs on the rows as it was trained."""
    from dpo_pipeline.models import is_adapter, load_options, load_policy
    from dpo_pipeline.training.merge import merge_adapter

    quantization = manifest["loading"]["quantization"] if "loading" in manifest else None
    options = dataclasses.replace(load_options(run), quantization=quantization)
    policy = load_policy(path, options)
    logprobs = next_token_logprobs(policy, rows)
    if is_adapter(path):
        del policy
        policy = merge_adapter(Path(path), options)
    return policy, logprobs


def next_token_logprobs(model: Any, rows: list[list[int]]) -> list[Any]:
    """Log-probs in nats of every next token after each token of a row, float32 on the CPU: [tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0] for ids in rows]
    return [each.float().log_softmax(-1).cpu() for each in logits]


def compare_export(run: Run, folder: Path, rows: list[list[int]], logprobs: list[Any]) -> float:
    """KL of the run from the export in nats a token, on all next tokens of the rows; PipelineError where it is large.

    The export is loaded as anybody loads it, from its folder alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    code = {"trust_remote_code": run.model.trust_remote_code}
    exported = next_token_logprobs(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **code).eval(), rows)
    pairs = zip(logprobs, exported, strict=True)
    divergence = float(torch.cat([(old.exp() * (old - new)).sum(-1) for old, new in pairs]).mean())
    if not divergence <= MAX_KL:
        raise PipelineError(
            f"the export would be another policy, {divergence:.3g} nats a token from the run: type "
            "export.dtype=float32, or use final/ itself"
        )
    return divergence


def export_dtype(run: Run) -> Any:
    """The torch dtype of the export: of 16 bits where the run leaves it open."""
    import torch

    from dpo_pipeline.models import load_config

    if run.export.dtype != "auto":
        return getattr(torch, run.export.dtype)
    return torch.float16 if load_config(run.model).dtype == torch.float16 else torch.bfloat16


def check_room(folder: Path, model: Any) -> None:
    """Raise PipelineError where the disk has no room for the weights of a model."""
    from dpo_pipeline.hardware import gigabytes

    needed, place = model.get_memory_footprint(), next(each for each in folder.resolve().parents if each.is_dir())
    if needed > (free := shutil.disk_usage(place).free):
        raise PipelineError(
            f"the export takes {gigabytes(needed)} and the disk of {place} has {gigabytes(free)} left: free some, or "
            "name another disk by root="
        )


def upload(folder: Path, repository: str) -> None:
    """Upload a folder to a repository of the hub, which is private where it is new; raises PipelineError."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        address = HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise PipelineError(
            f"push={repository} failed ({reason}): check name, login and network; the export is in {folder}"
        ) from error
    log.info("uploaded to %s", address)


if __name__ == "__main__":
    main(run_export)
