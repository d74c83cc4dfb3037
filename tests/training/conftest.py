"""Settings of a run, and runs that several tests only read or go on with."""

from contextlib import suppress

import pytest

# Not on every GPU machine, where no test comes as far as a fixture.
with suppress(ModuleNotFoundError):
    from training import runs


@pytest.fixture
def config(tmp_path):
    return runs.make_up(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped, to be read only."""
    return runs.train(runs.make_up(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def refused(capsys):
    """Asserts that the command ends with 2 and these words; returns all that it said."""

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
    return runs.killed_run(config, loss=runs.stop_in(3))
