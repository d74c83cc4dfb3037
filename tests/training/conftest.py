"""Settings of a run, and runs that several tests only read or go on with.

The helpers are imported where they are used: the step is tested without the packages that a run needs.
"""

import pytest


@pytest.fixture
def config(tmp_path):
    from training import runs

    return runs.make_up(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped, to be read only."""
    from training import runs

    return runs.train(runs.make_up(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def refused(capsys):
    """Asserts that the command ends with 2 and these words; returns all that it said."""
    from training import runs

    def refused(words, *argv, **parts):
        assert runs.main([*argv], **parts) == 2
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said
        return said

    return refused


@pytest.fixture
def stopped(config):
    """A run of six epochs that was killed in its third."""
    from training import runs

    return runs.killed_run(config, loss=runs.stop_in(3))
