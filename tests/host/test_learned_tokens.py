"""Learned tokens in the host's own text encoding: every prompt form, family and file layout."""

import json

import pytest
import torch
from safetensors.torch import save_file

FAMILIES = ("sd15", "sd21", "sdxl")
PROMPTS = (
    "a photo of <dog>",
    "<dog>",
    "a (<dog>:1.3) in the snow",
    "(a <dog>:0.7), (detailed)",
    "<dog>'s hat, <Dog>, and<dog>",
    "a <dog>\nplaying <cat> saxophone " + "in the park " * 40,
)


@pytest.fixture
def lessons(comfy):
    """lessons(family) -> clip, {encoder: (3, width)} rows, of which <dog> owns two and <cat> one."""
    from comfyui_personalize.nodes.learned_tokens import encoder_widths

    def make(family, seed=0):
        _, clip, _ = comfy.load(family)
        generator = torch.Generator().manual_seed(seed)
        widths = encoder_widths(clip)
        return clip, {key: torch.randn(3, width, generator=generator) * 0.3 for key, width in widths.items()}

    return make


def encode(comfy, clip, prompt):
    ((embeds, extra),) = comfy.nodes.CLIPTextEncode().encode(clip, prompt)[0]
    return embeds, extra["pooled_output"]


def tokens(rows):
    from comfyui_personalize.models.learned_embeddings import LearnedEmbedding

    return [
        LearnedEmbedding("<dog>", {key: value[:2] for key, value in rows.items()}),
        LearnedEmbedding("<cat>", {key: value[2:] for key, value in rows.items()}),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_trigger_means_what_embedding_files_mean(comfy, lessons, family, prompt):
    """The host's own "embedding:" syntax with the same rows in a file is the reference."""
    from comfyui_personalize.nodes.learned_tokens import teach

    clip, rows = lessons(family)
    folder = comfy.base / "models" / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value[:2].clone() for key, value in rows.items()}, folder / "two_rows.safetensors")
    save_file({key: value[2:].clone() for key, value in rows.items()}, folder / "one_row.safetensors")
    spelled = prompt.replace("<Dog>", "<dog>")
    for trigger, name in (("<dog>", "two_rows"), ("<cat>", "one_row")):
        spelled = spelled.replace(trigger, f" embedding:{name} ")
    reference = clip.clone()
    for key in rows:
        getattr(reference.tokenizer, key).embedding_directory = [str(folder)]
    expected = encode(comfy, reference, spelled)

    untaught = encode(comfy, clip, prompt)
    taught = teach(clip, tokens(rows), "dog.safetensors")
    got = encode(comfy, taught, prompt)
    assert all(torch.equal(*pair) for pair in zip(got, expected))
    assert not torch.allclose(got[0], untaught[0])
    assert all(torch.equal(*pair) for pair in zip(encode(comfy, clip, prompt), untaught))


def test_both_encoders_of_sdxl_hear_the_token(comfy, lessons):
    from comfyui_personalize.nodes.learned_tokens import teach

    clip, rows = lessons("sdxl")
    before, _ = encode(comfy, clip, "a <dog>")
    after, _ = encode(comfy, teach(clip, tokens(rows), "x"), "a <dog>")
    width = rows["clip_l"].shape[1]
    assert not torch.allclose(before[..., :width], after[..., :width])
    assert not torch.allclose(before[..., width:], after[..., width:])


def test_loaders_stack_and_the_nearest_one_wins(comfy, lessons):
    from comfyui_personalize.nodes.learned_tokens import teach

    clip, rows = lessons("sd15")
    _, others = lessons("sd15", seed=1)
    dog, cat = tokens(rows)
    other_dog, _ = tokens(others)
    both = teach(teach(clip, [dog], "a"), [cat], "b")
    at_once = teach(clip, [dog, cat], "c")
    prompt = "a <dog> and a <cat>"
    assert torch.equal(encode(comfy, both, prompt)[0], encode(comfy, at_once, prompt)[0])
    replaced = teach(both, [other_dog], "d")
    assert not torch.equal(encode(comfy, replaced, prompt)[0], encode(comfy, both, prompt)[0])
    assert torch.equal(encode(comfy, both, prompt)[0], encode(comfy, at_once, prompt)[0])


def test_unknown_triggers_stay_text_and_the_embedding_syntax_also_works(comfy, lessons, caplog):
    from comfyui_personalize.nodes.learned_tokens import teach

    clip, rows = lessons("sd15")
    taught = teach(clip, tokens(rows), "x")
    assert torch.equal(encode(comfy, taught, "a <bird> sings")[0], encode(comfy, clip, "a <bird> sings")[0])
    assert torch.equal(encode(comfy, taught, "a embedding:<dog>")[0], encode(comfy, taught, "a <dog>")[0])
    assert not [message for message in caplog.messages if "embedding" in message]  # the host warns of unknown ones


@pytest.mark.parametrize(("trained_on", "used_with"), [("sd15", "sd21"), ("sdxl", "sd15"), ("sd15", "sdxl")])
def test_tokens_of_another_family_are_refused(lessons, trained_on, used_with):
    from comfyui_personalize.models.errors import IncompatibleModelError
    from comfyui_personalize.nodes.learned_tokens import teach

    _, rows = lessons(trained_on)
    clip, _ = lessons(used_with)
    if (trained_on, used_with) == ("sdxl", "sd15"):
        rows = {"clip_l": rows["clip_g"]}
    with pytest.raises(IncompatibleModelError, match="dog.pt: token <dog> was trained for other text encoders"):
        teach(clip, tokens(rows), "dog.pt")


def write(path, layout, rows):
    """One file with the tokens <dog> (two rows) and <cat> (one row), or <dog> alone where the layout has no room."""
    names = json.dumps([{"trigger": "<dog>", "rows": 2}, {"trigger": "<cat>", "rows": 1}])
    first = next(iter(rows.values()))
    if layout == "ours":
        save_file(rows, path, {"personalize.tokens": names})
    elif layout == "bundled":
        entries = {f"bundle_emb.dog.{key}": value[:2].clone() for key, value in rows.items()}
        entries |= {f"bundle_emb.cat.{key}": value[2:].clone() for key, value in rows.items()}
        save_file(entries | {"lora_unet_x.alpha": torch.ones(())}, path, {"personalize.tokens": names})
    elif layout == "a1111_bundle":
        save_file({"bundle_emb.dog.string_to_param.*": first[:2].clone()}, path)
    elif layout == "host":
        save_file({key: value[:2].clone() for key, value in rows.items()}, path)
    elif layout == "diffusers":
        save_file({"<dog>": first[0].clone(), "<cat>": first[2].clone()}, path)
    elif layout == "diffusers_bin":
        torch.save({"<dog>": first[0].clone()}, path)
    elif layout == "a1111":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": first[:2].clone()}, "name": "dog"}, path)
    elif layout == "emb_params":
        save_file({"emb_params": first[:2].clone()}, path)


@pytest.mark.parametrize(
    ("layout", "name", "triggers"),
    [
        ("ours", "anything.safetensors", ["<dog>", "<cat>"]),
        ("bundled", "anything.safetensors", ["<dog>", "<cat>"]),
        ("a1111_bundle", "anything.safetensors", ["<dog>"]),
        ("host", "dog.safetensors", ["<dog>"]),
        ("diffusers", "anything.safetensors", ["<cat>", "<dog>"]),
        ("diffusers_bin", "learned_embeds.bin", ["<dog>"]),
        ("a1111", "dog.pt", ["<dog>"]),
        ("emb_params", "dog.safetensors", ["<dog>"]),
    ],
)
def test_every_file_layout_through_the_node(comfy, lessons, layout, name, triggers):
    from comfyui_personalize.nodes.learned_tokens import teach
    from comfyui_personalize.nodes.load_dco import LoadLearnedTokens

    clip, rows = lessons("sd15")
    folder = comfy.base / "models" / "embeddings" / layout
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / name, layout, rows)
    listed = f"{layout}/{name}"
    taught, written = LoadLearnedTokens.execute(clip, listed).args
    assert sorted(written.split(", ")) == sorted(triggers)
    reference = tokens(rows)
    if layout.startswith("diffusers"):
        reference[0].rows["clip_l"] = rows["clip_l"][:1]
    expected = teach(clip, reference, "x")
    prompt = "a " + " and a ".join(triggers)
    assert torch.equal(encode(comfy, taught, prompt)[0], encode(comfy, expected, prompt)[0])
    before = LoadLearnedTokens.fingerprint_inputs(embedding_name=listed, trigger="", clip=None)
    assert before == LoadLearnedTokens.fingerprint_inputs(embedding_name=listed, trigger="", clip=None)
    write(folder / name, layout, rows)
    assert before != LoadLearnedTokens.fingerprint_inputs(embedding_name=listed, trigger="", clip=None)


def test_names_given_by_hand_split_and_rename(comfy, lessons):
    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.load_dco import LoadLearnedTokens

    clip, rows = lessons("sdxl")
    folder = comfy.base / "models" / "embeddings" / "by_hand"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(rows, folder / "learned_embeds.safetensors")
    listed = "by_hand/learned_embeds.safetensors"
    assert LoadLearnedTokens.execute(clip, listed).args[1] == "<by_hand>"
    assert LoadLearnedTokens.execute(clip, listed, "<a>, b c").args[1] == "<a>, <b>, <c>"
    with pytest.raises(ConfigError, match="holds 3 rows, but 2 tokens"):
        LoadLearnedTokens.execute(clip, listed, "<a>, <b>")


def test_files_without_tokens_are_refused(comfy, lessons):
    from comfyui_personalize.models.errors import FormatError
    from comfyui_personalize.nodes.load_dco import LoadLearnedTokens

    class Payload:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    clip, _ = lessons("sd15")
    folder = comfy.base / "models" / "embeddings" / "refused"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, folder / "lora.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(1, 64)}, "code": Payload()}, folder / "malicious.pt")
    (folder / "text.safetensors").write_text("not found")
    for name, reason in (
        ("lora.safetensors", "no learned tokens"),
        ("malicious.pt", "refused"),
        ("text.safetensors", "not a safetensors file"),
    ):
        with pytest.raises(FormatError, match=reason):
            LoadLearnedTokens.execute(clip, f"refused/{name}")
    with pytest.raises(FormatError, match="not in the embeddings folder any more"):
        LoadLearnedTokens.execute(clip, "refused/gone.pt")
