"""Times DPO of this project against TRL's own script, side by side; ends with tables in Markdown for README.

    make bench ARGS="--pairs 48 --repeats 1"          or: python -m tests.bench.training --workloads hh
    make bench ARGS="--sweep"                         five betas too: one `-m` against five runs of TRL
    make bench ARGS="--device cuda --methods lora"    models of random weights in the shape of 1.4B and 7B

All variants train the same rows in the same order, each in a process of its own; they alternate. TRL's process is
`python -m trl.scripts.dpo`, which `trl dpo` starts. `training` is the reference pass with all steps, `command` the
whole process: ours also checks, loads `final/` back and evaluates a pair. Tokens are those of TRL's count, prompts
twice a pair; so is MFU, of bfloat16's peak and with causal attention. On a busy machine read the CPU seconds.
"""

import argparse
import json
import math
import os
import re
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[3] / "shared"
BETAS = ("0.01", "0.05", "0.1", "0.3", "0.5")
BEST = "--precompute_ref_log_probs --activation_checkpointing False --save_strategy no".split()
GROUPED = "--train_sampling_strategy group_by_length --remove_unused_columns False".split()
TRL = {"trl dpo": [], "trl dpo, best flags": BEST, "trl dpo, best flags, column `length`": [*BEST, *GROUPED]}
OURS = {
    "this project": [],
    "- similar lengths": ["switch=lengths"],  # these two have no key: see run_child
    "- LM head on completions only": ["switch=head"],
    "- no activation checkpointing": ["dpo.activation_checkpointing=true"],
    "- shared prompt": ["training.shared_prefix=off"],
    "- cached reference": ["reference=frozen"],
}
METHODS = {  # keys of this project; flags of TRL
    "full": ("", ""),
    "lora": ("lora=r16", "--use_peft --lora_dropout 0 --lora_target_modules all-linear"),
}
METHODS["qlora"] = ("lora=r16 quantization=nf4", f"{METHODS['lora'][1]} --load_in_4bit --use_bnb_nested_quant")
ROWS_AT_ONCE = {"tiny": 4, "1.4B": 4, "7B": 2}  # of the models of random weights
LENGTHS = ((90, 1.0), (250, 0.7), (250, 0.7))  # tokens of prompt and completions, log-normal, as in UltraFeedback
SECONDS = ["command", "command CPU", "training", "training CPU"]


def run_child(file: str, module: str, *arguments: str) -> None:
    """Run a module as `python -m` does, and write what a clock in its trainer saw."""
    import torch
    from transformers import TrainerCallback, trainer
    from trl import DPOTrainer
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    facts: dict[str, Any] = {"losses": [], "spans": []}  # of the reference pass and the steps: wall and CPU clock
    run_reference_pass = DPOTrainer._precompute_ref_logps

    def read_clocks() -> tuple[float, float]:
        return time.time(), time.process_time()

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            facts["spans"].append([read_clocks(), None])

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                facts["losses"].append(logs["loss"])
                facts["spans"][-1][1], facts["tokens"] = read_clocks(), logs["num_tokens"]
                facts.setdefault("first step", time.time())

    def time_reference_pass(*positional):
        start, table = read_clocks(), run_reference_pass(*positional)
        facts["spans"].append([start, read_clocks()])
        return table

    trainer.DEFAULT_CALLBACKS.append(Clock)
    DPOTrainer._precompute_ref_logps = time_reference_pass
    if "switch=lengths" in arguments or "switch=head" in arguments:
        from dpo_pipeline.training import lm_head
        from dpo_pipeline.training import trainer as our_trainer

        if "switch=lengths" in arguments:
            our_trainer.use_similar_lengths = lambda trainer: None
        else:
            utils._use_triton, utils._ChunkedLogProbFunction = chunked_logprob._use_triton, lm_head.trl_head
    sys.argv[1:] = [argument for argument in arguments if not argument.startswith("switch=")]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    resident = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    facts["memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
    Path(file).write_text(json.dumps(facts))


def time_command(call: list[str], folder: Path) -> dict[str, float]:
    """Wall and CPU seconds of a command and its children; raises CalledProcessError where it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    with (folder / "log.txt").open("a") as log:
        subprocess.run([sys.executable, "-m", *call], stdout=log, stderr=subprocess.STDOUT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": time.time() - start, "command CPU": cpu}


def time_variant(name: str, work: dict[str, Any], folder: Path, betas: tuple[str, ...]) -> dict[str, Any]:
    """The numbers of one epoch, or of one for each of several `betas`; caches start empty, outputs are deleted."""
    is_sweep, file = len(betas) > 1, folder / "facts.json"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        os.environ["HF_HOME"] = f"{scratch}/hf"
        if name in OURS:
            calls = [["dpo_pipeline.dpo", *work["keys"], *OURS[name], f"root={scratch}", f"beta={','.join(betas)}"]]
            calls[0] += ["-m"] if is_sweep else []
        else:
            flags = [*work["flags"], *TRL[name], "--output_dir", f"{scratch}/out"]
            calls = [["trl.scripts.dpo", *flags, "--beta", beta] for beta in betas]
        start = time.time()
        prefix = [] if is_sweep else ["tests.bench.training", "--child", str(file)]
        timings = [time_command([*prefix, *call], folder) for call in calls]
    numbers = {key: sum(timing[key] for timing in timings) for key in SECONDS[:2]}
    if is_sweep:
        return numbers
    facts = json.loads(file.read_text())
    spans = [[end - begin for begin, end in zip(*span, strict=True)] for span in facts["spans"]]
    numbers["training"], numbers["training CPU"] = map(sum, zip(*spans, strict=True))
    numbers |= {"first step": facts["first step"] - start, "GiB": facts["memory"] / 2**30, "losses": facts["losses"]}
    numbers |= {"pairs/s": work["pairs"] / numbers["training"], "tokens/s": facts["tokens"] / numbers["training"]}
    if work["on_gpu"]:
        numbers["MFU %"] = model_utilization(work, facts["tokens"], numbers["tokens/s"])
    return numbers


def model_utilization(work: dict[str, Any], tokens: int, speed: float) -> float:
    """MFU in percent of the GPU's peak in bfloat16, as if all weights were trained."""
    import torch
    from transformers import AutoConfig
    from trl.trainer import utils

    config, length = AutoConfig.from_pretrained(work["model"]), round(tokens / work["pairs"] / 2)
    peak = utils.get_peak_flops(torch.cuda.get_device_name(), "bfloat16") or math.nan
    mfu = utils.compute_mfu(utils.compute_flops_per_token(config, length), speed, 1, peak)
    return utils.adjusted_mfu(mfu, config, length)


def make_keys(workload: str, options: Any, folder: Path) -> list[str]:
    """The keys of a workload's model, pairs, batch and learning rate, with the model and the pairs on disk."""
    from dpo_pipeline.base_model import base_model
    from dpo_pipeline.config import compose
    from tests.shapes import SHAPES, TINY, make_model, write_pairs

    if workload == "hh":
        rows = f"dataset.path={SHARED}/data/hh_harmless/train.jsonl.gz"
        keys = [rows, "dataset=hh_rlhf", "dataset.subsets=null", "batch.global_size=32", "dpo.learning_rate=1e-5"]
        model = SHARED / "models" / "stories15M"
    elif workload == "embedded":
        with base_model(compose([f"root={folder}"])) as run:
            model = run.model.path
        keys = [f"batch.micro_size={run.batch.micro_size}", f"dpo.learning_rate={run.dpo['learning_rate']}"]
    else:
        model, file, tokens = folder / "model", folder / "pairs.jsonl", 128 if workload == "tiny" else 1024
        make_model(model, TINY if workload == "tiny" else SHAPES[workload])
        write_pairs(file, 1000, tokens, LENGTHS)
        keys = ["dataset=json", f"dataset.path={file}", f"length.max={tokens}", "dpo.learning_rate=1e-5"]
        keys += ["batch.global_size=16", f"batch.micro_size={ROWS_AT_ONCE[workload]}"]
    count = options.pairs or (8000 if workload == "embedded" else 270)
    return [*keys, "policy=base", "model=path", f"model.path={model}", f"dataset.rows={count}"]


def make_work(workload: str, method: str, options: Any, folder: Path) -> dict[str, Any]:
    """What each side is to be called with; TRL's file has the rows that ours trains on, none of them cut."""
    from dpo_pipeline.config import compose
    from dpo_pipeline.data.prepare import prepare

    keys, flags = (choice.split() for choice in METHODS[method])
    keys += [*make_keys(workload, options, folder), "length.prompt=drop", "dpo.logging_steps=1", "dpo.eval_steps=9999"]
    keys += "evaluation.pairs=1 evaluation.prompts=1 evaluation.max_new_tokens=8 evaluation.tracker_prompts=0".split()
    run = compose([*keys, f"root={folder}"])
    data = prepare(run, "dpo", ("train",), strict=False)
    rows = [row for row in data.rows["train"] if not row["reason"]]
    (folder / "trl").mkdir()
    with (folder / "trl" / "train.jsonl").open("w") as file:
        for row in rows:
            longest = row["prompt_tokens"] + max(row["chosen_tokens"], row["rejected_tokens"])
            pair = {key: row[key] for key in ("prompt", "chosen", "rejected")}
            file.write(json.dumps(pair | {"length": longest}) + "\n")
    on_cpu = options.device == "cpu"
    settings = {
        "model_name_or_path": run.model.path,
        "dataset_name": folder / "trl",
        "dtype": "float32" if on_cpu or method == "full" else "bfloat16",
        "max_length": data.limits.max,
        "per_device_train_batch_size": run.batch.micro_size,
        "gradient_accumulation_steps": run.batch.global_size // run.batch.micro_size,
        "learning_rate": run.dpo["learning_rate"],
    }
    flags += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    flags += "--num_train_epochs 1 --lr_scheduler_type cosine --warmup_steps 0.1 --seed 0 --data_seed 0".split()
    flags += ["--logging_steps", "1", "--report_to", "none", *(["--use_cpu", "--bf16", "False"] if on_cpu else [])]
    return {"model": run.model.path, "pairs": len(rows), "on_gpu": not on_cpu, "keys": keys, "flags": flags}


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """A line for each variant: medians, least and most of the seconds, and the ratios of the first variant to it."""
    import pandas

    groups = pandas.DataFrame(rows).drop(columns="losses", errors="ignore").groupby("variant", sort=False)
    middle, low, high = (getattr(groups, name)() for name in ("median", "min", "max"))
    cells = middle.map("{:,.1f}".format)
    if "loss gap" in middle:
        cells["loss gap"] = middle["loss gap"].map("{:.0e}".format)
    for name in [name for name in SECONDS if name in middle]:
        cells[name] += " (" + low[name].map("{:.1f}".format) + "-" + high[name].map("{:.1f}".format) + ")"
        cells[f"x {name}"] = (middle[name].iloc[0] / middle[name]).map("{:.2f}".format)
    lines = [["", *cells], ["---"] * (len(cells.columns) + 1), *cells.reset_index().to_numpy().tolist()]
    print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def bench(workload: str, method: str, options: Any, folder: Path) -> None:
    """Time every variant, `repeats` times in turn, and then the sweeps; print their tables."""
    work = make_work(workload, method, options, folder)
    names = [name for name in (*TRL, *OURS) if any(word in name for word in options.only)]
    plans = [(f"{workload}, {method}, {work['pairs']} pairs", names, BETAS[2:3])]
    if options.sweep:
        plans.append((f"five betas, {plans[0][0]}", ["trl dpo", "trl dpo, best flags", "this project"], BETAS))
    for title, variants, betas in plans:
        rows = []
        for name in variants * options.repeats:
            try:
                rows.append({"variant": name, **time_variant(name, work, folder, betas)})
            except subprocess.CalledProcessError:
                print(f"{name} failed: {(folder / 'log.txt').read_text().strip().splitlines()[-1]}", flush=True)
                continue
            print(f"{name:40}", *(f"{key} {rows[-1][key]:6.1f} s" for key in SECONDS if key in rows[-1]), flush=True)
            if "losses" in rows[-1]:
                steps = zip(rows[0]["losses"], rows[-1]["losses"], strict=True)
                rows[-1]["loss gap"] = max(abs(first - loss) for first, loss in steps)
        if rows:
            print_table(title, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=("hh", "embedded", *ROWS_AT_ONCE))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["full"])
    parser.add_argument("--pairs", type=int, help="read, of which not all fit: 270, of the embedded task all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], help="words of the names of the variants to time")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    machine = [re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1], f"{os.cpu_count()} cores"]
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        import torch

        machine.append(torch.cuda.get_device_name())
    machine += [f"{name} {version(name)}" for name in ("torch", "transformers", "trl")]
    print(f"`make bench ARGS={' '.join(sys.argv[1:])!r}` on {', '.join(machine)}", flush=True)
    workloads = options.workloads or (["hh", "embedded"] if options.device == "cpu" else ["hh", "1.4B", "7B"])
    for workload, method in product(workloads, options.methods):
        if workload == "hh" and not SHARED.is_dir():
            print(f"hh is left out: {SHARED} is absent")
            continue
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            bench(workload, method, options, Path(folder))


if __name__ == "__main__":
    run_child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
