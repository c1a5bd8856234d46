import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignkit import config
from alignkit.errors import DataError
from alignkit.files import write_lines
from alignkit.report import write_report
from alignkit.report.run import read_run
from alignkit.report.tables import OBJECTIVES

STEPS, FRAMES, SIZE = 60, 9, 32  # of the run that conftest.py makes
LEFT_OPEN = {"meta", "link", "img", "input", "br", "path", "line", "circle"}


class Film:
    """A picture whose frames stand one under the other, as its style says."""

    def __init__(self, image: Image.Image, style: str):
        self.motion = {name: float(number) for name, number in re.findall(r"--(\w+):([\d.]+)", style)}
        self.image, self.n_frames = image, int(self.motion["frames"])
        assert image.height % self.n_frames == 0
        self.size = (image.width, image.height // self.n_frames)

    def frame(self, t: int) -> np.ndarray:
        width, height = self.size
        return np.asarray(self.image.crop((0, t * height, width, (t + 1) * height)).convert("RGBA"))


class Page(HTMLParser):
    """The page as a reader's browser sees it: text by section, attributes, pictures; unclosed tags fail."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.images, self.open = [], [], [], []
        self.film = ""
        self.text = ""
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        attrs = dict(attrs)
        if attrs.get("class") == "film":
            self.film = attrs["style"]
        if tag == "img":
            self.images.append(Film(_webp(attrs["src"]), self.film))
        if tag not in LEFT_OPEN:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def ids(self) -> set[str]:
        return {value for name, value in self.attributes if name == "id"}


def _webp(uri: str) -> Image.Image:
    head, content = uri.split(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def page_of(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_elsewhere_and_there_is_no_script(run):
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    for name, value in page.attributes:
        if name in ("src", "srcset", "href", "action", "poster", "data", "xlink:href"):
            assert value.startswith(("data:", "#")), f"{name}={value[:60]}"
        assert not name.startswith("on"), f"script in {name}"
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html, "the browser is told to load nothing, whatever the page says"


def test_every_section_is_there_with_the_run_s_numbers(run):
    page = page_of(run)
    assert page.ids() >= {"verdict", "pairs", "effect", "curves", "numbers", "skipped", "configuration"}
    for words in (
        "Tiny Wan2.1, aligned with LocalDPO",
        "in 60 steps of 16 pairs",
        "Alignment reached",
        "All 2 criteria hold",
        "81.0% preferred (70% wanted)",
        "50.0 % → 81.0 %",
        "+0.20 %",
        "10.07 → 7.533",
        "no preference: 1.386",
        "10.07 ± 0.25",
        "87.5 %",
        "2 min 23 s",
        "4 min 50 s",
        "1.84 GB",
        "CPU, 2 threads",
        "weight_region: 1.0",
        "2.13.0",
        "too short: it has 3 frames",
        "strength 0.80",
    ):
        assert words in page.text, words
    assert "not available" not in page.text.lower()


def test_criteria_that_are_not_met_are_said_first_and_in_words(make_run, tmp_path):
    page = page_of(make_run(tmp_path, reached=False))
    assert "Alignment not reached" in page.text
    assert "1 of 2 criteria is not met: winner error." in page.text
    assert page.text.count("✓") == 1 and page.text.count("✗") == 1
    assert page.text.index("not reached") < page.text.index("Samples before and after")


def test_text_of_the_run_cannot_become_markup(run):
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    for hostile in ("<b>red</b>", "<script>alert(1)", "<changed>", "bad<1>"):
        assert hostile not in html, f"{hostile} reached the page unescaped"
        assert hostile in page.text, f"{hostile} is not shown as text"


def test_samples_move_side_by_side_in_step_and_for_ever(run):
    page = page_of(run)
    assert len(page.images) == 4 + 2
    pair, sample = page.images[0], page.images[-1]
    for film, panels in ((sample, 3), (pair, 3)):
        assert film.n_frames == FRAMES
        assert film.motion["seconds"] == 0.125  # 8 frames a second
        assert film.size == (panels * SIZE + (panels - 1) * 2, SIZE)


def test_pair_shows_winner_marked_region_and_loser_at_the_same_moment(run):
    pair = page_of(run).images[1]
    stored = np.load(run / "report_pairs" / "001.npz")
    size = SIZE
    for t in (0, 4, 8):
        shown = pair.frame(t)
        panels = [shown[:, i * (size + 2) : i * (size + 2) + size, :3].astype(int) for i in range(3)]
        assert np.array_equal(panels[0], stored["winner"][t])
        assert np.array_equal(panels[2], stored["loser"][t])
        changed = (panels[1] != panels[0]).any(axis=-1)
        expected = np.zeros((size, size), bool)
        expected[8:20, 8:24] = True  # the mask's cells 2:5, 2:6, of 4 pixels
        assert np.array_equal(changed, expected)
        outline = np.abs(panels[1] - (255, 0, 170)).max(axis=-1) < 30
        assert outline[8, 8:24].all() and outline[8:20, 23].all() and not outline[9:19, 9:23].any()
        assert (shown[:, size : size + 2, 3] == 0).all(), "the gap is transparent, for light and dark pages"


def test_samples_of_both_models_keep_their_places(run):
    image = page_of(run).images[2].frame(0)[..., :3]
    noise = [image[24:, left : left + 28].astype(float).std() for left in (0, SIZE + 2)]
    assert noise[0] > 1.5 * noise[1], "the noisier base belongs on the left"


@pytest.mark.parametrize(
    "name, words",
    [
        ("config.yaml", "The whole configuration"),
        ("train", "Training curves: not available"),
        ("eval.json", "Held-out pairs by noise level"),
        ("report_pairs", "Pairs: not available"),
        ("samples", "Samples: not available"),
        ("skipped.jsonl", None),
    ],
)
def test_a_missing_file_is_said_to_be_not_available(run, name, words):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run)
    if words is None:
        assert "skipped" not in page.ids()
    else:
        assert words in page.text and "not available" in page.text.lower()
    assert page.ids() >= {"verdict", "pairs", "effect", "curves", "numbers", "configuration"}


def test_an_empty_summary_still_makes_a_page(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    page = page_of(tmp_path)
    assert "No criteria were recorded" in page.text and "Alignment not reached" in page.text
    assert page.text.lower().count("not available") >= 8


@pytest.mark.parametrize("value", [None, "text", [1, "x", None], {"a": {"b": None}}, float("nan")], ids=repr)
def test_nothing_in_the_summary_can_stop_the_page(finished_run, tmp_path, value):
    summary = json.loads((finished_run / "summary.json").read_text())
    for key in summary:
        (tmp_path / "summary.json").write_text(json.dumps({**summary, key: value}))
        assert page_of(tmp_path).ids() >= {"verdict", "numbers"}, key


def test_missing_or_broken_summary_is_one_clear_error(run):
    (run / "summary.json").write_text('{"family": ')
    with pytest.raises(DataError, match=r"summary\.json: cannot be read as JSON"):
        write_report(run)
    (run / "summary.json").write_text("[]")
    with pytest.raises(DataError, match="no JSON object"):
        write_report(run)
    (run / "summary.json").unlink()
    with pytest.raises(DataError, match=r"summary\.json: missing.*run 'alignkit eval' first"):
        write_report(run)


def test_broken_pictures_are_named_and_the_others_shown(run):
    (run / "report_pairs" / "000.npz").write_bytes(b"PK\x03\x04 not a zip")
    (run / "samples" / "aligned" / "001.mp4").write_bytes(b"nothing")
    (run / "samples" / "base" / "002.mp4").unlink()
    page = page_of(run)
    assert len(page.images) == 2 + 1
    for words in ("000.npz cannot be read", "001.mp4: cannot be read as a video", "002.mp4: no such file"):
        assert words in page.text


def test_a_long_list_of_skipped_files_is_folded_and_counted(run):
    rows = [json.dumps({"video": f"{i}.mp4", "reason": f"reason {i}"}) for i in range(300)]
    (run / "skipped.jsonl").write_text("\n".join(rows))
    page = page_of(run)
    assert "300 things in the videos folder were not used" in page.text and "All 300 are in skipped.jsonl" in page.text
    folded = page.text.index("More of them")
    assert page.text.index("reason 7") < folded < page.text.index("reason 8") < page.text.index("reason 199")
    assert "reason 200" not in page.text


def test_samples_outside_of_the_run_are_not_read(run):
    rows = [{"prompt": "x", "seed": 0, "base": "../../outside.mp4", "aligned": "aligned/000.mp4"}]
    (run / "samples" / "samples.jsonl").write_text(json.dumps(rows[0]))
    shutil.copy(run / "samples" / "base" / "000.mp4", run.parent / "outside.mp4")
    page = page_of(run)
    assert len(page.images) == 2 and "lies outside" in page.text


def test_a_half_written_last_line_of_metrics_is_passed_over(run):
    file = run / "train" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 61, "loss": 0.')
    assert "in 60 steps" in page_of(run).text


def test_how_fast_a_step_was_and_where_its_time_went_is_said(run):
    parts = {"seconds/policy": 3.0, "seconds/optimizer": 1.0}
    rows = [{"step": i, "seconds": s, "pairs_per_second": 16 / s, **parts} for i, s in enumerate((9.0, 4.0, 4.0), 1)]
    write_lines(run / "train" / "timings.jsonl", rows)
    page = write_report(run).read_text()
    said = "A training step (median): 4.000 s, 4.000 pairs a second. Of its time: policy 75.0 %, optimizer 25.0 %."
    assert said in page
    write_lines(run / "train" / "timings.jsonl", [row | {"mfu": 0.384} for row in rows])
    assert "4.000 pairs a second, 38.4 % of the devices’ peak (MFU). Of" in write_report(run).read_text()


def test_what_looks_at_held_out_pairs_found_is_drawn_over_the_steps_of_the_whole_chain(run):
    assert "Held-out pairs while training" not in page_of(run).text
    rows = [{"step": step, "region_accuracy": 0.5, "winner_error_change": step / 1000} for step in (0, 40)]
    write_lines(run / "train" / "validation.jsonl", rows)
    text = page_of(run).text
    assert "Held-out pairs while training" in text and "Change of their errors, in percent" in text
    (run / "config.yaml").write_text("stages: [{name: sft}, {name: localdpo}]\n")
    for name in ("01-sft", "02-localdpo"):
        shutil.copytree(run / "train", run / "stages" / name / "train")
    assert [row["step"] for row in read_run(run).validation] == [0, 40, STEPS, STEPS + 40]


def test_numbers_that_nobody_knows_are_drawn_too(run):
    file = run / "train" / "metrics.jsonl"
    rows = [json.loads(line) | {"new/number": i} for i, line in enumerate(file.read_text().splitlines())]
    file.write_text("\n".join(map(json.dumps, rows)))
    page = page_of(run)
    assert "Everything else that was logged" in page.text and "new/number" in page.text


def test_metrics_under_trl_s_names_are_drawn_with_their_kind(run):
    file = run / "train" / "metrics.jsonl"
    text = file.read_text().replace("global/accuracy", "rewards/accuracies").replace("global/logit", "rewards/margins")
    file.write_text(text)
    page = page_of(run)
    assert page.text.count("global 0.7") == 1, "global accuracy belongs beside the region's"
    assert "rewards/" not in page.text, "drawn again among the rest"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("local_dpo", "them start at 2 × 0.693"),
        ("dpo", "the loss of dpo is 0.6931"),
        ("ipo", "the loss of ipo is 0.25"),
        ("hinge", "the loss of hinge is 1"),
        ("poly_dpo", "the loss of poly_dpo is 1.193"),
        ("winner_guarded", "there is no value that it starts from"),
        ("sft", "The plain denoising loss of the winners."),
    ],
)
def test_the_loss_is_explained_for_its_objective(run, name, words):
    (run / "config.yaml").write_text(f"objective: {{name: {name}, beta: 5000, poly_alpha: 1.0}}\n")
    text = page_of(run).text
    assert words in text and f"aligned with {OBJECTIVES[name]}" in text


def test_every_objective_has_a_title():
    assert OBJECTIVES.keys() == config.OBJECTIVES.keys()


@pytest.mark.parametrize(
    ("config", "words", "others"),
    [
        ("data: {videos: clips}", "redrawn random regions", "as they were ranked"),
        ("data: {pairs: mine.jsonl}\nobjective: {name: dpo}", "as they were ranked", "redrawn"),
        ("objective: {name: sft}", "from the winners of its pairs alone", "as they were ranked"),
    ],
)
def test_the_page_says_what_the_pairs_were(run, config, words, others):
    (run / "config.yaml").write_text(config + "\n")
    text = page_of(run).text
    assert words in text and others not in text


def test_metrics_that_an_objective_does_not_have_are_left_out(run):
    """Supervised training logs its loss and the winner's error: no empty plot is left of the rest."""
    (run / "config.yaml").write_text("objective: {name: sft}\n")
    file = run / "train" / "metrics.jsonl"
    kept = ("step", "loss", "error_w", "error_by_timestep", "lr", "grad_norm")
    rows = [{name: json.loads(line)[name] for name in kept} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    text = page_of(run).text
    assert "Denoising error" in text and "Learning rate" in text
    assert not any(title in text for title in ("Implicit accuracy", "Gap of the", "Logits", "Rewards", "saturation"))


def test_a_chains_stages_are_shown_one_after_the_other(run):
    (run / "config.yaml").write_text("stages: [{name: sft}, {name: localdpo}]\n")
    rows = (run / "train" / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "train")
    for name in ("01-sft", "02-localdpo"):
        (run / "stages" / name / "train").mkdir(parents=True)
        (run / "stages" / name / "train" / "metrics.jsonl").write_bytes(rows)
    read = read_run(run)
    assert [row["step"] for row in read.metrics] == list(range(1, 2 * STEPS + 1))
    for name, objective, rate in (("01-sft", "sft", "1.0e-5"), ("02-localdpo", "local_dpo", "2.0e-6")):
        (run / "stages" / name / "config.yaml").write_text(
            f"objective: {{name: {objective}}}\ntrain: {{steps: {STEPS}, learning_rate: {rate}}}"
        )
    text = " ".join(page_of(run).text.split())
    assert "aligned with supervised fine-tuning and LocalDPO" in text
    stages = text[text.index("How it was made") : text.index("Curves Training")]
    assert f"supervised fine-tuningsupervised fine-tuning{STEPS} of {STEPS}1.00·10⁻⁵stored" in stages
    assert f"LocalDPOLocalDPO{STEPS} of {STEPS}2.00·10⁻⁶stored" in stages and "Rankings" not in stages


def test_rankings_are_summed_up_with_who_gave_them(run):
    assert "How it was made" not in page_of(run).text
    answers = [{"id": f"0-{i}", "who": "motion <1>", "p": 0.5 + i / 10} for i in range(1, 5)]
    pairs = [{"prompt": f"prompt {i % 2}", "chosen": i, "rejected": 0, "p": 0.7} for i in range(3)]
    (run / "rankings").mkdir()
    write_lines(run / "rankings" / "answers.jsonl", answers)
    write_lines(run / "rankings" / "ranking.jsonl", pairs)
    assert "pairsmotion <1>43270.0 %" in page_of(run).text  # 4 comparisons, 3 pairs of 2 prompts
    shutil.move(run / "rankings", run.parent / "elsewhere")
    (run / "config.yaml").write_text(f"data: {{pairs: {run.parent / 'elsewhere' / 'ranking.jsonl'}}}\n")
    assert "pairsmotion <1>43270.0 %" in page_of(run).text


def test_the_page_says_what_is_new_against_the_nearest_shipped_configuration(run):
    shipped = config.load_config("wan-tiny-localdpo", ["output.dir=elsewhere"])
    (run / "config.yaml").write_text(config.dump_config(shipped))
    assert "The settings are those of wan-tiny-localdpo" in page_of(run).text
    own = config.load_config("wan-tiny-localdpo", ["train.learning_rate=1e-5", "data.videos=<mine>"])
    (run / "config.yaml").write_text(config.dump_config(own))
    text = page_of(run).text
    assert "What is new against wan-tiny-localdpo" in text and "train.learning_rate1e-050.0003" in text
    assert "data.videos<mine>" not in text, "where things are is no setting"


def test_a_learning_rate_that_stays_takes_a_sentence_and_no_card(run):
    assert "Learning rate" in page_of(run).text
    file = run / "train" / "metrics.jsonl"
    rows = [json.loads(line) | {"lr": 3e-4} for line in file.read_text().splitlines()]
    write_lines(file, rows)
    text = page_of(run).text
    assert "The learning rate was 3.00·10⁻⁴ throughout." in text and "Learning rate" not in text


def test_sections_stand_in_the_order_of_a_reader_s_questions(run):
    html = write_report(run).read_text()
    ids = re.findall(r'<section id="(\w+)"', html)
    assert ids == ["pairs", "effect", "verdict", "numbers", "curves", "skipped", "configuration"]
    assert html.index('href="#verdict">Alignment reached') < html.index('<section id="pairs"'), "not only far below"


def test_a_students_page_says_in_how_few_steps_it_samples_and_shows_no_error_at_others(run):
    file = run / "summary.json"
    usual = write_report(run).read_text()
    config = run / "config.yaml"
    config.write_text(config.read_text() + "\nsample:\n  num_inference_steps: 12\n")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"student_steps": 4}))
    text = page_of(run).text
    assert (
        "a student now, which samples in 4 steps" in text
        and "samples in 4 steps without guidance, the base in 12" in text
    )
    assert 'class="tiles threes"' in usual and 'class="tiles"' not in usual
    assert 'class="tiles"' in write_report(run).read_text(), "four tiles: none is alone in a row of three"
    for tile in ("Region accuracy", "Winner’s error"):
        assert (
            f'<p class="tile-name">{tile}' in usual
            and f'<p class="tile-name">{tile}' not in write_report(run).read_text()
        )


def test_the_page_stays_small_with_many_large_pictures(make_run, tmp_path):
    run = make_run(tmp_path, samples=30, pairs=0)
    generator = np.random.default_rng(0)
    for i in range(8):
        noise = generator.integers(0, 256, (24, 90, 160, 3), dtype=np.uint8)  # nothing compresses worse
        np.savez(run / "report_pairs" / f"{i:03d}.npz", winner=noise, loser=noise, mask=np.ones((24, 9, 16)),
                 prompt="noise", strength=0.8)  # fmt: skip
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 8_000_000
    assert "All 30 samples were ordered" in page.text and len(page.images) > 9


def test_same_run_gives_the_same_bytes(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def judge_samples(run, gains: list[float], following: list[bool]) -> None:
    """Give each sample of the run what `alignkit eval` measures: a fault that became less likely by the gain."""
    rows = [json.loads(line) for line in (run / "samples" / "samples.jsonl").read_text().splitlines()]
    for row, gain, kept in zip(rows, gains, following, strict=True):
        row |= {"fault_base": 0.5 + gain / 2, "fault_aligned": 0.5 - gain / 2, "change": 1.0}
        row |= {"followed_base": True, "followed_aligned": kept}
    evaluation = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(evaluation | {"samples": rows}))


def test_the_samples_shown_are_chosen_by_the_printed_rule(make_run, tmp_path):
    run = make_run(tmp_path, samples=20, pairs=0)
    gains = [0.04 * i for i in range(20)]
    judge_samples(run, gains, [i != 10 for i in range(20)])  # number 10 lost its prompt: the worst of all
    page = page_of(run)
    shown = [int(number) for number in re.findall(r'"quoted" word (\d+) ', page.text)]
    assert shown == [19, 18, 17, 11, 9, 8, 1, 0, 10]
    for words in ("largest gain", "median", "worst", "All 20 samples were ordered by how much less likely a fault"):
        assert words in page.text
    assert "aligned: fault 12 %, as prompted" in page.text and "not as prompted" in page.text


def test_where_the_detector_fires_is_shown_on_both_samples_and_what_differs_beside(run):
    cells = np.zeros((2, 4, 5, 4, 4), np.uint8)
    cells[1, 0, 0, 0, 0] = 255
    np.savez(run / "samples" / "maps.npz", base=cells[0], aligned=cells[1])
    page = page_of(run)
    image = page.images[2]
    assert image.size == (5 * SIZE + 4 * 2, SIZE) and "aligned: faults" in page.text
    shown = image.frame(0)[..., :3].astype(int)
    base, aligned, seen_base, seen_aligned, change = (
        shown[:, i * (SIZE + 2) : i * (SIZE + 2) + SIZE] for i in range(5)
    )
    assert np.array_equal(change, np.minimum(2 * np.abs(base - aligned), 255))
    marked = np.abs(seen_aligned - (255, 0, 170)).max(axis=-1) < 60
    assert marked[:8, :8].all() and not marked[8:].any() and not marked[:, 8:].any()
    assert not (np.abs(seen_base - (255, 0, 170)).max(axis=-1) < 60).any()


def test_maps_of_other_samples_are_not_shown(run):
    np.savez(
        run / "samples" / "maps.npz", base=np.zeros((3, 5, 4, 4), np.uint8), aligned=np.zeros((3, 5, 4, 4), np.uint8)
    )
    assert "aligned: faults" not in page_of(run).text


def test_a_region_is_shown_as_filmed_and_as_both_models_redraw_it(run):
    videos = {name: np.full((FRAMES, SIZE, SIZE, 3), tone, np.uint8) for name, tone in
              (("original", 40), ("base", 90), ("aligned", 140))}  # fmt: skip
    (run / "regions").mkdir()
    np.savez(run / "regions" / "000.npz", **videos, mask=np.ones((3, 8, 8), np.uint8), prompt="a region")
    (run / "regions" / "001.npz").write_bytes(b"nothing")
    page = page_of(run)
    shown = page.images[-1].frame(0)[0, :: SIZE + 2, 0]
    assert shown[0] == 40 and shown[2] == 90 and shown[3] == 140
    assert page.text.index("What a pair looks like") < page.text.index("Samples before and after")
    assert page.text.index("Samples before and after") < page.text.index("A held-out region, redrawn")
    assert "001.npz cannot be read" in page.text


def test_a_run_that_cannot_be_judged_says_why_and_what_to_do(run):
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"verdict": "cannot be judged", "reached": False, "unjudged": ["2 clips are held out: bring <more>"]}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(run)
    assert "Alignment cannot be judged" in page.text and "bring <more>" in page.text
    assert "criteria hold at once" not in page.text
