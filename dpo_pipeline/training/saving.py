"""Saves what was trained as a policy that is loaded back once."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from dpo_pipeline.content_hash import WEIGHTS, content_hash
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import device
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import LoadOptions, load_policy
from dpo_pipeline.training.merge import add_older_keys
from dpo_pipeline.training.trainer import sharding

log = logging.getLogger(__name__)


def save_final(
    trainer: Any, tokenizer: Any, folder: Path, load_options: LoadOptions, fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """Save what `from_pretrained` loads into `folder/final`, load it back once, and return its facts for the manifest.

    Rank 0 writes. Raises PipelineError where the saved policy does not give the log-probs that training ended with, on
    the rows of `fingerprint`.
    """
    # Without Accelerate's autocast, as anybody loads it.
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    # A sharded policy is whole only where all processes take part.
    state = {"state_dict": trainer.accelerator.get_state_dict(trainer.model_wrapped)} if sharding(trainer) else {}
    prompts, completions = fingerprint["prompts"], fingerprint["answers"]
    trained_logprobs = completion_logprobs(policy, prompts, completions, len(prompts))

    def save_and_verify() -> dict[str, Any]:
        final = folder / "final"
        write_final(trainer, policy, tokenizer, final, state)
        # The trained policy makes room on the device for the one that is loaded back.
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.accelerator.free_memory()
        if load_options.quantization is None and not state:
            policy.to("cpu")
        saved_policy = load_policy(final, load_options, device_name=device())
        saved_logprobs = completion_logprobs(saved_policy, prompts, completions, len(prompts))
        return {
            "step": final_step(trainer),
            "reload_difference_nats": verify_saved_policy(
                trainer, final, load_options, trained_logprobs, saved_logprobs
            ),
            "probe": {**fingerprint, "after": [float(row.sum()) for row in saved_logprobs]},
            "sha256": content_hash(final, WEIGHTS),
        }

    return on_main_process(save_and_verify)


def write_final(trainer: Any, policy: Any, tokenizer: Any, final: Path, state: dict[str, Any]) -> None:
    """Write the policy, its tokenizer and its model card to `final`, whole or not at all."""
    partial = final.with_name("final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    # Without the frozen copy of the adapter that served as its reference.
    adapter = {"selected_adapters": ["default"]} if is_peft_model(policy) else {}
    policy.save_pretrained(partial, **state, **adapter)
    policy.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    add_older_keys(partial)
    trainer.create_model_card(model_name=final.parent.name)
    card = Path(trainer.args.output_dir) / "README.md"
    # TRL names a base on the hub alone: of a folder its card says None.
    text = re.sub(r"\[None\]\(\S*\)", lambda _: f"`{policy.config._name_or_path}`", card.read_text("utf-8"))
    (partial / "README.md").write_text(text, "utf-8")
    card.unlink()
    for file in partial.glob("*.safetensors"):  # safetensors makes them readable to their owner alone
        file.chmod((partial / "generation_config.json").stat().st_mode)
    partial.rename(final)


def verify_saved_policy(
    trainer: Any, final: Path, load_options: LoadOptions, trained_logprobs: Any, saved_logprobs: Any
) -> float:
    """The largest difference in nats between the token log-probs in training and of the saved policy; raises
    PipelineError where it is more than rounding.
    """
    difference = max(float((a - b).abs().max()) for a, b in zip(trained_logprobs, saved_logprobs, strict=True))
    is_rounded = load_options.dtype.itemsize < 4 or (sharding(trainer) and (trainer.args.bf16 or trainer.args.fp16))
    if difference > (0.1 if is_rounded else 1e-3):
        raise PipelineError(f"{final} does not load back as it was trained: log-probs differ by {difference:.3g} nats")
    return difference


def final_step(trainer: Any) -> int:
    """The step whose weights the trainer holds: the last, or that of the best checkpoint, which is logged."""
    args, state = trainer.args, trainer.state
    if not (args.load_best_model_at_end and state.best_model_checkpoint):
        return state.global_step
    step = int(state.best_model_checkpoint.rsplit("-", 1)[1])
    extreme = "highest" if args.greater_is_better else "lowest"
    metric = args.metric_for_best_model.removeprefix("eval_").replace("_", " ")
    log.info("final/ is step %d: %s validation %s, %.4g", step, extreme, metric, state.best_metric)
    return step
