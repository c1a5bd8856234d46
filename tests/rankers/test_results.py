"""What votes say, against published numbers and by hand."""

import pytest

from alignkit.errors import DataError
from alignkit.rankers.asking import digests_of
from alignkit.rankers.people import answers, read_comparisons, summary, waiting, write_comparisons
from alignkit.rankers.people.results import krippendorff_alpha, wilson
from alignkit.rankers.people.votes import record

# K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), B to D: a text a rater, . is missing.
PUBLISHED = [
    (0.095, "0100000010", "1110010000"),
    (0.692, "aabbdcccedda", "babbbccceddd"),
    (0.743, "123321412...", "1233224125.3", ".3332342251.", "12332441251."),
]


def units(*raters):
    return [[value for value in values if value != "."] for values in zip(*raters, strict=True)]


@pytest.mark.parametrize("alpha, raters", [(alpha, raters) for alpha, *raters in PUBLISHED])
def test_alpha_is_that_of_the_published_examples(alpha, raters):
    assert krippendorff_alpha(units(*raters)) == pytest.approx(alpha, abs=5e-4)  # half a unit of its last digit


def test_alpha_knows_its_ends():
    assert krippendorff_alpha([["a", "a"], ["b", "b", "b"], ["a"]]) == 1
    assert krippendorff_alpha([["a", "b"]] * 50) == pytest.approx(-0.98), "worse than chance"
    for undefined in ([], [["a"], ["b"]], [["a", "a"], ["a", "a"]]):
        assert krippendorff_alpha(undefined) is None


def test_wilson_is_the_published_interval():
    # R. Newcombe, Statistics in Medicine 17 (1998), table I.
    for seen, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(seen / count, count) == pytest.approx((low, high), abs=5e-5)  # the same
    assert wilson(1, 10)[1] == pytest.approx(1)


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(b"%d" % number)
    kinds = [("sft", "dpo"), ("dpo", "sft"), ("sft", "dpo"), ("sft", "sft")]
    write_comparisons(
        tmp_path,
        [
            {"id": str(n), "prompt": "a ball", "a": f"{n}.mp4", "b": f"{(n + 1) % 4}.mp4", "kind_a": a, "kind_b": b}
            for n, (a, b) in enumerate(kinds)
        ],
    )
    return tmp_path


def vote(folder, rater, said):
    digests = digests_of(read_comparisons(folder))
    for comparison, answer in said.items():
        record(folder, rater, comparison, digests[comparison], answer, "a")


def test_answers_are_shares_of_votes_and_skips_are_none(folder):
    assert answers(folder) == {} and waiting(folder) == 4 and waiting(folder, 3) == 12
    vote(folder, "ada", {"0": "a", "1": "b", "2": "tie", "3": "skip"})
    vote(folder, "bo", {"0": "b", "1": "b"})
    vote(folder, "cy", {"0": "b"})
    assert answers(folder) == {"0": pytest.approx(1 / 3), "1": 0.0, "2": 0.5}
    assert waiting(folder) == 1 and waiting(folder, 2) == 3


def test_the_summary_says_who_wins_how_sure_that_is_and_how_far_raters_agree(folder):
    vote(folder, "ada", {"0": "a", "1": "b", "2": "tie", "3": "skip"})
    vote(folder, "bo", {"0": "b", "1": "b"})
    lines = summary(folder)
    assert lines[0] == "3 of 4 comparisons answered: 5 votes, 1 tie among them, 1 skip, by 2 raters"
    low, high = wilson(1.5 / 5, 5)
    assert lines[1] == (
        f"dpo against sft: better in 30.0% of 5 votes, 95 % interval {low:.1%} to {high:.1%} "
        "(1 better, 1 tied, 3 worse)"
    )
    assert "a tie counts half to each" in lines[2]
    # Two pairs, {a, b} and {b, b}: 1 - (4 - 1) * 2 / (16 - 1 - 9)
    assert "Krippendorff's alpha 0.00 (nominal; 2 comparisons answered by two or more" in lines[3]
    assert lines[4].startswith("the video on the left was chosen in 25.0% of votes")


def test_without_kinds_and_votes_the_summary_counts(folder):
    rows = [{"id": "0", "prompt": "a ball", "a": "0.mp4", "b": "1.mp4"}]
    write_comparisons(folder, rows)
    assert summary(folder) == ["0 of 1 comparisons answered: 0 votes, 0 ties among them, 0 skips, by 0 raters"]
    vote(folder, "ada", {"0": "tie"})
    assert summary(folder)[1:] == [
        "agreement between raters: not known, no comparison was answered by two",
        "left against right: every vote is a tie",
    ]


def test_votes_about_other_videos_are_not_taken_for_these(folder):
    vote(folder, "ada", {"0": "a", "1": "a"})
    (folder / "0.mp4").write_bytes(b"made again")
    assert answers(folder) == {"1": 1.0}
    assert summary(folder)[1] == "1 vote not counted: about other videos than are there now"


def test_a_deleted_video_is_one_line(folder):
    (folder / "2.mp4").unlink()
    for use in (answers, waiting, summary):
        with pytest.raises(DataError, match=r"comparisons.jsonl:2: 'b': there is no video '2.mp4'; .*"):
            use(folder)
