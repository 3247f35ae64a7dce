"""Progress in a pipe (plain lines) and on a terminal (live table), with warnings, errors and Ctrl-C in between."""

from __future__ import annotations

import fcntl
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

from tether.runs import Display


def script(how: str) -> None:
    """What a command does that shows its progress."""
    try:
        with Display(20, ("score", "loss/kl"), start=2) as display:
            for iteration in (3, 4):
                display.phase("collecting")
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
    assert b"".join(read(out)).decode().splitlines() == [
        "iteration  3/20  score  +0.300  kl   0.012",
        "a note [bold]as is[/bold]",
        "iteration  4/20  score  +0.400  kl   0.012",
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
    assert re.fullmatch(r"iteration ━+.━+ +4/20 0:00:\d\d -?[\d:-]+", lines[7])
    assert lines[8:] == ["end", ""]


def test_an_error_leaves_a_clean_terminal() -> None:
    received = run_in_terminal("raise")
    assert received.rindex("\x1b[?25h") < received.index("Traceback")
    assert screen(received)[-2:] == ["ValueError: it broke", ""]


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


def test_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    columns = ("score", "kl", "tokens", "loss", "missing", "train/clip_fraction")
    with Display(5, columns, unit="step") as display:
        display.update(
            1, {"score": -0.5, "kl": 1.5e-6, "tokens": 12345, "loss": float("nan"), "train/clip_fraction": 123.4}
        )
    assert capsys.readouterr().out == (
        "step 1/5  score  -0.500  kl 1.5e-06  tokens  12,345  loss     nan  missing       -  clip fraction     123\n"
    )
