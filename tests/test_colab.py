"""The commands of the Colab notebook run in their order, on the embedded task."""

import json
import re
import shlex
from importlib import import_module

from dpo_pipeline.config import CONF, compose
from dpo_pipeline.record import read_json
from tests.helpers import SMALL

NOTEBOOK = json.loads((CONF.parent / "launch" / "colab.ipynb").read_text("utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = [line for cell in CELLS for line in re.findall(r"python -m dpo_pipeline\.(.*?)(?: &&|$)", cell)]


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
        run = compose([*arguments, *typed])
        getattr(import_module(f"dpo_pipeline.{stage}"), f"run_{stage}")(run)
    assert stages == ["sft", "dpo", "sft", "dpo", "evaluate", "export"]
    results = read_json(run.home / "results.json")["policies"]
    assert "win_rate.length.sft" in results[f"dpo/{run.variant}"]["own"]
    assert (run.dpo_folder / "export" / "model.safetensors").is_file()
