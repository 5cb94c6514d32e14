"""A run's folder is a function of what was typed: its name, and the variants of its SFT and DPO."""

import hashlib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from dpo_pipeline.schema import Run

# Keys that do not change the `final/` of a run: places, trackers, logging, checkpoints, evaluation, and how rows are
# spread over devices. They are no part of a run's identity nor of its folder's name. Patterns of fnmatch.
NOT_IDENTITY = (
    *("root", "name", "variant", "sft_variant", "check", "overwrite", "overlay", "report_to", "wandb.*", "hydra*"),
    *("evaluation.*", "best_of.*", "gate.*", "guard.*", "judge*", "pairs.*", "export.*", "chat.*"),
    *("target", "push", "compare"),
    *("batch.micro_size", "model.micro_size", "model.use_safetensors", "model.trust_remote_code", "training.*"),
    *("*.activation_checkpointing", "*.dataloader_num_workers", "*.run_name", "*.logging_*"),
    *("*.on_bad_row", "*.on_contradiction"),
    *("*.eval_steps", "*.eval_strategy", "*.eval_on_start", "*.save_steps", "*.save_strategy", "*.save_total_limit"),
    "*dataset*.sft_target",  # the default of the key `sft_target`
)
# Keys that one stage alone reads.
READ_BY_OTHER_STAGE = {
    "sft": ("dpo.*", "dpo_best", "beta", "policy", "reference.*"),
    "dpo": ("sft.*", "sft_best", "sft_target", "sft_loss", "*sft_dataset*"),
}
MAX_LABELS = 40  # characters of a folder's name for the typed keys; longer ones become a hash
TRACKED = ("reward", "kl", "stop_rate")  # what `dpo_best` may name that the tracker alone measures


def name_folders(run: Run, overrides: list[str], choices: dict[str, str]) -> None:
    """Fill in `name`, `sft_variant` and `variant` where they are null, from the options chosen and what was typed."""
    model, dataset = choices["model"], choices["dataset"]
    if model == "path":
        model = Path(run.model.path).name
    if dataset == "json":
        dataset = Path(run.dataset["path"]).name.split(".")[0]
    run.name = clean_name(run.name or f"{model}-{dataset}") + ("-debug" if run.debug else "")
    adapter = [choices["lora"]] if run.lora is not None else []
    adapter += [choices["quantization"]] if run.quantization is not None else []
    other = [choices["dataset@sft_dataset"]] if run.sft_dataset else []
    run.sft_variant = clean_name(run.sft_variant or "-".join([*(adapter or ["full"]), *other]))
    parts = ["+".join(loss_names(run)), f"beta{run.beta:g}", *adapter]
    parts += [policy_name(run.policy)] if run.policy != "sft" else []
    labels = "-".join(override_labels(run, overrides))
    parts += [f"seed{run.seed}", labels if len(labels) <= MAX_LABELS else short_hash(labels)]
    run.variant = clean_name(run.variant or "-".join(filter(None, parts)))


def policy_name(policy: str) -> str:
    """`base`, or the part of a folder's path that names it: the last one that is not `final` or `merged`."""
    return next(part for part in reversed(Path(policy).absolute().parts) if part not in ("final", "merged"))


def loss_names(run: Run) -> list[str]:
    """The preference losses of a run."""
    losses = run.dpo["loss_type"]
    return losses if isinstance(losses, list) else [losses]


def is_identity(key: str, run: Run, stage: str) -> bool:
    """Whether a config key can change the `final/` of a stage in this run."""

    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in patterns)

    if matches(READ_BY_OTHER_STAGE[stage]):
        return False
    return matches(exceptions_of(run, stage)) or not matches(NOT_IDENTITY)


def exceptions_of(run: Run, stage: str) -> list[str]:
    """The keys of NOT_IDENTITY that do change this run: they choose its start, its checkpoint or its end."""
    best = run.sft_best if stage == "sft" else run.dpo_best
    keys = [f"{stage}.eval_steps", f"{stage}.save_steps"] if best != "last" else []
    if stage == "sft":
        return keys
    if run.policy == "sft":
        keys.append("sft_variant")
    if run.guard.action == "stop":
        keys += ["guard.*", "dpo.eval_steps"]
    if run.guard.action == "stop" or best in TRACKED:
        keys += ["evaluation.tracker_prompts", "evaluation.max_new_tokens"]
    if best == "reward":
        keys += ["evaluation.kl_budget", "judge*"]
    if "sft" in loss_names(run):
        keys.append("batch.micro_size")  # TRL takes that term per token of each micro batch
    return keys


def override_labels(run: Run, overrides: list[str]) -> list[str]:
    """`key_value` for each typed key of DPO's identity that no other part of the name says."""
    in_name = r"(model|dataset|experiment|lora|quantization|loss|beta|seed|policy|debug|dpo\.loss_type|.*path)$"
    pairs = sorted(item.lstrip("+~").partition("=")[::2] for item in overrides)
    return [
        f"{key}_{normalize_number(value)}"
        for key, value in pairs
        if is_identity(key, run, "dpo") and not re.match(in_name, key)
    ]


def normalize_number(value: str) -> str:
    """A value as Hydra writes it in a sweep's job: 0.0001 for 1e-4."""
    try:
        return value if value.lstrip("+-").isdigit() else str(float(value))
    except ValueError:
        return value


def clean_name(name: str) -> str:
    """A name for one folder on every file system; where it had to be changed or cut, a hash of it tells it apart."""
    clean = re.sub(r"[^\w.+-]", "_", name)
    clean = clean if len(clean.encode()) <= 150 else clean.encode()[:140].decode(errors="ignore")
    return clean if clean == name else f"{clean}-{short_hash(name)}"


def short_hash(text: str) -> str:
    """Eight hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
