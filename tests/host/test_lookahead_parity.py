"""The host binding against the LCM-Lookahead authors' recorded passes and guided trajectories."""

import importlib.util
import uuid
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.parity

_spec = importlib.util.spec_from_file_location(
    "personalize_recorded_cases", Path(__file__).parents[1] / "parity" / "conftest.py"
)
recorded = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recorded)


def lookahead_cases(*patterns):
    files = recorded.cases("lookahead", patterns)
    return pytest.mark.parametrize("path", files, ids=[f"lookahead/{path.stem}" for path in files])


@pytest.fixture
def load_case(comfy, load_helper, tmp_path):
    """load_case(path) -> the case, the host's MODEL and the encoder."""

    def load(path):
        case = recorded.Case(path, [])
        return case, *load_helper("host/golden_encoder.py").load(case, tmp_path)

    return load


def identity_of(encoder, cond, uncond, latents=None):
    from comfyui_personalize.models.lookahead import IdentityTokens
    from comfyui_personalize.models.lookahead.identity import Identity, fingerprint

    latents = None if latents is None else latents.unsqueeze(1)  # one picture of each person
    return Identity(IdentityTokens(cond, uncond), latents, fingerprint(encoder.resampler))


class Bench:
    """Single calls of the UNet, outside any sampling."""

    def __init__(self, case, model, encoder, scale=1.0):
        from comfyui_personalize.nodes.encoder_fit import encoder_lora
        from comfyui_personalize.nodes.identity_attention import IdentityAttention
        from comfyui_personalize.nodes.identity_roles import Run

        inputs = case.inputs
        identity = identity_of(encoder, inputs.get("adapter", inputs.get("enc_adapter")), None)
        self.inputs, self.model, self.run = inputs, model, Run()
        self.lora = [encoder_lora(model, encoder)] if encoder.lora else []
        self.attention = IdentityAttention(model, encoder, identity, adapter_scale=scale)

    def unet(self, role, prefix, **settings):
        """One call on the inputs of that prefix, all rows of which have one role."""
        from comfyui_personalize.nodes.identity_roles import KEY, ROLES, RUN

        chunk = uuid.uuid4()
        lora = self.lora if role.keep else []
        options = {
            "wrappers": {"diffusion_model": {"lora": lora, KEY: [self.attention]}},
            "uuids": [chunk], ROLES: {chunk: role}, RUN: self.run, **settings.pop("options", {}),
        }  # fmt: skip
        sample, time_ids = self.inputs[f"{prefix}sample"], self.inputs[f"{prefix}time_ids"]
        sizes = self.model.model.embedder(time_ids.flatten()).view(len(time_ids), -1)
        return self.model.model.diffusion_model(
            sample,
            self.inputs[f"{prefix}timesteps"],
            context=self.inputs[f"{prefix}text"],
            y=torch.cat([self.inputs[f"{prefix}pooled"], sizes], dim=1),
            transformer_options=options,
            **settings,
        )

    def encode(self, prefix="enc_"):
        from comfyui_personalize.nodes.identity_roles import Role

        self.unet(Role(keep="face"), prefix)
        return self.run.references["face"]


@lookahead_cases("02_*", "02b_*")
def test_keys_and_values_of_the_encoder_pass(load_case, path):
    case, model, encoder = load_case(path)
    bench = Bench(case, model, encoder)
    kept = bench.encode("")
    assert set(kept) == set(case.config["modules"])
    statistics = {f"stats.{which}": [] for which in ("self_k", "self_v", "cross_k", "cross_v")}
    for block in case.config["modules"]:
        from comfyui_personalize.nodes.identity_attention import _Call
        from comfyui_personalize.nodes.identity_roles import Role

        shape = bench.inputs["sample"].shape
        call = _Call(bench.attention, None, (Role(tokens="cond"),), bench.run, None, shape, {})
        taken = dict(zip(("self_k", "self_v"), kept[block]))
        taken |= zip(("cross_k", "cross_v"), call._tokens(block, torch.zeros(1)))
        for which, tensor in taken.items():
            for name, value in (("", tensor), (".token0", tensor[:, 0]), (".tokenlast", tensor[:, -1])):
                if f"{block}.{which}{name}" in case.expected:
                    case.check(f"{block}.{which}{name}", value)
            numbers = torch.stack([tensor.mean(), tensor.std(), tensor.norm()])
            statistics[f"stats.{which}"].append(numbers)
    for name, rows in statistics.items():
        if name in case.expected:
            case.check(name, torch.stack(rows))
    assert not case.unchecked


def authors_freeu(b1, b2, s1, s2):
    """FreeU as the authors apply it: to the second level alone, before each of its layers."""
    import comfy_extras.nodes_freelunch as freelunch

    def patch(h, skip, options):
        level = options["block"][1] // 3
        if level == 1:
            h = h.clone()
            h[:, : h.shape[1] // 2] *= b2
            skip = freelunch.Fourier_filter(skip, threshold=1, scale=s2)
        return h, skip

    return {"patches": {"output_block_patch": [patch]}}


@lookahead_cases("03_*")
def test_decoder_pass(load_case, path):
    from comfyui_personalize.nodes.identity_roles import Role

    case, model, encoder = load_case(path)
    plain, shared = Role(tokens="cond"), Role(tokens="cond", shared="face")
    scale, freeu = case.config["adapter_attention_scale"], case.config["freeu"]
    for name, role, of_adapter, options in (
        ("dropped", plain, 1.0, {}),
        ("dropped_scaled", plain, scale, {}),
        ("dropped_scale0", plain, 0.0, {}),
        ("kv", shared, 1.0, {}),
        ("kv_scaled", shared, scale, {}),
        ("kv_scale0", shared, 0.0, {}),
        ("freeu_kv", shared, 1.0, authors_freeu(**freeu)),
        ("freeu_b1_s1_ignored", shared, 1.0, authors_freeu(**freeu)),
    ):
        bench = Bench(case, model, encoder, of_adapter)
        bench.encode()
        case.check(name, bench.unet(role, "dec_", options=options))
    assert not case.unchecked


@lookahead_cases("03b_*")
def test_reference_of_another_size_and_controlnet(load_case, path):
    from comfyui_personalize.nodes.identity_roles import Role

    case, model, encoder = load_case(path)
    bench = Bench(case, model, encoder)
    bench.encode()
    shared = Role(tokens="cond", shared="face")
    case.check("other_resolution", bench.unet(shared, "dec_"))
    down = [case.inputs[f"cn_down_{level}"].clone() for level in range(9)]
    residuals = {"output": down, "middle": [case.inputs["cn_mid"].clone()]}
    case.check("controlnet", bench.unet(shared, "dec_", control=residuals))
    assert not case.unchecked


@lookahead_cases("04_*")
def test_dropped_tokens(load_case, path):
    from comfyui_personalize.models.lookahead import kept_tokens
    from comfyui_personalize.nodes.identity_roles import Role

    case, model, encoder = load_case(path)
    bench = Bench(case, model, encoder)
    kept = bench.encode()
    counts = []
    for block in case.config["order"]:
        seen = kept_tokens(case.inputs[f"rand.{block}"], case.config["drop_chance"])[0]
        kept[block] = [tensor[:, seen] for tensor in kept[block]]
        counts.append(int(seen.sum()))
        if f"{block}.self_k" in case.expected:
            case.check(f"{block}.self_k", kept[block][0])
    case.check("kept_count", torch.tensor(counts))
    case.check("noise_pred", bench.unet(Role(tokens="cond", shared="face"), "dec_"))
    assert not case.unchecked


class Trajectory:
    """A recorded sampling loop, driven through the host's guider."""

    def __init__(self, case, model, encoder):
        from comfyui_personalize.nodes.lookahead_guider import LookaheadGuider

        self.case, self.config, inputs = case, case.config, case.inputs
        few_step = "step_noise" in inputs
        sharing = "first_full" in case.expected
        if self.config["freeu"]:
            model = model.clone()
            (patch,) = authors_freeu(**self.config["freeu"])["patches"]["output_block_patch"]
            model.set_model_output_block_patch(patch)
        self.seen: dict[str, list] = {"noise_pred": [], "encoder_input": [], "latents": []}
        self.rows: dict = {}

        def first_rows(arguments):
            self.rows = self.rows or dict(
                zip(("plain_text", "plain_uncond", "shared_text", "shared_uncond"), arguments["conds_out"])
            )
            return arguments["conds_out"]

        text, pooled = inputs["text"], inputs["pooled"]
        settings = dict(
            encoder=encoder,
            identity=identity_of(
                encoder, inputs["adapter_cond"], inputs["adapter_uncond"], inputs["cond_latent_unscaled"]
            ),
            positive=[[text, {"pooled_output": pooled}]],
            negative=[[torch.zeros_like(text), {"pooled_output": torch.zeros_like(pooled)}]],
            encoder_prompt=[[inputs["enc_text"], {"pooled_output": inputs["enc_pooled"]}]],
            mode="attention sharing" if sharing else "adapter only",
            text_scale=self.config["guidance_scale_nokv" if sharing else "guidance_scale"],
            full_scale=self.config["guidance_scale_full"],
            identity_scale=self.config["guidance_scale_kv"],
            adapter_scale=self.config["adapter_attention_scale"],
            reference_noise="each picture's own" if self.config["noisy_encoder_input"] else "none",
        )  # fmt: skip
        observed = model.clone()
        observed.set_model_sampler_pre_cfg_function(first_rows)
        self.observer = LookaheadGuider(observed, **settings)
        self.guider = LookaheadGuider(model, **settings, few_step=few_step)
        self.observer.encoding = self.guider.encoding  # it runs inside the other's sampling

    def run(self, scheduler, step):
        """Follow the authors' scheduler; step(index, timestep, noise prediction, latents) -> the next latents."""
        import comfy.samplers

        outer = self

        class Follow(comfy.samplers.KSAMPLER):
            def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, *_more):
                sampling = wrap.inner_model.model_sampling
                latents, options = noise, extra_args["model_options"]
                for index, timestep in enumerate(scheduler.timesteps):
                    sigma = sampling.sigma(timestep.reshape(1).float()).expand(len(noise))
                    root = (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
                    x = latents * root
                    denoised = wrap(x, sigma, **extra_args)
                    if not index:
                        outer.first(wrap, x, sigma, options)
                    prediction = (x - denoised) / sigma.reshape(-1, 1, 1, 1)
                    outer.seen["noise_pred"].append(prediction)
                    run = options["transformer_options"]["personalize_identity_run"]
                    if run.latents is not None:
                        clean = run.noise is None
                        outer.seen["encoder_input"].append(
                            run.latents if clean else (run.latents + sigma[0] * run.noise) / root[:1]
                        )
                    latents = step(index, timestep, prediction, latents)
                    outer.seen["latents"].append(latents)
                return latents

        start = self.case.inputs["init_latents"]
        self.guider.sample(start, torch.zeros_like(start), Follow(None), torch.tensor([14.6, 0.0]), seed=0)
        for name, tensors in self.seen.items():
            if name in self.case.expected:
                self.case.check(name, torch.stack(tensors))

    def first(self, wrap, x, sigma, options):
        """All predictions of the first step, as the authors compute them even where guidance needs fewer."""
        self.observer.inner_model, self.observer.conds = wrap.inner_model, wrap.conds
        functions = {"sampler_pre_cfg_function": self.observer.model_options["sampler_pre_cfg_function"]}
        self.observer.predict_noise(x, sigma, options | functions)
        noise = {row: (x - denoised) / sigma.reshape(-1, 1, 1, 1) for row, denoised in self.rows.items()}
        for name, kind in (("first_full", "shared"), ("first_nokv", "plain")):
            if name in self.case.expected:
                self.case.check(name, torch.cat([noise[f"{kind}_uncond"], noise[f"{kind}_text"]]))


@lookahead_cases("06_*", "06b_*", "06c_*", "06d_*", "06e_*")
def test_guided_trajectory(load_case, path):
    from diffusers import DPMSolverMultistepScheduler

    case, model, encoder = load_case(path)
    config = case.config
    base = {key: value for key, value in config["scheduler_base_config"].items() if not key.startswith("_")}
    scheduler = DPMSolverMultistepScheduler.from_config(
        base | config["scheduler_overrides"], final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(config["num_inference_steps"])
    case.check("timesteps", scheduler.timesteps)
    case.check("sigmas", scheduler.sigmas)
    Trajectory(case, model, encoder).run(
        scheduler,
        lambda _index, timestep, prediction, latents: scheduler.step(prediction, timestep, latents).prev_sample,
    )
    assert not case.unchecked


@lookahead_cases("06f_*", "06g_*")
def test_few_step_trajectory(load_case, path):
    from diffusers import LCMScheduler

    from comfyui_personalize.models.lookahead import preview
    from comfyui_personalize.models.schedules import NoiseSchedule

    case, model, encoder = load_case(path)
    config = case.config
    base = {key: value for key, value in config["scheduler_base_config"].items() if not key.startswith("_")}
    scheduler = LCMScheduler.from_config(base | config["scheduler_overrides"])
    scheduler.set_timesteps(config["num_inference_steps"])
    case.check("timesteps", scheduler.timesteps)
    schedule = NoiseSchedule(scheduler.alphas_cumprod)

    def step(index, timestep, prediction, latents):
        clean = preview(schedule, prediction, latents, timestep.expand(len(latents)))
        if index + 1 == len(scheduler.timesteps):
            return clean
        kept = scheduler.alphas_cumprod[scheduler.timesteps[index + 1]]
        return kept.sqrt() * clean + (1 - kept).sqrt() * case.inputs["step_noise"][index]

    Trajectory(case, model, encoder).run(scheduler, step)
    assert not case.unchecked
