"""From what was trained before to what DPO trains now: the starting policy, its adapter and its reference."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_pipeline.config import Run, instantiate_node
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.locks import file_lock
from dpo_pipeline.models import LoadOptions, adapter_base, is_adapter, load_config, load_policy, load_tokenizer
from dpo_pipeline.training.arguments import weights_dtype
from dpo_pipeline.training.merge import merge

log = logging.getLogger(__name__)

# What must be equal for an adapter to be continued; dropout is switched off by TRL, initialisation is over.
SAME_ADAPTER = (
    "peft_type r lora_alpha target_modules bias use_rslora use_dora rank_pattern alpha_pattern modules_to_save "
    "target_parameters layers_to_transform"
).split()


@dataclass
class StartingPolicy:
    """What DPO starts from: the policy's own folder (or hub id), whether it is an adapter, and how it is handed over.

    `into` is where an adapter is merged before anything is trained on it, None where nothing is to be merged; `lora`
    the config of an adapter to be made, None where one is continued or every weight is trained.
    """

    source: str | Path
    adapter: bool
    into: Path | None
    lora: Any | None

    @property
    def weights(self) -> str | Path:
        """What is loaded, once `into` is made."""
        return self.into or self.source

    def __str__(self) -> str:
        after = "merged, " if self.into else "continued" if self.adapter else ""
        return (
            f"{self.source} ({after}{'new adapter' if self.lora else 'full' if self.into or not self.adapter else ''})"
        )


def load_options(run: Run) -> LoadOptions:
    """How the weights of a run are loaded."""
    return LoadOptions(run.model, weights_dtype(run), run.quantization)


def sft_start(run: Run) -> StartingPolicy:
    """SFT starts from the base, with a new adapter where there is one."""
    return StartingPolicy(run.model.path, False, None, new_adapter(run, run.model.path))


def new_adapter(run: Run, base: str | Path) -> Any:
    """The config of an adapter to be made on `base`, which it names with its revision; None where there is none."""
    if run.lora is None:
        return None
    return instantiate_node(run.lora, revision=run.model.revision if str(base) == run.model.path else None)


def dpo_start(run: Run) -> StartingPolicy:
    """How the starting policy becomes what this run trains; reads configs, no weights.

    Raises PipelineError where a policy of another base, architecture or tokenizer was given.
    """
    if run.policy == "base":
        return sft_start(run)
    source = run.sft_folder / "final" if run.policy == "sft" else Path(run.policy)
    if not is_adapter(source):
        check_fits(run, source)
        return StartingPolicy(source, False, None, new_adapter(run, source))
    base = adapter_base(source)
    if not Path(base).is_dir() and base != run.model.path:
        raise PipelineError(
            f"the adapter in {source} lies on the base {base}, which is no folder here, and this run's base is "
            f"{run.model.path}: give its base by model=path model.path=..."
        )
    check_fits(run, base)
    if run.policy != "sft" and base != run.model.path:
        log.info("the adapter in %s lies on %s, not on this run's base %s", source, base, run.model.path)
    mine = new_adapter(run, base)
    differing = [] if mine is None else adapter_differences(run, base, mine, source)
    if mine is not None and not differing:
        return StartingPolicy(source, True, None, None)
    into = (run.sft_folder if run.policy == "sft" else run.dpo_folder) / "merged"
    if differing:
        log.info(
            "the adapter in %s is another one (%s): merged, and a new one made on it", source, "; ".join(differing)
        )
    return StartingPolicy(source, True, into, new_adapter(run, into))


def planned_sft(run: Run) -> StartingPolicy:
    """What DPO will start from once the same config has made its SFT."""
    return StartingPolicy(run.sft_folder / "final", run.lora is not None, None, None)


def check_fits(run: Run, path: str | Path) -> None:
    """Raise PipelineError where the model at `path` is not of the run's base's architecture and size."""
    if str(path) == run.model.path:
        return
    theirs, mine = (load_config(run.model, p).get_text_config() for p in (path, None))
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        found, wanted = getattr(theirs, key), getattr(mine, key)
        if found != wanted:
            raise PipelineError(
                f"{path} is another model than the base {run.model.path} ({key} {found}, not {wanted}): give its base "
                "by model=, or model=path model.path=..."
            )


def adapter_differences(run: Run, base: str | Path, lora: Any, adapter: Path) -> list[str]:
    """Where the adapter that `lora` makes on `base` differs from the one in a folder: `r 8, not 16`."""
    lora = on_meta(run, base, lora).peft_config["default"].to_dict()
    theirs = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    pairs = {key: (json_value(theirs[key]) if key in theirs else None, json_value(lora[key])) for key in SAME_ADAPTER}
    return [
        f"{key} {found}, not {wanted}" for key, (found, wanted) in pairs.items() if (found or None) != (wanted or None)
    ]


def json_value(value: Any) -> Any:
    """A value as JSON has it, sets and lists of names in one order."""
    return sorted(value) if isinstance(value, set | list) else value


def on_meta(run: Run, base: str | Path, lora: Any) -> Any:
    """The model at `base` with an adapter, if any, without memory for its weights: for its shapes and names."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        config = load_config(run.model, None if str(base) == run.model.path else base)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=run.model.trust_remote_code)
        if lora is None:
            return model
        from peft import get_peft_model

        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise PipelineError(
                f"PEFT refuses what stands under lora for {base}: {reason}: name this model's layers by "
                "lora.target_modules=all-linear, and see the other keys of lora"
            ) from error


def load_start(run: Run, start: StartingPolicy) -> Any:
    """The starting policy, merged first where it has to be, ready to train."""
    if start.into:

        def merged() -> None:
            with file_lock(start.into):  # of the jobs of a sweep one does it
                merge(Path(start.source), start.into, load_options(run))

        on_main_process(merged)
    return load_policy(start.weights, load_options(run), trainable=True)


def second_model(run: Run, start: StartingPolicy) -> Any:
    """The reference as a model of its own, that nothing trains, where the run needs one; else None.

    That is a copy of the starting policy for reference=frozen, or what reference.path names.
    """
    path = run.reference.path or (start.weights if run.reference.mode == "frozen" else None)
    if path is None:
        return None
    if run.reference.path:
        check_fits(run, adapter_base(path) if is_adapter(path) else path)
    loaded = load_policy(path, load_options(run)).requires_grad_(False)
    # TRL puts its loss head on the model itself, which a PEFT wrapper would hide; the adapter's layers are inside.
    return loaded.get_base_model() if is_adapter(path) else loaded


def tokenizer_of(run: Run, source: str | Path) -> Any:
    """The tokenizer of a policy, else of the base.

    Raises PipelineError where the two differ: one would read other tokens than the other.
    """
    base = load_tokenizer(run.model)
    folder = Path(source)
    if folder.is_dir() and not (any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()):
        return base
    own = load_tokenizer(run.model, folder)
    for what, mine, theirs in (
        ("vocabulary", base.get_vocab(), own.get_vocab()),
        ("chat template", base.chat_template, own.chat_template),
        ("end token", base.eos_token, own.eos_token),
        ("BOS", base.bos_token, own.bos_token),
    ):
        if mine != theirs:
            raise PipelineError(
                f"the tokenizer in {folder} has another {what} than that of the base {run.model.path}: take the "
                "tokenizer that the policy was trained with, in both"
            )
    return own
