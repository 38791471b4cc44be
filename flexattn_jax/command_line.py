"""What the commands (eval.py, ...) share: flags into settings, and mistakes into one sentence and exit code 2."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

_FLAG = "config"


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
        except (AttributeError, KeyError) as error:
            setting, *meant = re.findall(r"\w+(?=[\\\"'])", str(error))
            hint = f"did you mean {meant[0]!r}?" if meant else "the config file lists the settings"
            _fail(name, f"there is no setting {setting!r}; {hint}")
        except (flags.Error, ValueError, TypeError, OSError) as error:
            _fail(name, _sentence(error))
        if len(rest) > 1:
            _fail(name, f"{rest[1]!r} is no flag; settings are written --{_FLAG}.NAME=VALUE")
        return rest

    def main(_) -> None:
        logging.set_verbosity(logging.WARNING)  # JAX reports every backend that it does not find
        try:
            command(config.value.to_dict())
        except user_errors as error:
            _fail(name, str(error))
        except KeyboardInterrupt:
            print(f"\n{name}: stopped", file=sys.stderr)
            sys.exit(130)

    app.run(main, flags_parser=parse)


def _fail(name: str, message: str) -> NoReturn:
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(2)


def _sentence(error: BaseException) -> str:
    """The message of a flag's error; ml_collections puts whole stack traces into some."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if "Traceback" in str(error):
        return lines[-1].split("Error: ", 1)[-1]
    if isinstance(error, OSError):
        return f"the config file cannot be read: {lines[-1].strip()}"
    return " ".join(lines)
