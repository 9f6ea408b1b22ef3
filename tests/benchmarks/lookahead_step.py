"""One denoising step with a face encoder, ours against the authors' order of work, and both counted at full size."""

import torch
from pairs import Pair, time_pairs
from torch.utils.flop_counter import FlopCounterMode

MODES = {"attention sharing": "sharing", "adapter only": "no sharing"}


def measure(comfy, checkpoint, encoder, identity, side: int, rounds: int) -> dict[str, dict]:
    """Mode -> seconds of a step both ways, UNet rows of each call, VAE passes, and how far the results differ.

    The authors encode the picture, make the adapter's keys and values and run the encoder in every step, and ask the
    UNet twice where attention is shared.
    """
    from comfyui_personalize.nodes.lookahead_guider import LookaheadGuider

    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
    encode = comfy.nodes.CLIPTextEncode().encode
    prompts = {"positive": encode(clip, "a painting of a face")[0], "negative": encode(clip, "")[0]}
    picture = torch.rand(1, side, side, 3)
    found: dict[str, dict] = {}
    for mode in MODES:
        guider = LookaheadGuider(model, encoder=encoder, identity=identity, mode=mode, text_scale=5.0, **prompts)
        # Without sharing the authors run the encoder for the adapter's keys and values alone.
        observer = LookaheadGuider(model, encoder=encoder, identity=identity, text_scale=5.0, **prompts)
        found[mode] = _measure(comfy, guider, observer, vae, picture, side // vae.downscale_ratio, rounds)
    return found


def _measure(comfy, guider, observer, vae, picture, side: int, rounds: int) -> dict:
    from comfyui_personalize.nodes.identity_roles import KEY, RUN
    from comfyui_personalize.nodes.lookahead_guider import ROWS

    found: dict = {"ours_vae": 0, "authors_vae": 1}

    def compare(inner, x, sigma, options) -> Pair:
        rows: list[int] = []
        hook = inner.diffusion_model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
        run = options["transformer_options"][RUN]
        plain, shared = ("plain_text", "plain_uncond"), ("shared_text", "shared_uncond")

        def ours():
            run.references.clear()
            return guider.predict_noise(x, sigma, options)

        def authors():
            run.references.clear()
            run.made.clear()
            vae.encode(picture)
            observer._encode(sigma, options, {"text", "uncond"})
            predictions = {}
            for names in (shared, plain) if guider.sharing else (plain,):
                asked = dict(options)
                conds = guider._with_roles({name: ROWS[name] for name in names}, asked)
                answers = comfy.samplers.calc_cond_batch(inner, list(conds.values()), x, sigma, asked)
                predictions |= dict(zip(names, answers))
            text, full, identity = guider.scales
            base = predictions["plain_uncond"]
            guided = base + text * (predictions["plain_text"] - base)
            if guider.sharing:
                guided += full * (predictions["shared_text"] - base) + identity * (predictions["shared_uncond"] - base)
            return guided

        for name, work in (("ours", ours), ("authors", authors)):
            rows.clear()
            found[f"{name}_output"] = work()
            found[f"{name}_rows"] = list(rows)
        hook.remove()
        return time_pairs(ours, authors, rounds)

    class Probe(comfy.samplers.KSAMPLER):
        def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, *_more):
            inner, sigma = wrap.inner_model, sigmas[:1]
            observer.inner_model, observer.conds = inner, guider.conds
            observer.encoding = guider.encoding
            x = inner.model_sampling.noise_scaling(sigma, noise, latent_image, True)
            options = extra_args["model_options"]
            run = options["transformer_options"][RUN]
            if run.latents is None:
                (start,) = observer.model_patcher.get_wrappers("sampler_sample", KEY)
                start._prepare(run, inner, noise, 0)
            found["pair"] = compare(inner, x, sigma, options)
            return latent_image

    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    guider.sample(noise, torch.zeros_like(noise), Probe(None), torch.tensor([5.0, 0.0]), seed=0)
    ours, theirs = found.pop("ours_output"), found.pop("authors_output")
    found["largest_difference"] = float((ours - theirs).abs().max() / ours.abs().max())
    return found


def full_size_work(comfy, side: int = 1024) -> dict[str, float]:
    """TFLOP of a step at SDXL's true size, counted without data: "sharing", "no sharing", and the authors' of both."""
    with torch.device("meta"):
        unet, encoder, identity = _hollow(comfy)
    latents = side // 8

    def rows(count: int) -> dict:
        return {
            "x": torch.empty(count, 4, latents, latents, device="meta"),
            "timesteps": torch.empty(count, device="meta"),
            "context": torch.empty(count, 77, 2048, device="meta"),
            "y": torch.empty(count, 2816, device="meta"),
        }

    from comfy.ldm.modules.attention import attention_pytorch

    from comfyui_personalize.nodes.identity_attention import IdentityAttention
    from comfyui_personalize.nodes.identity_roles import KEY, ROLES, RUN, Role, Run

    def counted(_chosen, *args, **settings):  # the others ask the device how much memory it has
        return attention_pytorch(*args, **settings)

    model = _Hollow(unet)
    attention = IdentityAttention(model, encoder, identity, adapter_scale=1.0)
    run = Run()

    def work(*roles: Role) -> float:
        options = {
            "wrappers": {"diffusion_model": {KEY: [attention]}},
            "uuids": list(range(len(roles))),
            ROLES: dict(enumerate(roles)),
            RUN: run,
            "optimized_attention_override": counted,
        }
        with FlopCounterMode(display=False) as counter:
            unet(**rows(len(roles)), transformer_options=options)
        return counter.get_total_flops() / 1e12

    encoding = work(Role(keep="text"), Role(keep="uncond"))
    shared = Role(tokens="cond", shared="text"), Role(tokens="uncond", shared="uncond")
    plain = Role(tokens="cond"), Role(tokens="uncond")
    work(*plain)  # the adapter's keys and values, which later steps find made
    without = work(*plain)
    once = work(Role(), Role())
    return {
        "sharing": encoding + work(*plain, *shared),
        "no sharing": without,
        "plain": once,
        "authors' sharing": encoding + work(*shared) + without,
        "authors' no sharing": encoding + without,
    }


class _Hollow:
    """As much of the host's MODEL as the binding looks at."""

    def __init__(self, unet):
        self.model = self
        self.diffusion_model = unet
        self.model_config = type("Config", (), {"unet_config": unet_config()})


def unet_config() -> dict:
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "num_head_channels": 64,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
    }


def _hollow(comfy):
    """SDXL's UNet, an encoder of rank 4 and an identity, none of which holds data."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from comfyui_personalize.models.lookahead import IdentityTokens
    from comfyui_personalize.models.lookahead.encoder import LookaheadEncoder
    from comfyui_personalize.models.lookahead.identity import Identity
    from comfyui_personalize.models.lora import LowRankDelta
    from comfyui_personalize.nodes.unet_names import host_names

    unet = UNetModel(**unet_config(), operations=comfy.ops.disable_weight_init)
    names = host_names(_Hollow(unet))
    widths = {
        name.removesuffix(".attn1.to_k"): unet.get_submodule(own).weight.shape[0]
        for name, own in names.items()
        if name.endswith(".attn1.to_k")
    }
    change = {width: LowRankDelta(torch.empty(4, width), torch.empty(width, 4)) for width in set(widths.values())}
    encoder = LookaheadEncoder(
        resampler=None,
        adapter={block: (torch.empty(width, 2048), torch.empty(width, 2048)) for block, width in widths.items()},
        lora={},
        copies={block: (change[width], change[width]) for block, width in widths.items()},
        name="hollow",
        metadata={},
    )
    tokens = IdentityTokens(torch.empty(1, 16, 2048), torch.empty(1, 16, 2048))
    return unet, encoder, Identity(tokens, None, "")
