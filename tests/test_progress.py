"""What a command says of how far it is: on a terminal, where it is ended, and in a pipe."""

import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from starting import fresh_environment, one_line
from terminal import Screen, Terminal

from alignkit.training.loop import train_folder

COLUMNS = 60
WORDS = "a sentence that is wider than sixty columns by some words, for there is a path in it:"
PATH = "runs/" + "a-long-name/" * 6 + "pairs"
WORK = f"""
import sys, time
from alignkit.progress import progress, say
with progress("regenerating held-out regions", 1200, done=602) as bar:
    for number in range(4):
        bar.advance(note="loss 1.3800  winner's error 0.2134", beside="accuracy 94 %  10.7 pairs/s  1.34 GB at most")
        if number == 1:
            with progress("sampling", 3) as inner:
                inner.advance(2)
                time.sleep(0.6)
            say("{WORDS} {PATH}")
    {{end}}
"""


def on_a_terminal() -> dict[str, str]:
    """An environment that leaves it to the terminal how wide it is: readline, once loaded, says so in variables."""
    return {key: value for key, value in fresh_environment().items() if key not in ("COLUMNS", "LINES")} | {
        "TERM": "xterm"
    }


@pytest.fixture
def terminal():
    terminals = []

    def make(columns=COLUMNS):
        terminals.append(Terminal(columns))
        return terminals[-1]

    yield make
    for one in terminals:
        one.close()


@pytest.fixture
def work(terminal):
    """WORK that ends with `end`: (its terminal, exit code), once `send` is sent where it shows `when`."""

    def run(end="pass", *, columns=COLUMNS, when="", send=None):
        shown = terminal(columns)
        with open(shown.path, "w") as slave:
            code, env = WORK.format(end=end), on_a_terminal()
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=slave, stderr=slave, env=env,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's jobs ignore it
            )  # fmt: skip
        if send:
            shown.wait_for(when)
            process.send_signal(send)
        process.wait(timeout=60)
        return shown, process.returncode

    return run


@pytest.fixture
def command_on(terminal, server):
    """`command_on("train", CONFIG)`: (the terminal, exit code)."""

    def run(*argv):
        shown = terminal()
        words, env = ["alignkit", *map(str, argv)], on_a_terminal()
        pid = int(server.ask({"argv": words, "code": None, "env": env, "out": shown.path, "err": shown.path}))
        end = time.monotonic() + 120
        while not (status := server.ask({"poll": pid})):
            shown.read()  # a full one would stop it
            assert time.monotonic() < end, shown.read()
            time.sleep(0.01)
        return shown, int(status)

    return run


def test_nothing_is_cut_by_the_edge_of_a_small_terminal_but_what_is_wider(work):
    terminal, status = work()
    screen = terminal.screen()
    assert status == 0 and screen.cursor and "…" not in terminal.read()
    assert all(line in PATH for line in screen.wrapped), screen.wrapped
    lines = [line.rstrip() for line in screen.lines]
    assert lines[:2] == ["a sentence that is wider than sixty columns by some words,", "for there is a path in it:"]
    bar, *facts = lines[lines.index("pairs") + 1 :] if "pairs" in lines else lines[4:]
    assert re.fullmatch(r"regenerating held-out regions [━╸ ]+606/1200 \d+:\d\d:\d\d left", bar), lines
    assert re.split(r" {2,}|\n", "\n".join(facts).strip()) == [
        "loss 1.3800", "winner's error 0.2134", "accuracy 94 %", "10.7 pairs/s", "1.34 GB at most",
    ]  # fmt: skip


def test_a_task_within_another_has_its_bar_under_that_one_s(work):
    terminal, _ = work()
    shown = terminal.read()
    screen = Screen(COLUMNS).feed(shown[: shown.rindex("2/3") + 3])
    first, last = (next(line for line in screen.lines if word in line) for word in ("held-out", "sampling"))
    assert "604/1200" in first and "2/3" in last
    assert not any("sampling" in line for line in terminal.screen().lines)


def test_narrower_still_titles_break_between_words(work):
    terminal, _ = work(columns=40)
    words = " ".join(terminal.screen().lines).split()
    assert {"regenerating", "held-out", "regions", "606/1200", "winner's"} <= set(words), words


@pytest.mark.parametrize(
    ("end", "send", "expected"),
    [
        ("raise ValueError('an error')", None, 1),
        ("time.sleep(60)", signal.SIGINT, -signal.SIGINT),
        ("time.sleep(60)", signal.SIGTERM, -signal.SIGTERM),
        ("time.sleep(60)", signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["exception", "interrupt", "SIGTERM", "SIGKILL"],
)
def test_a_command_that_ends_early_leaves_the_terminal_in_order(work, end, send, expected):
    terminal, status = work(end, when="606/1200", send=send)
    screen = terminal.screen()
    assert status == expected
    assert screen.cursor, "hidden"
    assert screen.column == 0 and screen.lines[screen.row] == "", "the shell's prompt has no line of its own"
    assert any("/1200" in line for line in screen.lines), terminal.read()


def test_piped_lines_are_plain_and_say_what_they_said(command):
    result = subprocess.run([sys.executable, "-c", WORK.format(end="pass")], capture_output=True, text=True, check=True)
    assert f"{WORDS} {PATH}" in result.stderr.splitlines()
    assert "\x1b" not in result.stderr and "━" not in result.stderr
    code = "from alignkit.progress import progress\n" + (
        "with progress('training', 4, done=2) as bar:\n"
        "    for _ in range(2): bar.advance(note='loss 0.69  winner 0.2', beside='8 GB')"
    )
    assert command(python=("-c", code)).stderr == "training: 4/4, 0 s left loss 0.69  winner 0.2\n"


def test_a_refused_command_says_one_sentence_broken_between_words(command_on, config_file, command):
    terminal, status = command_on("train", config_file, "train.stepps=3")
    screen = terminal.screen()
    assert status == 2 and screen.wrapped == []
    assert len(screen.lines) > 2 and " ".join(screen.lines).strip() == one_line(
        command("train", config_file, "train.stepps=3")
    )


def test_training_shows_its_numbers_and_leaves_the_same_bits(command_on, run_with_pairs, config_file, command):
    written = []
    for name in ("shown", "piped"):
        config, settings = run_with_pairs(name, "train.steps=2", "train.checkpoint_every=2")
        if name == "shown":
            terminal, status = command_on("train", config_file, *settings, "train.global_batch_size=4")
            assert status == 0, terminal.read()
        else:
            result = command("train", config_file, *settings)
            assert result.returncode == 0, result.stderr
            assert re.search(r"^training: 2/2, 0 s left loss \d\.\d{4}  winner's error \d\.\d{4}$", result.stderr, re.M)
        written.append((train_folder(config) / "metrics.jsonl").read_bytes())
    assert written[0] == written[1]
    shown = "\n".join(line.rstrip() for line in terminal.screen().lines)
    assert re.search(r"training [━╸ ]+ 2/2 0:00:\d\d\n", shown), shown
    for fact in (r"loss \d", r"winner's error \d", r"accuracy \d+ %", r"\d pairs/s", r"\d GB at most"):
        assert re.search(fact, shown), (fact, shown)
