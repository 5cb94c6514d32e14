"""The keys that our code reads: types, bounds, allowed values and combinations; conf/config.yaml gives the rest."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, with_config
from typing_extensions import TypedDict  # pydantic takes that of `typing` from Python 3.12 on

from dpo_pipeline.errors import nearest

Text = Annotated[str, Field(min_length=1)]
FolderName = Annotated[str, Field(pattern="[^.]")]  # not "." or ".."
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
# An int stays an int: TRL reads 1 and 1.0 differently in some fields, and so does a run's identity.
Positive = Annotated[float | int, Field(gt=0)] | None
NonNegative = Annotated[float | int, Field(ge=0)] | None
CONFIGS = ("config.json", "adapter_config.json")  # what `from_pretrained` looks for in a folder
SMOOTHED = {"cdpo", "robust", "exo_pair", "aot", "aot_unpaired"}  # losses that `dpo.label_smoothing` changes


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, defer_build=True, allow_inf_nan=False)


class LearningRate(Part):
    sft: Rate
    sft_lora: Rate
    dpo: Rate
    dpo_lora: Rate


class Model(Part):
    builder: dict[str, Any] | None
    path: Text | None
    revision: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attn_implementation: str
    use_safetensors: bool | None
    chat_template: Text | None
    chat_template_kwargs: dict[str, Any] | None
    trust_remote_code: bool
    activation_checkpointing: bool | Literal["auto"]
    micro_size: PositiveInt
    learning_rate: LearningRate


class Reference(Part):
    mode: Literal["frozen", "adapter", "cached"]
    path: Text | None


class Batch(Part):
    global_size: PositiveInt
    micro_size: PositiveInt | None


class Training(Part):
    shared_prefix: Literal["auto", "on", "off"]


class Length(Part):
    max: PositiveInt | None = None
    max_prompt: PositiveInt | None = None
    prompt: Literal["left", "drop"]
    completion: Literal["drop", "keep_eos", "cut"]


class Evaluation(Part):
    policy: Text | None
    reference: Text | None
    pairs: PositiveInt
    prompts: PositiveInt
    prompts_file: Text | None
    temperatures: list[Rate]
    opponent: Literal["chosen", "demonstration"]
    all_pairs: bool
    noise_floor: Literal["local", "all", "off"]
    safety_file: Text | None
    bias_file: Text | None
    tracker_prompts: Count
    max_new_tokens: PositiveInt
    kl_budget: PositiveFloat
    batch_size: PositiveInt | None


class BestOf(Part):
    n: PositiveInt | None
    judge: str | None


class Pairs(Part):
    completions: Annotated[int, Field(ge=2)]
    temperature: PositiveFloat
    prompts: PositiveInt | None
    prompts_file: Text | None
    judge: str | None
    keep: Literal["best_worst", "all"]
    min_gap: Rate
    only_ended: bool


class Export(Part):
    dtype: Literal["auto", "bfloat16", "float16", "float32"]


class Chat(Part):
    temperature: Rate
    max_new_tokens: PositiveInt


class Gate(Part):
    against: Text | None
    metric: Text


class Guard(Part):
    action: Literal["warn", "stop", "off"]
    kl_max: PositiveFloat


class Wandb(Part):
    project: str
    entity: str | None
    group: str | None


class DatasetNode(TypedDict):  # with the arguments of its loader
    __pydantic_config__ = ConfigDict(extra="allow", coerce_numbers_to_str=True)
    _target_: str
    test_rows: Count
    split_seed: int
    sft_target: Literal["chosen", "demonstration"]
    form: Literal["auto", "text", "messages"]
    on_bad_row: Literal["drop", "error"]
    on_contradiction: Literal["drop", "error"]
    path: NotRequired[Text]
    sets: NotRequired[dict[str, "DatasetNode"]]


# Fields of trl.SFTConfig and DPOConfig with values that TRL would accept, and then train nothing or fail at step 1.
POSITIVE = "num_train_epochs logging_steps eval_steps save_steps save_total_limit".split()
NON_NEGATIVE = "learning_rate warmup_steps weight_decay max_grad_norm".split()
NUMBERS = dict.fromkeys(POSITIVE, Positive) | dict.fromkeys(NON_NEGATIVE, NonNegative)
NUMBERS["label_smoothing"] = Annotated[float, Field(ge=0, lt=0.5)]  # the share of labels believed wrong
TrainerFields = with_config(extra="allow")(TypedDict("TrainerFields", NUMBERS, total=False))


class Run(Part):
    """One run. A key that is null in conf/config.yaml and means a default has its value once config.py is done."""

    model: Model
    dataset: DatasetNode
    sft_dataset: DatasetNode | None = None
    lora: dict[str, Any] | None
    quantization: dict[str, Any] | None
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    reference: Reference
    judge: dict[str, dict[str, Any]] = {}
    root: Text
    name: FolderName | None
    variant: FolderName | None
    sft_variant: FolderName | None
    seed: Count
    beta: PositiveFloat
    policy: Text
    target: Text
    push: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None
    compare: bool
    sft_best: Literal["perplexity", "last"]
    dpo_best: str
    sft_target: Literal["chosen", "demonstration"] | None
    sft_loss: Literal["last", "all"]
    report_to: Literal["none", "wandb", "tensorboard", "trackio", "mlflow"]
    debug: bool
    check: bool
    overwrite: bool
    overlay: list[Text]
    batch: Batch
    training: Training
    length: Length
    evaluation: Evaluation
    best_of: BestOf
    pairs: Pairs
    export: Export
    chat: Chat
    gate: Gate
    guard: Guard
    wandb: Wandb
    sft: TrainerFields
    dpo: TrainerFields

    @property
    def home(self) -> Path:
        """The folder of all runs of this name."""
        return Path(self.root) / str(self.name)

    @property
    def sft_folder(self) -> Path:
        return self.home / "sft" / str(self.sft_variant)

    @property
    def dpo_folder(self) -> Path:
        return self.home / "dpo" / str(self.variant)

    @property
    def dataset_name(self) -> str:
        """What results call the pairs: the last part of their path, or their loader."""
        return Path(self.dataset["path"]).name if "path" in self.dataset else self.dataset["_target_"].split(".")[-2]

    @property
    def verdicts(self) -> Path:
        return Path(self.root) / ".cache" / "verdicts"

    @field_validator("*")
    def check_value(cls, value: Any, keys: Any) -> Any:
        """Raise ValueError for a value that cannot be, or not with those above it; pydantic reports the others too."""
        no_adapter, fault = keys.data.get("lora", {}) is None, None
        match keys.field_name:
            case "model" if value.path is None and value.builder is None:
                fault = "model.path has no value: type model.path=..."
            case "model" if value.chat_template and not Path(value.chat_template).is_file():
                fault = f"model.chat_template={value.chat_template}: there is no such file (from {Path.cwd()})"
            case "lora" if value is None and "model" in keys.data and keys.data["model"].dtype == "float16":
                fault = "model.dtype=float16 rounds updates of trained weights to nothing: type model.dtype=auto"
            case "lora" | "quantization" if value is not None and "_target_" not in value:
                fault = f"{keys.field_name}.{next(iter(value))} needs an option of {keys.field_name}= to belong to"
            case "quantization" if no_adapter and value is not None:
                fault = "quantization= needs an adapter, quantized weights cannot be trained: add lora=r16"
            case "reference" if no_adapter and value.mode == "adapter":
                fault = "reference=adapter needs an adapter: add lora=r16, or type reference=frozen or cached"
            case "reference" if value.mode == "adapter" and value.path is not None:
                fault = "reference.path is another model, which no adapter is: type reference=frozen or cached"
            case "root" if file := next((path for path in Path(value, "x").parents if path.is_file()), None):
                fault = f"root={value}: {file} is a file, so no folder can lie in it: type another root="
            case "policy" if value not in ("sft", "base") and not is_policy(value):
                near = nearest(value, ("sft", "base"))
                fault = f"policy={value}: must be sft, base, a hub id or a folder with {' or '.join(CONFIGS)}{near}"
            case "report_to" if value != "none" and not find_spec(value):
                fault = f"report_to={value} needs a package: `pip install {value}`, or type report_to=none"
            case "evaluation" if value.reference and not value.policy:
                fault = "evaluation.reference needs a policy to compare with it: type evaluation.policy=FOLDER"
            case "dpo":
                fault = loss_fault(value)
        if fault:
            raise ValueError(fault)
        return value


def is_policy(path: str) -> bool:
    """Whether a path is a folder with a model or an adapter, or could be a hub id, `user/model`."""
    if Path(path).is_dir():
        return any(Path(path, file).is_file() for file in CONFIGS)
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None


def loss_fault(dpo: dict[str, Any]) -> str | None:
    """What is wrong with the loss and its label smoothing, if anything."""
    loss, smoothing = dpo.get("loss_type"), dpo.get("label_smoothing", 0)
    losses = loss if isinstance(loss, list) else [loss]
    if not losses or not all(isinstance(name, str) for name in losses):
        return f"dpo.loss_type={loss} names no loss: type loss=NAME, or ++dpo.loss_type=[A,B]"
    if losses == ["cdpo"] and ("label_smoothing" not in dpo or "loss_weights" in dpo):
        return "cdpo needs dpo.label_smoothing and sets the weights itself: type loss=cdpo alone"
    if smoothing and not SMOOTHED & set(losses):
        return f"dpo.label_smoothing={smoothing} has no effect with {'+'.join(losses)}: type loss=cdpo or loss=robust"
    return None
