"""XXH64 in plain Python (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md)."""

from __future__ import annotations

import struct

_MASK = (1 << 64) - 1
_P1 = 0x9E3779B185EBCA87
_P2 = 0xC2B2AE3D27D4EB4F
_P3 = 0x165667B19E3779F9
_P4 = 0x85EBCA77C2B2AE63
_P5 = 0x27D4EB2F165667C5


def _rotl(x: int, r: int) -> int:
    return ((x << r) | (x >> (64 - r))) & _MASK


def _round(acc: int, lane: int) -> int:
    return (_rotl((acc + lane * _P2) & _MASK, 31) * _P1) & _MASK


def _stripes(data: bytes | memoryview, size: int, seed: int) -> int:
    """Accumulator after the whole 32-byte stripes. The rounds are written out: this loop is all the time."""
    a, b, c, d = (seed + _P1 + _P2) & _MASK, (seed + _P2) & _MASK, seed, (seed - _P1) & _MASK
    m, p1, p2 = _MASK, _P1, _P2
    for w, x, y, z in struct.iter_unpack("<4Q", data[: size - size % 32]):
        a = (a + w * p2) & m
        a = (((a << 31) | (a >> 33)) & m) * p1 & m
        b = (b + x * p2) & m
        b = (((b << 31) | (b >> 33)) & m) * p1 & m
        c = (c + y * p2) & m
        c = (((c << 31) | (c >> 33)) & m) * p1 & m
        d = (d + z * p2) & m
        d = (((d << 31) | (d >> 33)) & m) * p1 & m
    acc = (_rotl(a, 1) + _rotl(b, 7) + _rotl(c, 12) + _rotl(d, 18)) & _MASK
    for lane in (a, b, c, d):
        acc = ((acc ^ _round(0, lane)) * _P1 + _P4) & _MASK
    return acc


def xxh64(data: bytes | memoryview, seed: int = 0) -> int:
    size = len(data)
    acc = _stripes(data, size, seed) if size >= 32 else (seed + _P5) & _MASK
    acc = (acc + size) & _MASK
    at = size - size % 32
    while at + 8 <= size:
        (lane,) = struct.unpack_from("<Q", data, at)
        acc = (_rotl(acc ^ _round(0, lane), 27) * _P1 + _P4) & _MASK
        at += 8
    if at + 4 <= size:
        (lane,) = struct.unpack_from("<I", data, at)
        acc = (_rotl(acc ^ (lane * _P1 & _MASK), 23) * _P2 + _P3) & _MASK
        at += 4
    for byte in data[at:]:
        acc = (_rotl(acc ^ (byte * _P5 & _MASK), 11) * _P1) & _MASK
    acc = ((acc ^ (acc >> 33)) * _P2) & _MASK
    acc = ((acc ^ (acc >> 29)) * _P3) & _MASK
    return acc ^ (acc >> 32)


def section_checksum(data: bytes | memoryview) -> int:
    """Of a section of a shard: XXH64 over the XXH64 values of its pieces of 1024 bytes (FORMAT.md section 3)."""
    pieces = (xxh64(data[at : at + 1024]) for at in range(0, len(data), 1024))
    return xxh64(b"".join(piece.to_bytes(8, "little") for piece in pieces))
