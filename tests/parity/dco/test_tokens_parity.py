"""Learned tokens against the authors' embedding handler and their optimizer steps."""

import pytest
import torch

from comfyui_personalize.models.formats import read_safetensors, write_safetensors
from comfyui_personalize.models.learned_embeddings import read_learned_embeddings
from comfyui_personalize.models.tokens import random_rows, remembered_norms, retract
from comfyui_personalize.trainers.config import TrainConfig
from comfyui_personalize.trainers.optimizer import ParameterGroup, clip_gradients, make_optimizer
from comfyui_personalize.trainers.ranks import Ranks


def count(names, prefix: str) -> int:
    """How many numbered tensors ``prefix_0``, ``prefix_1``, ... a case has."""
    return sum(name.startswith(prefix) and name.removeprefix(prefix).isdigit() for name in names)


@pytest.mark.golden("dco", "token_embeddings_init")
def test_first_rows_and_remembered_norms(case):
    ids, words = case.config["train_ids"], case.config["initializer_tokens"]
    for encoder in range(count(case.inputs, "weight_after_resize_")):
        table = case.inputs[f"weight_after_resize_{encoder}"]
        rows, norms, drawn = [], [], 0
        for word, source in zip(words, case.config["initializer_ids"], strict=True):
            if word:
                rows.append(table[source : source + 1])
                norms.append(remembered_norms(rows[-1]))
            else:
                rows.append(random_rows(case.inputs[f"randn_{encoder}_{drawn}"], table))
                norms.append(remembered_norms(rows[-1], scalar=table.std()))
                drawn += 1
        filled = table.clone()
        filled[ids] = torch.cat(rows)
        frozen = torch.ones(len(table), dtype=torch.bool)
        frozen[ids] = False
        case.check(f"weight_{encoder}", filled)
        case.check(f"norm_{encoder}", torch.cat(norms))
        case.check(f"std_{encoder}", table.std())
        case.check(f"index_no_updates_{encoder}", frozen)


@pytest.mark.golden("dco", "token_embeddings_retract")
def test_rows_return_to_their_norms(case):
    ids = case.config["train_ids"]
    for encoder in range(count(case.inputs, "original_")):
        original = case.inputs[f"original_{encoder}"]
        moved = case.inputs[f"weight_perturbed_{encoder}"][ids]

        restored = original.clone()
        restored[ids] = retract(moved, case.inputs[f"norm_{encoder}"])
        case.check(f"weight_{encoder}", restored)

        restored[ids] = retract(moved, remembered_norms(original[ids]))
        case.check_background(f"sane_weight_{encoder}", restored)


@pytest.mark.golden("dco", "ti_clip_adamw_retract")
def test_clipped_steps_of_lora_and_tokens(case):
    config, ids = case.config, case.config["train_ids"]
    encoders, layers = count(case.inputs, "weight_"), count(case.inputs, "lora_")
    lora = [case.inputs[f"lora_{i}"].clone().requires_grad_() for i in range(layers)]
    tables = [case.inputs[f"weight_{e}"] for e in range(encoders)]
    others = [[row for row in range(len(table)) if row not in ids] for table in tables]
    learned = [table[ids].clone().requires_grad_() for table in tables]
    context = [table[rows].clone().requires_grad_() for table, rows in zip(tables, others, strict=True)]
    settings = TrainConfig(
        adam_beta1=config["betas"][0],
        adam_beta2=config["betas"][1],
        adam_epsilon=config["eps"],
        max_grad_norm=config["max_grad_norm"],
    )
    groups = [
        ParameterGroup("unet", dict(enumerate(lora)), config["lr_unet"], config["weight_decay"]),
        ParameterGroup("text", dict(enumerate(learned)), config["lr_text"], config["weight_decay"]),
    ]
    optimizer = make_optimizer(settings, groups, Ranks())
    for step in range(config["steps"]):
        for i, tensor in enumerate(lora):
            tensor.grad = case.inputs[f"grad_lora_{i}_{step}"].clone()
        for e in range(encoders):
            gradient = case.inputs[f"grad_weight_{e}_{step}"]
            learned[e].grad, context[e].grad = gradient[ids].clone(), gradient[others[e]].clone()
        clip_gradients([*lora, *learned, *context], settings.max_grad_norm)
        optimizer.step()
        for e, rows in enumerate(learned):
            with torch.no_grad():
                rows.copy_(retract(rows, case.inputs[f"norm_{e}"]))
            table = case.inputs[f"original_{e}"].clone()
            table[ids] = rows.detach()
            case.check(f"weight_{e}_{step}", table)
        for i, tensor in enumerate(lora):
            case.check(f"lora_{i}_{step}", tensor)


@pytest.mark.golden("dco", "learned_embeds_file")
def test_embedding_file(case, tmp_path):
    tensors, _ = read_safetensors(case.file(case.config["file"]))
    assert tensors.keys() == case.expected.keys()
    written, _ = read_safetensors(write_safetensors(tmp_path / "again.safetensors", tensors, {}))
    for key in tensors:
        assert len(tensors[key]) == len(case.config["inserting_tokens"])
        case.check(key, tensors[key])
        case.check(key, written[key])
    tokens = read_learned_embeddings(case.file(case.config["file"]), case.config["inserting_tokens"])
    assert [token.trigger for token in tokens] == case.config["inserting_tokens"]
    for key in tensors:
        case.check(key, torch.cat([token.rows[key] for token in tokens]))
