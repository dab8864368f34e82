"""A fleet that lasts for a file of tests; REPEAT=n in the environment runs each test n times."""

import os
from collections.abc import Iterator

import pytest
from fleet import Fleet, fleet, plain


def pytest_generate_tests(metafunc):
    times = int(os.environ.get("REPEAT", "1"))
    if times > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(times))


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
