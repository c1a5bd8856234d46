"""What a run computes again in the backward pass changes its memory and time, and no gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.errors import ConfigError
from alignkit.models import checkpointing
from alignkit.models.checkpointing import FORWARD_OPS
from alignkit.training import loop
from alignkit.training.distributed import start_process
from alignkit.training.loop import train
from alignkit.training.terms import difference

LORA = "train.lora={rank: 4, alpha: 8}"
FULL = "train.lora=null"


class Attention(TorchDispatchMode):
    """Counts attention's forwards, outside the backward pass and within."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in FORWARD_OPS["native"]:
            within = torch._C._current_graph_task_id() != -1
            self.backward += within
            self.forward += not within
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(  # each value of one column with each of the others
    ("family", "preset", "weights"),
    [("wan", "zero2", LORA), ("wan", "zero3", FULL), ("2b", "zero2", FULL), ("2b", "zero3", LORA)],
)
def test_gradients_stay_and_only_full_computes_attention_in_the_backward_pass(first_step, family, preset, weights):
    counts, gradients = {}, {}
    for mode in ("none", "selective", "full"):
        counts[mode] = Attention()
        settings = f"train.checkpointing={mode}", f"deepspeed.preset={preset}", weights, "train.micro_batch_size=1"
        _, gradients[mode] = first_step(family, *settings, "train.global_batch_size=2", watch=counts[mode])
    assert len({count.forward for count in counts.values()}) == 1
    assert counts["none"].backward == counts["selective"].backward == 0
    assert counts["full"].backward == counts["full"].forward / 2  # the others are the reference's
    for mode in ("selective", "full"):
        assert gradients[mode].keys() == gradients["none"].keys()
        for name, expected in gradients["none"].items():
            assert (gradients[mode][name] - expected).norm() <= 1e-5 * expected.norm(), (mode, name)


def test_what_cannot_be_kept_is_refused_before_weights_are_read(run_with_pairs, monkeypatch):
    config, _ = run_with_pairs("run", "train.checkpointing=selective")
    monkeypatch.setitem(checkpointing.FORWARD_OPS, "native", {"somewhere::else"})
    for name in ("run_terms", "open_start"):
        monkeypatch.setattr(loop, name, lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match=r"train\.checkpointing: 'selective' cannot keep what attention 'native'"):
        train(config, start_process())


@pytest.mark.parametrize(("was", "now"), [(True, "full"), (False, "none")])
def test_a_run_from_before_selective_goes_on_under_the_terms_it_had(was, now):
    stored = {"version": 2, "train.gradient_checkpointing": was}
    assert difference(stored, {"version": 2, "train.checkpointing": now}) is None
    changed = difference(stored, {"version": 2, "train.checkpointing": "selective"})
    assert changed == f"train.checkpointing = {now!r}, now it is 'selective'"
