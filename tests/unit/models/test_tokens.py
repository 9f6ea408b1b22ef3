"""Trigger words in prompts, and the rows they stand for."""

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.tokens import (
    LearnedToken,
    check_distinct,
    random_rows,
    remembered_norms,
    repeat_to_rows,
    replace_triggers,
    retract,
    split_prompt,
    validate_trigger,
)


@pytest.mark.parametrize("trigger", ["<dog>", "<my-dog_2>", "<Hündchen>", "<狗>", "<a.b>", "<dog*>", "<$1>"])
def test_usable_triggers(trigger):
    assert validate_trigger(trigger) == trigger
    assert split_prompt(f"a {trigger}, running", [trigger]) == ["a ", 0, ", running"]


@pytest.mark.parametrize(
    "trigger",
    ["", "dog", "<dog", "dog>", "<>", "< >", "<my dog>", "<dog:1>", "<(dog)>", "<[dog]>", "<{dog}>", "<a|b>", "<a,b>",
     "<<dog>>", "<a><b>", "<a\\b>", "<dog>\n", " <dog>", "<do\tg>"],
)  # fmt: skip
def test_triggers_that_prompts_cannot_carry_are_refused(trigger):
    with pytest.raises(ConfigError, match="such as <dog>"):
        validate_trigger(trigger)
    with pytest.raises(ConfigError):
        LearnedToken(trigger)


@pytest.mark.parametrize("wrong", [{"initializer": 5}, {"initializer": None}, {"rows": "2"}, {"rows": True}])
def test_what_a_token_is_made_of_is_checked(wrong):
    with pytest.raises(ConfigError, match="token <dog>"):
        LearnedToken("<dog>", **wrong)
    with pytest.raises(ConfigError, match="such as <dog>"):
        LearnedToken(5)


@pytest.mark.parametrize("rows", [0, -1])
def test_a_token_owns_at_least_one_row(rows):
    with pytest.raises(ConfigError, match="at least 1"):
        LearnedToken("<dog>", rows=rows)


def test_the_same_trigger_twice_is_refused_whatever_its_case():
    check_distinct([LearnedToken("<dog>"), LearnedToken("<dogs>")])
    with pytest.raises(ConfigError, match="<DOG> is used twice"):
        check_distinct([LearnedToken("<dog>"), LearnedToken("<cat>"), LearnedToken("<DOG>")])


@pytest.mark.parametrize(
    ("prompt", "triggers", "pieces"),
    [
        ("", ["<dog>"], []),
        ("", [], []),
        ("a dog", [], ["a dog"]),
        ("a dog", ["<dog>"], ["a dog"]),
        ("<dog>", ["<dog>"], [0]),
        ("a <dog> runs", ["<dog>"], ["a ", 0, " runs"]),
        ("<dog><dog> <cat>", ["<dog>", "<cat>"], [0, 0, " ", 1]),
        ("A <DOG> and a <Dog>", ["<dog>"], ["A ", 0, " and a ", 0]),
        ("a <dog> runs", ["<Dog>"], ["a ", 0, " runs"]),
        ("my<dog>s", ["<dog>"], ["my", 0, "s"]),
        ("a <dog-2> and <dog>", ["<dog>", "<dog-2>"], ["a ", 1, " and ", 0]),
        ("<a.c> <abc>", ["<a.c>"], [0, " <abc>"]),
        ("<dog", ["<dog>"], ["<dog"]),
        ("ein <HÜNDCHEN>", ["<Hündchen>"], ["ein ", 0]),
    ],
)
def test_prompts_are_cut_at_their_triggers(prompt, triggers, pieces):
    assert split_prompt(prompt, triggers) == pieces


def test_overlapping_triggers_prefer_the_longest():
    # Without brackets, as names of rows inside other tools' files are.
    assert split_prompt("dogs dog", ["dog", "dogs"]) == [1, " ", 0]


@pytest.mark.parametrize("written", ["<kizim>", "<KIZIM>", "<kızım>", "<KİZİM>", "<ſtyle>", "<STYLE>"])
def test_letters_whose_case_folds_oddly_do_not_fail(written):
    pieces = split_prompt(f"a {written} b", ["<kizim>", "<style>"])
    assert pieces[0].startswith("a ") and all(piece in (0, 1) or isinstance(piece, str) for piece in pieces)
    assert "b" in replace_triggers(f"a {written} b", {"<kizim>": "girl", "<style>": "paint"})


def test_joining_the_pieces_gives_the_prompt_back():
    triggers = ["<a>", "<ab>", "<a-b>"]
    prompt = "<ab>x<a><a-b> <a>, y <abc>"
    pieces = split_prompt(prompt, triggers)
    assert "".join(piece if isinstance(piece, str) else triggers[piece] for piece in pieces) == prompt


def test_triggers_are_replaced_by_their_words():
    words = {"<dog>": "dog", "<Style>": "", "<dog-2>": r"\1 puppy"}
    assert replace_triggers("a <DOG> and <dog-2> in <style> style", words) == r"a dog and \1 puppy in  style"
    assert replace_triggers("a <dog>", {}) == "a <dog>"
    assert replace_triggers("nothing here", words) == "nothing here"


def test_rows_from_noise_have_the_spread_of_the_table():
    generator = torch.Generator().manual_seed(0)
    table = 0.3 * torch.randn(50, 64, generator=generator)
    rows = random_rows(torch.randn(200, 64, generator=generator), table)
    assert rows.shape == (200, 64)
    assert rows.std().item() == pytest.approx(table.std().item(), rel=0.05)


def test_rows_return_to_their_norms_and_keep_their_direction():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 8, generator=generator)
    norms = remembered_norms(start)
    assert norms.shape == (4, 1)
    torch.testing.assert_close(retract(start, norms), start)
    moved = start + torch.randn(4, 8, generator=generator)
    back = retract(moved, norms)
    torch.testing.assert_close(back.norm(dim=-1, keepdim=True), norms)
    torch.testing.assert_close(torch.cosine_similarity(back, moved), torch.ones(4))
    torch.testing.assert_close(retract(back, norms), back)


def test_one_norm_for_all_rows():
    norms = remembered_norms(torch.randn(3, 8), scalar=torch.tensor(0.25))
    torch.testing.assert_close(norms, torch.full((3, 1), 0.25))


def test_initializers_are_cut_or_repeated_to_the_rows_wanted():
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    assert repeat_to_rows(rows, 2).flatten().tolist() == [1, 2]
    assert repeat_to_rows(rows, 3).flatten().tolist() == [1, 2, 3]
    assert repeat_to_rows(rows, 5).flatten().tolist() == [1, 2, 3, 3, 3]
