"""The small world as it is drawn and put into words, and what is held out of it to be taught afterwards."""

import itertools
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

import generator  # noqa: E402 - lies in the folder that was just added
from captions import COMPREHENSIVE, SHORT, Detail, caption, random_caption, swap_word  # noqa: E402
from drawing import draw, mask_of, silhouette  # noqa: E402
from experiments import FULL  # noqa: E402
from generator import random_creature, random_scene  # noqa: E402
from prompts import REPORTING, TUNING, Prompt, in_style, suitable  # noqa: E402
from scenes import (  # noqa: E402
    BACKGROUNDS,
    HELD_OUT_STYLES,
    STYLES,
    Creature,
    Person,
    Scene,
    Shape,
    contrasts,
)
from subjects import (  # noqa: E402
    HELD_OUT_FACES,
    HELD_OUT_LOOKS,
    SUBJECTS,
    style_lesson,
    style_scenes,
    subject_lesson,
    suitable_backgrounds,
    training_backgrounds,
    training_scenes,
    write_style,
    write_subject,
)

from comfyui_personalize.models.tokens import LearnedToken  # noqa: E402
from comfyui_personalize.trainers.dataset import Dataset  # noqa: E402
from comfyui_personalize.trainers.tokenizer import load_tokenizer  # noqa: E402

DRAWS = 10_000
MAX_WORDS, MAX_TOKENS = 36, 75


@pytest.fixture(scope="module")
def scenes():
    """Many random scenes, none of them drawn."""
    return [random_scene(random.Random(f"test/{number}")) for number in range(DRAWS)]


# Drawing


def test_the_same_seed_gives_the_same_picture():
    first, again, other = (draw(random_scene(random.Random(seed))) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("style", STYLES + HELD_OUT_STYLES)
def test_every_style_draws_a_scene_differently_and_in_range(style):
    scene = Scene("in a meadow", (Shape("star", "red", radius=19.5),), style)
    picture = draw(scene)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.float32
    assert 0 <= picture.min() and picture.max() <= 1
    for other in set(STYLES + HELD_OUT_STYLES) - {style}:
        assert np.abs(picture - draw(replace(scene, style=other))).mean() > 0.005, other


@pytest.mark.parametrize("kind", ["shape", "creature"])
def test_a_mask_covers_exactly_what_the_thing_changes(kind):
    for number in range(40):
        scene = random_scene(random.Random(f"mask/{number}"), kind, "flat")
        mask = mask_of(scene.things[0])
        changed = np.abs(draw(scene) - draw(replace(scene, things=()))).max(-1)
        assert changed[mask == 0].max() == 0, scene
        # Where the background still shows through, it does so as much as the mask says.
        assert changed[mask > 0.9].min() > 0.02, scene


def test_no_thing_is_cut_off_at_the_edge(scenes):
    reach = {}
    for scene in scenes[:1500]:
        for thing in scene.things:
            distance = silhouette(thing)
            border = min(edge.min() for edge in (distance[0], distance[-1], distance[:, 0], distance[:, -1]))
            kind = "wide" if getattr(thing, "body", "") == "wide" else type(thing).__name__
            reach[kind] = min(border, reach.get(kind, 0.0))
    # The border's pixels are half a pixel inside the edge. Tails of wide creatures in a pair go furthest.
    assert reach.pop("wide") > -1.5
    assert all(border > -0.5 for border in reach.values()), reach


def test_colours_stand_out_from_the_background(scenes):
    for scene in scenes:
        for thing in scene.things:
            assert isinstance(thing, Person) or contrasts(thing.colour, scene.background), scene


# Held out


def test_what_is_held_out_is_never_drawn(scenes):
    things = [thing for scene in scenes for thing in scene.things]
    creatures = [thing for thing in things if isinstance(thing, Creature)]
    people = [thing.identity for thing in things if isinstance(thing, Person)]
    assert len(creatures) > 1000 and len(people) > 1000
    assert not HELD_OUT_LOOKS & {creature.looks for creature in creatures}
    assert not HELD_OUT_FACES & {(who.skin, who.hair, who.hair_colour) for who in people}
    assert all(creature.odd is None for creature in creatures)
    assert {scene.style for scene in scenes} == set(STYLES)


def test_without_holding_them_out_the_characters_would_be_drawn(monkeypatch):
    monkeypatch.setattr(generator, "HELD_OUT_LOOKS", set())
    rng = random.Random(0)
    looks = {random_creature(rng, rng.choice(list(BACKGROUNDS))).looks for _ in range(DRAWS)}
    assert len(looks & HELD_OUT_LOOKS) >= 4


# Words


SHAPE_CLAUSES = {
    "colour": "red",
    "texture": "striped",
    "size": "big",
    "place": "on the left",
    "background": "at night",
    "style": "in neon style",
}
CREATURE_CLAUSES = {
    "colour": "orange",
    "parts": "with blue ears and two eyes and a blue belly",
    "place": "on the right",
    "background": "under water",
    "style": "in clay style",
}


@pytest.mark.parametrize(
    ("scene", "clauses", "noun"),
    [
        (
            Scene("at night", (Shape("star", "red", "striped", radius=19.5, x=21.0),), "neon"),
            SHAPE_CLAUSES,
            "star",
        ),
        (
            Scene("under water", (replace(SUBJECTS["mok"].looks, x=43.0),), "clay"),
            CREATURE_CLAUSES,
            "creature",
        ),
    ],
    ids=["shape", "creature"],
)
def test_every_clause_is_there_or_not_whatever_the_others_are(scene, clauses, noun):
    for chosen in itertools.product((False, True), repeat=len(clauses)):
        wanted = dict(zip(clauses, chosen))
        words = caption(scene, replace(COMPREHENSIVE, **wanted))
        for name, phrase in clauses.items():
            assert (f" {phrase} " in f" {words} ") == wanted[name], (name, words)
        article = "an" if wanted["colour"] and clauses["colour"] == "orange" and not words.startswith("a ") else "a"
        assert words.startswith(f"{article} ")
        assert f" {noun}" in words
        assert sum(len(clauses[name].split()) for name in clauses if wanted[name]) <= len(words.split())


def test_short_captions_name_the_thing_alone():
    assert caption(Scene("at night", (SUBJECTS["mok"].looks,), "neon"), SHORT) == "an orange creature"
    assert caption(Scene("at night", (Shape("ring", "red", "striped"),)), replace(SHORT, colour=False)) == "a ring"


def test_two_things_are_told_apart_by_their_places():
    scene = Scene("in the snow", (Shape("circle", "blue", x=16.0), Shape("star", "orange", x=48.0)))
    assert caption(scene) == "a blue circle on the left and an orange star on the right in the snow"


def test_captions_fit_into_a_prompt(scenes):
    tokenizer = load_tokenizer()
    rng = random.Random(0)
    said = [caption(scene) for scene in scenes[:2000]] + [random_caption(rng, scene) for scene in scenes[:2000]]
    assert max(len(words.split()) for words in said) <= MAX_WORDS
    assert max(map(len, tokenizer(said, add_special_tokens=False)["input_ids"])) < MAX_TOKENS


def test_random_captions_leave_clauses_out_and_keep_the_thing(scenes):
    rng = random.Random(1)
    scene = next(scene for scene in scenes if isinstance(scene.things[0], Shape) and len(scene.things) == 1)
    said = [random_caption(rng, scene) for _ in range(200)]
    assert all(scene.things[0].shape in words for words in said)
    assert len(set(said)) > 50


def test_a_swapped_word_takes_its_article_along():
    assert swap_word("a red star on a beach", "red", "orange") == "an orange star on a beach"
    assert swap_word("an orange star and a blue ring", "orange", "red") == "a red star and a blue ring"
    assert swap_word("a red star and a red ring", "red", "blue") == "a blue star and a blue ring"
    with pytest.raises(ValueError, match="no word 'green'"):
        swap_word("a red star, evergreen", "green", "blue")


# Subjects


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=list(SUBJECTS))
def test_a_character_has_five_pictures_that_show_it_well(subject):
    scenes = training_scenes(subject)
    assert len(set(scenes)) == 5
    assert all(scene.style == "flat" and len(scene.things) == 1 for scene in scenes)
    backgrounds = [scene.background for scene in scenes]
    assert len(set(backgrounds)) >= 3
    assert set(backgrounds) == set(training_backgrounds(subject))
    assert all(contrasts(subject.looks.colour, background) for background in backgrounds)
    assert len({scene.things[0].radius for scene in scenes}) >= 3
    assert set(suitable_backgrounds(subject)) - set(backgrounds), "a place is left where it was never seen"
    for scene in scenes:
        mask = mask_of(scene.things[0])
        assert max(edge.max() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])) == 0


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=list(SUBJECTS))
def test_a_characters_captions_say_all_but_its_looks(subject):
    lesson = subject_lesson(subject)
    for scene, words, base in zip(lesson.scenes, lesson.captions, lesson.base_captions):
        assert base == caption(scene, replace(COMPREHENSIVE, colour=False, parts=False))
        assert words == base.replace("a creature", f"a {subject.token}")


def test_the_description_is_what_a_caption_would_say():
    for subject in SUBJECTS.values():
        scene = Scene("at night", (subject.looks,))
        assert caption(scene, Detail(place=False, background=False)) == subject.description


def test_a_written_character_is_read_alike_from_both_layouts(tmp_path):
    subject = SUBJECTS["zib"]
    folder = write_subject(tmp_path / "zib", subject)
    by_json = Dataset.from_folder(folder)
    (folder / "config.json").unlink()
    by_sidecars = Dataset.from_folder(folder, tokens=[LearnedToken("<zib>", "creature")])
    assert by_json.tokens == (LearnedToken("<zib>", "creature"),)
    assert by_json.fingerprint == by_sidecars.fingerprint
    assert [example.caption for example in by_json.examples] == list(subject_lesson(subject).captions)
    assert [example.base_caption for example in by_json.examples] == list(subject_lesson(subject).base_captions)
    for example, scene in zip(by_json.examples, training_scenes(subject)):
        opened = example.open()
        expected = np.rint(draw(scene) * 255), np.rint(mask_of(scene.things[0]) * 255)
        assert np.array_equal(np.asarray(opened.rgb), expected[0])
        assert np.array_equal(np.asarray(opened.mask), expected[1])


@pytest.mark.parametrize("style", HELD_OUT_STYLES)
def test_a_written_style_is_read_with_its_token(tmp_path, style):
    dataset = Dataset.from_folder(write_style(tmp_path / style, style))
    assert dataset.tokens == (LearnedToken(f"<{style}>", "drawing"),)
    assert all(example.mask is None for example in dataset.examples)
    for example, scene in zip(dataset.examples, style_scenes(style), strict=True):
        assert example.caption == f"{example.base_caption} in <{style}> style"
        assert example.base_caption == caption(replace(scene, style="flat"))
        assert np.array_equal(np.asarray(Image.open(example.picture.path)), np.rint(draw(scene) * 255))


def test_a_style_that_the_base_model_knows_is_no_lesson():
    with pytest.raises(ValueError, match="'neon' is no held-out style; expected one of blueprint, poster"):
        style_lesson("neon")


# Prompts


def test_settings_are_not_chosen_by_prompts_that_are_reported():
    assert not {prompt.template for prompt in TUNING} & {prompt.template for prompt in REPORTING}
    assert len({prompt.template for prompt in REPORTING}) == len(REPORTING)
    for name in FULL.subjects:
        assert len(suitable(REPORTING, SUBJECTS[name].looks)) >= 16
        unseen = set(suitable_backgrounds(SUBJECTS[name])) - set(training_backgrounds(SUBJECTS[name]))
        assert unseen <= {prompt.background for prompt in REPORTING if prompt.template == f"a {{}} {prompt.background}"}


def test_a_prompts_scene_is_what_its_words_say():
    looks = SUBJECTS["mok"].looks
    for prompt in REPORTING + TUNING:
        scene = prompt.scene(looks)
        detail = replace(COMPREHENSIVE, colour=True, parts=False, place=prompt.place is not None)
        assert prompt.naming("an orange creature") == caption(scene, detail)
        assert all(contrasts(thing.colour, scene.background) for thing in scene.things if isinstance(thing, Shape))
    pair = Prompt("in the snow", "on the right", Shape("star", "red"))
    assert pair.template == "a red star on the left and a {} on the right in the snow"
    assert pair.naming("<mok>") == pair.template.replace("{}", "<mok>")
    assert [type(thing) for thing in pair.scene(looks).things] == [Shape, Creature]


def test_prompts_in_a_taught_style_are_of_the_subject_alone():
    styled = in_style(REPORTING, "poster")
    assert len(styled) == 8
    assert styled[0].template == "a {} in a meadow in poster style"
