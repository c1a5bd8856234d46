"""The tiny text encoder: a UMT5EncoderModel over bytes, trained to name the attributes at every byte."""

import itertools
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch.nn import functional as F
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from alignkit.tiny.clips import ATTRIBUTES, BACKGROUND_WORD
from alignkit.tiny.stages import Ema, RunningLog, schedule, step_rng, train_steps

STAGE = 2
TEXT_DIM = 64
CAPTION_LENGTH = 64  # bytes with the end mark; every caption fits
# The first is the one the clips carry. The last names no background.
WORDINGS = (
    "a {colour} {shape} moves {motion} on a {background} background",
    "a {colour} {shape} moving {motion} on a {background} background",
    "A {colour} {shape} moves {motion} over a {background} background.",
    "{colour} {shape}, moves {motion}, {background} background",
    "a {colour} {shape} moves {motion}",
)
ALL_ATTRIBUTES = [
    dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values())
]
NOT_NAMED = -100


def new_tokenizer() -> ByT5Tokenizer:
    """Bytes plus three: no vocabulary file."""
    return ByT5Tokenizer()


def new_text_encoder() -> UMT5EncoderModel:
    """An untrained UMT5EncoderModel of 0.13 M parameters."""
    config = UMT5Config(
        vocab_size=384,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
    )
    return UMT5EncoderModel(config)


def word(attributes: dict[str, str], wording: int) -> str:
    """The caption of some attributes in one of the wordings."""
    return WORDINGS[wording].format(
        **(attributes | {"background": BACKGROUND_WORD[attributes["background"]]})
    )


def combination(attributes: dict[str, str]) -> int:
    """The place of these attributes in ``ALL_ATTRIBUTES``."""
    place = 0
    for name, values in ATTRIBUTES.items():
        place = place * len(values) + values.index(attributes[name])
    return place


def encode_prompts(
    tokenizer: ByT5Tokenizer, encoder: UMT5EncoderModel, prompts: list[str], length: int = CAPTION_LENGTH
) -> torch.Tensor:
    """Text as WanPipeline encodes it: float [B, length, D], zeros after each prompt's own tokens."""
    tokens = tokenizer(
        [prompt_clean(prompt) for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask
    return encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]


@torch.no_grad()
def caption_bank(tokenizer: ByT5Tokenizer, encoder: UMT5EncoderModel) -> torch.Tensor:
    """Every wording of every combination, float32 [wordings, combinations, CAPTION_LENGTH, D]."""
    rows = [
        encode_prompts(tokenizer, encoder, [word(attributes, wording) for attributes in ALL_ATTRIBUTES])
        for wording in range(len(WORDINGS))
    ]
    return torch.stack(rows)


class _NamingModel(torch.nn.Module):
    """The encoder with one linear head an attribute, applied to every token."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = new_text_encoder()
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(TEXT_DIM, len(values)) for name, values in ATTRIBUTES.items()}
        )


def train_text_encoder(folder: Path, *, steps: int, peak_rate: float, seed: int) -> UMT5EncoderModel:
    """Train on all captions in all wordings, so that each byte's embedding holds all that is named."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    texts, labels = [], []
    for wording, pattern in enumerate(WORDINGS):
        for attributes in ALL_ATTRIBUTES:
            texts.append(word(attributes, wording))
            labels.append(
                [
                    values.index(attributes[name]) if f"{{{name}}}" in pattern else NOT_NAMED
                    for name, values in ATTRIBUTES.items()
                ]
            )
    tokens = tokenizer(texts, padding="max_length", max_length=CAPTION_LENGTH, return_tensors="pt")
    labels = torch.tensor(labels)
    model = _NamingModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(model, 0.99)
    running = RunningLog("text", steps)
    for step in train_steps("text", folder, model, optimizer, ema, steps):
        rows = torch.from_numpy(step_rng(seed, STAGE, step).integers(len(texts), size=48))
        mask = tokens.attention_mask[rows]
        optimizer.param_groups[0]["lr"] = peak_rate * schedule(step, steps)
        hidden = model.encoder(tokens.input_ids[rows], mask).last_hidden_state
        loss, right = 0.0, []
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
