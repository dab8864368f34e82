"""A fleet that lasts for a file of tests; REPEAT=n in the environment runs each test n times."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
from fleet import Fleet, fleet, plain


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    times = int(os.environ.get("REPEAT", "1"))
    if times > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(times))


def pytest_terminal_summary(terminalreporter):
    """Of repeated tests: how many have passed, and the shortest and longest of them, in seconds."""
    if int(os.environ.get("REPEAT", "1")) == 1:
        return
    runs = defaultdict(list)
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.when == "call" or outcome != "passed":
                name = report.nodeid.rpartition("::")[2]
                name = re.sub(r"-?\d+\]$", "]", name).removesuffix("[]")  # of all repetitions
                runs[name].append((outcome, report))
    terminalreporter.section("repeated")
    for name, seen in sorted(runs.items()):
        seconds = [report.duration for _, report in seen]
        passed = sum(outcome == "passed" for outcome, _ in seen)
        terminalreporter.line(
            f"{name:<72}{passed:>3} of {len(seen)}, {min(seconds):.0f} to {max(seconds):.0f} s"
        )


@pytest.fixture(scope="module")
def shared_fleet():
    with fleet() as own:
        yield own


@pytest.fixture
def whole(shared_fleet, request) -> Iterator[Fleet]:
    """SuperLink and three SuperNodes; what an earlier test has killed is started again, and after
    a test that fails everything."""
    shared_fleet.ensure()
    failed = request.session.testsfailed
    yield shared_fleet
    if request.session.testsfailed > failed:
        shared_fleet.stop()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The curve of the run that nothing happens to."""
    curves = {}

    def curve(**keys):
        name = "-".join(f"{key}{value}" for key, value in sorted(keys.items())) or "plain"
        if name not in curves:
            curves[name] = plain(tmp_path_factory.mktemp("plain"), name, **keys)
        return curves[name]

    return curve
