"""One exception per status code, so that callers can catch what they can handle."""

from __future__ import annotations

import grpc


class KVShrinkError(Exception):
    """What the service answered, or why a call failed. `message` names the field and the value."""

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, code: grpc.StatusCode | None = None, retry_after_s: float = 0.0) -> None:
        if code is not None:
            self.code = code
        super().__init__(f"{self.code.name}: {message}")
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidArgument(KVShrinkError, ValueError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(KVShrinkError, LookupError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(KVShrinkError):
    """Other bytes are stored under this key."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(KVShrinkError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(KVShrinkError):
    """A budget is full. `retry_after_s` is the service's hint; 0 where it gave none."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DataLoss(KVShrinkError):
    """A stored shard is damaged, or the answer is not what the protocol promises."""

    code = grpc.StatusCode.DATA_LOSS


class Unavailable(KVShrinkError, ConnectionError):
    """No service there, or it is draining."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(KVShrinkError, TimeoutError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unauthenticated(KVShrinkError):
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(KVShrinkError):
    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(KVShrinkError):
    code = grpc.StatusCode.UNIMPLEMENTED


class Cancelled(KVShrinkError):
    code = grpc.StatusCode.CANCELLED


_CLASSES: dict[grpc.StatusCode, type[KVShrinkError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        ResourceExhausted,
        DataLoss,
        Unavailable,
        DeadlineExceeded,
        Unauthenticated,
        PermissionDenied,
        Unimplemented,
        Cancelled,
    )
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_code(code: int, message: str, retry_after_ms: int = 0) -> KVShrinkError:
    """The exception of a numeric status code, as ObjectStatus carries it."""
    status = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    cls = _CLASSES.get(status, KVShrinkError)
    return cls(message, code=status, retry_after_s=retry_after_ms / 1000)


def from_rpc(error: grpc.RpcError) -> KVShrinkError:
    if not isinstance(error, grpc.Call):
        return KVShrinkError(str(error))
    code = error.code() or grpc.StatusCode.UNKNOWN
    return _CLASSES.get(code, KVShrinkError)(error.details() or "", code=code)
