"""Kinds of values that options of the command line take."""

from __future__ import annotations

from typing import Any

import click


class Duration(click.ParamType):
    """Seconds, or with a unit: 60, 90s, 5m, 8h, 1h30m."""

    name = "duration"

    def __init__(self, least: float = 0.0) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from console.words import duration, parse_duration

        if isinstance(value, int | float):
            return float(value)
        try:
            seconds = parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not self.least <= seconds <= 30 * 86400:
            self.fail(f"{value} is out of range; use {duration(self.least)} to 30 days", param, ctx)
        return seconds


class Moment(click.ParamType):
    """HH:MM, today or tomorrow, whichever comes next; as a Unix time."""

    name = "HH:MM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from datetime import datetime, timedelta

        try:
            wanted = datetime.strptime(str(value), "%H:%M")
        except ValueError:
            self.fail(f"{value!r} is not a time of day; write it as HH:MM, for example 07:30", param, ctx)
        now = datetime.now()
        moment = now.replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
        return (moment if moment > now else moment + timedelta(days=1)).timestamp()
