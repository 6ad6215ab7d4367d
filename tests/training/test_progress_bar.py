"""The progress bar: lines in a file, a bar on a terminal, and what is said to be left."""

import io
import re

import pytest

from lora_jax.sweeps.progress_bar import ProgressBar as SweepBar
from lora_jax.sweeps.trials import Trial
from lora_jax.training.progress_bar import ProgressBar
from lora_jax.training.task import Score
from tests.helpers import tiny_task


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def run(bar, clock, steps, seconds):
    for _ in range(steps):
        clock.seconds += seconds
        bar.update()


def left(file):
    """What the lines say is left."""
    return re.findall(r"<(\S+?)[\],]", file.getvalue())


def test_a_file_gets_a_line_now_and_then(clock):
    file = io.StringIO()
    with ProgressBar(100, file=file, now=clock) as bar:
        run(bar, clock, 100, 1.0)
    lines = file.getvalue().splitlines()
    assert len(lines) == 11 and not set("\r\x1b|") & set(file.getvalue())
    assert lines[0] == "  1% 1/100 [00:01<?]" and lines[1] == " 11% 11/100 [00:11<01:29]"
    assert lines[-1] == "100% 100/100 [01:40<00:00]"


def test_compilation_is_shown_and_not_estimated_with(clock):
    file = io.StringIO()
    with ProgressBar(100, file=file, now=clock) as bar:
        with bar.during("compiling"):
            assert file.getvalue() == "  0% 0/100 [00:00<?, compiling]\n"
            clock.seconds += 60
        run(bar, clock, 20, 1.0)
        with bar.during("compiling"):
            clock.seconds += 60
        run(bar, clock, 20, 1.0)
    exact = [100 - int(done) for done in re.findall(r"(\d+)/100 \[\S+<\d", file.getvalue())]
    assert [60 * int(x[:2]) + int(x[3:]) for x in left(file) if x != "?"] == exact
    assert file.getvalue().count("compiling") == 2


def test_what_begins_often_is_shown_once_a_second(clock):
    file = io.StringIO()
    bar = ProgressBar(1000, file=file, now=clock)
    for _ in range(100):
        with bar.during("compiling"):
            clock.seconds += 0.05
    assert file.getvalue().count("compiling") == 5
    with bar.during("evaluating", is_work=True):
        clock.seconds += 30
    with bar.during("evaluating", is_work=True):
        assert (
            file.getvalue().endswith("evaluating]\n") and file.getvalue().count("evaluating") == 1
        )


def test_an_evaluation_is_part_of_what_is_left(clock):
    bar = ProgressBar(40, file=io.StringIO(), now=clock)
    bar.update()
    for _ in range(2):
        run(bar, clock, 10, 1.0)
        with bar.during("evaluating", is_work=True):
            clock.seconds += 10
    file = bar._file = io.StringIO()
    bar.close()
    assert left(file) == ["00:38"]  # 19 units at two seconds each


def test_a_run_that_goes_on(clock):
    file = io.StringIO()
    with ProgressBar(100, initial=50, file=file, now=clock) as bar:
        run(bar, clock, 20, 1.0)
        bar.skip(10)
    assert left(file) == ["?", "00:39", "00:20"] and "51/100" in file.getvalue()


def test_a_terminal_gets_a_bar_in_place(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    file = Terminal()
    with ProgressBar(10, file=file, now=clock) as bar:
        bar.describe("best validation accuracy 0.9000")
        run(bar, clock, 5, 1.0)
        bar.write("step 5: its update is left out")
        bar.show("loss 0.1")
        run(bar, clock, 5, 0.1)
    parts = file.getvalue().split("\r")
    assert file.getvalue().count("\n") == 2 and parts[-1].endswith("\n")
    assert all(len(part.strip("\n")) < 60 for part in parts), parts
    assert "step 5: its update is left out\n" in parts and "100%|" in parts[-1]


def test_an_evaluation_beside_a_compilation(clock):
    file = Terminal()
    bar = ProgressBar(10, file=file, now=clock)
    with bar.during("compiling"):
        with bar.during("evaluating", is_work=True):
            clock.seconds += 30
        clock.seconds += 30
    bar.close()
    assert re.findall("[a-z]+ing", file.getvalue()) == ["compiling", "evaluating", "compiling"]


def test_a_hidden_bar_writes_nothing(clock):
    for file in (io.StringIO(), Terminal()):
        with ProgressBar(10, file=file, now=clock, is_hidden=True) as bar, bar.during("compiling"):
            run(bar, clock, 10, 100.0), bar.write("a line")
        assert file.getvalue() == ""


def test_the_bar_of_a_sweep(clock, capsys):
    trials = [Trial(name, {}, None) for name in "abcd"]
    with SweepBar(trials, ()) as bar:
        bar._bar._now, bar._bar._begin = clock, clock()
        bar.set_progress(trials[0], 1.0, is_work=False)  # done before
        bar.set_progress(trials[1], 0.5)  # goes on
        with bar.compiling():
            clock.seconds += 60
        for k in range(6, 11):
            clock.seconds += 10
            bar.set_progress(trials[1], k / 10)
        bar.set_best(trials[1], Score("accuracy"), 0.75)
        clock.seconds += 10
        bar.set_progress(trials[2], 0.1), bar.set_progress(trials[2], 0.2)
        bar.set_progress(trials[3], 1.0, is_work=False)  # dropped
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == " 38% [00:00<?, compiling]" and lines[1] == " 40% [01:10<?]"
    assert lines[2] == " 42% [01:20<03:50]"  # 23 tenths of a run, at ten seconds each
    assert lines[-1].startswith("best accuracy 0.7500 (the only run):  80% [02:00<")


def test_a_run_says_that_it_compiles(tmp_path, capsys):
    tiny_task.run(tmp_path / "run")
    told = capsys.readouterr().err
    assert re.match(r" +0% 0/\d+ \[00:00<\?, (evaluating|compiling)\]\n", told)
    assert "\r" not in told and "100% " in told.splitlines()[-1]
