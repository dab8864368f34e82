"""run/run_log.py: what a run said is in its directory, and how it ended."""

import logging
import signal

import pytest
from runs import run_factory

from hosl_flower.errors import ClientError
from hosl_flower.run.run_log import NAME, RunLog, stop_announced
from hosl_flower.system.signals import exiting_when_told
from strategies.hosl import Hosl

log = logging.getLogger("hosl_flower")


def said(directory):
    """Without the times."""
    return [line.split(" ", 2)[2] for line in (directory / NAME).read_text().splitlines()]


def run_that_fails(directory):
    with RunLog() as kept:
        log.warning("first of %d", 3)
        if directory:
            kept.keep(directory)
        log.warning("second")
        raise ClientError("nobody is there")


def test_lines_before_there_is_a_directory_are_kept_and_a_failure_is_the_last(tmp_path, caplog):
    caplog.set_level(logging.INFO, log.name)  # as the command line and the ServerApp set it
    before = list(log.handlers)
    with pytest.raises(ClientError):
        run_that_fails(tmp_path)
    end = ["there is no checkpoint to go on from", "run failed: ClientError: nobody is there"]
    assert said(tmp_path) == ["first of 3", "second", *end]
    assert log.handlers == before
    with RunLog() as kept:  # resumed
        kept.keep(tmp_path)
        log.warning("again")
    assert said(tmp_path)[4:] == ["again"]


def test_a_signal_leaves_a_line_and_does_what_it_did_before(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(tmp_path))
    heard = []
    try:
        with RunLog() as kept, stop_announced(kept):
            kept.keep(tmp_path)
            signal.raise_signal(signal.SIGINT)
        assert heard == [tmp_path]
    finally:
        signal.signal(signal.SIGINT, before)
    (line,) = said(tmp_path)
    assert line.startswith("run stopped: signal 2")
    assert line.endswith(f"; resume={tmp_path} goes on from the checkpoint of step 5")


def test_a_signal_that_is_ignored_stops_nothing_and_says_nothing(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with RunLog() as kept, stop_announced(kept):
            kept.keep(tmp_path)
            signal.raise_signal(signal.SIGINT)
            log.warning("it goes on")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert said(tmp_path) == ["it goes on"]


class Stopped(Hosl):
    """It is told to end during step 2."""

    number = signal.SIGINT

    def steps(self, session, link, steps):
        if 2 in steps:
            signal.raise_signal(self.number)
        return super().steps(session, link, steps)


@pytest.mark.usefixtures("heeded_signals")
def test_a_run_in_process_that_is_stopped_says_how_to_resume(tiny_opt, tmp_path):
    run = run_factory(Stopped, tiny_opt, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_every=1, steps=3, eval_every=1)
    directory = tmp_path / "runs" / "run0"
    assert said(directory)[-1] == (
        f"run stopped: signal 2 (SIGINT); resume={directory} goes on from the checkpoint of step 1"
    )


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_exits_with_128_and_the_signal(tmp_path, number):
    before = signal.getsignal(number)
    ends = pytest.raises(SystemExit)
    with ends as caught, exiting_when_told(), RunLog() as kept, stop_announced(kept):
        kept.keep(tmp_path)
        signal.raise_signal(number)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) == before
    (line,) = said(tmp_path)
    assert line.startswith(f"run stopped: signal {int(number)} ({number.name}); ")


def test_a_signal_that_is_ignored_ends_no_command():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup
    try:
        with exiting_when_told():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(ClientError):
        run_that_fails(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["/dev/full", "/", "/nowhere/log.txt"])
def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys, target):
    """A full disk, a directory, a file that cannot be made."""
    (tmp_path / NAME).symlink_to(target)
    with RunLog() as kept:
        kept.keep(tmp_path)
        log.warning("lost")
        log.warning("lost too")
    assert "Traceback" not in capsys.readouterr().err
