"""Whatever is given wrong is one clear sentence and exit 1: no traceback, nothing written over."""

import contextlib
import errno
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock
from safetensors import SafetensorError

from dpo_pipeline import base_model, record, run_folder
from dpo_pipeline.cli import main
from dpo_pipeline.config import compose
from dpo_pipeline.data import prepare
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation import measure
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import reference, saving
from dpo_pipeline.training.callbacks import Metrics

STAGES = {"sft": run_sft, "dpo": run_dpo}
ROWS = [
    {"prompt": f"film : the {city} {road} . review :", "chosen": " i loved it .", "rejected": " it was flat ."}
    for city in "silent broken golden last hidden lonely crimson distant".split()
    for road in "river garden station winter letter".split()
]
CHAT = [
    {"prompt": [{"role": "user", "content": row["prompt"]}]}
    | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    for row in ROWS
]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
FORM = "give one JSON object for each row"
FOLDER = "give a folder that from_pretrained loads"

# What most cases type: a local model and pairs, laid in every case; BASE without an SFT before.
MODEL = "model=path model.path=model batch.global_size=8 length.max=48 evaluation.max_new_tokens=8 name=run"
GIVEN = f"{MODEL} dataset=json dataset.path=pairs.jsonl dataset.test_rows=5"
BASE = f"{GIVEN} policy=base variant=run"
POLICY = f"{GIVEN} variant=run policy="
ADAPTER = f"{POLICY}adapter lora=r8"
SFT, DPO = "outputs/run/sft/full", "outputs/run/dpo/run"


def llama(folder, **config):
    """A model of random weights with the embedded task's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo_pipeline.training.tiny import word_tokenizer

    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **ids, "max_position_embeddings": 64, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders that cases copy from: a model, others that do not fit it, and an adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("parts")
    model = llama(folder / "model")
    for name, config in {"wide": {"hidden_size": 32}, "large": {"vocab_size": 133}}.items():
        llama(folder / name, **config)
    shutil.copytree(folder / "model", folder / "pickle")
    (folder / "pickle" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pickle" / "pytorch_model.bin")
    shutil.copytree(folder / "model", folder / "bert")
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(bert).save_pretrained(folder / "bert")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder


# What lays something on the disk: each takes the working folder of a case, where the model and the pairs lie already.
def file(name, content):
    def lay(here, parts):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return lay


def lines(*rows, name="pairs.jsonl"):
    return file(name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def changed(rows, count=1, first=0, **values):
    """The rows, `count` of them from `first` on with other values; None is null, a missing one is left out."""
    return lines(*({**row, **values} if first <= i < first + count else row for i, row in enumerate(rows)))


def part(name, to=None):
    """A folder of `parts` in the place of another."""

    def lay(here, parts):
        shutil.rmtree(here / (to or name), ignore_errors=True)
        shutil.copytree(parts / name, here / (to or name))

    return lay


def gone(*names):
    return lambda here, parts: [(here / name).unlink() for name in names]


def cut(name, left):
    return lambda here, parts: (here / name).write_bytes((here / name).read_bytes()[:left])


def edited(name, **values):
    """A JSON file with other values; a value may be a path that begins with the case's folder: `HERE/x`."""

    def lay(here, parts):
        new = {k: str(here / v[5:]) if str(v).startswith("HERE/") else v for k, v in values.items()}
        (here / name).write_text(json.dumps({**json.loads((here / name).read_text()), **new}))

    return lay


def tokenizer(**special):
    """The model's tokenizer with no special tokens but these."""

    def lay(here, parts):
        from transformers import PreTrainedTokenizerFast

        from dpo_pipeline.training.tiny import word_tokenizer

        bare = word_tokenizer().backend_tokenizer
        PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", **special).save_pretrained(here / "model")

    return lay


def more_words(name, word):
    def lay(here, parts):
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(here / name)
        words.add_tokens([word])
        words.save_pretrained(here / name)

    return lay


def adapter(**values):
    """An adapter on the case's own model, its config with other values."""

    def lay(here, parts):
        part("adapter")(here, parts)
        edited("adapter/adapter_config.json", **{"base_model_name_or_path": "HERE/model", **values})(here, parts)

    return lay


def run_of(stage, typed, state="done", pid=None):
    """The folder of a run that these arguments made, with its weights, in a state."""

    def lay(here, parts):
        run = compose(typed.split())
        place = run.sft_folder if stage == "sft" else run.dpo_folder
        status = {"state": state, "step": 5, "error": None, "pid": pid or os.getpid(), "host": socket.gethostname()}
        record.write_json(place / "status.json", status)
        record.write_json(
            place / "manifest.json", {"identity": run_folder.identity(run, stage), "final": {"sha256": "x"}}
        )
        record.write_json(place / "checkpoints" / "checkpoint-5" / "trainer_state.json", {})
        file("final/model.safetensors", "weights")(place, parts)

    return lay


def held(folder):
    """A run's folder held by another process."""

    def lay(here, parts):
        lock = FileLock(Path(folder).with_name(f".{Path(folder).name}.lock"))
        Path(lock.lock_file).parent.mkdir(parents=True)
        lock.acquire()
        HELD.append(lock)
        Path(lock.lock_file).write_text("process 7 on elsewhere")

    return lay


HELD: list[FileLock] = []


def chat(template, rows=CHAT):
    return lambda here, parts: (lines(*rows)(here, parts), file("model/chat_template.jinja", template)(here, parts))


NO_EOS = "the tokenizer has no end token, so no completion could end: set eos_token in its tokenizer_config.json"
BROKEN = lines(*ROWS[:2], '{"prompt": "a", "chosen": ', *ROWS[3:])
CUT_GZIP = gzip.compress(json.dumps(ROWS).encode())[:-20]
NO_PICKLE = file("model/pytorch_model.bin", "hello")

# name: (stage, what is typed, what is laid besides a good model and good pairs, the sentence)
CASES = {
    # What is typed.
    "unknown experiment": ("sft", "experiment=nope", "experiment=nope is no option: there are .*reviews_lora"),
    "fp16 on a CPU": ("sft", f"{GIVEN} precision=fp16", "precision=fp16 is not supported .*type precision=auto"),
    "wrong field value": ("dpo", f"{BASE} dpo.optim=adam", "DPOConfig refuses .*adam is not a valid .*select one of"),
    "tracker": ("sft", f"{GIVEN} report_to=mlflow", "report_to=mlflow .*`pip install mlflow`"),
    # Files of pairs.
    "broken line": ("sft", GIVEN, BROKEN, f"pairs.jsonl cannot .*: line 3 is no JSON .Expecting value.*: {FORM}"),
    "broken list": ("sft", GIVEN.replace("jsonl", "json"), file("pairs.json", json.dumps(ROWS, indent=1)[:-30]),
        f"pairs.json cannot .*: line 200 is no JSON .*: {FORM}"),
    "numbers": ("sft", GIVEN, file("pairs.jsonl", "[1, 2]"),
        f"pairs.jsonl, row 1 holds 1, not an object: {FORM}"),
    "null prompt": ("sft", GIVEN, changed(ROWS, 1, 7, prompt=None),
        "line 8: prompt is null, not text or messages.*correct"),
    "missing column": ("dpo", BASE, lines({"prompt": "a", "chosen": "b"}),
        r"line 1 has the columns prompt, chosen, .*no form .*: say what they hold, such as 'dataset.columns={prompt"),
    "empty file": ("sft", GIVEN, file("pairs.jsonl", ""), f"pairs.jsonl is empty: {FORM}"),
    "no gzip": ("sft", f"{GIVEN} dataset.path=p.gz", file("p.gz", "hello"),
        "p.gz cannot .*Not a gzipped file.*: fetch it again, or take .gz off"),
    "gzip cut short": ("sft", f"{GIVEN} dataset.path=p.gz", file("p.gz", CUT_GZIP),
        "p.gz cannot .*cut short.*: fetch it again"),
    "not UTF-8": ("sft", GIVEN, file("pairs.jsonl", json.dumps(ROWS[0]).encode() + b'\n{"a": "\xe9"}'),
        "pairs.jsonl cannot .*: line 2 is not UTF-8: save it"),
    "no file": ("sft", f"{GIVEN} dataset.path=nope.jsonl",
        r"there is no file or folder nope.jsonl \(from .*\): check"),
    "other test file": ("dpo", f"{BASE} dataset.test_path=b.jsonl", lines({"text": "a"}, name="b.jsonl"),
        "this data set has no column 'chosen' .*in test"),
    "hub data": ("sft", f"{MODEL} dataset=hh_rlhf",
        "data set Anthropic/hh-rlhf is neither .*: check the name .*dataset.path="),
    # Rows.
    "identical completions": ("dpo", BASE, changed(ROWS, 3, rejected=ROWS[0]["chosen"]),
        r"3 of 40 rows of pairs.jsonl teach nothing, more than 5%: 3 identical completions \(pairs.jsonl, line \d\): "
        "check that dataset= .*or take them out"),
    "no demonstration": ("sft", f"{GIVEN} sft_target=demonstration",
        "no column 'demonstration' .*set sft_target=chosen"),
    "no test rows": ("dpo", f"{BASE} dataset.test_rows=0", "no test rows to measure on: raise dataset.test_rows"),
    "too few reviews": ("sft", f"{MODEL} dataset.rows=3", "dataset.rows=3: .* 16"),
    "all too long": ("sft", f"{GIVEN} length.max=4", "100% of 36 rows are too long: .* would keep 99%"),
    "no room to complete": ("dpo", f"{BASE} evaluation.max_new_tokens=63",
        "=63 leaves no room for a prompt .*of 64 tokens: lower"),
    # Messages.
    "no template": ("sft", f"{GIVEN} dataset.form=messages", lines(*CHAT),
        "rows are messages but the tokenizer has no chat template: take an ins"),
    "template refuses": ("sft", GIVEN, chat("{{ raise_exception('roles must alternate') }}"),
        r"chat template refuses a dialogue of user \(roles must alternate\): give the messages"),
    "broken template": ("sft", GIVEN, chat("{% for m in messages %}"),
        r"chat template refuses .*Unexpected end .*correct its chat_template"),
    # Models.
    "no model folder": ("sft", f"{GIVEN} model.path=./no",
        r"model folder ./no does not exist .*give a hub id"),
    "model is a file": ("sft", f"{GIVEN} model.path=pairs.jsonl",
        "pairs.jsonl is a file, not a model: give the folder"),
    "hub model": ("sft", f"{GIVEN} model.path=nobody/x",
        r"no model .* from nobody/x \(.*connect.*check the name.*model.path="),
    "no weights": ("sft", GIVEN, gone("model/model.safetensors"),
        "no model .*no file named .*: it holds no weights: give"),
    "pickles": ("sft", GIVEN, part("pickle", "model"),
        "pickles: model.use_safetensors=null reads them"),
    "no pickle": ("sft", f"{GIVEN} model.use_safetensors=null", gone("model/model.safetensors"), NO_PICKLE,
        rf"no model could be loaded from .*\(.*\): {FOLDER}"),
    "weights cut short": ("sft", GIVEN, cut("model/model.safetensors", -100),
        f"no model .*not fully covered.: {FOLDER}"),
    "a classifier": ("sft", GIVEN, part("bert", "model"),
        "lacks 6 weights of its architecture, BertLM.*: give a causal"),
    "an encoder and decoder": ("sft", GIVEN, file("model/config.json", '{"model_type": "t5"}'),
        r"model is no causal language model \(model_type t5\): give one that"),
    "no context": ("sft", GIVEN, file("model/config.json", '{"model_type": "bloom"}'),
        r"model names no context \(model_type bloom\): set max_position_embeddings"),
    "other shapes": ("sft", GIVEN, edited("model/config.json", hidden_size=32),
        r"weights .* do not have the shape .* such as lm_head.weight, \[126, 16\] instead of \[126, 32\]: give the"),
    "no config": ("sft", GIVEN, gone("model/config.json"), f"no model .*model_type.*: {FOLDER}, with config.json"),
    "broken config": ("sft", GIVEN, file("model/config.json", "{"),
        f"no model .*config.json' is not a valid JSON file.*: {FOLDER}"),
    "config of a list": ("sft", GIVEN, file("model/config.json", "[1]"),
        f"no model .*must be a mapping, not list.: {FOLDER}"),
    "no such type": ("sft", GIVEN, edited("model/config.json", model_type="x"),
        f"no model .*model type `x` but Tran.*: {FOLDER}"),
    "wrong size": ("sft", GIVEN, edited("model/config.json", hidden_size="a"),
        f"no model .*expected int, got str.*: {FOLDER}"),
    "code in the folder": ("sft", GIVEN, edited("model/config.json", model_type="x", auto_map={"AutoConfig": "x.Y"}),
        "contains custom code .*: read that code, then type model.trust_remote_code=true"),
    "no tokenizer": ("sft", GIVEN, gone("model/tokenizer.json"), f"no model .*tokenizer.*: {FOLDER}.* tokenizer"),
    "attention": ("sft", f"{GIVEN} model.attn_implementation=foo",
        "no model .*`attn_implementation=.*: type model.attn_impl"),
    "no end token": ("sft", GIVEN, tokenizer(pad_token="<pad>"), NO_EOS),
    "no end token, no padding": ("dpo", BASE, tokenizer(), NO_EOS),
    "an adapter as the model": ("sft", f"{GIVEN} model.path=adapter", adapter(),
        "adapter is an adapter, not a whole model: give its base by model.path=, .*policy=FOLDER"),
    # Policies and references.
    "no such policy": ("dpo", f"{POLICY}nope",
        "policy=nope: must be sft, base, a hub id or a folder with config.json or adapter_config"),
    "no such policy on the hub": ("dpo", f"{POLICY}nobody/x", "nobody/x .*: check the name: .* is no folder here"),
    "adapter that names none": ("dpo", ADAPTER, adapter(base_model_name_or_path=None),
        "adapter in .* names no base: set base_model_name_or_path"),
    "adapter on another base": ("dpo", ADAPTER, part("wide"), adapter(base_model_name_or_path="HERE/wide"),
        "wide is another model than the base .*model .hidden_size 32, not 16.: give its base"),
    "adapter of other shapes": ("dpo", ADAPTER, adapter(r=4),
        "no model .*adapter .*size mismatch.*: give the folder that PEFT"),
    "adapter without weights": ("dpo", ADAPTER, adapter(), gone("adapter/adapter_model.safetensors"),
        "adapter holds no adapter_model.safetensors: give the folder"),
    "adapter cut short": ("dpo", ADAPTER, adapter(), cut("adapter/adapter_model.safetensors", 9),
        "no model .*adapter .*header.*: give the folder that PEFT saved"),
    "broken adapter config": ("dpo", ADAPTER, adapter(), file("adapter/adapter_config.json", "{"),
        "adapter_config.json is not readable .*: give the folder as PEFT"),
    "adapter config of a list": ("dpo", ADAPTER, adapter(), file("adapter/adapter_config.json", "[1]"),
        "adapter_config.json is not readable .*: give the folder"),
    "other words": ("dpo", f"{POLICY}other", part("model", "other"), more_words("other", "zzz"),
        "tokenizer in .*other has another vocabulary than .*: use the tokenizer"),
    "other vocabulary size": ("dpo", f"{POLICY}large", part("large"),
        "large is another model than .*vocab_size 133, not 126.: give its base"),
    "policy without weights": ("dpo", f"{POLICY}other", part("model", "other"), gone("other/model.safetensors"),
        "no model .*other .*: it holds no weights: give a folder"),
    "no reference": ("dpo", f"{BASE} reference.path=./no", "model folder ./no does not exist .*give a hub id"),
    "other reference": ("dpo", f"{BASE} reference.path=large", part("large"),
        "large is another model .*vocab_size 133, .*: give its base"),
    # Places.
    "root is a file": ("sft", f"{GIVEN} root=pairs.jsonl",
        "root=pairs.jsonl: pairs.jsonl is a file, .*: type another root="),
    "root under a file": ("dpo", f"{BASE} root=pairs.jsonl/x",
        "root=pairs.jsonl/x: pairs.jsonl is a file"),
    "root as check": ("sft", f"{GIVEN} root=pairs.jsonl check=true",
        "root=pairs.jsonl: pairs.jsonl is a file"),
    "root without a right": ("sft", f"{GIVEN} root=/sys/x", r"/sys/x.* cannot be read or written \(.*\): .*root="),
    "a file for all SFTs": ("sft", GIVEN, file("outputs/run/sft", "mine"),
        "outputs/run/sft cannot be made .*: move it away"),
    "a file for the run": ("sft", GIVEN, file(SFT, "mine"),
        f"{SFT} holds files but no run: choose another place with variant="),
    "foreign files": ("sft", GIVEN, file(f"{SFT}/thesis.txt", "mine"),
        f"{SFT} holds files but no run: choose another"),
    "foreign files, overwrite": ("dpo", f"{BASE} overwrite=true", file(f"{DPO}/thesis.txt", "mine"),
        f"{DPO} holds files but no run: choose another place"),
    "another run": ("sft", GIVEN, run_of("sft", f"{GIVEN} seed=3"),
        rf"{SFT} holds another run \(seed is 3 there, 0 here\): keep both with sft_variant=.*name=.*overwrite=true"),
    "another run, interrupted": ("dpo", BASE, run_of("dpo", f"{BASE} beta=0.3", "interrupted"),
        rf"{DPO} holds another run \(beta is 0.3 there, 0.1 here\): keep both with variant="),
    "a run in use": ("sft", GIVEN, held(SFT), f"{SFT} is in use by process 7 on elsewhere: wait for it or end it"),
    "DPO before SFT": ("dpo", f"{GIVEN} variant=run", "no finished SFT in .*none.: run `make sft` .*policy=base"),
    "SFT interrupted": ("dpo", f"{GIVEN} variant=run", run_of("sft", GIVEN, "interrupted"),
        r"no finished SFT in .*\(interrupted\): run `make sft`"),
    "SFT of another base": ("dpo", f"{GIVEN} variant=run", part("wide"), run_of("sft", f"{GIVEN} model.path=wide"),
        r"another base model \(model.path is .* there, .* here\): give the same model="),
    "a sweep in two processes": ("dpo", "-m seed=1,2",
        "whole in each of the 2 processes.*: type `python -m dpo_pipeline.dpo -m seed=1,2` without the launcher"),
    "a sweep of nothing": ("dpo", f"-m {BASE} beta=", "beta has no value|beta=: .*valid number"),
    "a sweep of no number": ("dpo", f"-m {BASE} beta=0.1,abc", "beta=abc: .*valid number"),
    "a sweep of a comma": ("dpo", f"-m {BASE} beta=0.1,", r"beta=0.1, cannot be read"),
    "a sweep of one value twice": ("dpo", f"-m {GIVEN} policy=base beta=0.1,0.1", "2 jobs would share .*: a value"),
    "a sweep in one folder": ("dpo", f"-m {BASE} beta=0.1,0.2", f"2 jobs would share {DPO}: .*variant= is one for"),
    "a sweep without SFT": ("dpo", f"-m {GIVEN} beta=0.1,0.2",
        f"no finished SFT in {SFT} .*: run `make sft`"),
    "a sweep of more GPUs": ("dpo", f"-m {GIVEN} policy=base beta=0.1,0.2 hydra.launcher.gpus_per_job=2",
        r"1 job\(s\) at once of 2 GPU\(s\) each want 2, and 0 are visible: lower hydra.launcher.jobs or"),
    "no such launcher": ("dpo", f"-m {GIVEN} hydra/launcher=submitit_slrm beta=0.1,0.2",
        "hydra/launcher=submitit_slrm is no option"),
}  # fmt: skip
SKIPPED = {
    "tracker": find_spec("mlflow") and "mlflow is here",
    "a sweep of more GPUs": torch.cuda.is_available() and "there are GPUs",
    "root without a right": not Path("/sys/kernel").is_dir() and "no place that nobody may write to",
}


@pytest.fixture
def here(tmp_path, parts, monkeypatch):
    """The working folder of a case: a model, good pairs, and a run of somebody's that is none of its business."""
    # A training that fails, unlike one that is interrupted, leaves its own handler behind: here for the next case.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parts / "model", tmp_path / "model")
    lines(*ROWS)(tmp_path, parts)
    file("outputs/run/dpo/kept/final/model.safetensors", "kept")(tmp_path, parts)
    yield tmp_path
    while HELD:
        HELD.pop().release()


def end_of(stage: str, typed: str, monkeypatch) -> str | int:
    """What a command exits with, run in this process."""
    monkeypatch.setattr(sys, "argv", [stage, *typed.split()])
    with pytest.raises(SystemExit) as ended:
        main(STAGES[stage])
    return ended.value.code


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written_over(name, here, parts, monkeypatch, capfd):
    stage, typed, *laid, sentence = CASES[name]
    if SKIPPED.get(name):
        pytest.skip(SKIPPED[name])
    for lay in laid:
        lay(here, parts)
    if name == "a sweep in two processes":
        for variable in ("WORLD_SIZE=2", "RANK=0", "MASTER_ADDR=localhost", "MASTER_PORT=29500"):
            monkeypatch.setenv(*variable.split("="))
    before = content(here)
    told = end_of(stage, typed, monkeypatch)
    assert isinstance(told, str), told  # which Python prints, and exits with 1
    assert told.startswith("error: ")
    assert "\n" not in told
    assert re.search(sentence, told), told
    assert "Traceback" not in capfd.readouterr().err
    after = content(here)
    assert {file: after.get(file) for file in before} == before
    own = [here / (SFT if stage == "sft" else DPO), here / "outputs" / ".cache"]
    new = [file for file in after.keys() - before if file.suffix != ".lock"]
    assert not [file for file in new if not any(file.is_relative_to(place) for place in own)]


@pytest.mark.parametrize("count", [0, 2])
def test_up_to_5_percent_of_useless_rows_are_told_and_dropped(count, here, parts, capfd, monkeypatch):
    changed(ROWS, count, rejected=ROWS[0]["chosen"])(here, parts)
    monkeypatch.setattr(sys, "argv", ["dpo", *BASE.split(), "dataset.split_seed=1", "check=true"])
    main(run_dpo)
    assert ("| 2 identical completions |" in capfd.readouterr().out) == (count > 0)
    assert not (here / DPO).exists()


FULL = "the disk is full.*: free some space and type the same command, .*or name another disk .root=.*HF_HOME="
RIGHT = "/x cannot be read or written .*: change its permissions, or name another place by root="
KIND = "/x cannot be made or opened .*: move it away"
DISK = {
    "ENOSPC": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"), FULL),
    "quota": (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/x"), FULL),
    "EACCES": (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"), RIGHT),
    "EROFS": (OSError(errno.EROFS, os.strerror(errno.EROFS), "/x"), RIGHT),
    "ENOTDIR": (NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/x"), KIND),
    "EEXIST": (FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "/x"), KIND),
    "safetensors": (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
    "torch": (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), FULL),
    "torch, at its end": (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), FULL),
}


@pytest.mark.parametrize("name", DISK)
def test_what_the_disk_refuses_is_one_sentence(name, here, monkeypatch, capfd):
    """Each as it is raised while the stage goes on, and as a library hands it on as the cause of its own error."""
    error, sentence = DISK[name]
    for raised in (error, wrapped(error)):
        monkeypatch.setattr(base_model, "base_model", raising(raised))
        told = end_of("sft", GIVEN, monkeypatch)
        assert re.match(f"error: {sentence}", told.replace(" while /x was written", "")), told
        assert "\n" not in told
    assert "Error executing job" not in capfd.readouterr().err  # Hydra's own line
    assert run_folder.run_state(here / SFT) == "failed"


def test_a_download_folder_that_cannot_be_made_is_named(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "/x/hf")
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x/hf/datasets")
    monkeypatch.setattr("datasets.load_dataset", raising(error))
    told = end_of("sft", f"{MODEL} dataset=hh_rlhf", monkeypatch)
    assert re.match("error: /x/hf/datasets cannot be made .*export HF_HOME=", told), told


def test_what_a_library_says_in_several_lines_is_one(here, monkeypatch):
    monkeypatch.setattr(
        base_model, "base_model", raising(PipelineError("TRL refuses it:\n  one  reason\n\n  another"))
    )
    assert end_of("sft", GIVEN, monkeypatch) == "error: TRL refuses it: one reason another"


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def wrapped(error):
    outer = RuntimeError("could not save")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "bug",
    [KeyError("x"), FileNotFoundError(errno.ENOENT, "No such file", "x"), RuntimeError("shape"), ConnectionError("x")],
    ids=lambda bug: type(bug).__name__,
)
@pytest.mark.parametrize("where", ["stage", "loader"])
def test_a_bug_is_one_line_and_its_traceback_lies_in_a_file(bug, where, here, monkeypatch, capfd):
    from dpo_pipeline.data import formats

    of_the_past = PermissionError(errno.EACCES, "tried before", "/y")
    bug.__context__ = of_the_past  # what a library tried before is not what failed
    monkeypatch.setattr(*((base_model, "base_model") if where == "stage" else (formats, "read_source")), raising(bug))
    assert end_of("sft", GIVEN, monkeypatch) == 2
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    text = Path(re.search(r"^unexpected error: \w+: .*\(traceback in (.*)\)$", printed, re.M)[1]).read_text()
    assert type(bug).__name__ in text
    assert "in raising" in text or "in call" in text


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ({"RANK": "junk"}, "RANK=junk .*unset RANK"),
        ({"LOCAL_RANK": ""}, "unset LOCAL_RANK"),
        ({"WORLD_SIZE": "0"}, "unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "without RANK, MASTER_ADDR .*unset WORLD_SIZE"),
    ],
)
def test_what_is_left_of_a_launcher_is_named(variables, remedy, here, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert re.search(f"^error: .*{remedy}", end_of("sft", GIVEN, monkeypatch))


@pytest.mark.slow
def test_one_process_of_two_says_that_it_waits(here):
    launch = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    code = "from dpo_pipeline import distributed; distributed.NOTICE_SECONDS = 1; distributed.connect_processes()"
    call = ["timeout", "100", sys.executable, "-c", code]
    with subprocess.Popen(call, env=os.environ | launch, stdout=subprocess.PIPE, text=True) as process:
        assert "waiting for 1 other process(es)" in process.stdout.readline()
        process.terminate()


@pytest.mark.parametrize("typed", ["--beta 0.05", "--beta=0.05"])
def test_a_flag_is_answered_with_the_key(typed, here, monkeypatch):
    assert re.search("type beta=", end_of("dpo", typed, monkeypatch))


# What the shell makes of the output, the variables, and the exit codes that may be. What fits into a pipe's buffer
# before its reader ends is no error.
OUTPUTS = {
    "a closed pipe": ("| head -c 1", {}, (0, 1)),
    "a full device": ("> /dev/full", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, (1,)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_broken_output_is_no_traceback(name, here):
    redirection, variables, codes = OUTPUTS[name]
    lines(*ROWS, {"prompt": "\u65e5\u672c", "chosen": " \x1b]0;title\x07 \u672c", "rejected": " b"})(here, None)
    command = f"set -o pipefail; {sys.executable} -m dpo_pipeline.inspect_data {GIVEN} {redirection}"
    done = subprocess.run(["bash", "-c", command], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


SHAPES = [[], {}, 5, None]


@pytest.mark.parametrize("name", ["status.json", "manifest.json", "metrics.jsonl"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_state_file_of_another_shape_is_named(name, shape, here, monkeypatch):
    folder = here / SFT
    file(f"{SFT}/{name}", json.dumps(shape) + "\n")(here, None)
    for other, value in {"status.json": {"state": "failed"}, "manifest.json": {"identity": {}}}.items():
        if other != name:
            (folder / other).write_text(json.dumps(value))
    if name == "metrics.jsonl":
        with pytest.raises(PipelineError, match=name):
            record.read_metrics(folder)
    else:
        assert re.search(f"{name} .*restore it, or move it away", end_of("sft", GIVEN, monkeypatch))


def test_what_looks_like_a_secret_is_written_and_printed_nowhere(here, monkeypatch, capfd):
    secret = "t0psecret"
    address, key = f"https://me:{secret}@host/m?key={secret}", f"sk-{secret}-{secret}"
    monkeypatch.setattr(base_model, "base_model", raising(PipelineError(f"no answer from {address} with {key}")))
    sentence = end_of("sft", f"{GIVEN} reference.path='{address}' wandb.entity={key}", monkeypatch)
    assert "no answer" in sentence
    assert secret not in sentence
    assert (here / SFT / "config.yaml").is_file()
    printed = capfd.readouterr()
    assert secret not in printed.out + printed.err
    assert not [path for path, text in content(here / "outputs").items() if secret.encode() in text]


def test_a_run_folder_that_is_moved_while_it_trains_is_named(here, monkeypatch, capfd):
    def move_at_3(self, args, state, control, **kwargs):
        if state.global_step == 3:
            (here / SFT).rename(here / "elsewhere")

    monkeypatch.setattr(Metrics, "on_step_end", move_at_3)
    assert re.search(f"{SFT} was moved or deleted", end_of("sft", GIVEN, monkeypatch))
    assert not (here / SFT).exists()


def test_a_full_disk_ends_a_run_with_one_sentence_and_the_same_command_goes_on(here, monkeypatch, capfd):
    """A file system of 1 MB, with room for what was foreseen but not for a file that somebody lays there meanwhile."""
    disk = here / "disk"
    disk.mkdir()
    if (
        os.name == "nt"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("no file system can be mounted here: that needs root")
    step_end = Metrics.on_step_end

    def fill_at_3(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            with contextlib.suppress(OSError):
                (disk / "filler").write_bytes(bytes(10**7))

    typed = f"{GIVEN} root=disk ++sft.save_steps=2 ++sft.eval_steps=2"
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Metrics, "on_step_end", fill_at_3)
            told = end_of("sft", typed, monkeypatch)
        assert re.match(f"error: {FULL}", re.sub(" while .* was written", "", told)), told
        assert "Traceback" not in capfd.readouterr().err
        (disk / "filler").unlink()
        monkeypatch.setattr(sys, "argv", ["sft", *typed.split()])
        main(run_sft)
        printed = capfd.readouterr().out
        assert "resuming from disk/run/sft/full/checkpoints/checkpoint-2" in printed
        assert run_folder.run_state(disk / "run" / "sft" / "full") == "done"
    finally:
        subprocess.run(["umount", disk], check=True)


def interrupting(module, name):
    """(module, name, a function that is interrupted as by Ctrl-C, and then goes on as before)."""
    before = getattr(module, name)

    def call(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return before(*args, **kwargs)

    return module, name, call


STOPS = {
    "sft before training": ("sft", lambda: interrupting(prepare, "prepare")),
    "sft saving": ("sft", lambda: interrupting(saving, "save_final")),
    "dpo reference pass": ("dpo", lambda: interrupting(reference, "run_reference_pass")),
    "dpo measuring": ("dpo", lambda: interrupting(measure, "sample")),
}


@pytest.mark.parametrize("name", STOPS)
def test_ctrl_c_ends_with_75_anywhere_and_the_same_command_goes_on(name, here, monkeypatch, capfd):
    stage, stop = STOPS[name]
    typed, own = (GIVEN, here / SFT) if stage == "sft" else (BASE, here / DPO)
    with monkeypatch.context() as patch:
        patch.setattr(*stop())
        assert end_of(stage, typed, monkeypatch) == 75
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "interrupted: type the same command to go on from" in printed.out
    assert run_folder.run_state(own) == "interrupted"
    main(STAGES[stage])
    assert run_folder.run_state(own) == "done"
    assert (own / "final" / "model.safetensors").is_file()
    assert stage == "sft" or "dpo/run" in record.read_json(here / "outputs/run/results.json")["policies"]
