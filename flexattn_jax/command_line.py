"""What the commands (eval.py, ...) share: flags into settings, and mistakes into one sentence and exit code 2."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from flexattn_jax.files import FileError, printable, private_folder

_FLAG = "config"
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_NO_MEMORY = (
    "memory is full: give smaller sizes (batch_size, the model, the pictures), dtype bfloat16, or a larger machine"
)
_LONGEST = 6000  # characters of a message: a hostile file may have put a book into it


def can_draw_charts() -> bool:
    """Whether matplotlib, an optional package, is there; if not, says so, and a command goes on without charts."""
    there = importlib.util.find_spec("matplotlib") is not None
    if not there:
        print('charts are not drawn: they need matplotlib, pip install --editable ".[lab]"')
    return there


def run_command(
    command: Callable[[dict[str, Any]], Any],
    default_config: str | os.PathLike,
    user_errors: tuple[type[Exception], ...],
) -> NoReturn:
    """Parses flags, --config=FILE[:ARG] and --config.NAME=VALUE among them, and runs a command.

    A mistake in the flags or one of `user_errors` ends with one sentence and exit code 2, Ctrl-C with 130.

    Args:
        command: is given the settings as plain types.
        default_config: the config file that is read when --config is not given.
        user_errors: what `command` raises for a mistake of the user's, its message saying what to do.
    """
    name = os.path.basename(sys.argv[0])
    # Without a default here, since defaults are read before there is a place to catch their errors.
    config = config_flags.DEFINE_config_file(_FLAG, None, f"Settings; without it {default_config}.")

    def parse(argv: list[str]) -> list[str]:
        if not any(argument.lstrip("-").split("=")[0] == _FLAG for argument in argv[1:]):
            argv = [argv[0], f"--{_FLAG}={default_config}", *argv[1:]]
        try:
            rest = flags.FLAGS(argv)
            config.value.to_dict()  # a config file that is missing is reported only now
        except Exception as error:  # a config file is a program: it may raise anything
            _fail(name, _sentence(error, _config_file(argv)))
        if len(rest) > 1:
            _fail(name, f"{rest[1]!r} is no flag; settings are written --{_FLAG}.NAME=VALUE")
        return rest

    def main(_) -> None:
        logging.set_verbosity(logging.WARNING)  # JAX reports every backend that it does not find

        def act() -> None:
            _check_cache()
            command(_Settings(config.value.to_dict()))

        sys.exit(exit_code(name, act, (*user_errors, _NoSetting, FileError)))

    app.run(main, flags_parser=parse)


def exit_code(name: str, act: Callable[[], Any], user_errors: tuple[type[Exception], ...], failed: int = 2) -> int:
    """Runs a command; mistakes of the user's, and what a machine can lack, become one sentence.

    Args:
        name: of the command, for the sentence.
        act: the command.
        user_errors: what it raises for a mistake of the user's, the message saying what to do.
        failed: the exit code of a sentence.

    Returns:
        the process's exit code: 0, `failed`, 130 after Ctrl-C, or 141 where the reader of a pipe is gone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal's encoding lacks ends no run
    try:
        act()
        sys.stdout.flush()
        return 0
    except user_errors as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        message = (
            f"{error.filename or 'a file'} cannot be read or written ({error.strerror or error}); check the path, its "
            "permissions and the free space, and run the same command again"
        )
    except MemoryError:
        message = _NO_MEMORY
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word for it
            raise
        message = _NO_MEMORY
    _say(name, message)
    return failed


def _say(name: str, message: str) -> None:
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]} ... ({len(message) - _LONGEST:,} characters more)"
    print(f"{name}: {printable(message)}", file=sys.stderr)


def _fail(name: str, message: str) -> NoReturn:
    _say(name, message)
    sys.exit(2)


class _NoSetting(ValueError):
    """A config file lacks a setting."""


class _Settings(dict):
    """Settings of a config file; one that is missing is a mistake of the user's."""

    def __missing__(self, key: str) -> NoReturn:
        raise _NoSetting(
            f"the config file has no setting {key!r}, which this command needs; take one of configs/ that is meant for "
            "it, or compare with those"
        )

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return _Settings(value) if isinstance(value, dict) else value


def _check_cache() -> None:
    """Refuses a compilation cache into which others can put programs; one on other storage is that storage's matter."""
    folder = os.environ.get(_CACHE, "")
    if folder and "://" not in folder:
        try:
            private_folder(Path(folder))
        except FileError as error:
            raise FileError(f"{_CACHE}={folder} {error}") from error


def _config_file(argv: list[str]) -> str:
    """What follows --config on a command line."""
    found = re.search(rf"\0--?{_FLAG}(?:=|\0)([^\0]*)", "\0".join(argv))
    return f"the config file {found[1]!r}" if found else "the config file"


def _sentence(error: Exception, file: str) -> str:
    """The message of a flag's or a config file's error; ml_collections puts whole stack traces into some."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if "Traceback" in str(error):
        return lines[-1].split("Error: ", 1)[-1]
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, (AttributeError, KeyError)) and "ml_collections" in raised_in:
        setting, *meant = re.findall(r"\w+(?=[\\\"'])", str(error)) or ["?"]
        if meant == ["get_config"]:
            return f"{file} has no function get_config; name one of configs/, or one written like those"
        hint = f"did you mean {meant[0]!r}?" if meant else "the config file lists the settings"
        return f"there is no setting {setting!r}; {hint}"
    if isinstance(error, OSError):
        return f"{file} cannot be read: {lines[-1]}"
    if isinstance(error, (flags.Error, ValueError, TypeError)):
        return " ".join(lines)
    return f"{file} cannot be run: {type(error).__name__}: {lines[-1]}"
