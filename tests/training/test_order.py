"""The order of pairs: a function of (seed, step), each pair once an epoch, the same on any number of processes."""

from collections import Counter

from alignkit.training.order import global_batch, rank_share


def test_every_pair_comes_once_an_epoch_across_batches_that_straddle_epochs():
    count, size = 10, 4
    seen = [item for step in range(15) for item in global_batch(count, 3, step, size)]
    by_epoch = Counter(epoch for _, epoch in seen)
    assert by_epoch == {epoch: count for epoch in range(6)}
    assert Counter(seen).most_common(1)[0][1] == 1


def test_a_step_needs_nothing_of_the_steps_before():
    forward = [global_batch(7, 1, step, 3) for step in range(20)]
    assert [global_batch(7, 1, step, 3) for step in reversed(range(20))][::-1] == forward


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        return [row for row, _ in global_batch(50, seed, epoch, 50)]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_processes_share_one_batch():
    batch = global_batch(100, 0, 5, 8)
    for world_size in (1, 2, 4):
        shares = [rank_share(batch, rank, world_size) for rank in range(world_size)]
        assert [item for share in shares for item in share] == batch


def test_epochs_that_are_counted_from_later_on_have_orders_of_their_own():
    """Rounds of new pairs, each drawn from for less than an epoch: not the same places every time."""
    rounds = [[row for step in range(3) for row, _ in global_batch(200, 3, step, 8, 24 * n)] for n in range(3)]
    assert len({tuple(rows) for rows in rounds}) == 3
    later, first = (global_batch(7, 3, 2, 8, epoch) for epoch in (5, 0))
    assert [epoch for _, epoch in later] == [epoch + 5 for _, epoch in first]
