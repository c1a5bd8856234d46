"""Networks of both families, of one layer and random weights."""

import pytest
import torch

from alignkit.models import family_module

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 1,
}  # fmt: skip
COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 6,
}  # fmt: skip
CASES = {
    "wan": ("wan", WAN, (2, 4, 3, 8, 8)),
    "2b": ("cogvideox", COGVIDEOX | {"use_rotary_positional_embeddings": False}, (2, 3, 4, 8, 8)),
    "5b": ("cogvideox", COGVIDEOX | {"use_rotary_positional_embeddings": True}, (2, 3, 4, 8, 8)),
}


@pytest.fixture(params=CASES)
def one_layer(request):
    """(network, run): run() is its output and its gradients by name, of the same inputs at each call."""
    name, config, shape = CASES[request.param]
    family = family_module(name)
    torch.manual_seed(0)
    network = family.build_transformer(config)
    with torch.no_grad():  # as built, some gains are zero and would hide what they multiply
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    state, text = torch.randn(shape), torch.randn(2, 6, 16)

    def run():
        network.zero_grad()
        output = family.predict(network, state, torch.tensor([700.0, 40.0]), text)
        output.square().sum().backward()
        return output.detach(), {key: p.grad.clone() for key, p in network.named_parameters()}

    return network, run
