"""The quality figures of `kvshrink eval`, in numpy and double precision: their one definition outside the program.

Each query attends causally to every token up to its own position, softmax over all of them; query head h reads kv head
h / (q_heads / kv_heads). Logits are compared for all keys, those that a query doesn't see too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass
class Errors:
    """Sums, so that layers add up."""

    k_error: float = 0.0
    k_energy: float = 0.0
    v_error: float = 0.0
    v_energy: float = 0.0
    logit_error: float = 0.0
    logits: int = 0
    output_error: float = 0.0
    output_energy: float = 0.0
    kl_nats: float = 0.0
    rows: int = 0  # queries x heads

    def add(self, other: Errors) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def figures(self) -> dict[str, float]:
        return {
            "rel_mse_k": self.k_error / self.k_energy,
            "rel_mse_v": self.v_error / self.v_energy,
            "logit_rmse": float(np.sqrt(self.logit_error / self.logits)),
            "attention_rel_error": self.output_error / self.output_energy,
            "attention_kl": self.kl_nats / self.rows,
        }


class Attention:
    """Exact attention of a layer's queries, [queries, tail tokens], at the end of its keys and values."""

    def __init__(self, q: Array, k: Array, v: Array, scale: float) -> None:
        queries, tokens = len(q), len(k)
        self.q = np.asarray(q, np.float64) * scale
        self.seen = np.arange(tokens) <= (tokens - queries + np.arange(queries))[:, None]
        self.k, self.v = np.asarray(k, np.float64), np.asarray(v, np.float64)
        self.logits, self.weights, self.log_sum, self.output = self._attend(self.k, self.v)

    def _attend(self, k: Doubles, v: Doubles) -> tuple[Doubles, Doubles, Doubles, Doubles]:
        """Logits [kv_heads, group, queries, tokens], weights likewise, log-sum-exp, outputs [.., queries, head_dim]."""
        queries, q_heads, d = self.q.shape
        kv_heads = k.shape[1]
        q = self.q.transpose(1, 0, 2).reshape(kv_heads, q_heads // kv_heads, queries, d)
        logits = q @ k.transpose(1, 2, 0)[:, None]
        seen = np.where(self.seen, logits, -np.inf)
        largest = seen.max(axis=-1, keepdims=True)
        weights = np.exp(seen - largest)
        total = weights.sum(axis=-1, keepdims=True)
        weights /= total
        return logits, weights, largest + np.log(total), weights @ v.transpose(1, 0, 2)[:, None]

    def compare(self, k: Array, v: Array) -> Errors:
        """What changes when these keys and values take the place of the exact ones."""
        k, v = np.asarray(k, np.float64), np.asarray(v, np.float64)
        logits, _, log_sum, output = self._attend(k, v)
        change = logits - self.logits
        log_ratio = np.where(self.seen, (log_sum - self.log_sum) - change, 0.0)
        return Errors(
            k_error=float(((k - self.k) ** 2).sum()),
            k_energy=float((self.k**2).sum()),
            v_error=float(((v - self.v) ** 2).sum()),
            v_energy=float((self.v**2).sum()),
            logit_error=float((change**2).sum()),
            logits=change.size,
            output_error=float(((output - self.output) ** 2).sum()),
            output_energy=float((self.output**2).sum()),
            kl_nats=float((self.weights * log_ratio).sum()),
            rows=log_sum.size,
        )
