"""The script for one GPU does on a CPU what a CPU can, and reports what fails."""

import pytest

from tests import gpu


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which main sets
    monkeypatch.setattr(gpu, "LOG", tmp_path / "log")
    return tmp_path / "log"


def test_checks_run_on_a_cpu(capsys):
    checks = ["out of memory", "shared prompts", "DPO 135M", "QLoRA DPO 7B", "preflight"]
    assert gpu.main(["--device", "cpu", "--steps", "2", "--only", *checks]) == 0
    lines = capsys.readouterr().out.splitlines()[-len(checks) :]
    assert [line.split("|")[1].strip() for line in lines] == checks
    assert [line.split("|")[2].strip() for line in lines] == ["skipped", "ok", "ok", "ok", "ok"]
    assert "tokens/s" in lines[2]


def test_a_failed_check_has_its_error_in_its_row_and_the_rest_goes_on(capsys, log, monkeypatch):
    monkeypatch.setitem(gpu.CHECKS, "bf16", lambda bench: 1 / 0)
    monkeypatch.setitem(gpu.CHECKS, "preflight", lambda bench: "all is well")
    assert gpu.main(["--device", "cpu", "--only", "bf16", "preflight"]) == 1
    failed, other = capsys.readouterr().out.splitlines()[-2:]
    assert "FAILED" in failed
    assert "ZeroDivisionError" in failed
    assert "all is well" in other
    assert "Traceback" in log.read_text()


def test_losses_that_differ_fail():
    assert gpu.compare_losses([0.5, 0.6], [0.5, 0.6], "fp32") == "0"
    with pytest.raises(ValueError, match="differ by 0.1"):
        gpu.compare_losses([0.5, 0.6], [0.5, 0.7], "fp32")
