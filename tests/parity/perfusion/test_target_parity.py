"""Where a concept starts and how it moves: superclass, average, token positions, the covariance of captions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comfyui_personalize.models.keys import sgm_to_diffusers
from comfyui_personalize.models.perfusion import (
    CovarianceEstimate,
    concept_encoding,
    concept_row,
    moved_target_input,
    read_covariance,
    superclass_input,
)
from comfyui_personalize.models.tokens import replace_triggers
from comfyui_personalize.trainers.text import LearnedTokenEmbedding


def rows_of(case):
    """The recorded word positions as rows of an encoding, which starts with the start token."""
    return case.inputs["concept_token_idx"] + 1


@pytest.mark.golden("perfusion", "c_inv_estimate")
def test_covariance(case):
    encodings = case.inputs["encodings"]
    estimate = CovarianceEstimate(encodings.shape[-1])
    for batch in encodings.split(case.config["batch_size"]):
        estimate.add(batch)
    assert estimate.captions == case.config["n_captions"]
    case.check("C", estimate.matrix())
    case.check("C_inv", estimate.covariance().inverse)


@pytest.mark.golden("perfusion", "c_inv_estimate", whole=False)
def test_the_authors_file(case):
    stored = np.load(case.file("files/C_inv.npy"), allow_pickle=False)
    assert stored.dtype == np.float64
    covariance = read_covariance(case.file("files/C_inv.npy"))
    assert torch.equal(covariance.inverse, torch.from_numpy(stored))
    case.check("C_inv", covariance.inverse)


@pytest.mark.golden("perfusion", "target_input_ema")
def test_moving_average(case):
    target, steps = case.inputs["target_input"], len(case.expected)
    for step in range(steps):
        encodings = case.inputs[f"encoding_{step}"].requires_grad_()
        target = moved_target_input(target, encodings, rows_of(case), case.config["ema_p"])
        assert not target.requires_grad
        case.check(f"target_input_{step}", target)


@pytest.mark.golden("perfusion", "roe_init_target_output")
def test_target_output_of_one_projection(case):
    x = case.inputs["x_super"]
    rows = superclass_input(x, torch.zeros(len(x), dtype=torch.long), "positions")
    case.check("target_output", F.linear(rows, case.weights["weight"]))


@pytest.mark.golden("perfusion", "roe_init_from_superclass")
def test_start_from_the_superclass(case):
    encodings, weights = case.inputs["encoding_superclass"], case.sibling(case.config["weights_case"]).weights
    case.check("target_input", concept_encoding(encodings, rows_of(case)))
    rows = superclass_input(encodings, rows_of(case), "positions")
    for name in case.expected.keys() - {"target_input"}:
        case.check(name, F.linear(rows, weights[name.replace(".target_output", ".weight")]))
        sgm_name = name.removesuffix(".target_output")
        assert sgm_to_diffusers(sgm_name, 1).endswith((".attn2.to_k", ".attn2.to_v"))
    # The paper's mode starts from the row of the concept alone.
    assert torch.equal(superclass_input(encodings, rows_of(case), "paper")[0], case_row(encodings, rows_of(case)))


def case_row(encodings, rows):
    return torch.stack([encoding[row] for encoding, row in zip(encodings, rows.tolist())]).mean(dim=0)


@pytest.mark.golden("perfusion", "prompt_template")
def test_positions_in_prompts(case):
    config, found = case.config, []
    start, token = 49406, 265
    for template, prompt, superclass in zip(config["templates"], config["prompts"], config["superclass_prompts"]):
        assert template.format(config["placeholder"]) == prompt
        assert replace_triggers(prompt, {config["placeholder"]: config["initializer_word"]}) == superclass
        # Every word of these templates is one token.
        ids = [start, *(token if word == config["placeholder"] else 1000 for word in prompt.split(" "))]
        found.append(concept_row(ids, token))
    case.check("encoding_row", torch.tensor(found))
    case.check("index", torch.tensor(found) - 1)


@pytest.mark.golden("perfusion", "embedding_manager")
def test_the_word_takes_the_placeholders_place(case):
    """Our own learned ids lie after the vocabulary; the rows that reach the text encoder are the authors'."""
    ids, embedded, token = case.inputs["token_ids"], case.inputs["embedded"], case.config["placeholder_token"]
    table = torch.zeros(int(ids.max()) + 1, embedded.shape[-1])
    table[ids.flatten()] = embedded.flatten(0, 1)
    embedding = LearnedTokenEmbedding(table, case.inputs["learned"])
    case.check("embedded", embedding(torch.where(ids == token, len(table), ids)))
