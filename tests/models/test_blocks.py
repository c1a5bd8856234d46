"""The compiled block gives the eager one's output and gradients: an Inductor fault in Wan's modulation is on record."""

from alignkit.models.blocks import compile_blocks


def test_compiled_blocks_agree_forward_and_backward(one_layer):
    network, run = one_layer
    eager = run()
    compile_blocks(network)
    compiled = run()
    assert any(layer._compiled_call_impl for layer in network.modules() if hasattr(layer, "_compiled_call_impl"))
    assert (compiled[0] - eager[0]).norm() <= 1e3 * 2**-24 * eager[0].norm()
    for key, expected in eager[1].items():
        # some 10³ fp32 roundings deep, against the largest gradient of the model where its own is next to nothing
        scale = max(expected.norm(), 1e-3 * max(gradient.norm() for gradient in eager[1].values()))
        assert (compiled[1][key] - expected).norm() <= 1e3 * 2**-24 * scale, key
