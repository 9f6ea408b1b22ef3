"""The parity run itself: forgotten cases, forgotten outputs and wrong values must fail it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent


@pytest.fixture
def golden(tmp_path):
    """A set of three cases: one with an output more, one with a wrong output, and one that no test knows."""
    (tmp_path / "dco").mkdir()
    for source, target in {
        "sft_loss_beta_off": "sft_loss_beta_off",
        "dco_loss_saturated": "dco_loss_saturated",
        "sdxl_time_ids": "unheard_of",
    }.items():
        with safe_open(HERE / "data" / "dco" / f"{source}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata()
        if source == "sft_loss_beta_off":
            tensors["out.extra"] = tensors["out.loss_plain"].clone()
        if source == "dco_loss_saturated":
            tensors["out.loss"] = tensors["out.loss"] + 2 * json.loads(metadata["case"])["atol_by_tensor"]["out.loss"]
        save_file(tensors, tmp_path / "dco" / f"{target}.safetensors", metadata)
    return tmp_path


def run(golden, *options: str) -> tuple[int, str]:
    """Status and output of the loss cases' tests on another set."""
    module = HERE / "dco" / "test_loss_parity.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(module)]
    result = subprocess.run(
        command, env=os.environ | {"GOLDEN_DIR": str(golden)}, cwd=HERE, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_what_was_forgotten_or_is_wrong_fails(golden):
    status, output = run(golden)
    assert status == 1, output
    assert "no test consumes dco/unheard_of.safetensors" in output
    assert "recorded outputs that the test never compared: ['extra']" in output
    assert "dco/dco_loss_saturated: loss is off by" in output
    assert "3 failed" in output


@pytest.mark.slow
def test_a_selection_of_tests_is_not_held_to_the_rest(golden):
    status, output = run(golden, "-k", "saturated")
    assert status == 1, output
    assert "1 failed" in output and "unheard_of" not in output
