"""Whatever is typed, set in the environment or left on the disk: an exit code of ours, and no traceback."""

import ast
import io
import json
import os
import random
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_pipeline.cli import main
from dpo_pipeline.config import CONF, known_keys
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.inspect_data import run_inspect
from dpo_pipeline.sft import run_sft
from tests.helpers import SMALL

COMMANDS = {"sft": run_sft, "dpo": run_dpo, "inspect_data": run_inspect}
CASES = int(os.environ.get("BOUNDARY_CASES", "60"))
VALUES = [
    *("", "null", "true", "0", "-1", "1.5", "1e30", "1e400", "nan", "abc", "日本", "'a b'", "../x", "/dev/null", "~"),
    *(
        "[1,2]",
        "[]",
        "{a: 1}",
        "{}",
        "${x}",
        "${seed}",
        "???",
        "'\x1b]0;t\x07'",
        "x" * 300,
        "'a\nb'",
        "|",
        "%s",
        "'<'",
    ),
]
ENVIRONMENTS = [
    *({}, {}, {"RANK": "junk"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "-1"}, {"CUDA_VISIBLE_DEVICES": "9"}),
    *({"HF_HOME": "/dev/null/x"}, {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_MIXED_PRECISION": "fp16"}),
]
EDITS = ["", "{", "[]", "{}", "null", "5", '"x"', '{"state": "done"}', '{"identity": 3}', '{"identity": {}}', "\x00"]


def random_command(generator: random.Random, keys: list[str]) -> list[str]:
    """Overrides of random keys and values; Hydra's own flags are left out, they print and end by themselves."""
    count = generator.choice([0, 1, 1, 1, 2, 3])
    prefixes = ["", "", "", "+", "++", "~"]
    return [f"{generator.choice(prefixes)}{generator.choice(keys)}={generator.choice(VALUES)}" for _ in range(count)]


def edit_state(generator: random.Random, folder: Path) -> None:
    """Put random content into a state file of a run, or take a part of one away."""
    name = generator.choice(["status.json", "manifest.json", "metrics.jsonl", "config.yaml", "checkpoints", "final"])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).is_dir():
        (folder / name).write_text(generator.choice(EDITS))


def run_command(stage: str, typed: list[str]) -> tuple[object, str]:
    """The exit code of a command in this process, and what it prints on both streams."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    arguments, sys.argv = sys.argv, [stage, *typed]
    try:
        with redirect_stdout(output), redirect_stderr(output):
            main(COMMANDS[stage])
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):  # which Python prints, and ends with 1
            output.write(code)
            code = 1
    finally:
        sys.argv = arguments
    output.flush()
    return code, output.buffer.getvalue().decode()


def contents(folder: Path) -> dict[Path, bytes]:
    return {
        file: file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.is_relative_to(folder / "outputs")
    }


@pytest.mark.parametrize("seed", range(CASES))
def test_any_command_ends_with_a_code_of_ours_and_no_traceback(seed, boundary, monkeypatch):
    generator = random.Random(seed)
    stage = generator.choice(sorted(COMMANDS))
    typed = random_command(generator, boundary.keys)
    for name, value in generator.choice(ENVIRONMENTS).items():
        monkeypatch.setenv(name, value)
    if generator.random() < 0.3:
        edit_state(generator, boundary.folder / "outputs" / "x" / "sft" / "full")
    monkeypatch.chdir(boundary.folder)
    before = contents(boundary.folder)
    code, printed = run_command(stage, [*SMALL, "name=x", "root=outputs", "check=true", *typed])
    assert code in (0, 1, 2, 75), printed
    assert "Traceback" not in printed
    assert not set(printed) & set("\x00\x07\x1b"), json.dumps(printed)
    assert contents(boundary.folder) == before


@pytest.fixture(scope="module")
def boundary(tmp_path_factory):
    """A working folder with a file of somebody's in it, and the keys to type."""
    folder = tmp_path_factory.mktemp("boundary")
    (folder / "somebodys").write_text("file")
    elsewhere = ("check", "root", "hydra")  # keys that move what is written, or start the training
    return SimpleNamespace(folder=folder, keys=[key for key in known_keys() if not key.startswith(elsewhere)])


def test_text_is_read_and_written_in_utf_8_whatever_the_locale_says():
    calls = []
    for file in [*(CONF.parent / "dpo_pipeline").rglob("*.py"), *(CONF.parent / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            calls += [ast.unparse(node)] if name in ("open", "read_text", "write_text") else []
    assert len(calls) > 10
    is_binary = re.compile(r"^os\.open|^Image\.open|^gzip\.open\(file\)$|\.open\('[rwx]b'\)")
    assert [call for call in calls if "utf-8" not in call and not is_binary.search(call)] == []
