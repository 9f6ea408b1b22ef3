"""Encoder and decoder passes of one diffusers UNet against the two UNets of the authors' code."""

import pytest
import torch

from comfyui_personalize.models.lookahead import kept_tokens
from comfyui_personalize.trainers.lookahead.identity_attention import IdentityAttention, drop_tokens

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def identity(tiny_unet, encoder) -> IdentityAttention:
    return IdentityAttention(tiny_unet, encoder)


@pytest.fixture
def encode(case, identity, recorded_pass):
    """Reference and adapter of the recorded encoder pass."""

    def run(prefix: str = "enc_"):
        given = recorded_pass(prefix)
        reference = identity.encode(given.sample, given.timesteps, given.conditioning)
        return reference, identity.adapter(case.inputs[f"{prefix}adapter"])

    return run


@pytest.fixture
def decode(identity, recorded_pass):
    """A prediction of the recorded decoder's inputs."""
    given = recorded_pass("dec_")
    return lambda **told: identity.predict(given.sample, given.timesteps, given.conditioning, **told)


@pytest.mark.golden("lookahead", "02_*", "02b_*")
def test_keys_and_values_of_the_encoder(case, encode):
    reference, adapter = encode("")
    assert reference.keys() == adapter.keys() == set(case.config["modules"])

    for kind, found in (("self", reference), ("cross", adapter)):
        for index, which in enumerate("kv"):
            rows = []
            for block in case.config["modules"]:
                tensor, name = found[block][index], f"{block}.{kind}_{which}"
                rows.append(torch.stack([tensor.mean(), tensor.std(), tensor.norm()]))
                if block in case.config["full_modules"]:
                    case.check(name, tensor)
                else:
                    case.check(f"{name}.token0", tensor[:, 0])
                    case.check(f"{name}.tokenlast", tensor[:, -1])
            case.check(f"stats.{kind}_{which}", torch.stack(rows))


@pytest.mark.golden("lookahead", "03_decoder")
def test_decoder(case, encode, decode, freeu):
    reference, adapter = encode()
    scale = case.config["adapter_attention_scale"]
    for name, shared in (("kv", reference), ("dropped", None)):
        case.check(name, decode(reference=shared, adapter=adapter))
        case.check(f"{name}_scaled", decode(reference=shared, adapter=adapter, adapter_scale=scale))
        case.check(f"{name}_scale0", decode(reference=shared, adapter=adapter, adapter_scale=0.0))
    with freeu(case.config["freeu"]):
        case.check("freeu_kv", decode(reference=reference, adapter=adapter))
    with freeu(case.config["freeu"] | {"b1": 1.4, "s1": 0.5}):
        case.check("freeu_b1_s1_ignored", decode(reference=reference, adapter=adapter))


@pytest.mark.golden("lookahead", "03b_*")
def test_reference_of_another_size_and_controlnet(case, tiny_unet, encode, decode):
    reference, adapter = encode()
    case.check("other_resolution", decode(reference=reference, adapter=adapter))

    skips = sorted((name for name in case.inputs if name.startswith("cn_down_")), key=lambda name: int(name[8:]))
    residuals = {
        "down_block_additional_residuals": [case.inputs[name] for name in skips],
        "mid_block_additional_residual": case.inputs["cn_mid"],
    }
    tiny_unet.register_forward_pre_hook(lambda unet, given, told: (given, told | residuals), with_kwargs=True)
    case.check("controlnet", decode(reference=reference, adapter=adapter))


@pytest.mark.golden("lookahead", "04_*")
def test_dropped_tokens(case, encode, decode):
    reference, adapter = encode()
    order = case.config["order"]
    kept = {block: kept_tokens(case.inputs[f"rand.{block}"], case.config["drop_chance"]) for block in order}
    dropped = drop_tokens(reference, kept)

    case.check("kept_count", torch.tensor([dropped[block][0].shape[1] for block in order]))
    for name in [name for name in case.expected if name.endswith(".self_k")]:
        case.check(name, dropped[name.removesuffix(".self_k")][0])
    case.check("noise_pred", decode(reference=dropped, adapter=adapter))
