import json
import re
import shutil

import pytest
from report_page import Page, page_of

from alignkit import config
from alignkit.errors import DataError
from alignkit.files import write_lines
from alignkit.report import write_report
from alignkit.report.run import read_run
from alignkit.report.tables import OBJECTIVES

STEPS = 60  # of the run that conftest.py makes


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


def test_a_long_list_of_skipped_files_is_folded_and_counted(run):
    rows = [json.dumps({"video": f"{i}.mp4", "reason": f"reason {i}"}) for i in range(300)]
    (run / "skipped.jsonl").write_text("\n".join(rows))
    page = page_of(run)
    assert "300 things in the videos folder were not used" in page.text and "All 300 are in skipped.jsonl" in page.text
    folded = page.text.index("More of them")
    assert page.text.index("reason 7") < folded < page.text.index("reason 8") < page.text.index("reason 199")
    assert "reason 200" not in page.text


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


def test_same_run_gives_the_same_bytes(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_run_that_cannot_be_judged_says_why_and_what_to_do(run):
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"verdict": "cannot be judged", "reached": False, "unjudged": ["2 clips are held out: bring <more>"]}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(run)
    assert "Alignment cannot be judged" in page.text and "bring <more>" in page.text
    assert "criteria hold at once" not in page.text
