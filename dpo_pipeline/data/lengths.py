"""The length policy: what a row of token ids is cut to, or why it is dropped."""

from dataclasses import dataclass
from typing import Any

from dpo_pipeline.errors import PipelineError


@dataclass(frozen=True)
class LengthLimits:
    """Limits in tokens: `max` of a prompt with its longer completion, `max_prompt` of a prompt if the row exceeds it.

    `prompt`: left | drop, cut it to `max_prompt`, or drop the row. `completion`: drop | keep_eos | cut, drop the row,
    or cut its completions, with or without the end token.
    """

    max: int
    max_prompt: int
    prompt: str = "left"
    completion: str = "drop"

    @classmethod
    def resolve(cls, length: Any, context: int) -> "LengthLimits":
        """The limits of a config's `length`, or their defaults; raises PipelineError beyond the model's `context`."""
        longest = length.max or min(512, context)
        if longest > context:
            raise PipelineError(f"length.max={longest} exceeds the model's context of {context} tokens: lower it")
        max_prompt = length.max_prompt or longest // 2
        if max_prompt >= longest:
            raise PipelineError(
                f"length.max_prompt={max_prompt} leaves no room for a completion in length.max={longest}: lower it"
            )
        return cls(longest, max_prompt, length.prompt, length.completion)

    def fit(self, prompt: list[int], completions: list[list[int]], bos: int, end: int) -> tuple[Any, Any, str, str]:
        """Prompt and completions within the limits, what was cut, and the reason to drop them; both may be empty.

        As in the DPO authors' code a prompt is cut from its left; its first `bos` tokens stay.
        """
        longest = max(map(len, completions))
        if len(prompt) + longest <= self.max:
            return prompt, completions, "", ""
        cut = ""
        if len(prompt) > self.max_prompt:
            if self.prompt == "drop":
                return prompt, completions, "", "too long"
            rest = prompt[bos + len(prompt) - self.max_prompt :]
            # In a dialogue whose every message opens with BOS, the rest may already begin with one.
            prompt, cut = (prompt[:bos] if rest[:1] != prompt[:1] else []) + rest, "prompt cut"
        room = self.max - len(prompt)
        if longest <= room:
            return prompt, completions, cut, ""
        if self.completion == "drop":
            return prompt, completions, "", "too long"
        last = [end] if self.completion == "keep_eos" else []
        completions = [ids if len(ids) <= room else ids[: room - len(last)] + last for ids in completions]
        return prompt, completions, "completion cut", ""
