"""What the commands share: options of settings, errors in words."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from coterie import config
from coterie.errors import BadConfiguration, CoterieError

PathOption = click.Path(path_type=Path)


def settings_options(kind: type[config.Settings], *leave_out: str) -> Callable[[Any], Any]:
    """Options for the fields of a settings class: same names, same defaults, its descriptions as help."""

    def decorate(command: Any) -> Any:
        for name, field in reversed(kind.model_fields.items()):
            if name in leave_out:
                continue
            flag, default = f"--{name.replace('_', '-')}", field.default
            text = field.description or ""
            variable: dict[str, Any] = {}
            if kind.environment is not None:
                variable = {"envvar": f"{kind.environment}{name.upper()}", "show_envvar": True}
            if isinstance(default, bool):
                option = click.option(
                    f"{flag}/--no-{name.replace('_', '-')}", name, default=default, help=text, **variable
                )
            elif isinstance(default, dict):
                option = click.option(flag, name, multiple=True, metavar="KEY=VALUE", help=text)
            else:
                choices = typing.get_args(field.annotation)
                literal = bool(choices) and all(isinstance(choice, str) for choice in choices)
                number = float if field.annotation is float else None  # a default of 10 would take whole numbers alone
                option = click.option(
                    flag,
                    name,
                    default=default,
                    type=click.Choice(choices) if literal else number if isinstance(default, int | float) else str,
                    show_default=True,
                    help=text,
                    **variable,
                )
            command = option(command)
        return command

    return decorate


def read_settings(kind: type[config.Settings], values: dict[str, Any]) -> Any:
    """Make settings of a command's options."""
    pairs = {}
    for name, value in values.items():
        if isinstance(kind.model_fields[name].default, dict):
            bad = [item for item in value if "=" not in item]
            if bad:
                raise BadConfiguration(f"--{name} {bad[0]}: write it as KEY=VALUE, for example worker_id=annotator")
            value = dict(item.split("=", 1) for item in value)
        pairs[name] = value
    return kind.of(**pairs)


class InWords(click.Command):
    """Ends with a message and an exit code, never with a traceback, where coterie itself refuses."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CoterieError as error:
            click.secho(f"coterie: {error}", fg="red", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.secho("coterie: interrupted; nothing half-written was left. Start it again to go on.", err=True)
            ctx.exit(130)


class Group(InWords, click.Group):
    """Commands that end so."""
