"""At which step our training loop stops, against the authors' loop."""

import json

import pytest
import torch

from comfyui_personalize.trainers.config import TrainConfig
from comfyui_personalize.trainers.loop import ParameterGroup, train_loop
from comfyui_personalize.trainers.stopping import DVAR


class Recorded:
    """Evaluations as they were recorded, one after the other."""

    measure, higher_is_better = "evaluation", False

    def __init__(self, losses):
        self.losses = iter(losses)

    def run(self, cancelled):
        return {"": next(self.losses)}

    def state_dict(self):
        return {}


@pytest.mark.golden("dvar", "early_stop_loop")
def test_the_loop_stops_at_the_recorded_step(case, tmp_path):
    every, losses = case.config["early_stop_freq"], case.inputs["eval_losses"].tolist()
    rule = DVAR(window=case.config["window"] * every, eps=case.config["eps"], every=every)
    weight = torch.nn.Parameter(torch.ones(()))
    result = train_loop(
        TrainConfig(steps=10 * every * len(losses)),
        [ParameterGroup("g", {"w": weight}, 1e-3, 0.0)],
        weight.square,
        device=torch.device("cpu"),
        stopping=rule,
        evaluation=Recorded(losses),
        run_folder=tmp_path,
    )
    assert result.stopped_by == "rule"
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    evaluated = [line for line in log if "evaluation" in line]
    case.check("n_optimizer_steps", torch.tensor(result.steps))
    case.check("n_evaluations", torch.tensor(len(result.evaluations)))
    case.check("normalized_var_last", torch.tensor(evaluated[-1]["dvar"], dtype=torch.float64))
    assert [loss for _, loss in result.evaluations] == losses
    assert [steps for steps, _ in result.evaluations] == [line["step"] - 1 for line in evaluated]
