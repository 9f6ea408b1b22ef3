"""The small world's identity network: whom it is trained on, how it is measured, and that the committed one works."""

import random
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

import identity  # noqa: E402 - lies in the folder that was just added
from dataset import draw_bytes, in_unit_range  # noqa: E402
from generator import random_identity  # noqa: E402
from identity import IdentityNet  # noqa: E402
from scenes import BACKGROUNDS, STYLES, Identity  # noqa: E402
from subjects import PEOPLE  # noqa: E402
from weights import path_of  # noqa: E402


def faces(who):
    return who.skin, who.hair, who.hair_colour


def test_nobody_held_out_is_trained_on():
    people = identity.identities("identity", identity.IDENTITIES)
    assert not {faces(who) for who in people} & {faces(who) for who in PEOPLE.values()}
    assert len(set(people)) == identity.IDENTITIES


def test_relatives_differ_in_one_thing_that_can_be_seen():
    bald = Identity(0.9, 1, "no", "black", "blue", 0.4, glasses=False, beard=False)
    for number in range(60):
        rng = random.Random(number)
        for who in (random_identity(rng), bald):
            before, after = asdict(who), asdict(identity.relative(rng, who))
            different = [trait for trait in before if before[trait] != after[trait]]
            assert len(different) == 1
            assert different != ["hair_colour"] or who.hair != "no" or who.beard


def test_scenes_of_a_person_differ_in_all_but_the_person():
    scenes = identity.people_scenes("ada", 60, seed=3)
    assert {scene.things[0].identity for scene in scenes} == {PEOPLE["ada"]}
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert len({scene.things[0].turn for scene in scenes}) == 60
    assert scenes[:5] == identity.people_scenes("ada", 5, seed=3)
    assert scenes[:5] != identity.people_scenes("ada", 5, seed=4)
    with pytest.raises(KeyError):
        identity.people_scenes("dan", 1, seed=0)


def test_moved_pictures_stay_where_they_are_told_to_and_move_where_they_may():
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    still = identity.moved(pictures, torch.Generator().manual_seed(1), pixels=0, zoom=0)
    torch.testing.assert_close(still, pictures, rtol=0, atol=1e-4)
    spot = torch.zeros(50, 1, 64, 64)
    spot[:, :, 30:34, 30:34] = 1
    seen = identity.moved(spot, torch.Generator().manual_seed(1), pixels=5, zoom=0)
    columns = (seen.sum((1, 2)) * (torch.arange(64) + 0.5)).sum(1) / seen.sum((1, 2, 3)) - 32
    assert 4 < columns.abs().max() <= 5.01


def test_the_margin_makes_the_right_answer_harder():
    vectors = F.normalize(torch.randn(6, identity.DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(6)
    cosines = vectors @ vectors.T
    logits = identity.SCALE * (cosines - identity.MARGIN * torch.eye(6))
    loss = identity.margin_loss(vectors, 3 * vectors, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert loss > F.cross_entropy(identity.SCALE * cosines, labels)


def test_similarities_of_pairs():
    embeddings = torch.eye(4)[[0, 0, 1, 1, 2, 3]].view(3, 2, 4)  # the third person is never alike
    same, different = identity.similarities(embeddings)
    assert sorted(same.tolist()) == [0, 1, 1]
    assert different.tolist() == [0] * 12
    assert identity.accuracy(same, different, 0.5) == pytest.approx((2 / 3 + 1) / 2)
    same, different = torch.tensor([0.5, 0.7]), torch.tensor([-0.1, 0.3])
    assert 0.3 <= identity.best_threshold(same, different) < 0.5


def test_the_file_holds_the_network_and_its_threshold(tmp_path):
    torch.manual_seed(0)
    net = IdentityNet()
    net.save(tmp_path / "net.safetensors", {"threshold": 0.25})
    loaded = IdentityNet.load(tmp_path / "net.safetensors")
    assert loaded.threshold == 0.25
    assert (tmp_path / "net.safetensors").stat().st_size < 1.5e6
    pictures = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(loaded.embed(pictures), net.embed(pictures), rtol=0, atol=5e-3)


def test_a_picture_learns_from_its_embedding(tmp_path):
    torch.manual_seed(0)
    IdentityNet().save(tmp_path / "net.safetensors", {"threshold": 0.25})
    net = IdentityNet.load(tmp_path / "net.safetensors")
    picture, other = (in_unit_range(draw_bytes(identity.people_scenes(name, 1, 0)[0]))[None] for name in ("ada", "ben"))
    picture.requires_grad_()
    embedding = net.embed(picture)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(1))
    similarity = (embedding * net.embed(other)).sum()
    (gradient,) = torch.autograd.grad(similarity, picture)
    with torch.no_grad():
        nearer = net.embed(picture + 0.05 * gradient / gradient.norm())
        assert (nearer * net.embed(other)).sum() > similarity


def test_a_short_training_tells_people_apart():
    torch.manual_seed(0)
    people = identity.identities("short", 6)
    pictures = in_unit_range(identity.portraits("short", people, 4))
    labels = torch.arange(6).repeat_interleave(4)
    model = identity._Classifier(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = identity.margin_loss(model.net.embed(pictures), model.person_embedding, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_committed_network_tells_people_apart_that_it_never_saw():
    net = IdentityNet.load(path_of(identity.FILE))
    scores = identity.measure(net, 40)
    assert scores["accuracy"] > 0.92, scores
    assert scores["accuracy, held-out people"] > 0.92, scores
    assert scores["one held-out person"] > scores["two held-out people"] + 0.4, scores
