"""Perfusion concepts in the host: what they change, what they leave alone, and what is refused."""

import gc
import logging

import pytest
import torch

WORDS = (("<cup>", "cup"), ("<bear>", "bear"))


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.fixture
def scene(comfy, load_helper):
    """scene(family, count=1, **concept) -> model, CLIP and concepts together."""
    make_concept = load_helper("host/concepts.py").make_concept

    class Scene:
        def __init__(self, family="sd15", count=1, beta=0.6, tau=0.1, **settings):
            from comfyui_personalize.nodes.rank_one_edits import GatedConcept

            self.model, self.clip, _ = comfy.load(family)
            self.concepts = tuple(
                GatedConcept(make_concept(self.model, self.clip, *words, seed=seed, **settings), beta, tau)
                for seed, words in enumerate(WORDS[:count])
            )

        def apply(self, concepts=None, model=None, start=0.0, end=1.0):
            from comfyui_personalize.nodes.perfusion import ApplyPerfusion

            concepts = self.concepts if concepts is None else concepts
            return ApplyPerfusion.execute(model or self.model, self.clip, concepts, start, end).result

        def sample(self, tools, prompt="a <cup> and a <bear> in paris", concepts=None, model=None, **settings):
            model, clip = self.apply(concepts, model)
            return tools.ksample(model, encode(comfy, clip, prompt), encode(comfy, clip, "blurry"), **settings)

    return Scene


def encode(comfy, clip, prompt):
    return comfy.nodes.CLIPTextEncode().encode(clip, prompt)[0]


@pytest.mark.parametrize("family", ("sd15", "sd21", "sdxl"))
@pytest.mark.parametrize("positions", (1, 77))
def test_a_concept_shows_and_its_gate_closes_it(comfy, tools, scene, family, positions):
    from dataclasses import replace

    one = scene(family, positions=positions)
    plain = tools.ksample(one.model, *(encode(comfy, one.apply()[1], text) for text in ("a <cup> in paris", "blurry")))
    shown, closed = (
        one.sample(tools, "a <cup> in paris", [replace(one.concepts[0], beta=beta)]) for beta in (0.6, float("inf"))
    )
    assert tools.relative(shown, plain) > 0.02
    assert tools.relative(shown, closed) > 0.02


def test_the_order_of_concepts_does_not_matter(tools, scene):
    two = scene(count=2)
    first, second = (two.sample(tools, concepts=concepts) for concepts in (two.concepts, two.concepts[::-1]))
    assert tools.relative(second, first) < 1e-4
    assert tools.relative(two.sample(tools, concepts=two.concepts[:1]), first) > 0.01


def test_what_is_made_once_is_what_every_step_would_make(tools, scene):
    two = scene("sdxl", count=2)
    patched = two.model.clone()
    patched.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))  # then nothing is kept
    assert tools.relative(two.sample(tools, model=patched, steps=4), two.sample(tools, steps=4)) < 1e-4


def test_prompts_that_another_node_changes_from_step_to_step_are_edited_anew(tools, scene):
    one, steps = scene(), []

    def fading(apply_model, args):
        steps.append(1)
        given = dict(args["c"])
        given["c_crossattn"] = given["c_crossattn"] * (1 - 0.1 * len(steps))
        return apply_model(args["input"], args["timestep"], **given)

    def sample(*changes):
        steps.clear()
        model = one.model.clone()
        for change in changes:
            change(model)
        return one.sample(tools, model=model, steps=4)

    def wrap(model):
        model.set_model_unet_function_wrapper(fading)

    def keep_nothing(model):
        model.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))

    assert tools.relative(sample(wrap), sample(wrap, keep_nothing)) < 1e-5
    assert tools.relative(sample(wrap), sample()) > 0.01


def test_edits_cost_no_row_and_are_made_once(tools, scene, monkeypatch):
    from comfyui_personalize.nodes import rank_one_edits

    two, made = scene(count=2), []
    once = rank_one_edits.gated_outputs
    monkeypatch.setattr(rank_one_edits, "gated_outputs", lambda *args: made.append(1) or once(*args))
    with tools.CountRows(two.model) as rows:
        two.sample(tools, steps=5)
    projections = len(rank_one_edits.RankOneEdits(two.model, two.concepts, None).projections)
    assert rows == [2] * 5
    assert len(made) == projections


def test_a_lora_merged_or_switchable_acts_under_the_edits(tools, scene):
    one = scene()
    tensors = tools.random_lora(one.model, every=1, gain=0.5)
    merged = one.sample(tools, model=tools.with_stock_loader(one.model, tensors))
    switchable = one.sample(tools, model=tools.with_switchable(one.model, tensors))
    # Keys answer to the superclass as the base model does; a LoRA in the weights changes that answer as well.
    assert tools.relative(switchable, merged) < 0.05
    assert tools.relative(merged, one.sample(tools)) > 0.02


def test_an_empty_range_is_the_plain_model_bit_for_bit(comfy, tools, scene):
    one = scene()
    model, clip = one.apply(start=0.3, end=0.3)
    prompts = [encode(comfy, clip, text) for text in ("a <cup> in paris", "blurry")]
    assert torch.equal(tools.ksample(model, *prompts), tools.ksample(one.model, *prompts))
    late = one.apply(start=0.5)[0]
    whole = one.apply()[0]
    assert not torch.equal(tools.ksample(late, *prompts), tools.ksample(one.model, *prompts))
    assert not torch.equal(tools.ksample(late, *prompts), tools.ksample(whole, *prompts))


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_concepts_switched_off_are_the_plain_model_bit_for_bit(comfy, tools, scene, family):
    from comfyui_personalize.nodes.perfusion_concepts import LoadPerfusionConcept

    one = scene(family)
    (concepts, words) = LoadPerfusionConcept.execute("not read", beta=0.6, tau=0.1, enabled=False).result
    assert (concepts, words) == ((), "")
    model, clip = one.apply(concepts)
    prompts = [encode(comfy, clip, text) for text in ("a <cup> in paris", "blurry")]
    plain = [encode(comfy, one.clip, text) for text in ("a <cup> in paris", "blurry")]
    assert torch.equal(tools.ksample(model, *prompts), tools.ksample(one.model, *plain))


@pytest.mark.parametrize(("prompt", "beta"), [("paris at night", 0.95), ("a <cup> and a <bear> in paris", 4.0)])
def test_gated_removal_leaves_other_prompts_and_those_of_closed_gates_alone(comfy, tools, scene, prompt, beta):
    from dataclasses import replace

    two = scene(count=2, beta=beta, tau=0.01)
    words = two.apply()[1]
    plain = tools.ksample(two.model, *(encode(comfy, words, text) for text in (prompt, "blurry")))
    gated = [replace(concept, gated_removal=True) for concept in two.concepts]
    assert tools.relative(two.sample(tools, prompt, gated), plain) < 1e-5
    assert tools.relative(two.sample(tools, prompt), plain) > 1e-3


def test_rows_of_a_batch_do_not_see_each_other(tools, scene):
    two = scene(count=2)
    start = {"samples": torch.zeros(2, 4, 8, 8)}
    together = two.sample(tools, start=start)
    assert not torch.equal(together[0], together[1])
    alone = two.sample(tools)
    assert tools.relative(together[:1], alone) < 1e-4  # the first row's noise is the same


@pytest.mark.parametrize("positions", (1, 77))
def test_long_prompts(comfy, tools, scene, positions):
    one = scene(positions=positions)
    prompt = "a <cup> " + "in a very quiet old town " * 20
    model, clip = one.apply()
    assert encode(comfy, clip, prompt)[0][0].shape[1] > 77
    assert one.sample(tools, prompt).isfinite().all()


def test_answers_follow_weights_that_hooks_of_the_host_change(comfy, tools, scene, monkeypatch):
    """A LoRA on one prompt alone, and only for the first steps: keys answer by the weights that are in force."""
    import comfy.hooks as hooks

    from comfyui_personalize.nodes import rank_one_edits

    one = scene()
    model, clip = one.apply()
    lora = hooks.create_hook_lora(tools.random_lora(one.model, every=1), strength_model=1.0, strength_clip=0.0)
    frames = hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        frames.add(hooks.HookKeyframe(strength=strength, start_percent=start))
    lora.set_keyframes_on_hooks(frames)
    prompt = [[embeds, {**options, "hooks": lora}] for embeds, options in encode(comfy, clip, "a <cup>")]
    prompts = prompt, encode(comfy, clip, "blurry")
    got = tools.ksample(model, *prompts)
    output = rank_one_edits._Call._output
    monkeypatch.setattr(
        rank_one_edits._Call, "_output", lambda call, *args: call.run.outputs.clear() or output(call, *args)
    )
    fresh = model.clone()
    fresh.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))  # then nothing is kept
    assert tools.relative(got, tools.ksample(fresh, *prompts)) < 1e-5


def test_context_windows_cut_the_prompts_too(comfy, scene):
    """Each window of the host's reads its own part of a batch of prompts, under one and the same uuid."""
    from contextlib import ExitStack

    from comfyui_personalize.nodes.rank_one_edits import _RUN, KEY, _Run

    one = scene()
    model, clip = one.apply()
    comfy.model_management.load_model_gpu(model)
    wrappers = {"diffusion_model": {KEY: model.get_wrappers("diffusion_model", KEY)}}

    def predict(prompt, run):
        options = {"wrappers": wrappers, "uuids": ["one"], "context_window": object(), _RUN: run}
        noise = torch.ones(1, 4, 8, 8)
        return model.model.diffusion_model(
            noise, torch.tensor([500.0]), context=encode(comfy, clip, prompt)[0][0], transformer_options=options
        )

    with ExitStack() as hooks, ExitStack() as others:
        run = _Run(None, hooks)
        predict("paris", run)
        second = predict("a <cup>", run)
        hooks.close()
        assert torch.equal(second, predict("a <cup>", _Run(None, others)))


def test_nothing_stays_on_the_model(comfy, tools, scene):
    two = scene(count=2)
    prompts = [encode(comfy, two.clip, text) for text in ("a cup in paris", "blurry")]
    before = tools.ksample(two.model, *prompts)
    for seed in range(20):
        two.sample(tools, seed=seed, steps=1)
    gc.collect()
    modules = two.model.model.diffusion_model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert torch.equal(tools.ksample(two.model, *prompts), before)


# Global locking


def locked(scene, prompt, **settings):
    from comfyui_personalize.nodes.perfusion import PerfusionTextEncode

    _, clip = scene.apply()
    settings = {"global_locking": True, **settings}
    return PerfusionTextEncode.execute(clip, scene.concepts, prompt, **settings).result[0]


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_keys_see_the_prompt_with_the_superclass_words(comfy, scene, family):
    from comfyui_personalize.nodes.rank_one_edits import TAG

    two = scene(family, count=2)
    ((embeds, options),) = locked(two, "a {1} and (a {2}:1.2) in paris")
    words = encode(comfy, two.apply()[1], "a <cup> and (a <bear>:1.2) in paris")[0]
    superclass = encode(comfy, two.clip, "a cup and (a bear:1.2) in paris")[0]
    assert torch.equal(embeds, words[0]) and torch.equal(options["pooled_output"], words[1]["pooled_output"])
    assert torch.allclose(options[TAG], superclass[0], atol=1e-5)


def test_a_prompt_without_concepts_needs_no_second_encoding(scene):
    from comfyui_personalize.nodes.rank_one_edits import TAG

    two = scene(count=2)
    assert TAG not in locked(two, "a cup in paris")[0][1]
    assert TAG not in locked(two, "a {1}", global_locking=False)[0][1]


def test_global_locking_acts_and_one_node_does_the_same(comfy, tools, scene):
    from comfyui_personalize.nodes.perfusion import KSamplerMultiConceptLocking

    two = scene(count=2)
    model, clip = two.apply()
    prompt, negative = "a {1} in a {2}", encode(comfy, clip, "blurry")
    free = tools.ksample(model, locked(two, prompt, global_locking=False), negative, cfg=6.0)
    bound = tools.ksample(model, locked(two, prompt), negative, cfg=6.0)
    assert tools.relative(bound, free) > 1e-3
    settings = {"seed": 1, "steps": 3, "cfg": 6.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    (latent,) = KSamplerMultiConceptLocking.execute(
        two.model, two.clip, two.concepts, prompt, "blurry", latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        global_locking=True, **settings,
    ).result  # fmt: skip
    assert torch.equal(latent["samples"], bound)


def test_an_area_of_the_prompt_leaves_the_negative_prompt_alone(comfy, tools, scene):
    """The host adds an area of one list to the other: a copy, by which neither keys nor edits may be mistaken."""
    two = scene(count=2)
    model, clip = two.apply()
    (area,) = comfy.nodes.ConditioningSetArea().append(locked(two, "a {1}"), 32, 64, 0, 0, 1.0)
    negative = encode(comfy, clip, "blurry")
    together = tools.ksample(model, area, negative, steps=2)
    apart = model.clone()
    calc = comfy.samplers.calc_cond_batch
    apart.model_options["sampler_calc_cond_batch_function"] = lambda args: [
        calc(args["model"], [None] * index + [cond], args["input"], args["sigma"], args["model_options"])[index]
        for index, cond in enumerate(args["conds"])
    ]
    assert tools.relative(tools.ksample(apart, area, negative, steps=2), together) < 1e-4


def test_an_area_of_the_negative_prompt_leaves_keys_locked(comfy, tools, scene):
    """The host then samples the prompt in that area once more, under an entry that is a copy of the negative one."""
    one = scene()
    model, clip = one.apply()
    prompt, negative = locked(one, "a {1}"), encode(comfy, clip, "blurry")
    (everywhere,) = comfy.nodes.ConditioningSetArea().append(negative, 64, 64, 0, 0, 1.0)
    whole, area = (tools.ksample(model, prompt, one_of, steps=1) for one_of in (negative, everywhere))
    assert tools.relative(area, whole) < 1e-4


def test_a_file_that_does_not_name_its_encoder_locks_keys_too(comfy, scene):
    """As the authors' files, which hold rows for whichever encoder has their width."""
    from dataclasses import replace

    from comfyui_personalize.models.learned_embeddings import ANY
    from comfyui_personalize.nodes.rank_one_edits import TAG

    one = scene()
    ((_, named),) = locked(one, "a {1} in paris")
    concept = one.concepts[0].concept
    anyone = replace(concept.embedding, rows={ANY: concept.embedding.rows["clip_l"]})
    one.concepts = (replace(one.concepts[0], concept=replace(concept, embedding=anyone)),)
    ((_, options),) = locked(one, "a {1} in paris")
    assert torch.equal(options[TAG], named[TAG])


def test_only_concepts_that_a_prompt_names_need_a_superclass(scene):
    from dataclasses import replace

    two = scene(count=2)
    two.concepts = (two.concepts[0], replace(two.concepts[1], concept=replace(two.concepts[1].concept, superclass="")))
    assert locked(two, "a {1} in paris")


def test_the_negative_prompt_takes_words_and_locking_as_well(comfy, tools, scene):
    from comfyui_personalize.nodes.perfusion import KSamplerMultiConceptLocking

    two = scene(count=2)
    model, _ = two.apply()
    apart = tools.ksample(model, locked(two, "a {1}"), locked(two, "a {2}"), cfg=6.0, steps=2)
    (latent,) = KSamplerMultiConceptLocking.execute(
        two.model, two.clip, two.concepts, "a {1}", "a {2}", 1, 2, 6.0, "euler", "normal",
        {"samples": torch.zeros(1, 4, 8, 8)}, 1.0, True,
    ).result  # fmt: skip
    assert torch.equal(latent["samples"], apart)


def test_a_word_of_several_vectors_has_room_for_a_longer_superclass(comfy, scene):
    from dataclasses import replace

    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.rank_one_edits import TAG

    two = scene(rows=3)
    long = replace(two.concepts[0], concept=replace(two.concepts[0].concept, superclass="coffee cup"))
    two.concepts = (long,)
    ((_, options),) = locked(two, "a {1} in paris")
    superclass = encode(comfy, two.clip, "a coffee cup cup in paris")[0][0]
    assert torch.allclose(options[TAG], superclass, atol=1e-5)
    one = scene()
    one.concepts = (replace(one.concepts[0], concept=replace(one.concepts[0].concept, superclass="coffee cup")),)
    with pytest.raises(ConfigError, match="2 tokens long, the concept's word 1"):
        locked(one, "a {1}")
    one.concepts = (replace(one.concepts[0], concept=replace(one.concepts[0].concept, superclass="")),)
    with pytest.raises(ConfigError, match="does not say which word"):
        locked(one, "a {1}")


# Files


@pytest.fixture
def folder(comfy):
    """The host's folder of concepts."""
    from pathlib import Path

    import comfyui_personalize.nodes._folders as folders

    path = Path(comfy.folder_paths.get_folder_paths(folders.CONCEPTS)[0])
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_chains_are_merged_and_described(scene, load_helper, caplog):
    from dataclasses import replace

    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.perfusion_concepts import InspectPerfusionConcepts
    from comfyui_personalize.nodes.rank_one_edits import GatedConcept

    two = scene(count=2)
    other = load_helper("host/concepts.py").make_concept(two.model, two.clip, "<cup>", "cup", seed=2)
    assert other.name == two.concepts[0].concept.name  # of a file in another folder
    with caplog.at_level(logging.WARNING):
        merged, words, text = InspectPerfusionConcepts.execute(two.concepts, [GatedConcept(other, 0.6, 0.1)]).result
    assert words == "<cup>, <bear>, <cup-2>" and "is taken, use <cup-2>" in caplog.text
    assert merged[:2] == two.concepts and merged[2].concept.parts is other.parts
    assert "| word | `<cup-2>` |" in text and "| resemblance | `<cup>` | `<bear>` | `<cup-2>` |" in text
    assert "resemblance" not in InspectPerfusionConcepts.execute(two.concepts[:1]).result[2]
    with pytest.raises(ConfigError, match="there are no concepts"):
        InspectPerfusionConcepts.execute((), ())
    copy = replace(two.concepts[1], concept=replace(two.concepts[1].concept, name="copy.safetensors"))
    for again, name in ((two.concepts[1], "<bear>"), (copy, "copy")):
        with pytest.raises(ConfigError, match=f"{name}.safetensors is in the chain already, as <bear> of <bear>"):
            InspectPerfusionConcepts.execute(merged, [again])


class Hostile:
    def __reduce__(self):
        return print, ("this ran",)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(folder, capsys):
    from comfyui_personalize.models.errors import FormatError
    from comfyui_personalize.nodes.perfusion_concepts import LoadPerfusionConcept

    torch.save({"target_input": Hostile()}, folder / "hostile.ckpt")
    message = refusal(FormatError, lambda: LoadPerfusionConcept.execute("hostile.ckpt", 0.6, 0.1, True))
    assert message.startswith("hostile.ckpt: refused, it contains ") and "this ran" not in capsys.readouterr().out
    (folder / "hostile.ckpt").unlink()


def test_files_are_chained_and_a_taken_word_is_numbered(tools, scene, folder, load_helper, caplog):
    from dataclasses import replace

    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.models.perfusion import write_concept
    from comfyui_personalize.nodes.perfusion_concepts import BY_THE_GATE, LoadPerfusionConcept

    one, make_concept = scene(), load_helper("host/concepts.py").make_concept
    for seed, name in enumerate(("cup", "mug", "glass")):
        concept = replace(make_concept(one.model, one.clip, "<cup>", "cup", seed=seed), family="sd15")
        write_concept(folder / f"{name}.safetensors", concept, dtype=torch.float32, overwrite=True)

    def load(name="cup", **settings):
        settings = {"beta": 0.6, "tau": 0.1, "enabled": True, **settings}
        return LoadPerfusionConcept.execute(f"{name}.safetensors", **settings).result

    first, tokens = load()
    assert tokens == "<cup>"
    assert torch.equal(one.sample(tools, concepts=first), one.sample(tools))
    with caplog.at_level(logging.WARNING):
        both, tokens = load("mug", concepts=first)
    assert tokens == "<cup>, <cup-2>" and "is taken, use <cup-2>" in caplog.text
    assert load("glass", concepts=both)[1] == "<cup>, <cup-2>, <cup-3>"
    assert load("mug", trigger="<mug>", concepts=first)[1] == "<cup>, <mug>"
    assert load(enabled=False, concepts=first) == (first, "<cup>")
    assert "removal" in LoadPerfusionConcept.validate_inputs("cup.safetensors", "gate")
    assert LoadPerfusionConcept.validate_inputs("cup.safetensors", BY_THE_GATE) is True
    assert [load(**chosen)[0][0].gated_removal for chosen in ({}, {"removal": BY_THE_GATE})] == [False, True]
    message = refusal(ConfigError, lambda: load("mug", trigger="<other>", beta=0.7, concepts=both))
    assert message.startswith("mug.safetensors is in the chain already, as <cup-2> of mug.safetensors, and")


# What is refused


def refusal(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_a_model_of_another_family_is_refused(comfy, scene):
    from comfyui_personalize.models.errors import IncompatibleModelError

    one = scene("sd15")
    other = comfy.load("sdxl")[0]
    assert "model family that it was trained on" in refusal(IncompatibleModelError, lambda: one.apply(model=other))


def test_concepts_are_applied_once(scene):
    from comfyui_personalize.models.errors import ConfigError

    two = scene(count=2)
    model, _ = two.apply(two.concepts[:1])
    assert "chain the Load Perfusion Concept" in refusal(ConfigError, lambda: two.apply(two.concepts[1:], model))


def test_a_number_without_a_concept_is_refused(scene):
    from comfyui_personalize.models.errors import ConfigError

    two = scene(count=2)
    for prompt, number in (("a {1} on {3}", 3), ("a {red|blue} {3}", 3), ("a {0}", 0)):
        message = refusal(ConfigError, lambda prompt=prompt: locked(two, prompt))
        assert f"asks for concept {{{number}}}, 2 are loaded" in message


def test_a_clip_without_the_word_is_refused(scene):
    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.perfusion import PerfusionTextEncode

    one = scene()
    message = refusal(ConfigError, lambda: PerfusionTextEncode.execute(one.clip, one.concepts, "a {1}", True))
    assert "does not know <cup>" in message and "connect the CLIP" in message
    assert PerfusionTextEncode.execute(one.clip, one.concepts, "blurry", True)


def test_another_covariance_is_refused(scene):
    from dataclasses import replace

    from comfyui_personalize.models.errors import IncompatibleModelError

    two = scene(count=2)
    other = replace(two.concepts[1], concept=replace(two.concepts[1].concept, covariance="another"))
    assert "same covariance" in refusal(IncompatibleModelError, lambda: two.apply((two.concepts[0], other)))


def test_a_superclass_prompt_that_lost_its_partner_is_refused(comfy, tools, scene):
    from comfyui_personalize.models.errors import ConfigError

    one = scene()
    model, clip = one.apply()
    prompt, other = locked(one, "a {1}"), encode(comfy, clip, "paris")
    joined = comfy.nodes.ConditioningConcat().concat(prompt, other)[0]  # 154 tokens, of which 77 have a partner
    mixed = comfy.nodes.ConditioningAverage().addWeighted(prompt, other, 0.5)[0]
    for changed in (joined, mixed):
        message = refusal(ConfigError, lambda changed=changed: tools.ksample(model, changed, other, cfg=1.0))
        assert "connect Perfusion Text Encode directly" in message


def test_a_prompt_of_zeroes_has_nothing_to_lock(comfy, tools, scene):
    one = scene(positions=77)  # so that values differ from token to token, and keys count
    model, clip = one.apply()
    prompt, zero = locked(one, "a {1}"), comfy.nodes.ConditioningZeroOut().zero_out
    unlocked = encode(comfy, clip, "a <cup>")
    kept, lost = (tools.ksample(model, prompt, zero(negative)[0]) for negative in (unlocked, prompt))
    assert tools.relative(lost, kept) < 1e-5
