"""Times a five-beta sweep against five single runs of `trl dpo` with the same settings, one after the other.

    make bench-sweep                          or: python tests/bench/sweep.py --rows 300 --lora none

Both train the same rows in the same batches from the same base and compute the reference's log-probs beforehand; what
differs is what a sweep shares. Wall and CPU seconds of all processes; on a busy machine read the CPU seconds.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from dpo_pipeline.config import compose
from dpo_pipeline.data.prepare import load_rows
from dpo_pipeline.data.report import kept_rows

SHARED = Path(__file__).resolve().parents[3] / "shared"
BETAS = ("0.05", "0.1", "0.2", "0.3", "0.5")


def timed(call: list[str], log: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command and its children; raises where it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("a") as output:
        subprocess.run(call, stdout=output, stderr=subprocess.STDOUT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "stories15M")
    parser.add_argument("--pairs", type=Path, default=SHARED / "data" / "hh_harmless" / "train.jsonl.gz")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--lora", choices=("none", "r16"), default="r16")
    given = parser.parse_args()
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    folder = Path(tempfile.mkdtemp(prefix="bench-sweep-"))
    os.environ["HF_HOME"] = str(folder / "hf")  # TRL's own cache starts empty, as ours does
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    pairs = load_rows(compose(["dataset=hh_rlhf", f"dataset.path={given.pairs}"]), "dpo", tokenizer)
    sides = ("chosen", "rejected")
    fit = [p for p in kept_rows(pairs) if max(len(tokenizer(p["prompt"] + p[s])["input_ids"]) for s in sides) < 250]
    rows = fit[: given.rows]
    ours = folder / "pairs.jsonl"
    ours.write_text("".join(json.dumps({key: row[key] for key in ("prompt", *sides)}) + "\n" for row in rows))
    typed = [
        *("policy=base", "model=path", f"model.path={given.model}", "dataset=json", f"dataset.path={ours}"),
        *(f"root={folder / 'outputs'}", "dataset.test_rows=1", f"lora={given.lora}", "length.max=256"),
        *("batch.global_size=16", "batch.micro_size=8", "dpo.learning_rate=1e-4", "dpo.eval_steps=100000"),
        *("evaluation.pairs=1", "evaluation.prompts=1", "evaluation.max_new_tokens=8"),
    ]
    train = kept_rows(load_rows(compose(typed), "dpo", tokenizer), "train")
    (folder / "trl").mkdir()
    lines = (json.dumps({key: row[key] for key in ("prompt", *sides)}) + "\n" for row in train)
    (folder / "trl" / "train.jsonl").write_text("".join(lines))
    log = folder / "log.txt"
    print(f"{len(train)} pairs, lora={given.lora}, betas {', '.join(BETAS)}; output: {log}", flush=True)
    call = [sys.executable, "-m", "dpo_pipeline.dpo", "-m", *typed, f"beta={','.join(BETAS)}"]
    wall, cpu = timed(call, log)
    print(f"sweep          {wall:7.1f} s wall {cpu:7.1f} s CPU", flush=True)
    adapter = ["--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear"]
    single = [
        *("trl", "dpo", "--model_name_or_path", str(given.model), "--dataset_name", str(folder / "trl")),
        *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-4"),
        *("--lr_scheduler_type", "cosine", "--warmup_steps", "0.1", "--max_length", "256", "--num_train_epochs", "1"),
        *("--precompute_ref_log_probs", "--activation_checkpointing", "False", "--bf16", "False", "--use_cpu"),
        *("--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none", "--dtype", "float32"),
        *(adapter if given.lora == "r16" else []),
    ]
    single[0] = str(Path(sys.executable).with_name("trl"))
    singles = []
    for beta in BETAS:
        singles.append(timed([*single, "--beta", beta, "--output_dir", str(folder / f"trl-{beta}")], log))
        print("trl dpo  {:>5} {:7.1f} s wall {:7.1f} s CPU".format(beta, *singles[-1]), flush=True)
    walls, cpus = (sum(side) for side in zip(*singles, strict=True))
    print(f"five trl dpo   {walls:7.1f} s wall {cpus:7.1f} s CPU")
    print(f"a sweep is {walls / wall:.2f} times as fast (wall), {cpus / cpu:.2f} times (CPU)")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
