"""What a violation of FORMAT.md is reported as."""

from __future__ import annotations


class FormatError(ValueError):
    """A violation of FORMAT.md: the field, its value and the rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"shard field '{field}' is {value}: {rule}")
        self.field = field
        self.value = value
        self.rule = rule


def require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise FormatError(field, value, rule)
