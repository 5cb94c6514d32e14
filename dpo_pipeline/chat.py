"""Talk to a policy in the terminal: `python -m dpo_pipeline.chat key=value ...`.

A chat model answers in a dialogue, a base model completes each line. `/new` begins again; Ctrl-D, or Ctrl-C, ends.
"""

import logging
from typing import Any

from dpo_pipeline.cli import main
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.formatting import escape_controls
from dpo_pipeline.record import run_logging
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.chat")  # __name__ is __main__ when run as a command


def run_chat(run: Run) -> None:
    """Answer each line of the input with the policy that `target` names, and with `compare` its reference too.

    Raises PipelineError where the policy is missing, or has no reference to compare with.
    """
    from dpo_pipeline.base_model import base_model
    from dpo_pipeline.data.tokens import eos_ids_of
    from dpo_pipeline.evaluation.policies import target_policies
    from dpo_pipeline.hardware import check_device, device
    from dpo_pipeline.models import load_config, load_generation_config, load_options, load_policy, with_base_of
    from dpo_pipeline.tokenizer import load_tokenizer

    if processes() > 1:
        raise PipelineError("one process is enough to chat: type the command without the launcher")
    with run_logging(None), base_model(run) as run:
        check_device("dpo_pipeline.chat")
        policy, reference = target_policies(run)
        if run.compare and reference is None:
            raise PipelineError("compare=true needs a policy with a reference, which the base is not: type target=dpo")
        if run.target not in ("dpo", "sft", "base"):
            run = with_base_of(run, policy.path)
        if run.check:
            return
        shown = {policy.name: policy} | ({reference.name: reference} if run.compare else {})
        options = load_options(run)
        models = {name: load_policy(each.path, options, device_name=device()) for name, each in shown.items()}
        tokenizer, config = load_tokenizer(run.model), load_config(run.model)
        eos_ids = eos_ids_of(tokenizer, load_generation_config(run.model, config))
        kind = "chat" if tokenizer.chat_template else "completion of each line, as a base model"
        print(f"{' and '.join(shown)}: {kind}; /new begins again, Ctrl-D ends", flush=True)
        converse(run, models, tokenizer, eos_ids, config.get_text_config().max_position_embeddings, policy.beta)


def converse(run: Run, models: dict[str, Any], tokenizer: Any, eos_ids: list[int], context: int, beta: float) -> None:
    """Read lines until the input ends, and print the completion of each model; the first one's is remembered."""
    from dpo_pipeline.data.prompts import prompt_ids

    messages: list[dict[str, str]] = []
    is_chat = bool(tokenizer.chat_template)
    while True:
        try:
            line = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line.strip():
            continue
        if line.strip() == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        try:
            ids = prompt_ids([messages if is_chat else line], is_chat, tokenizer)[0]
        except PipelineError as error:  # such as a special token in the line
            print(escape_controls(str(error)))
            messages.pop()
            continue
        room = min(run.chat.max_new_tokens, context - len(ids))
        if room < 1:
            print(f"that is {len(ids)} tokens, and the model reads {context}: type less, or /new")
            messages.pop()
            continue
        answers = {}
        for name, model in models.items():
            print(f"[{name}]" if len(models) > 1 else "", end="\n" if len(models) > 1 else "")
            answers[name] = stream_completion(model, ids, tokenizer, eos_ids, room, run.chat.temperature)
            print(flush=True)
        if len(models) > 1:
            print_rewards(list(models.values()), answers, ids, beta)
        text = tokenizer.decode(next(iter(answers.values())), skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})


def stream_completion(
    model: Any, prompt: list[int], tokenizer: Any, eos_ids: list[int], room: int, temperature: float
) -> list[int]:
    """Print a completion as it is sampled, and return its ids; Ctrl-C ends it early."""
    import torch
    from transformers import GenerationConfig, TextStreamer

    from dpo_pipeline.logprobs import inference
    from dpo_pipeline.sampling import generation_config

    class Streamer(TextStreamer):
        """Prints text without control characters, and keeps the ids."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.ids: list[int] = []

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.ids += value.flatten().tolist()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(escape_controls(text), end="", flush=True)

    streamer = Streamer()
    config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or None, top_k=0, max_new_tokens=room,
        eos_token_id=eos_ids, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    ids = torch.tensor([prompt], device=model.device)
    try:
        with inference(model), generation_config(model, config):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    return streamer.ids


def print_rewards(models: list[Any], answers: dict[str, list[int]], prompt: list[int], beta: float) -> None:
    """Print the implicit reward of each answer: beta times its log-prob under the policy less that of the reference.

    The policy is the first model, the reference the second (arXiv:2305.18290, section 4).
    """
    from dpo_pipeline.logprobs import completion_logprobs

    completions = [ids for ids in answers.values() if ids]
    policy, reference = (completion_logprobs(model, [prompt] * len(completions), completions, 1) for model in models)
    for name, policy_sum, reference_sum in zip(
        [name for name, ids in answers.items() if ids], policy, reference, strict=True
    ):
        print(f"implicit reward of {name}: {beta * float(policy_sum.sum() - reference_sum.sum()):+.3f}")


if __name__ == "__main__":
    main(run_chat)
