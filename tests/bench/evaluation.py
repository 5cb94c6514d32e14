"""Times batched completions against a `generate` loop of batch 1, alternating, with the same prompts and the same
lengths.

    make bench-eval                    or: python tests/bench/evaluation.py --model FOLDER --prompts 64 --rounds 3

Prompts are of the pairs at hand. Neither may end a completion early, so that both make as many tokens.
"""

import argparse
import statistics
import time
from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"


def loop(model: object, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """One prompt after the other, as a script would."""
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


def main() -> None:
    """Print prompts per second of both, and their ratio, of each round and in the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SHARED / "models" / "stories15M"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_pipeline.data.sources import read_source
    from dpo_pipeline.sampling import sample

    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    file = SHARED / "data" / "rasbt_preference" / "instruction-data-with-preference.json"
    rows = [row["instruction"] for _, row in read_source(str(file))["train"]]
    prompts = [ids[:64] for ids in tokenizer(rows[: given.prompts])["input_ids"]]
    ways = {
        "batched": lambda: sample(model, prompts, [model.config.vocab_size], 0, given.tokens, given.batch, seed=0),
        "loop of 1": lambda: loop(model, prompts, given.tokens),
    }
    ratios = []
    for number in range(given.rounds):
        took = {}
        for name, way in ways.items():
            began = time.monotonic()
            completions = way()
            took[name] = time.monotonic() - began
            assert all(len(completion) == given.tokens for completion in completions)
        ratios.append(took["loop of 1"] / took["batched"])
        told = ", ".join(f"{name} {len(prompts) / seconds:.1f} prompts/s" for name, seconds in took.items())
        print(f"round {number + 1}: {told}: {ratios[-1]:.1f} times", flush=True)
    print(f"median: {statistics.median(ratios):.1f} times ({given.threads} thread(s), {given.tokens} tokens each)")


if __name__ == "__main__":
    main()
