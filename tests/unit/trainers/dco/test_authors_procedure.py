"""Our training beside a plain one of the authors' kind: whole embedding tables trained, then put back row by row."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.tokenizer import load_tokenizer

STEPS = 4


class Plain:
    """DCO as the authors train it, on diffusers, transformers and peft alone.

    The vocabulary grows by the tokens, all rows of every table are trained and count when gradients are
    clipped; after each step the old rows are restored and the new ones rescaled to their first norms.
    """

    def __init__(self, base, tokens, lora, *, rank, rate, text_rate, beta):
        from peft import LoraConfig

        self.beta, self.norms = beta, []
        self.alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
        self.velocity = base.prediction_type == "v_prediction"
        self.unet = base.load_unet()
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        parameters = dict(self.unet.named_parameters())
        for name, value in lora.items():
            parameters[name].data.copy_(value)
        self.lora = {name: parameters[name] for name in lora}
        self.tokenizer = load_tokenizer(None)
        self.tokenizer.add_tokens([token.trigger for token in tokens])
        self.new = self.tokenizer.convert_tokens_to_ids([token.trigger for token in tokens])
        self.encoders = base.load_text_encoders()
        self.tables, self.first, self.lengths = [], [], []
        for encoder in self.encoders:
            old = encoder.get_input_embeddings().weight.detach()
            words = [self.tokenizer(token.initializer, add_special_tokens=False).input_ids for token in tokens]
            table = nn.Embedding.from_pretrained(torch.cat([old, *(old[ids] for ids in words)]), freeze=False)
            encoder.set_input_embeddings(table)
            self.tables.append(table.weight)
            self.first.append(table.weight.detach().clone())
            self.lengths.append(table.weight[self.new].detach().norm(dim=-1, keepdim=True))
        groups = [{"params": list(self.lora.values()), "lr": rate}, {"params": self.tables, "lr": text_rate}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        self.family = base.family

    def encode(self, prompts):
        hidden, pooled = [], None
        for slot, encoder in zip(self.family.encoders, self.encoders, strict=True):
            pad = 49407 if slot.pad_with_end else 0
            ids = [self.tokenizer(prompt).input_ids for prompt in prompts]
            ids = torch.tensor([row + [pad] * (77 - len(row)) for row in ids])
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2] if len(self.encoders) == 2 else output.last_hidden_state)
            if len(self.encoders) == 2:
                pooled = getattr(output, "text_embeds", None)
        return torch.cat(hidden, -1), pooled

    def predict(self, noisy, timesteps, prompts):
        embeds, pooled = self.encode(prompts)
        added = None
        if pooled is not None:
            side = 8 * noisy.shape[-1]
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * len(noisy))}
        return self.unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample

    def step(self, latents, noise, timesteps, captions, base_captions):
        kept = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        target = kept.sqrt() * noise - (1 - kept).sqrt() * latents if self.velocity else noise
        error = F.mse_loss(self.predict(noisy, timesteps, captions), target)
        if self.beta > 0:
            self.unet.disable_adapters()
            with torch.no_grad():
                reference = F.mse_loss(self.predict(noisy, timesteps, base_captions), target)
            self.unet.enable_adapters()
            loss = -torch.log(torch.sigmoid(-self.beta * (error - reference)))
        else:
            loss = error
        loss.backward()
        self.norms.append(nn.utils.clip_grad_norm_([*self.lora.values(), *self.tables], 1.0).item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for table, first, lengths in zip(self.tables, self.first, self.lengths, strict=True):
                learned = table[self.new]
                table.copy_(first)
                table[self.new] = learned / learned.norm(dim=-1, keepdim=True) * lengths
        return loss.item()


@pytest.mark.parametrize(("family", "beta"), [("sdxl", 20.0), ("sd15", 20.0), ("sd21", -1.0)])
def test_the_compact_training_takes_the_same_course(family, beta, tiny, inside):
    tokens = LearnedToken("<dog>", "dog"), LearnedToken("<hat>", "hat")
    captions = [f"a <dog> with a <hat>, number {number}" for number in range(4)]
    dataset = tiny.dataset(*tokens, captions=captions)
    settings = {"steps": STEPS, "beta": beta, "max_grad_norm": 1.0}
    result = tiny.train(family, dataset, **settings)
    plain = Plain(tiny.base(family), tokens, inside.lora[0], rank=4, rate=1e-3, text_rate=1e-3, beta=beta)

    losses = []
    for batch in inside.batches:
        examples = [dataset.examples[draw.example] for draw in batch.draws]
        texts = [example.caption for example in examples], [example.base_caption for example in examples]
        losses.append(plain.step(batch.latents, batch.noise, batch.timesteps, *texts))

    assert len(losses) == STEPS
    # Both sum in float32 in different orders; a step taken otherwise would show in the second or third digit.
    assert result.train.losses == pytest.approx(losses, rel=2e-5)
    assert inside.norms == pytest.approx(plain.norms, rel=1e-4)
    assert beta <= 0 or max(plain.norms) > 1, "the clipping was meant to be at work"
    trained = dict(inside.unet[0].named_parameters())
    for name, value in plain.lora.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)
    for encoder, table, first in zip(inside.encoders, plain.tables, plain.first):
        learned = encoder.get_input_embeddings().learned
        torch.testing.assert_close(learned, table[plain.new], rtol=1e-3, atol=1e-5)
        # and they did learn: by more than the tolerance, in direction but not in length
        assert (learned - first[plain.new]).abs().max() > 1e-3
        torch.testing.assert_close(learned.norm(dim=-1), first[plain.new].norm(dim=-1))
