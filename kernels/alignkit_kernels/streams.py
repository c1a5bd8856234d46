"""What a keyed draw is for: the fourth word of the Philox counter, so that uses never share noise."""

from enum import IntEnum


class Stream(IntEnum):
    """Streams of the counter contract. Append, never renumber: stored pairs depend on the numbers."""

    TRAINING = 0  # the noise a training state is made with
    TIMESTEP = 1
    MASK = 2
    STRENGTH = 3
    CORRUPTION = 4  # the noise a loser is regenerated with
    ROLLOUT = 5  # what sampling a video starts from
    CAPTION_DROPOUT = 6
    EVALUATION = 7
