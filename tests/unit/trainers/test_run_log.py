"""A run's log is read as it was written: which loss belongs to which step, and what was measured when."""

import pytest

from comfyui_personalize.models.errors import FormatError
from comfyui_personalize.trainers.run_log import LoggedRun, RunLog, read_log


def test_what_was_measured_before_a_step_belongs_to_the_steps_done_then(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(1, {"loss": 0.5, "lr": 1e-3, "evaluation": 0.9})
    log.write(2, {"loss": 0.25, "lr": 1e-3})
    log.write(3, {"loss": 0.125, "lr": 1e-3, "evaluation": 0.8})
    log.write(3, {"evaluation": 0.7})  # after the last step
    log.close()
    assert read_log(tmp_path) == LoggedRun([0.5, 0.25, 0.125], [(0, 0.9), (2, 0.8), (3, 0.7)])


@pytest.mark.parametrize("text", ["", '{"step": 3, "evaluation": 1}\n', '{"loss": 1}\n', "[1]}\n", '{"step": 1, "loss'])
def test_what_is_no_log_is_refused(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(FormatError, match="is no log of a training|no log.jsonl with losses there"):
        read_log(tmp_path)
    with pytest.raises(FormatError, match="give the name of a training"):
        read_log(tmp_path / "nowhere")
