"""The page as a person has it: in a browser, by keyboard, mouse and thumb."""

import re
import shutil
import subprocess
import sys
from itertools import count, pairwise

import pytest
import torch

from alignkit.media.videos import write_video
from alignkit.rankers.people import write_comparisons
from alignkit.rankers.people.votes import read_votes

pytest.importorskip("uvicorn", reason="the extra 'rank' is not installed")
pytest.importorskip("starlette", reason="the extra 'rank' is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("no chromium on this machine", allow_module_level=True)

COUNT = 4
SETTLED = 450  # ms after which the page takes the next answer, a little more than SETTLE_MS in page.js
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PICTURES = "[...document.querySelectorAll('video')]"
raters = (f"rater {number}" for number in count())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    sizes = [(48, 48), (48, 48), (180, 320), (48, 48)]
    for number in range(2 * COUNT):
        height, width = sizes[number // 2]
        frames = torch.randint(256, (9, height // 4, width // 4, 3), dtype=torch.uint8)
        frames = frames.repeat_interleave(4, 1).repeat_interleave(4, 2)
        write_video(folder / f"{number}.mp4", frames, 8)
    write_comparisons(
        folder,
        [
            {"id": str(n), "prompt": f"<i>prompt</i> {n}", "a": f"{2 * n}.mp4", "b": f"{2 * n + 1}.mp4"}
            for n in range(COUNT)
        ],
    )
    return folder


@pytest.fixture(scope="module")
def address(folder):
    code = "import sys, pathlib; from alignkit.rankers.people.server import serve; serve(pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, folder], stderr=subprocess.PIPE, text=True)
    yield re.search(r"http://\S+", process.stderr.readline())[0]
    process.terminate()
    assert process.communicate(timeout=20)[1] == ""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as a new rater; at the end nothing may have been asked of another address, and no error said."""
    contexts, complaints, asked = [], [], []

    def open_page(viewport=DESKTOP, name=None, **settings):
        context = browser.new_context(viewport=viewport, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.fill("#name", name or next(raters))
        page.keyboard.press("Enter")
        settle(page)
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert asked and all(url.startswith((address, "data:")) for url in asked)


def settle(page):
    page.wait_for_selector("#stage.shown")
    page.wait_for_timeout(SETTLED)


def answer(page, act):
    """Do it, and wait until the next pair can be answered or all are done."""
    before = page.evaluate("videos[0].src")
    act()
    page.wait_for_function("(before) => videos[0].src !== before", arg=before)
    if page.is_visible("#compare"):
        settle(page)


def press(page, key):
    answer(page, lambda: page.keyboard.press(key))


def votes_of(folder, page):
    rater = page.evaluate("rater")
    return [vote for vote in read_votes(folder) if vote.rater == rater]


def sides(votes):
    return [{vote.left: "left"}.get(vote.answer, "right") if vote.answer in "ab" else vote.answer for vote in votes]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_can_be_answered_and_nothing_is_cut_off(visit, folder, viewport, scheme):
    phone = viewport is PHONE
    page = visit(viewport, color_scheme=scheme, is_mobile=phone, has_touch=phone)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 382) == (scheme == "light")
    for _ in range(COUNT):
        wide, high, page_wide, page_high = page.evaluate(
            "[innerWidth, innerHeight, document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        assert (page_wide, page_high) == (wide, high) == tuple(viewport.values()), "all is on the screen"
        boxes = [page.locator(f"#{side}").bounding_box() for side in ("left", "right")]
        assert min(box["width"] for box in boxes) >= 140
        button = page.locator("[data-do=left]")
        assert button.bounding_box()["height"] >= 44
        assert page.inner_text("#prompt").startswith("<i>prompt</i>"), "a prompt is a text"
        answer(page, button.tap if phone else button.click)
    assert f"{COUNT} votes on {COUNT} pairs" in page.inner_text("#finished")
    assert page.evaluate("rater") in page.inner_text("#finished h1")
    assert sides(votes_of(folder, page)) == ["left"] * COUNT


def test_every_answer_has_a_key_and_undo_takes_the_last_one_back(visit, folder):
    page = visit()
    for key in ("ArrowLeft", "ArrowRight", "Space", "s"):
        press(page, key)
    assert sides(votes_of(folder, page)) == ["left", "right", "tie", "skip"]
    assert "3 votes on 4 pairs, 1 skipped" in page.inner_text("#finished")
    page.wait_for_timeout(SETTLED)
    press(page, "u")
    press(page, "Backspace")
    assert sides(votes_of(folder, page)) == ["left", "right"] and page.inner_text("#count") == "3 of 4"
    press(page, "ArrowDown")
    assert sides(votes_of(folder, page)) == ["left", "right", "tie"]


@pytest.mark.parametrize("twice", ["double click", "two keys", "key held down"])
def test_a_double_click_does_not_vote_on_the_next_pair(visit, folder, twice):
    page = visit()
    if twice == "double click":
        page.dblclick("[data-do=right]", delay=20)
    elif twice == "two keys":
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight", delay=30)
        page.wait_for_timeout(120)
        page.keyboard.press("ArrowRight")
    else:
        for _ in range(30):
            page.keyboard.down("ArrowRight")
            page.wait_for_timeout(30)
    page.wait_for_timeout(SETTLED)
    assert sides(votes_of(folder, page)) == ["right"] and page.inner_text("#count") == "2 of 4"


def test_space_is_a_tie_after_a_click_and_presses_a_button_that_was_reached_by_tab(visit, folder):
    page = visit()
    answer(page, lambda: page.click("[data-do=left]"))
    press(page, "Space")
    page.focus("[data-do=right]")
    press(page, "Space")
    assert sides(votes_of(folder, page)) == ["left", "tie", "right"]


def test_who_has_skipped_can_answer_those_at_the_end(visit, folder):
    page = visit()
    for key in ("s", "ArrowLeft", "s", "ArrowLeft"):
        press(page, key)
    page.wait_for_timeout(SETTLED)
    answer(page, lambda: page.click("#again"))
    assert page.inner_text("#count") == "3 of 4"
    for _ in range(2):
        press(page, "ArrowRight")
    assert sides(votes_of(folder, page)) == ["left", "left", "right", "right"] and page.is_hidden("#again")


def test_the_down_key_scrolls_a_long_description_that_has_the_focus(visit, folder):
    page = visit()
    page.evaluate("at('prompt').textContent = 'word '.repeat(2000)")
    page.focus("#prompt")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => at('prompt').scrollTop > 0")
    assert votes_of(folder, page) == []
    page.evaluate("at('prompt').blur()")
    press(page, "ArrowDown")
    assert sides(votes_of(folder, page)) == ["tie"]


def test_a_reload_keeps_the_rater_the_pair_and_its_sides(visit):
    page = visit()
    press(page, "ArrowLeft")
    shown = f"{PICTURES}.map(video => video.src)"
    before = page.evaluate(shown), page.inner_text("#prompt"), page.inner_text("#count")
    page.reload()
    settle(page)
    assert before == (page.evaluate(shown), page.inner_text("#prompt"), page.inner_text("#count"))


def test_both_videos_play_in_step_round_after_round_and_find_back_when_one_is_late(visit):
    page = visit()
    follow = f"""async () => {{
        const videos = {PICTURES}, seen = [];
        for (let i = 0; i < 40; i++) {{
            await new Promise((done) => setTimeout(done, 60));
            if (videos.some((video) => video.seeking || video.ended)) continue;
            seen.push(videos.map((video) => video.currentTime));
        }}
        return seen;
    }}"""
    seen = page.evaluate(follow)
    assert max(abs(left - right) for left, right in seen) < 0.06, "half a frame"
    rounds = sum(after[0] < before[0] for before, after in pairwise(seen))
    assert rounds >= 1 and max(left for left, _ in seen) > 0.9, "9 frames at 8 a second, again and again"
    page.evaluate("videos[0].currentTime = 0.6")
    page.wait_for_timeout(1500)
    late = page.evaluate(follow)
    assert max(abs(left - right) for left, right in late) < 0.06


def test_small_videos_are_enlarged_to_whole_squares(visit):
    page = visit(device_scale_factor=1)
    shown = page.evaluate(
        f"{PICTURES}.map(video => [video.videoWidth, video.offsetWidth, getComputedStyle(video).imageRendering])"
    )
    for width, on_screen, rendering in shown:
        assert rendering == ("pixelated" if width <= 256 else "auto")
        assert on_screen > width and (width > 256 or on_screen % width == 0)


def test_who_wants_less_motion_starts_the_videos(visit):
    page = visit(reduced_motion="reduce")
    assert page.evaluate(f"{PICTURES}.every(video => video.paused)") and page.inner_text("#play") == "Play"
    page.keyboard.press("p")
    page.wait_for_function(f"() => {PICTURES}.every(video => video.currentTime > 0)")
    press(page, "ArrowLeft")
    assert not page.evaluate(f"{PICTURES}.some(video => video.paused && !video.ended)"), "asked for once is enough"


def test_every_button_and_field_has_a_name(visit):
    page = visit()
    for name in ("Left is better", "Tie", "Right is better", "Undo", "Pause", "Skip"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1
    assert page.get_by_role("progressbar", name="Pairs done").count() == 1
    assert page.locator(".legend").is_visible()
    page.get_by_role("button", name="not you?").click()
    assert page.get_by_label("Your name").is_visible()


def test_two_raters_at_once_each_have_their_own_votes(visit, folder):
    pages = [visit(), visit()]
    for page in pages:
        page.keyboard.press("ArrowLeft")
    for page in pages:
        page.wait_for_function("() => document.querySelector('#count').textContent === '2 of 4'")
        assert sides(votes_of(folder, page)) == ["left"]


def test_a_server_that_is_gone_is_said_and_the_vote_can_be_given_again(visit, folder):
    page = visit()
    page.route("**/vote", lambda route: route.abort())
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#problem:not([hidden])")
    assert "The server does not answer" in page.inner_text("#problem") and votes_of(folder, page) == []
    page.unroute("**/vote")
    press(page, "ArrowLeft")
    assert not page.is_visible("#problem") and sides(votes_of(folder, page)) == ["left"]
    assert len(visit.complaints) == 1
    visit.complaints.clear()  # of the browser itself, about what was cut off here
