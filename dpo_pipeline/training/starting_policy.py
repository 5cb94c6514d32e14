"""From what was trained before to what is trained now: the starting policy, its adapter and its reference."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_pipeline.base_model import fetch
from dpo_pipeline.config import instantiate_node
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.locks import file_lock
from dpo_pipeline.models import base_of, empty_model, is_adapter, load_config, load_options, load_policy
from dpo_pipeline.run_folder import run_state
from dpo_pipeline.schema import Run
from dpo_pipeline.training.merge import merge

log = logging.getLogger(__name__)

# What must be equal for an adapter to be continued; TRL switches dropout off, and initialisation is over.
SAME_ADAPTER = (
    "peft_type r lora_alpha target_modules bias use_rslora use_dora rank_pattern alpha_pattern modules_to_save "
    "target_parameters layers_to_transform"
).split()


@dataclass
class StartingPolicy:
    """What training starts from: a folder or hub id, whether it is an adapter, and how it is handed over.

    `merge_to` is the folder an adapter is merged into before anything is trained on it, None where nothing is merged.
    `lora` is the config of a new adapter, None where one is continued or every weight is trained.
    """

    source: str | Path
    is_adapter: bool
    merge_to: Path | None
    lora: Any | None

    @property
    def weights(self) -> str | Path:
        """The folder or hub id that is loaded, once `merge_to` exists."""
        return self.merge_to or self.source

    def __str__(self) -> str:
        if self.is_adapter and not self.merge_to:
            return f"{self.source} (continued)"
        return f"{self.source} ({'merged, ' if self.merge_to else ''}{'new adapter' if self.lora else 'full'})"


def resolve_starting_policy(run: Run, stage: str) -> StartingPolicy:
    """How the starting policy of a stage becomes what it trains; reads configs, no weights.

    SFT starts from the base. Raises PipelineError where a policy of another base or architecture is given.
    """
    if stage == "sft" or run.policy == "base":
        return StartingPolicy(run.model.path, False, None, new_adapter(run, run.model.path))
    source = run.sft_folder / "final" if run.policy == "sft" else run.policy
    if run.check and run.policy == "sft" and run_state(run.sft_folder) != "done":
        return StartingPolicy(source, run.lora is not None, None, None)  # the SFT that this config will train
    is_hub_id = run.policy != "sft" and not Path(source).is_dir()
    if is_hub_id and is_adapter(folder := fetch(run.model, str(source))):
        raise PipelineError(f"policy={source} is an adapter, now in a folder here: type policy={folder}")
    if not is_adapter(source):
        check_architecture(run, source)
        return StartingPolicy(source, False, None, new_adapter(run, source))
    return hand_over_adapter(run, Path(source))


def hand_over_adapter(run: Run, source: Path) -> StartingPolicy:
    """The starting policy of a trained adapter: continued by the same LoRA, else merged into its base."""
    base = base_of(source, run.model)
    check_architecture(run, base)
    if run.policy != "sft" and base != run.model.path:
        log.info("the adapter in %s has the base %s, not this run's base %s", source, base, run.model.path)
    lora = new_adapter(run, base)
    differences = [] if lora is None else adapter_differences(run, base, lora, source)
    if lora is not None and not differences:
        return StartingPolicy(source, True, None, None)
    if differences:
        log.info("the adapter in %s differs (%s): merged, with a new adapter on it", source, "; ".join(differences))
    merge_to = (run.sft_folder if run.policy == "sft" else run.dpo_folder) / "merged"
    return StartingPolicy(source, True, merge_to, new_adapter(run, merge_to))


def new_adapter(run: Run, base: str | Path) -> Any:
    """The PEFT config of a new adapter on `base`, with the hub's revision of the base; None without LoRA."""
    if run.lora is None:
        return None
    return instantiate_node(run.lora, revision=run.model.revision if str(base) == run.model.path else None)


def check_architecture(run: Run, path: str | Path) -> None:
    """Raise PipelineError where the model at `path` does not have the architecture and size of the run's base."""
    if str(path) == run.model.path:
        return
    found, expected = (load_config(run.model, each).get_text_config() for each in (path, None))
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(found, key) != getattr(expected, key):
            raise PipelineError(
                f"{path} is another model than the base {run.model.path} ({key} {getattr(found, key)}, not "
                f"{getattr(expected, key)}): give its base by model=, or model=path model.path=..."
            )


def adapter_differences(run: Run, base: str | Path, lora: Any, adapter: Path) -> list[str]:
    """Where the adapter that `lora` makes on `base` differs from the one in a folder: `r 8, not 16`."""
    config = load_config(run.model, None if str(base) == run.model.path else base)
    expected = empty_model(run.model, config, lora).peft_config["default"].to_dict()
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    differences = []
    for key in SAME_ADAPTER:
        old, new = (sorted(v) if isinstance(v, set | list) else v for v in (saved.get(key), expected[key]))
        if (old or None) != (new or None):
            differences.append(f"{key} {old}, not {new}")
    return differences


def load_start(run: Run, start: StartingPolicy) -> Any:
    """The starting policy, merged first where it has to be, ready to train."""
    if start.merge_to:

        def merge_once() -> None:
            with file_lock(start.merge_to):  # one job of a sweep merges, the others wait
                merge(Path(start.source), start.merge_to, load_options(run))

        on_main_process(merge_once)
    return load_policy(start.weights, load_options(run), trainable=True)


def load_reference(run: Run, start: StartingPolicy) -> Any:
    """The reference as a second, frozen model, where the run needs one, else None.

    That is a copy of the starting policy for reference=frozen, or the model that reference.path names.
    """
    path = run.reference.path or (start.weights if run.reference.mode == "frozen" else None)
    if path is None:
        return None
    if run.reference.path:
        check_architecture(run, base_of(path, run.model) if is_adapter(path) else path)
    loaded = load_policy(path, load_options(run)).requires_grad_(False)
    # TRL puts its loss head on the model itself, which a PEFT wrapper would hide; the adapter's layers are inside.
    return loaded.get_base_model() if is_adapter(path) else loaded
