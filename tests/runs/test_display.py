"""Progress in a pipe (plain lines) and on a terminal (live table), with warnings, errors and Ctrl-C in between."""

from __future__ import annotations

import fcntl
import io
import itertools
import logging
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from rich.console import Console, Group

from tether.runs import Display
from tether.runs.display import Format, Pace, duration, table


def script(how: str) -> None:
    """What a command does that shows its progress."""
    try:
        with Display(20, ("score", "loss/kl")) as display:
            display.phase("drawing the frontier")
            if how == "raise early":
                raise ValueError("no model")
            display.begin(done=2)
            for iteration in (3, 4):
                display.update(iteration, {"score": 0.1 * iteration, "loss/kl": 0.012})
                logging.getLogger("tether").warning("a warning [in brackets] %d", iteration)
                display.note("a note [bold]as is[/bold]")
            if how == "raise":
                raise ValueError("it broke")
            if how == "wait":
                print("waiting", flush=True)
                time.sleep(30)
    except KeyboardInterrupt:
        print("stopped by the user")
    print("end")


def start(how: str, stdout: int, stderr: int, **environment: str) -> int:
    """Run `script` in a child process with these streams; its process id. A fork, for a new Python takes seconds."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.environ.update({"TERM": "xterm", **environment})
        logging.getLogger().handlers.clear()  # those of pytest
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        try:
            script(how)
        except ValueError:
            sys.__excepthook__(*sys.exc_info())  # type: ignore[arg-type]
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def read(descriptor: int) -> Iterator[bytes]:
    while select.select([descriptor], [], [], 30)[0]:
        try:
            data = os.read(descriptor, 4096)
        except OSError:  # Linux says EIO when the other side of a terminal has closed
            return
        if not data:
            return
        yield data


def run_in_terminal(how: str, **environment: str) -> str:
    """What a terminal of 24 × 80 is sent; Ctrl-C as soon as the child waits."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = start(how, terminal, terminal, **environment)
    os.close(terminal)
    received, interrupted = b"", False
    for data in read(main):
        received += data
        if not interrupted and b"waiting" in received:
            os.kill(child, signal.SIGINT)
            interrupted = True
    os.close(main)
    os.waitpid(child, 0)
    return received.decode()


def screen(received: str) -> list[str]:
    """The lines that the user sees in the end: what rich uses of a terminal, played back."""
    lines, row, column = [""], 0, 0
    for text, code, command in re.findall(r"([^\x1b]+)|\x1b\[([0-9;?]*)([A-Za-z])", received):
        if command == "A":
            row -= int(code or 1)
        elif command == "K":
            lines[row] = ""
        for character in text:
            if character == "\n":
                row += 1
                lines.extend([""] * (row + 1 - len(lines)))
            elif character == "\r":
                column = 0
            else:
                lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
                column += 1
    return [line.rstrip() for line in lines]


def test_plain_lines_in_a_pipe() -> None:
    (out, out_end), (errors, errors_end) = os.pipe(), os.pipe()
    child = start("end", out_end, errors_end)
    os.close(out_end)
    os.close(errors_end)
    said = re.sub(r"0\.\d+ s per iteration, 0 s left", "PACE", b"".join(read(out)).decode())
    assert said.splitlines() == [
        "drawing the frontier …",
        "iteration 3 …",
        "iteration  3/20  score  +0.300  kl   0.012  PACE",
        "a note [bold]as is[/bold]",
        "iteration  4/20  score  +0.400  kl   0.012  PACE",
        "a note [bold]as is[/bold]",
        "end",
    ]
    assert b"".join(read(errors)) == b"a warning [in brackets] 3\na warning [in brackets] 4\n"
    os.waitpid(child, 0)


def test_plain_lines_are_there_at_once() -> None:
    out, out_end = os.pipe()
    child = start("wait", out_end, os.open(os.devnull, os.O_WRONLY))
    os.close(out_end)
    with os.fdopen(out, "rb", buffering=0) as stream:
        assert stream.readline() == "drawing the frontier …\n".encode()
        assert stream.readline() == "iteration 3 …\n".encode()
        assert stream.readline().startswith(b"iteration  3/20")
        while stream.readline() != b"waiting\n":
            pass
        os.kill(child, signal.SIGINT)
        assert stream.readall() == b"stopped by the user\nend\n"
    os.waitpid(child, 0)


def test_live_table_on_a_terminal() -> None:
    received = run_in_terminal("end")
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")  # the cursor is hidden, and shown again
    lines = screen(received)
    assert lines.pop(0) == "drawing the frontier …"
    assert lines[:4] == [
        "a warning [in brackets] 3",
        "a note [bold]as is[/bold]",
        "a warning [in brackets] 4",
        "a note [bold]as is[/bold]",
    ]
    assert [line.split() for line in lines[4:7]] == [
        ["iteration", "score", "kl"],
        ["3/20", "+0.300", "0.012"],
        ["4/20", "+0.400", "0.012"],
    ]
    assert re.fullmatch(r"iteration ━+.━+ +4/20 0:00:\d\d \d s left", lines[7])
    assert lines[8:] == ["end", ""]


def test_an_error_leaves_a_clean_terminal() -> None:
    received = run_in_terminal("raise")
    assert received.rindex("\x1b[?25h") < received.index("Traceback")
    assert screen(received)[-2:] == ["ValueError: it broke", ""]


def test_an_error_before_the_first_iteration_leaves_no_empty_bar() -> None:
    lines = screen(run_in_terminal("raise early"))
    assert lines[0] == "drawing the frontier …"
    assert lines[1].startswith("Traceback")


def test_ctrl_c_leaves_a_clean_terminal() -> None:
    received = run_in_terminal("wait")
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")
    assert screen(received)[-3:] == ["stopped by the user", "end", ""]


def test_warnings_sent_elsewhere_stay_out_of_the_terminal() -> None:
    errors, errors_end = os.pipe()
    main, terminal = pty.openpty()
    child = start("end", terminal, errors_end)
    os.close(terminal)
    os.close(errors_end)
    assert b"a warning" not in b"".join(read(main))
    assert b"".join(read(errors)) == b"a warning [in brackets] 3\na warning [in brackets] 4\n"
    os.waitpid(child, 0)
    os.close(main)


def test_a_dumb_terminal_gets_plain_lines() -> None:
    received = run_in_terminal("end", TERM="dumb")
    assert "\x1b" not in received
    assert "iteration  3/20  score  +0.300  kl   0.012" in received


def shown(value: float, name: str = "loss", first: float | None = None) -> str:
    form = Format(name)
    if first is not None:
        form(first)
    return form(value)


def test_numbers() -> None:
    assert shown(-0.5, "score") == "-0.500"
    assert shown(12345) == "12,345"
    assert shown(float("nan")) == "nan"
    assert shown(2e-5, "train/learning_rate") == "2.00e-05"
    assert shown(1.5e12) == "1.50e+12"
    assert shown(-1e-9) == "0.000"
    assert Format("loss")(None) == "-"


def test_a_column_is_written_in_one_way() -> None:
    form = Format("train/clip_fraction")
    assert [form(value) for value in (0.008, 9.9e-4, 0.0, 0.25)] == ["0.0080", "0.0010", "0.0000", "0.2500"]
    assert [shown(value, "score", first=-212.4) for value in (99.123, 280.31)] == ["+99.1", "+280.3"]
    assert shown(0.4, "kl", first=2.9e-13) == "0.400"
    assert shown(31.331, "score", first=20.74) == "+31.33"
    assert shown(2951.0, "steps", first=981.0) == "2,951"


def test_how_long_the_rest_takes_is_told_by_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace = Pace(1000)
    now += 300  # loading
    pace.begin(done=10)
    assert pace.words("iteration") == ""
    for done, seconds in ((11, 4.0), (12, 400.0), (13, 4.2), (14, 3.9), (16, 8.2)):  # a slow one; two at once
        now += seconds
        pace.update(done)
    assert pace.words("iteration") == "4.1 s per iteration, 1 h 7 min left"
    now += 3
    assert pace.left() == pytest.approx(984 * 4.1 - 3)
    now += 1000  # an iteration that takes long has not brought the end nearer than its own median
    assert pace.left() == pytest.approx(983 * 4.1)
    pace.update(1000)
    assert pace.words("step").endswith(" s per step")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (45, "45 s"),
        (59.7, "1 min"),
        (720, "12 min"),
        (3600, "1 h"),
        (12000, "3 h 20 min"),
        (202000, "2 d 8 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


LABELS = ("iteration", "steps", "score", "reward", "kl", "entropy", "response length", "eos share", "clip fraction",
          "explained variance")  # fmt: skip


@pytest.mark.parametrize("width", [20, 40, 60, 80, 90, 120, 200])
@pytest.mark.parametrize("digits", [1, 12])
def test_a_number_is_never_cut(width: int, digits: int) -> None:
    """Columns that do not fit are lines below; labels break between words."""
    rows = [[f"{7 + row}/1000", *(f"{column}{row}.{'5' * digits}" for column in range(9))] for row in range(3)]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(Group(*table(LABELS, rows, width)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for number in rows[-1]:
        assert number in words
    for label in LABELS:
        assert set(label.split()) <= set(words)
    assert "…" not in " ".join(lines)
    if width == 200:
        assert len(lines) == 4


@pytest.mark.parametrize("width", [50, 60, 80, 90, 200])
def test_the_bar_shows_its_numbers_whole_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    clock = itertools.count(0, 5000)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    display = Display(100_000, ("score",))
    display.begin(12_344)
    display.update(12_345, {"score": 0.5})
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(display._render())
    bar = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert re.fullmatch(r"iteration [━╸╺ ]*12345/100000 -?[\d:-]+ .*\d+ d( \d+ h)? left *", bar), bar


def test_a_much_smaller_number_gets_the_decimals_that_it_needs() -> None:
    form = Format("score")
    assert [form(value) for value in (-1500.0, -812.4, -0.4, -12.0)] == ["-1,500", "-812", "-0.400", "-12.000"]
