"""Selective checkpointing: of the backends that torch can see, on both families, and of no other."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.errors import ConfigError
from alignkit.models import checkpointing
from alignkit.models.attention import BACKENDS, set_attention
from alignkit.models.checkpointing import FORWARD_OPS, check_selective, set_checkpointing

CPU = torch.device("cpu")


class Forwards(TorchDispatchMode):
    """Counts attention's forwards and all matrix products."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attention += func.name() in FORWARD_OPS["native"]
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["native", "native_flash"])
def test_a_selective_layer_computes_its_attention_once_and_the_rest_twice(one_layer, backend):
    network, run = one_layer
    set_attention(network, backend, CPU, torch.float32)
    check_selective(backend, network.config.attention_head_dim, CPU, torch.float32)
    found = {}
    for mode in ("none", "selective", "full"):
        set_checkpointing(network, mode)
        with Forwards() as counted:
            _, gradients = run()
        found[mode] = counted, gradients
    attention = {mode: counted.attention for mode, (counted, _) in found.items()}
    assert attention["none"] == attention["selective"] == attention["full"] / 2 > 0
    products = {mode: counted.products for mode, (counted, _) in found.items()}
    assert products["none"] < products["selective"] == products["full"]
    for mode in ("selective", "full"):
        for name, expected in found["none"][1].items():
            assert (found[mode][1][name] - expected).norm() <= 1e-5 * expected.norm(), (mode, name)


def test_each_backend_says_what_it_computes_attention_by():
    assert FORWARD_OPS.keys() == BACKENDS.keys()


def test_a_backend_that_torch_does_not_see_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(checkpointing.FORWARD_OPS, "native", {"somewhere::else"})
    with pytest.raises(ConfigError, match=r"train\.checkpointing: 'selective'.*attention 'native'.*somewhere::else"):
        check_selective("native", 16, CPU, torch.float32)
