"""A run's first step, and its gradients; also for processes that a test starts."""

from contextlib import nullcontext

import torch


def first_step_of(config, watch=None, change=lambda run: None):
    """Metrics, and gradients by name, fp64, of a run's first step, which is taken inside `watch`. change(run) is called
    before it."""
    from deepspeed.utils import safe_get_full_grad

    from alignkit.models import load_model
    from alignkit.stores.folders import pairs_folder
    from alignkit.stores.pairs import PairStore
    from alignkit.training.distributed import start_process
    from alignkit.training.engine import load_network, process_put_back
    from alignkit.training.run import start_run
    from alignkit.training.weights import open_start

    with process_put_back():
        process = start_process()
        torch.set_num_threads(1)
        model = load_model(config.model, with_transformer=False, with_encoders=False)
        start = open_start(config, model)
        model.transformer, _ = load_network(config, process, model, start)
        run = start_run(config, process, model, PairStore(pairs_folder(config, "train")), start)
        gradients, update = {}, run.policy.step

        def note_and_update():
            if run.policy.is_gradient_accumulation_boundary():
                named = run.policy.module.named_parameters()
                gradients.update({name: safe_get_full_grad(p).double() for name, p in named if p.requires_grad})
            update()

        run.policy.step = note_and_update
        change(run)
        with watch or nullcontext():
            metrics = run.step(0).metrics
        run.release()
        return metrics, gradients


def away_from_the_start(run):
    """The reference is not where the policy starts, so that no logit is 0."""
    answer, run.starts_apart = run.reference.answer, True
    run.reference.answer = lambda *shown: tuple(f * x for f, x in zip((0.98, 1.01), answer(*shown), strict=True))


def distance(gradients, expected):
    """Relative, of all gradients as one."""
    assert gradients.keys() == expected.keys()
    squares = [((gradients[name] - value).square().sum(), value.square().sum()) for name, value in expected.items()]
    return (sum(square for square, _ in squares) / sum(square for _, square in squares)).sqrt().item()
