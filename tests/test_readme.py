"""What the README shows is there: every command composes, every file and folder it names exists."""

import re
import shlex
import subprocess

import pytest

from dpo_pipeline.config import CONF, ROW_KEYS, compose, instantiate_node

ROOT = CONF.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if re.match(r"make |python -m ", line)
]
COMMANDS += [f"python -m dpo_pipeline.dpo {typed}" for typed in re.findall(r"`(dataset=mixture [^`]+)`", TEXT)]


def test_the_first_command_stands_before_line_15_and_the_page_is_short():
    lines = TEXT.splitlines()
    assert next(i for i, line in enumerate(lines) if line.startswith("make sft dpo")) < 14
    assert len(lines) < 180
    assert "| preference accuracy" in TEXT


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_is_one(command):
    words = shlex.split(command)
    if words[0] == "make":
        plan = subprocess.run(["make", "-n", "PYTHON=python3", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert plan.returncode == 0, plan.stderr
        overrides = [word for item in words if item.startswith("ARGS=") for word in shlex.split(item[5:])]
    else:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        swept = "-m" in words[3:]
        overrides = [word for word in words[3:] if word not in ("--cfg", "job", "-m")]
        if swept:  # each first value of those that the jobs differ in
            overrides = [re.sub(r"=([^,]+),.*", r"=\1", word) for word in overrides]
    compose([word for word in overrides if not word.startswith("policy=outputs/")])  # a folder that a run makes


FORMS = re.findall(r"^\| ([^|]+) \| `(\{.*?\})`[^|]* \| `([^`]+)` \|$", TEXT, flags=re.MULTILINE)


def test_the_table_of_forms_is_whole():
    assert len(FORMS) == 11


@pytest.mark.parametrize(("form", "row", "typed"), FORMS)
def test_a_row_of_each_form_is_read_by_the_command_beside_it(form, row, typed, tmp_path):
    (tmp_path / "a.jsonl").write_text(row + "\n")
    run = compose(shlex.split(typed.replace("FILE", str(tmp_path / "a.jsonl"))))
    node = run.sft_dataset or run.dataset
    options = {key: value for key, value in node.items() if key not in ROW_KEYS}
    (found,) = instantiate_node(options, chat=True, source="it")["train"]
    assert found["prompt"] == [{"role": "user", "content": "q"}]
    names = ["demonstration"] if run.sft_dataset else ["chosen", "rejected"]
    assert [found[name] for name in names] == ["a", "b"][: len(names)]


def test_every_folder_and_recipe_is_named_and_every_link_leads_somewhere():
    folders = [path.parent.name for path in (ROOT / "dpo_pipeline").glob("*/__init__.py")]
    for name in (*folders, "conf", "launch"):
        assert f"`{name}/`" in TEXT
    for recipe in (CONF / "experiment").glob("*.yaml"):
        assert f"{recipe.stem}`" in TEXT or f"={recipe.stem}" in TEXT
    for link in re.findall(r"(?:\]\(|src=\")(?!http)([^)\"]+)", TEXT):
        assert (ROOT / link).is_file()


def test_every_target_for_users_is_in_the_table_of_commands():
    for target in ("sft", "dpo", "sweep", "evaluate", "report", "inspect", "check", "pairs", "export", "chat"):
        assert f"`make {target}" in TEXT


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("install", "sft", "dpo", "test", "test-real", "lint"):
        assert f"make {target} " in listed


def test_make_without_a_fitting_python_says_so(tmp_path):
    call = ["make", "install", "PYTHON=", f"VENV={tmp_path}/venv"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13 and found none" in done.stdout
