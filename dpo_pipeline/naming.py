"""A run's folder is a function of what was typed: its name, and the variants of its SFT and DPO."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from dpo_pipeline.config import Run

# Training arguments that cannot change `final/`: they may differ when a run is continued, and no folder tells them.
NOT_IDENTITY = frozenset(
    "logging_steps logging_first_step logging_strategy eval_steps eval_strategy eval_on_start save_steps "
    "save_strategy save_total_limit on_bad_row activation_checkpointing dataloader_num_workers run_name".split()
)

TRACKED = ("reward", "kl", "stop_rate")  # what `dpo_best` may name that the tracker alone measures


def name_folders(run: "Run", typed: list[str], choices: dict[str, str]) -> None:
    """Fill in `name`, `sft_variant` and `variant` where they are null, from the options chosen and what was typed."""
    model, dataset = choices["model"], choices["dataset"]
    if model == "path":
        model = Path(run.model.path).name
    if dataset == "json":
        dataset = Path(run.dataset["path"]).name.split(".")[0]
    run.name = clean_name(run.name or f"{model}-{dataset}") + ("-debug" if run.debug else "")
    adapter = [choices["lora"]] if run.lora is not None else []
    adapter += [choices["quantization"]] if run.quantization is not None else []
    if run.sft_variant is None:
        other = [choices["dataset@sft_dataset"]] if run.sft_dataset else []
        run.sft_variant = clean_name("-".join([*(adapter or ["full"]), *other]))
    if run.variant is None:
        parts = ["+".join(loss_names(run)), f"beta{run.beta:g}", *adapter]
        parts += [policy_name(run.policy)] if run.policy != "sft" else []
        run.variant = clean_name("-".join([*parts, f"seed{run.seed}", *override_labels(typed)]))


def policy_name(policy: str) -> str:
    """`base`, or the part of a folder's path that tells it apart: that above `final` and `merged`."""
    return next(part for part in reversed(Path(policy).parts) if part not in ("final", "merged"))


def loss_names(run: "Run") -> list[str]:
    """The preference losses of a run; raises PipelineError where `dpo.loss_type` names none."""
    if "loss_type" not in run.dpo:
        raise PipelineError("dpo.loss_type is missing: choose a loss by loss=, or by ++dpo.loss_type=NAME")
    given = run.dpo["loss_type"]
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) for name in names):
        raise PipelineError(f"dpo.loss_type={given} names no loss: choose one by loss=, or by ++dpo.loss_type=[A,B]")
    return names


def override_labels(typed: list[str]) -> list[str]:
    """`key_value` for each typed key that is of DPO's identity and that no other part of the name tells."""
    told = r"(model|dataset|experiment|lora|quantization|loss|beta|seed|policy|dpo\.loss_type|.*path)$"
    ours = r"(model\.|dataset\.|dataset@dataset\.sets|lora\.|quantization\.|precision|reference|batch\.global_size|"
    ours += r"length\.|sft_variant|dpo\.|dpo_best|guard\.action=stop)"
    pairs = sorted(item.lstrip("+~").partition("=")[::2] for item in typed)
    parts = [(key, value) for key, value in pairs if re.match(ours, f"{key}={value}") and not re.match(told, key)]
    return [f"{key}_{normalize_number(value)}" for key, value in parts if key.split(".")[-1] not in NOT_IDENTITY]


def normalize_number(value: str) -> str:
    """A value as a sweep's job has it typed: Hydra writes 1e-4 there as 0.0001."""
    try:
        return value if value.lstrip("+-").isdigit() else str(float(value))
    except ValueError:
        return value


def clean_name(name: str) -> str:
    """A name that every file system takes; the end of one longer than 150 characters becomes a hash of it."""
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", name)
    return name if len(name) <= 150 else f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
