"""The report as a person sees it: desktop, tablet, phone, dark, by keyboard, with and without motion."""

import shutil

import pytest

from alignkit.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("no chromium on this machine", allow_module_level=True)

FILMS = "document.getAnimations().map(film => [film.playState, film.startTime, film.currentTime])"
ROWS = """[...document.querySelectorAll('.tiles > div')].reduce((rows, tile) => {
    const top = Math.round(tile.getBoundingClientRect().top); rows[top] = (rows[top] || 0) + 1; return rows }, {})"""
HEIGHTS = "[...document.querySelectorAll('.tile-value')].map(value => Math.round(value.offsetHeight))"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, finished_run, tmp_path):
    """Opens the report; nothing may have been asked of another address, and no error said, at the end."""
    address = write_report(shutil.copytree(finished_run, tmp_path / "run")).as_uri()
    contexts, complaints, asked = [], [], []

    def open_page(width, height=900, **settings):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith((address, "data:")) for url in asked)


@pytest.mark.parametrize(
    ("width", "settings"),
    [(1400, {}), (768, {}), (390, {"is_mobile": True, "has_touch": True}), (1400, {"color_scheme": "dark"})],
    ids=["desktop", "tablet", "phone", "dark"],
)
def test_nothing_is_wider_than_the_screen_and_no_tile_is_alone_in_its_row(visit, width, settings):
    page = visit(width, **settings)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert len(set(page.evaluate(ROWS).values())) == 1, "an orphan"
    if width > 400:
        assert len(set(page.evaluate(HEIGHTS))) == 1, "a value is broken in two"
    light, dark = "rgb(251, 251, 252)", "rgb(16, 18, 23)"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == (dark if settings.get("color_scheme") else light)


def test_one_button_holds_all_videos_and_they_are_in_step(visit):
    page = visit(1400)
    page.wait_for_timeout(100)
    films = page.evaluate(FILMS)
    assert len(films) == 6 and {state for state, *_ in films} == {"running"}
    assert len({start for _, start, _ in films}) == 1, "not begun at one moment"
    button = page.get_by_role("checkbox", name="Pause all videos")
    button.focus()
    page.keyboard.press("Space")
    held = page.evaluate(FILMS)
    assert {state for state, *_ in held} == {"paused"} and len({now for *_, now in held}) == 1
    assert page.get_by_text("Play all videos").first.is_visible()
    page.keyboard.press("Space")
    assert {state for state, *_ in page.evaluate(FILMS)} == {"running"}


def test_who_wants_no_motion_sees_the_frame_that_differs_most_until_asking_for_it(visit):
    page = visit(1400, reduced_motion="reduce")
    assert page.evaluate(FILMS) == []
    shown = """(() => { const img = document.querySelector('.film img'), style = getComputedStyle(img.parentNode);
        const top = img.parentNode.getBoundingClientRect().top - img.getBoundingClientRect().top;
        return [Math.round(top / img.parentNode.offsetHeight), +style.getPropertyValue('--still')] })()"""
    moved, still = page.evaluate(shown)
    assert moved == still
    page.get_by_role("checkbox", name="Play all videos").check(force=True)
    assert {state for state, *_ in page.evaluate(FILMS)} == {"running"}


def test_a_table_wider_than_a_phone_shows_that_it_scrolls_and_does_by_keyboard(visit):
    page = visit(390, is_mobile=True, has_touch=True)
    table = page.get_by_role("region", name="Held-out pairs by noise level")
    left, width, whole = table.evaluate("table => [table.scrollLeft, table.clientWidth, table.scrollWidth]")
    assert left == 0 and whole > width
    assert table.evaluate("table => getComputedStyle(table).backgroundAttachment") == "local, local, scroll, scroll"
    table.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(400)
    assert table.evaluate("table => table.scrollLeft") > 0


def test_curves_fold_by_keyboard(visit):
    page = visit(1400)
    group = page.locator("details.group").first
    group.locator("summary").first.focus()
    assert group.locator(".plot").first.is_visible()
    page.keyboard.press("Enter")
    assert not group.locator(".plot").first.is_visible()


def test_a_curve_is_read_off_where_the_pointer_is_and_enlarged_by_keyboard(visit):
    page = visit(1400)
    figure = page.locator("#curves figure").first
    plot, width = figure.locator(".plot"), figure.bounding_box()["width"]
    plot.scroll_into_view_if_needed()
    shown = ":scope .read text"
    visible = f"plot => [...plot.querySelectorAll('{shown}')].filter(e => getComputedStyle(e).visibility == 'visible')"
    assert plot.evaluate(f"{visible}.length") == 0
    plot.hover()
    assert plot.evaluate(f"{visible}.map(e => e.textContent)")[0].startswith("step ")
    figure.get_by_role("checkbox", name="Enlarge Loss").focus()
    page.keyboard.press("Space")
    assert figure.bounding_box()["width"] > 1.9 * width
