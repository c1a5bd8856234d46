"""The tiny text encoders: T5 encoders over bytes, trained to name the attributes at every byte."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ByT5Tokenizer, PreTrainedModel

from alignkit.tiny.clips import ATTRIBUTES, BACKGROUND_WORD
from alignkit.tiny.recipes import Recipe
from alignkit.tiny.stages import Ema, RunningLog, schedule, step_rng, train_steps

STAGE = 2
CAPTION_LENGTH = 64  # bytes with the end mark; every caption fits
# The first is the one the clips carry. The last names no background.
WORDINGS = (
    "a {colour} {shape} moves {motion} on a {background} background",
    "a {colour} {shape} moving {motion} on a {background} background",
    "A {colour} {shape} moves {motion} over a {background} background.",
    "{colour} {shape}, moves {motion}, {background} background",
    "a {colour} {shape} moves {motion}",
)
ALL_ATTRIBUTES = [dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())]
NOT_NAMED = -100


def new_tokenizer() -> ByT5Tokenizer:
    """Bytes plus three: no vocabulary file."""
    return ByT5Tokenizer()


def word(attributes: dict[str, str], wording: int) -> str:
    """The caption of some attributes in one of the wordings."""
    return WORDINGS[wording].format(**(attributes | {"background": BACKGROUND_WORD[attributes["background"]]}))


def combination(attributes: dict[str, str]) -> int:
    """The place of these attributes in ``ALL_ATTRIBUTES``."""
    place = 0
    for name, values in ATTRIBUTES.items():
        place = place * len(values) + values.index(attributes[name])
    return place


@torch.no_grad()
def caption_bank(
    recipe: Recipe, tokenizer: ByT5Tokenizer, encoder: PreTrainedModel
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By text length: every wording of every combination, float32 [wordings, combinations, length, D], and the
    empty prompt [length, D]."""
    bank = {}
    for length in recipe.TEXT_LENGTHS:
        rows = [
            recipe.encode_prompts(tokenizer, encoder, [word(entry, wording) for entry in ALL_ATTRIBUTES], length)
            for wording in range(len(WORDINGS))
        ]
        bank[length] = torch.stack(rows), recipe.encode_prompts(tokenizer, encoder, [""], length)[0]
    return bank


class _NamingModel(nn.Module):
    """The encoder with one linear head an attribute, applied to every token."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(
            {name: nn.Linear(encoder.config.d_model, len(values)) for name, values in ATTRIBUTES.items()}
        )


def train_text_encoder(recipe: Recipe, folder: Path, *, steps: int, peak_rate: float, seed: int) -> PreTrainedModel:
    """Train on all captions in all wordings, so that each byte's embedding holds all that is named."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    texts, places = [], []
    for wording, pattern in enumerate(WORDINGS):
        for attributes in ALL_ATTRIBUTES:
            texts.append(word(attributes, wording))
            places.append(
                [
                    values.index(attributes[name]) if f"{{{name}}}" in pattern else NOT_NAMED
                    for name, values in ATTRIBUTES.items()
                ]
            )
    labels = torch.tensor(places)
    model = _NamingModel(recipe.new_text_encoder())
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(model, 0.99)
    running = RunningLog("text", steps)
    for step in train_steps("text", folder, model, optimizer, ema, steps):
        rng = step_rng(seed, STAGE, step)
        rows = rng.integers(len(texts), size=48)
        length = int(rng.choice(recipe.ENCODED_LENGTHS, p=recipe.ENCODED_LENGTH_SHARES))
        chosen = [texts[row] for row in rows]
        mask = tokenizer(chosen, padding="max_length", max_length=length, return_tensors="pt").attention_mask
        optimizer.param_groups[0]["lr"] = peak_rate * schedule(step, steps)
        hidden = recipe.encode_prompts(tokenizer, model.encoder, chosen, length)
        loss: Any = 0.0
        right = []
        for column, head in enumerate(model.heads.values()):
            target = labels[rows, column, None].expand_as(mask).masked_fill(mask == 0, NOT_NAMED)
            logits = head(hidden)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=NOT_NAMED)
            named = target != NOT_NAMED
            right.append((logits.argmax(-1) == target)[named].float().mean().item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running.add(step, loss=loss.item(), right=float(np.mean(right)))
    model.load_state_dict(ema.values, strict=False)  # the embedding is in there once, under its first name
    return model.encoder.eval()
