"""The one config of every command: its schema, and how it is composed, checked and completed."""

import dataclasses
import inspect
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_pipeline.distributed import is_main_process, processes
from dpo_pipeline.errors import OneRankError, PipelineError, explain_config_error, nearest
from dpo_pipeline.hardware import STOPS
from dpo_pipeline.naming import loss_names, name_folders

CONF = Path(__file__).resolve().parent.parent / "conf"
CHOICES = {
    "precision.mixed": ("auto", "bf16", "fp16", "fp32"),
    "reference.mode": ("frozen", "adapter", "cached"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "sft_best": ("perplexity", "last"),
    "sft_target": (None, "chosen", "demonstration"),
    "length.prompt": ("left", "drop"),
    "length.completion": ("drop", "keep_eos", "cut"),
    "guard.action": ("warn", "stop", "off"),
    "evaluation.opponent": ("chosen", "demonstration"),
    "report_to": ("none", "wandb", "tensorboard", "trackio", "mlflow"),
}
# Of each data set, from conf/dataset/common/; its other keys are its loader's arguments.
ROW_KEYS = ("test_rows", "split_seed", "sft_target", "form", "on_bad_row")
ROW_CHOICES = {"form": ("auto", "text", "messages"), "on_bad_row": ("drop", "error")}


@dataclass
class LearningRate:
    sft: float = MISSING
    sft_lora: float = MISSING
    dpo: float = MISSING
    dpo_lora: float = MISSING


@dataclass
class Model:
    builder: dict[str, Any] | None = MISSING
    path: str | None = MISSING
    revision: str | None = None
    dtype: str = MISSING
    attn_implementation: str = MISSING
    use_safetensors: bool | None = MISSING
    trust_remote_code: bool = MISSING
    activation_checkpointing: bool = MISSING
    micro_size: int = MISSING
    learning_rate: LearningRate = field(default_factory=LearningRate)


@dataclass
class Precision:
    mixed: str = MISSING


@dataclass
class Reference:
    mode: str = MISSING
    path: str | None = None


@dataclass
class Batch:
    global_size: int = MISSING
    micro_size: int | None = None


@dataclass
class Length:
    max: int | None = None
    max_prompt: int | None = None
    prompt: str = MISSING
    completion: str = MISSING


@dataclass
class Evaluation:
    pairs: int = MISSING
    prompts: int = MISSING
    max_new_tokens: int = MISSING
    temperatures: list[float] = MISSING
    opponent: str = MISSING
    all_pairs: bool = MISSING
    kl_budget: float = MISSING
    tracker_prompts: int = MISSING
    policy: str | None = None
    reference: str | None = None
    prompts_file: str | None = None
    safety_file: str | None = None
    bias_file: str | None = None


@dataclass
class BestOf:
    n: int | None = None
    judge: str | None = None


@dataclass
class Guard:
    action: str = MISSING
    kl_max: float = MISSING


@dataclass
class Wandb:
    project: str = MISSING
    entity: str | None = None
    group: str | None = None


@dataclass
class Run:
    """Every key that our code reads; conf/config.yaml gives the defaults and says what moving each one does."""

    model: Model = field(default_factory=Model)
    dataset: dict[str, Any] = field(default_factory=dict)
    sft_dataset: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    precision: Precision = field(default_factory=Precision)
    reference: Reference = field(default_factory=Reference)
    judge: dict[str, Any] = field(default_factory=dict)
    root: str = MISSING
    name: str | None = None
    variant: str | None = None
    sft_variant: str | None = None
    seed: int = MISSING
    beta: float = MISSING
    policy: str = MISSING
    sft_best: str = MISSING
    dpo_best: str = MISSING
    sft_target: str | None = None
    report_to: str = MISSING
    debug: bool = MISSING
    check: bool = MISSING
    overwrite: bool = MISSING
    batch: Batch = field(default_factory=Batch)
    length: Length = field(default_factory=Length)
    evaluation: Evaluation = field(default_factory=Evaluation)
    best_of: BestOf = field(default_factory=BestOf)
    guard: Guard = field(default_factory=Guard)
    wandb: Wandb = field(default_factory=Wandb)
    sft: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """The folder of all runs of this name."""
        return Path(self.root) / str(self.name)

    @property
    def dataset_name(self) -> str:
        """What the pairs are called in results: the last part of their path, or their loader."""
        return Path(self.dataset["path"]).name if "path" in self.dataset else self.dataset["_target_"].split(".")[-2]

    @property
    def verdicts(self) -> Path:
        """Where what judges have said is kept."""
        return Path(self.root) / ".cache" / "verdicts"

    @property
    def sft_folder(self) -> Path:
        return self.home / "sft" / str(self.sft_variant)

    @property
    def dpo_folder(self) -> Path:
        return self.home / "dpo" / str(self.variant)


def register() -> None:
    """Make the schema known to Hydra, under the name that conf/config.yaml asks for."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Run)


def main(stage: Callable[[Run], Any]) -> None:
    """Run a command: compose its config from the command line, check it, and call `stage` with it.

    Ends the process with 1 and one sentence where the config or the input is wrong, with 75 where it was interrupted.
    """
    import hydra
    from hydra.core.plugins import Plugins
    from hydra_plugins.dpo_pipeline.launcher import ProcessLauncher

    from dpo_pipeline.quiet import quiet

    quiet()
    Plugins.instance().register(ProcessLauncher)  # an editable install is not scanned for plugins
    # Hydra then raises instead of printing; the libraries' many small bars are off, the training's own is not.
    os.environ.update(HYDRA_FULL_ERROR="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    register()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def task(cfg: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra_cfg = HydraConfig.get()
        if processes() > 1 and hydra_cfg.mode == RunMode.MULTIRUN:
            exit_with_error(sweep_in_ranks())
        try:
            stage(validate(cfg, list(hydra_cfg.overrides.task), dict(hydra_cfg.runtime.choices)))
        except Exception as error:  # here, since Hydra prints a line of its own for what leaves a task
            if sentence := explain_error(error):
                exit_with_error(sentence, alone=isinstance(error, OneRankError))
            raise

    if (given := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":  # before TRL's arguments set it
        exit_with_error(f"the launch file says mixed_precision: {given}: take that out, precision= alone says it")
    for each in STOPS:
        signal.signal(each, interrupt)
    try:
        task()
    except KeyboardInterrupt:
        sys.exit(75)
    except Exception as error:
        if sentence := explain_error(error):
            exit_with_error(sentence)
        raise


def sweep_in_ranks() -> str:
    """The sentence for a sweep that a launcher started in several processes."""
    given = " ".join(item for item in sys.argv[1:] if item not in ("-m", "--multirun"))
    return (
        f"a sweep under a launcher would run whole in each of the {processes()} processes: type `python -m "
        f"dpo_pipeline.{Path(sys.argv[0]).stem} -m {given}` without the launcher"
    )


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt for a signal to stop; a moment later where it would be thrown away, in a `__del__`."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            threading.Timer(0.1, signal.raise_signal, (signum,)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def exit_with_error(sentence: object, alone: bool = False) -> NoReturn:
    """End the process with 1 and one sentence: of rank 0, or of the rank that met an error `alone`."""
    lines = (line.strip() for line in str(sentence).splitlines())  # what a library said may have several
    told = f"error: {' '.join(line for line in lines if line)}"
    if is_main_process():
        sys.exit(told)
    if not alone:
        time.sleep(10)  # rank 0 tells it; a rank that ended before would have the launcher end rank 0 untold
    sys.exit(f"rank {os.environ['RANK']}: {told}" if alone else 1)


def compose(overrides: list[str]) -> Run:
    """The checked config that a command line of these overrides makes."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    register()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("config", overrides, return_hydra_config=True)
    except Exception as error:
        raise PipelineError(explain_error(error) or str(error)) from error
    return compose_and_validate(cfg)


def compose_and_validate(cfg: DictConfig) -> Run:
    """The checked config of a composition that holds Hydra's own part."""
    ours = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return validate(ours, list(cfg.hydra.overrides.task), dict(cfg.hydra.runtime.choices))


def validate(cfg: DictConfig, typed: list[str], choices: dict[str, str]) -> Run:
    """The typed config, with every null that means a default of its own filled in.

    `typed` are the overrides of the command line, `choices` the option of each group: names and folders follow from
    them. Raises PipelineError where a key is unknown or missing or a value cannot be.
    """
    try:
        # Once more through the schema: composition lets `+bta=0.3` and an unset `???` pass.
        merged = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.to_container(cfg, resolve=True))
        for key in sorted(OmegaConf.missing_keys(cfg)):
            raise PipelineError(f"{key} has no value: type {key}=...")
        run: Run = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise PipelineError(explain_error(error)) from error
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(merged, key)
        if value not in allowed:
            names = ", ".join("null" if a is None else a for a in allowed)
            raise PipelineError(f"{key}={value} is none of its values: {names}{nearest(value, allowed)}")
    check_numbers(merged)
    for key in ("dataset", "sft_dataset"):
        if getattr(run, key) is not None:
            check_dataset(key, getattr(run, key))
    check_paths(run)
    check_combinations(run)
    if "truth" in run.judge and run.dataset["_target_"] != "dpo_pipeline.data.reviews.load":
        if any(item.startswith("judge") for item in typed):
            raise PipelineError("judge=truth knows the truth of dataset=reviews alone: leave it out")
        del run.judge["truth"]  # came with dataset@sft_dataset=reviews
    resolve_defaults(run, typed, choices)
    return run


def check_dataset(key: str, node: dict[str, Any]) -> None:
    """Raise PipelineError where a data set's own keys, or those of the sets that it mixes, cannot be."""
    for name in (name for name in ROW_KEYS if name not in node):
        raise PipelineError(f"{key} has no {name}: begin its file with `defaults: [common/rows@_here_]`")
    for name, allowed in ROW_CHOICES.items():
        if node[name] not in allowed:
            listed = ", ".join(allowed)
            raise PipelineError(
                f"{key}.{name}={node[name]} is none of its values: {listed}{nearest(node[name], allowed)}"
            )
    if "path" in node and not node["path"]:
        raise PipelineError(f"{key}.path has no value: type {key}.path=...")
    check_arguments(key, {k: v for k, v in node.items() if k not in ROW_KEYS})
    if "sets" not in node:
        return
    if not isinstance(node["sets"], dict):
        raise PipelineError(
            f"{key}.sets={node['sets']} is no mapping: type +dataset@{key}.sets.NAME=OPTION for each set"
        )
    for name, each in node["sets"].items():
        if not isinstance(each, dict) or "_target_" not in each:
            raise PipelineError(f"{key}.sets.{name}={each} is no data set: type +dataset@{key}.sets.{name}=OPTION")
        check_dataset(f"{key}.sets.{name}", each)


def check_numbers(merged: DictConfig) -> None:
    """Raise PipelineError for a number that TRL would take, and then train nothing or fail at step 1."""
    stages = [("sft", "dpo"), ("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "save_total_limit")]
    positive = (
        *("beta", "batch.global_size", "batch.micro_size", "length.max", "length.max_prompt"),
        *("evaluation.pairs", "evaluation.prompts", "evaluation.max_new_tokens", "evaluation.kl_budget"),
        *("best_of.n", "guard.kl_max"),
        *(".".join(key) for key in itertools.product(*stages)),
    )
    stages = [("sft", "dpo"), ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")]
    for key in (
        *positive,
        "seed",
        "evaluation.tracker_prompts",
        *(".".join(key) for key in itertools.product(*stages)),
    ):
        value = OmegaConf.select(merged, key)
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise PipelineError(f"{key}={value} is no number")
        if key in positive and not value > 0:
            raise PipelineError(f"{key}={value}: it must be larger than 0")
        if not value >= 0:
            raise PipelineError(f"{key}={value}: it must not be below 0")
    for value in merged.evaluation.temperatures:
        if not value >= 0:
            raise PipelineError(
                f"evaluation.temperatures: {value:g} is below 0: give numbers from 0 (the likeliest token) on"
            )


def check_paths(run: Run) -> None:
    """Raise PipelineError where no folder can lie at the places named, or nothing is named."""
    if not run.root:
        raise PipelineError("root has no value: type root=...")
    for key in ("name", "variant", "sft_variant"):
        if (value := getattr(run, key)) in (".", ".."):
            raise PipelineError(f"{key}={value} is another folder's place: type a name of its own")
    if not run.model.builder and not run.model.path:
        raise PipelineError("model.path has no value: type model.path=...")
    for place in (Path(run.root), *Path(run.root).parents):
        if place.is_file():
            raise PipelineError(
                f"root={run.root}: no folder can lie in {place}, which is a file: name another by root=..."
            )
    if run.report_to != "none" and not find_spec(run.report_to):
        raise PipelineError(
            f"report_to={run.report_to} needs the package {run.report_to}, which is not installed: `pip install "
            f"{run.report_to}`, or type report_to=none"
        )


def check_combinations(run: Run) -> None:
    """Raise PipelineError for values that are fine alone and cannot be together."""
    if run.quantization is not None and run.lora is None:
        raise PipelineError("quantized weights cannot be trained, only an adapter on them: add lora=r16")
    if run.model.dtype == "float16" and run.lora is None:
        raise PipelineError(
            "model.dtype=float16 holds no weights that are trained, updates round to nothing: type model.dtype=auto"
        )
    if run.reference.mode == "adapter" and run.lora is None:
        raise PipelineError("reference=adapter needs an adapter: set lora=r16, or reference=frozen or cached")
    if run.reference.mode == "adapter" and run.reference.path is not None:
        raise PipelineError("reference.path names another model, which no adapter is: add reference=frozen or cached")
    if run.policy not in ("sft", "base") and not any(
        (Path(run.policy).expanduser() / file).is_file() for file in ("config.json", "adapter_config.json")
    ):
        raise PipelineError(
            f"policy={run.policy} is neither sft, base nor a folder with config.json or adapter_config.json"
            f"{nearest(run.policy, ('sft', 'base'))}"
        )
    if run.evaluation.reference and not run.evaluation.policy:
        raise PipelineError(
            "evaluation.reference= is what one folder is measured against: name that by evaluation.policy=FOLDER"
        )
    losses = loss_names(run)
    if losses == ["cdpo"] and ("label_smoothing" not in run.dpo or "loss_weights" in run.dpo):
        raise PipelineError("cdpo needs dpo.label_smoothing and sets the weights itself: choose it by loss=cdpo alone")
    if "label_smoothing" not in run.dpo:
        return
    smoothing = run.dpo["label_smoothing"]
    if not isinstance(smoothing, int | float) or not 0 <= smoothing < 0.5:
        raise PipelineError(
            f"dpo.label_smoothing={smoothing} is the share of labels believed wrong: it lies in [0, 0.5)"
        )
    if smoothing and not {"cdpo", "robust", "exo_pair", "aot", "aot_unpaired"} & set(losses):
        raise PipelineError(
            f"dpo.label_smoothing={smoothing} has no effect in TRL with {'+'.join(losses)}: choose loss=cdpo or robust"
        )


def resolve_defaults(run: Run, typed: list[str], choices: dict[str, str]) -> None:
    """Replace in place each null that stands for a default: learning rates, the micro batch, names."""
    rates = dataclasses.asdict(run.model.learning_rate)
    for stage in ("sft", "dpo"):
        fields = getattr(run, stage)
        if fields["learning_rate"] is None:
            fields["learning_rate"] = rates[stage if run.lora is None else f"{stage}_lora"]
    fitting = (n for n in range(run.model.micro_size, 0, -1) if run.batch.global_size % (n * processes()) == 0)
    run.batch.micro_size = run.batch.micro_size or next(fitting, 1)
    if run.debug:
        run.sft_best = "last"  # of two steps the first, at the warm-up's rate of 0, may be the best: the bare base
    run.sft_target = run.sft_target or (run.sft_dataset or run.dataset)["sft_target"]
    name_folders(run, typed, choices)
    if run.policy not in ("sft", "base"):
        run.policy = str(Path(run.policy).expanduser().resolve())
    if run.model.builder:
        run.model.path = str((run.home / "base" / "model").resolve())
    elif Path(run.model.path).expanduser().is_dir():
        run.model.path = str(Path(run.model.path).expanduser().resolve())  # adapters name it, from wherever loaded


def check_arguments(key: str, node: dict[str, Any]) -> None:
    """Raise PipelineError where the `_target_` of a node does not take its other keys; imports that target.

    A number given as text is refused too, where the target says that it wants a number.
    """
    from hydra.utils import get_class, get_method

    target = node["_target_"]
    named = get_class(target) if target.split(".")[-1][0].isupper() else get_method(target)
    parameters = inspect.signature(named).parameters
    for name, value in node.items():
        if name.startswith("_"):
            continue
        if name not in parameters:
            raise PipelineError(f"{key}.{name} is no option of {target}{nearest(name, parameters)}")
        if parameters[name].annotation in (int, float) and not isinstance(value, int | float):
            raise PipelineError(f"{key}.{name}={value} is no number")


def instantiate_node(node: dict[str, Any], **extra: Any) -> Any:
    """What the `_target_` of a config node makes of its other keys and `extra`: the only call of Hydra's instantiate.

    Lists and dicts arrive as Python's own: PEFT could not save its config otherwise. Raises PipelineError where the
    target does not take a key, or raises one itself.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    check_arguments(node["_target_"].split(".")[-2], node)
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, PipelineError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, ValueError | TypeError) and not node["_target_"].startswith("dpo_pipeline."):
            raise PipelineError(f"{node['_target_']} refuses its options: {error.__cause__}") from error
        raise


def explain_error(error: BaseException) -> str | None:
    """One sentence for an error that a person caused, with the nearest names of ours; None for any other error."""
    groups = {
        folder.name: [file.stem for file in folder.glob("*.yaml")] for folder in CONF.iterdir() if folder.is_dir()
    }
    return explain_config_error(error, known_keys(), groups)


def known_keys() -> list[str]:
    """Every dotted key that conf/config.yaml or the schema lists."""

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        return [key for k, v in node.items() for key in (f"{prefix}{k}", *walk(v, f"{prefix}{k}."))]

    schema = OmegaConf.to_container(OmegaConf.structured(Run))
    listed = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    return sorted({*walk(schema, ""), *(k for k in walk(listed, "") if not k.startswith(("hydra", "defaults")))})
