"""The training command's arguments: the command line, over the YAML file that it may name, over the defaults."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from bigru.config import NESTS, ConfigError, OptionalPath, TrainConfig, expand_home, from_mapping, shown
from bigru.files import printable, shell_line, user_path

MERGE = "tag:yaml.org,2002:merge"
"""YAML's tag of the key <<."""


@dataclass(frozen=True)
class Arguments(TrainConfig):
    """The command line: a run's settings, and where to take them from."""

    config: OptionalPath = None
    """YAML file of settings, under our names or the reference trainer's; other options override it."""
    resume: OptionalPath = None
    """Run folder to go on with, with its settings; `latest`: the last one. Beside it may stand --data-root and --index
    (where its data are now), --device, --threads, --epochs (more of a finished run) and --tensorboard."""
    changes: tyro.conf.Suppress[dict[str, Any] | None] = None
    """Settings that stand beside --resume."""

    sweep: Annotated[Literal["modalities"] | None, tyro.conf.arg(metavar="modalities", help_behavior_hint="")] = None
    """Train once with hands alone, then with gaze, objects, surrogate and all; what is done is not done again."""

    def __post_init__(self) -> None:
        expand_home(self)

    @property
    def settings(self) -> TrainConfig:
        """The run's settings alone."""
        return TrainConfig(self.data, self.model, self.optim, self.run)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Reads the command line, over the YAML file it may name, over the defaults.

    Args:
        argv: the arguments without the program's name.

    Raises:
        ConfigError: for a file or a value that cannot be used, or options beside --resume.
        SystemExit: after --help (0) or an unknown option (2).
    """
    # These two are needed before the rest can be read: the file's settings are the other options' defaults.
    first = argparse.ArgumentParser(prog="python -m bigru.train", add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=user_path)
    first.add_argument("--resume", type=user_path)
    known, others = first.parse_known_args(argv)
    asks_help = "-h" in others or "--help" in others
    if known.resume is not None and not asks_help:
        if known.config is not None:
            others = ["--config", *others]
        return Arguments(resume=known.resume, changes=_resume_changes(others))
    base = read_yaml(known.config) if known.config is not None else TrainConfig()
    return tyro.cli(
        Arguments,
        prog="python -m bigru.train",
        description="Train the hand-motion forecaster, score it on the test split and write results_bigru.md. "
        "The defaults are the published protocol.",
        default=Arguments(base.data, base.model, base.optim, base.run, config=known.config),
        args=others,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _resume_changes(argv: Sequence[str]) -> dict[str, Any] | None:
    """Returns the settings that may stand beside --resume, by name; None for none."""
    parser = argparse.ArgumentParser(prog="python -m bigru.train --resume RUN", allow_abbrev=False)
    parser.add_argument("--data-root", type=user_path)
    parser.add_argument("--index", type=user_path)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--tensorboard", action=argparse.BooleanOptionalAction)
    known, others = parser.parse_known_args(argv)
    if others:
        raise ConfigError(
            "--resume: a run goes on with the settings it began with; only --data-root, --index, --device, "
            f"--threads, --epochs and --tensorboard may stand beside it, got {shell_line(others)}"
        )
    return {name: value for name, value in vars(known).items() if value is not None} or None


def read_yaml(path: Path) -> TrainConfig:
    """Reads settings from a YAML file, under our names (flat or in sections) or the reference trainer's.

    A file that holds several models' settings by name is read at `bigru`; what stands beside it must be mappings
    under other names: other models, or what they share. Relative paths are relative to the current folder, as they
    are on the command line.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key, a setting beside `bigru` or a value that cannot be
            used.
    """
    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise ConfigError(f"config: {printable(path)} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {printable(path)} cannot be read: it is not UTF-8: {error.reason}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config: {printable(path)} is not YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"config: {printable(path)}: expected a mapping of settings, got {type(content).__name__}")
    if "bigru" not in content:
        return from_mapping(content, printable(path))
    # What is not read must not look like a setting.
    stray = [
        str(key)
        for key, value in content.items()
        if key != "bigru" and (key in NESTS or not isinstance(value, Mapping))
    ]
    if stray:
        raise ConfigError(
            f"config: {printable(path)}: {', '.join(stray)} beside bigru: settings belong in it; only other models' "
            "may stand beside it"
        )
    return from_mapping(content["bigru"], printable(path))


def _parse_yaml(text: str, path: Path) -> Any:
    """Returns what yaml.safe_load does, but for keys given twice and scalars that fail, which are errors with a line.

    Raises:
        ConfigError, yaml.YAMLError, RecursionError: for a file that cannot be used.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, loader, f"config: {printable(path)}, line", "", set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_node(node: yaml.Node, loader: yaml.SafeLoader, where: str, key: str, seen: set[int]) -> None:
    """Looks through a tree of YAML nodes, each once however many aliases lead to it; `key` names the node."""
    if id(node) in seen:
        return
    seen.add(id(node))
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, value in node.value:
            inner = f"{key}.{name.value}".lstrip(".") if isinstance(name, yaml.ScalarNode) else key
            _check_node(name, loader, where, inner, seen)
            # Several << are merged.
            if isinstance(name, yaml.ScalarNode) and name.tag != MERGE:
                line = name.start_mark.line + 1
                if name.value in lines:
                    raise ConfigError(f"{where} {line}: {inner} is given twice, first in line {lines[name.value]}")
                lines[name.value] = line
            _check_node(value, loader, where, inner, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_node(value, loader, where, key, seen)
    elif node.tag != MERGE:
        try:
            loader.construct_object(node)
        # Of !!float 1,5, an empty !!int, !!bool maybe and !!timestamp now, in this order.
        except (ValueError, IndexError, KeyError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConfigError(
                f"{where} {line}: {key}: {shown(node.value)} is no {kind}; in quotes it is text"
            ) from error


def command_line(config: TrainConfig) -> str:
    """Returns the command that starts a run with these settings."""
    words = ["python", "-m", "bigru.train"]
    default = TrainConfig().as_dict()
    for section, settings in config.as_dict().items():
        for name, value in settings.items():
            if value == default[section][name]:
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
    return shell_line(words)
