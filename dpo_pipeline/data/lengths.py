"""The length policy: what a row of token ids is cut to, or why it is dropped."""

from dataclasses import dataclass
from typing import Any

from dpo_pipeline.errors import PipelineError


@dataclass(frozen=True)
class LengthLimits:
    """Limits in tokens: of a prompt with its longer completion, of a prompt where the pair exceeds that, and what
    gives.

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
        cut = length.max_prompt or longest // 2
        if cut >= longest:
            raise PipelineError(
                f"length.max_prompt={cut} leaves no room for a completion in length.max={longest}: lower it"
            )
        return cls(longest, cut, length.prompt, length.completion)

    def fit(self, prompt: list[int], completions: list[list[int]], bos: int, end: int) -> tuple[Any, Any, str, str]:
        """Prompt and completions cut to the limits, what was cut, and the reason to drop them, empty where there is
        none.

        As in the DPO authors' code a prompt is cut from its left, but for its `bos` first tokens.
        """
        longest = max(map(len, completions))
        if len(prompt) + longest <= self.max:
            return prompt, completions, "", ""
        cut = ""
        if len(prompt) > self.max_prompt:
            if self.prompt == "drop":
                return prompt, completions, "", "too long"
            rest = prompt[bos + len(prompt) - self.max_prompt :]
            # Of a dialogue whose every message opens with it, the rest may begin so by itself.
            prompt, cut = (prompt[:bos] if rest[:1] != prompt[:1] else []) + rest, "prompt cut"
        room = self.max - len(prompt)
        if longest <= room:
            return prompt, completions, cut, ""
        if self.completion == "drop":
            return prompt, completions, "", "too long"
        last = [end] if self.completion == "keep_eos" else []
        completions = [ids if len(ids) <= room else ids[: room - len(last)] + last for ids in completions]
        return prompt, completions, "completion cut", ""
