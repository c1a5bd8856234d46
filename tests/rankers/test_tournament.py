"""Best and worst of K from answers about pairs."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.rankers.tournament import copeland, pick


def test_a_cycle_leaves_nobody_ahead_and_the_one_who_beats_all_first():
    answers = {(0, 1): 0.9, (1, 2): 0.9, (0, 2): 0.1}  # 0 beats 1 beats 2 beats 0
    assert copeland([0, 1, 2], answers, 0.1) == {0: 0, 1: 0, 2: 0}
    answers |= {(0, 3): 0.2, (1, 3): 0.2, (2, 3): 0.2}
    assert copeland([0, 1, 2, 3], answers, 0.1) == {0: -1, 1: -1, 2: -1, 3: 3}


@pytest.mark.parametrize(
    ("answer", "margin", "kept"),
    [(0.55, 0.1, True), (0.45, 0.1, True), (0.54, 0.1, False), (0.46, 0.1, False), (0.5, 0, False), (0.51, 0, True)],
)
def test_a_difference_under_the_margin_is_a_tie_whichever_side_it_is_on(answer, margin, kept):
    for keep in ("all", "best_worst"):
        pairs, dropped = pick([0, 1], {(0, 1): answer}, margin, keep)
        assert pairs == ([(0, 1) if answer > 0.5 else (1, 0)] if kept else []) and dropped == (not kept)


def test_a_prompt_whose_videos_all_tie_gives_no_pair_and_is_counted():
    assert pick([4, 5, 6], {(4, 5): 0.5, (4, 6): 0.5, (5, 6): 0.5}, 0.1, "best_worst") == ([], 1)


def test_best_and_worst_are_dropped_where_the_worst_won_against_the_best():
    answers = {(0, 1): 0.9, (0, 2): 0.9, (0, 3): 0.2, (1, 2): 0.5, (1, 3): 0.9, (2, 3): 0.9}
    assert pick([0, 1, 2, 3], answers, 0.1, "best_worst") == ([], 1)
    assert sorted(pick([0, 1, 2, 3], answers, 0.1, "all")[0]) == [(0, 1), (0, 2), (1, 3), (2, 3), (3, 0)]


def test_of_equal_counts_the_higher_sum_of_probabilities_decides():
    answers = {(0, 1): 0.5, (0, 2): 0.9, (1, 2): 0.99}
    assert pick([0, 1, 2], answers, 0.1, "best_worst") == ([(1, 2)], 0)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.permutations(range(4)))
def test_names_and_sides_do_not_matter(values, order):
    """The same videos under other numbers, and a comparison asked the other way round, give the same counts."""
    asked = dict(zip(combinations(range(4), 2), values, strict=True))
    renamed = {(order[b], order[a]): 1 - value for (a, b), value in asked.items()}
    counts, others = copeland(range(4), asked, 0.1), copeland(range(4), renamed, 0.1)
    near = any(abs(abs(value - (1 - value)) - 0.1) < 1e-12 for value in values)  # 1 − p rounds
    assert near or all(counts[name] == others[order[name]] for name in range(4))
    assert sum(counts.values()) == 0
