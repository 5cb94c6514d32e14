"""conf/README.md says what the comments of the config say, of every key."""

from omegaconf import OmegaConf

from dpo_pipeline.config import CONF
from tests.config_reference import read_keys, reference


def test_the_reference_is_up_to_date():
    assert (CONF / "README.md").read_text("utf-8") == reference(), "type make config-reference"


def test_the_reference_lists_every_key_of_the_config_with_its_default():
    config = OmegaConf.load(CONF / "config.yaml")
    listed = {key: value for key, value, _ in read_keys(CONF / "config.yaml")}
    for key, node in config.items():
        if key in ("defaults", "hydra"):
            continue
        for dotted in [f"{key}.{name}" for name in node] if OmegaConf.is_dict(node) else [key]:
            value = OmegaConf.to_container(config)[key]
            value = value[dotted.partition(".")[2]] if "." in dotted else value
            assert dotted in listed
            assert OmegaConf.to_container(OmegaConf.create(f"x: {listed[dotted]}"))["x"] == value
