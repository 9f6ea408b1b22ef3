"""DVAR's criterion and the CLIP plateau against the authors' stoppers."""

import pytest
import torch

from comfyui_personalize.models.dvar import PlateauStop, VarianceStop


@pytest.mark.golden("dvar", "var_early_stopper")
def test_variance_rule(case):
    for name, settings in case.config["series"].items():
        stop = VarianceStop(settings["window"], settings["eps"])
        values, stopped = [], []
        for loss in case.inputs[name].tolist():
            values.append(stop.update(loss))
            stopped.append(stop.stopped)
        case.check(f"{name}_value", torch.tensor(values, dtype=torch.float64))
        case.check(f"{name}_stop_index", torch.tensor(stopped.index(True) if stop.stopped else -1))


@pytest.mark.golden("dvar", "clip_early_stopper")
def test_clip_plateau(case):
    for name, settings in case.config["series"].items():
        stop = PlateauStop(settings["patience"], settings["eps"])
        found = {"stopped": [], "best": [], "no_improvement": []}
        for score in case.inputs[name].tolist():
            found["stopped"].append(stop.update(score))
            found["best"].append(stop.best)
            found["no_improvement"].append(stop.no_improvement)
        for what in found.keys() & {key.removeprefix(f"{name}_") for key in case.expected}:
            expected = case.expected[f"{name}_{what}"]
            got = torch.tensor(found[what], dtype=expected.dtype)
            case.check(f"{name}_{what}", got if expected.ndim else got[-1])
