"""The host binding against the DCO authors' recorded predictions and guided trajectories."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.parity

_spec = importlib.util.spec_from_file_location(
    "personalize_recorded_cases", Path(__file__).parents[1] / "parity" / "conftest.py"
)
recorded = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recorded)


def dco_cases(*patterns):
    files = recorded.cases("dco", patterns)
    return pytest.mark.parametrize("path", files, ids=[f"dco/{path.stem}" for path in files])


def conditioning(embeds, pooled, time_ids):
    return [[embeds, {"pooled_output": pooled, "time_ids": time_ids}]]


@pytest.fixture
def load_case(comfy, load_helper):
    """load_case(path) -> the case, the host's MODEL under a switchable LoRA."""

    def load(path):
        case = recorded.Case(path, [])
        model, lora = load_helper("host/golden_unet.py").load(case)
        return case, load_helper("host/sampling.py").with_switchable(model, lora)

    return load


@dco_cases("unet_lora_dco_step_*")
def test_policy_and_reference_predictions_come_from_one_batch(load_case, load_helper, path):
    """The LoRA is on for the rows of the policy and off for those of the reference, in one forward."""
    import comfy.samplers

    from comfyui_personalize.nodes.switchable_lora import TAG

    case, model = load_case(path)
    inputs = case.inputs
    sampling = model.get_model_object("model_sampling")
    sigma = sampling.sigma(inputs["timesteps"].float())
    noisy = inputs["latents"] + sigma.view(-1, 1, 1, 1) * inputs["noise"]  # the host's scale: not divided
    case.check("noisy", sampling.calculate_input(sigma, noisy))

    policy = conditioning(inputs["prompt_embeds"], inputs["pooled"], inputs["time_ids"])
    embeds = inputs.get("base_prompt_embeds", inputs["prompt_embeds"])
    reference = conditioning(embeds, inputs.get("base_pooled", inputs["pooled"]), inputs["time_ids"])
    reference[0][1][TAG] = {}

    class Predict(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds = [self.conds["policy"], self.conds["reference"]]
            self.predictions = comfy.samplers.calc_cond_batch(self.inner_model, conds, noisy, sigma, model_options)
            return x

    guider = Predict(model)
    guider.inner_set_conds({"policy": policy, "reference": reference})
    tools = load_helper("host/sampling.py")
    with tools.CountRows(model) as rows:
        tools.guide(guider, steps=1, start={"samples": torch.zeros_like(noisy)})
    assert rows == [2 * len(noisy)]
    for name, denoised in zip(("model_pred", "refer_pred"), guider.predictions):
        case.check(name, (noisy - denoised) / sigma.view(-1, 1, 1, 1))


@dco_cases("reward_sampling_*")
def test_guided_trajectory(load_case, load_helper, path):
    """The authors' pipeline step by step, through the guider and the host's sampler of that name."""
    import comfy.samplers

    from comfyui_personalize.nodes.reward_guidance import RewardGuider

    case, model = load_case(path)
    config, inputs, schedule = case.config, case.inputs, case.config["scheduler"]
    sampling = model.get_model_object("model_sampling")
    euler = schedule["cls"] == "EulerDiscreteScheduler"
    assert euler or (schedule["cls"] == "DDIMScheduler" and config["eta"] == 0 and not schedule["set_alpha_to_one"])
    assert schedule["timestep_spacing"] == "leading"

    stride = schedule["num_train_timesteps"] // config["steps"]
    timesteps = torch.arange(config["steps"]).flip(0) * stride + schedule["steps_offset"]
    case.check("timesteps", timesteps.double())
    last = torch.zeros(1) if euler else sampling.sigma(torch.zeros(1))
    sigmas = torch.cat([sampling.sigma(timesteps.float()), last])
    if euler:
        case.check("sigmas", sigmas)

    time_ids = torch.tensor([config["time_ids"]], dtype=torch.float32)
    conds = {
        theirs: conditioning(inputs[f"{ours}_embeds"], inputs[f"{ours}_pooled"], time_ids)
        for ours, theirs in (("concept", "personalized"), ("base", "base"), ("negative", "negative"))
    }
    guider = RewardGuider(
        model, **conds, text_scale=config["w"], reward_scale=config["w_lora"], rescale=config["guidance_rescale"]
    )
    # The host multiplies noise by its own factor; DDIM's latents are those of the host divided by √(1+σ²).
    start = inputs["latents"] * config["init_noise_sigma"]
    scale = torch.ones_like(sigmas) if euler else (1 + sigmas**2).sqrt()
    top = float(sigmas[0]) >= float(sampling.sigma_max) * (1 - 1e-5)
    factor = sampling.noise_scaling(sigmas[0], torch.ones(1), torch.zeros(1), top)

    states = []
    final = guider.sample(
        start * scale[0] / factor,
        torch.zeros_like(start),
        comfy.samplers.sampler_object("euler" if euler else "ddim"),
        sigmas,
        callback=lambda step, denoised, x, total: states.append((x.clone(), denoised.clone())),
        disable_pbar=True,
        seed=0,
    )
    assert len(states) == config["steps"]
    latents = [x / scale[step] for step, (x, _) in enumerate(states)] + [final / scale[-1]]
    for step, (x, denoised) in enumerate(states):
        case.check(f"eps_{step}", (x - denoised) / sigmas[step])
        case.check(f"latents_{step}", latents[step + 1])
    case.check("final", latents[-1])
    assert not case.unchecked
