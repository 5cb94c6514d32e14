"""Times the preparation of HH-sized data against DPOTrainer's own, each in a process of its own, alternating.

    make bench-data                           or: python tests/bench/data.py --pairs 20000 --rounds 1

160,000 pairs: the rows at hand, again and again, each with another number before its dialogue. Both read the same file
of pairs and have token ids at the end; ours has also dropped, cut and counted. Rows a second, and peak memory.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"


def prepare_ours(file: str, model: str, folder: str) -> float:
    """Seconds from the file to token ids on disk, as `dpo` prepares them."""
    from dpo_pipeline.config import compose
    from dpo_pipeline.data.prepare import prepare

    options = ["model=path", f"model.path={model}", "dataset=json", f"dataset.path={file}", f"root={folder}"]
    run = compose([*options, "length.max=256"])
    began = time.monotonic()
    prepare(run, "dpo")
    return time.monotonic() - began


def prepare_trl(file: str, model: str, folder: str) -> float:
    """Seconds from the file to the data set that DPOTrainer trains on; what else its __init__ does is left out."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    took = []
    whole = DPOTrainer._prepare_dataset

    def timed(*args: object, **kwargs: object) -> object:
        began = time.monotonic()
        made = whole(*args, **kwargs)
        took.append(time.monotonic() - began)
        return made

    DPOTrainer._prepare_dataset = timed
    began = time.monotonic()
    rows = load_dataset("json", data_files=file, split="train", cache_dir=folder)
    read = time.monotonic() - began
    args = DPOConfig(output_dir=folder, use_cpu=True, bf16=False, report_to="none", max_length=256)
    DPOTrainer(model=AutoModelForCausalLM.from_pretrained(model), args=args, train_dataset=rows)
    return read + took[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "stories15M")
    parser.add_argument("--rows", type=Path, default=SHARED / "data" / "hh_harmless" / "train.jsonl.gz")
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        prepare = prepare_ours if given.one == "ours" else prepare_trl
        with tempfile.TemporaryDirectory() as folder:
            seconds = prepare(given.file, str(given.model), folder)
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
        return
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        file = Path(folder) / "pairs.jsonl"
        with gzip.open(given.rows, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        with file.open("w") as stream:
            for i in range(given.pairs):
                stream.write(json.dumps({key: f"\n\nHuman: {i}{text}" for key, text in rows[i % len(rows)].items()}))
                stream.write("\n")
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        rates: dict[str, list[float]] = {"trl": [], "ours": []}
        for _ in range(given.rounds):
            for name, found in rates.items():
                call = [sys.executable, __file__, "--one", name, "--model", str(given.model), "--file", str(file)]
                done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
                seconds, peak = json.loads(done.stdout.splitlines()[-1])
                found.append(given.pairs / seconds)
                print(f"{name:5} {found[-1]:7,.0f} rows/s  peak {peak / 2**30:.1f} GiB", flush=True)
        print(f"ours / trl: {sum(rates['ours']) / sum(rates['trl']):.1f}")


if __name__ == "__main__":
    main()
