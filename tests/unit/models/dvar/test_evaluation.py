"""The evaluation batch: what the code keeps, what it draws anew, and that its draws are its own."""

import pytest
import torch

from comfyui_personalize.models.dvar import EvaluationBatches, EvaluationSettings, GeneratorDraws, intervals
from comfyui_personalize.models.dvar.evaluation import PARTS
from comfyui_personalize.models.errors import ConfigError


class Pictures:
    """Picture n has the mean n everywhere."""

    def __init__(self, count=5, std=0.1):
        self.count, self.std = count, std

    def __len__(self):
        return self.count

    def moments(self, index):
        mean = torch.full((4, 2, 3), float(index))
        return mean, torch.full_like(mean, self.std)


def batches(pictures=None, seed=3, timesteps=1000, **settings):
    settings = {"batch_size": 2} | settings
    draws = GeneratorDraws(seed)
    return EvaluationBatches(EvaluationSettings(**settings), pictures or Pictures(), timesteps, draws), draws


def content(made):
    return [
        (b.pictures, b.captions, b.latents.tolist(), b.noise.tolist(), b.timesteps.tolist(), b.interval) for b in made
    ]


def parts(made):
    return {
        "images": [batch.pictures for batch in made],
        "latents": [batch.latents.tolist() for batch in made],
        "noise": [batch.noise.tolist() for batch in made],
        "captions": [batch.captions for batch in made],
        "timesteps": [batch.timesteps.tolist() for batch in made],
    }


def test_everything_fixed_is_the_same_objects_again():
    evaluation, _ = batches(accumulation=3)
    first, second = list(evaluation.batches()), list(evaluation.batches())
    assert [id(batch) for batch in first] == [id(batch) for batch in second]
    assert [batch.pictures for batch in first] == [(0, 1)] * 3  # other timesteps, the same pictures
    drawn = torch.cat([batch.timesteps for batch in first])
    assert len(set(drawn.tolist())) == 6


@pytest.mark.parametrize("zero", range(5))
def test_one_zero_draws_that_part_anew(zero):
    code = "".join("0" if place == zero else "1" for place in range(5))
    evaluation, _ = batches(code=code, accumulation=2)
    first, second = (parts(list(evaluation.batches())) for _ in range(2))
    changed = {name for name in PARTS if first[name] != second[name]}
    assert changed == {PARTS[zero]} | ({"latents"} if PARTS[zero] == "images" else set())


def test_pictures_come_round_and_captions_take_a_batch_of_their_own():
    evaluation, _ = batches(code="01101", accumulation=1)
    seen = [batch for _ in range(3) for batch in evaluation.batches()]
    assert [batch.pictures for batch in seen] == [(2, 3), (1, 2), (0, 1)]
    assert [batch.captions for batch in seen] == [(4, 0), (3, 4), (2, 3)]


def test_fewer_pictures_than_rows_repeat():
    evaluation, _ = batches(Pictures(3), batch_size=7)
    (batch,) = evaluation.batches()
    assert batch.pictures == batch.captions == (0, 1, 2, 0, 1, 2, 0)


def test_means_in_place_of_draws():
    evaluation, _ = batches(mean_latent=True, mean_noise=True)
    (batch,) = evaluation.batches()
    assert batch.latents[:, 0, 0, 0].tolist() == [0, 1] and not batch.noise.any()
    evaluation, _ = batches(mean_latent=True, mean_noise=True, code="10011")
    (batch,) = evaluation.batches()
    assert batch.latents[0].std() > 0 and batch.noise.std() > 0.5


def test_the_last_interval_ends_with_the_schedule():
    thirds = intervals(1000)
    assert {name: (third.start, third.stop) for name, third in thirds.items()} == {
        "begin": (0, 333),
        "middle": (333, 666),
        "end": (666, 1000),
    }
    evaluation, _ = batches(intervals=True, batch_size=3, timesteps=10)
    seen = {batch.interval: set(batch.timesteps.tolist()) for batch in evaluation.batches()}
    assert seen["begin"] == {0, 1, 2} and seen["middle"] == {3, 4, 5}
    assert seen["end"] <= {6, 7, 8, 9} and len(seen[""]) == len(seen["end"]) == 3
    ends = [list(batches(intervals=True, batch_size=3, timesteps=10, seed=seed)[0].batches())[-1] for seed in range(9)]
    assert any(9 in batch.timesteps for batch in ends)


@pytest.mark.parametrize("code", ["00000", "11111", "01010", "10100"])
def test_a_state_goes_on_exactly(code):
    whole, _ = batches(code=code, accumulation=2)
    expected = [content(whole.batches()) for _ in range(4)]
    first, draws = batches(code=code, accumulation=2)
    for _ in range(2):
        content(first.batches())
    second, other = batches(code=code, accumulation=2)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(draws.state_dict())
    assert [content(second.batches()) for _ in range(2)] == expected[2:]


def test_the_global_stream_and_other_generators_are_left_alone():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state(), generator.get_state()
    evaluation, _ = batches(code="00000", accumulation=2)
    content(evaluation.batches())
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(generator.get_state(), before[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"code": "1111"}, "five digits 0 or 1 for images, latents, noise, captions, timesteps"),
        ({"code": "11121"}, "got '11121'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationSettings(**settings)


def test_more_rows_than_timesteps_are_refused():
    batches(batch_size=10, timesteps=10)
    with pytest.raises(ConfigError, match="3 x 4 rows needs as many different timesteps, and there are 10; lower"):
        batches(batch_size=4, accumulation=3, timesteps=10)
    with pytest.raises(ConfigError, match="there are 3; lower"):
        batches(batch_size=4, intervals=True, timesteps=10)
