"""The commands of the Colab notebook run in their order, on the embedded task."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

from dpo_pipeline.config import CONF, compose
from dpo_pipeline.record import read_json
from tests.helpers import SMALL

NOTEBOOK = json.loads((CONF.parent / "launch" / "colab.ipynb").read_text("utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = [line for cell in CELLS for line in re.findall(r"python -m dpo_pipeline\\.(.*?)(?: &&|$)", cell)]


def test_the_settings_are_those_of_a_t4():
    arguments = next(cell for cell in CELLS if cell.startswith("ARGS"))
    run = compose(shlex.split(re.search(r'"(.*)"', arguments)[1].replace("{ROOT}", "/drive")))
    assert (run.precision, run.lora["r"], run.root) == ("fp16", 16, "/drive")


def test_the_commands_of_the_notebook_run_whole(tmp_path):
    arguments = ["model=tiny", "dataset=reviews", "lora=r16", f"root={tmp_path}", *SMALL]
    stages = []
    for command in COMMANDS:
        stage, *typed = shlex.split(command.replace("{ARGS}", ""))
        stages.append(stage)
        getattr(import_module(f"dpo_pipeline.{stage}"), f"run_{stage}")(compose([*arguments, *typed]))
    assert stages == ["sft", "dpo", "sft", "dpo", "evaluate", "export"]
    home = Path(tmp_path) / "tiny-reviews"
    assert (
        "win_rate.length.sft" in read_json(home / "results.json")["policies"]["dpo/sigmoid-beta0.1-r16-seed0"]["own"]
    )
    assert (home / "dpo" / "sigmoid-beta0.1-r16-seed0" / "export" / "model.safetensors").is_file()
