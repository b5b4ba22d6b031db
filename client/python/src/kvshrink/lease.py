"""The lease that a lookup gives."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Lease:
    """A run of chunks that is not evicted until `duration_s` have passed or it is released."""

    def __init__(
        self, release: Callable[[int], bool], present: int, tokens: int, lease_id: int, duration_s: float
    ) -> None:
        self._release = release
        self.present = present  # leading keys that are there
        self.tokens = tokens  # in them
        self.lease_id = lease_id  # 0: nothing is there, nothing is leased
        self.duration_s = duration_s

    def release(self) -> bool:
        """False: it had ended before."""
        lease_id, self.lease_id = self.lease_id, 0
        return self._release(lease_id) if lease_id else False

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Lease(present={self.present}, tokens={self.tokens}, lease_id={self.lease_id})"
