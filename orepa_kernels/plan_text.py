"""Plans as text: what the operators registered with PyTorch take, since an operator's arguments are tensors and plain values.

The text of a plan is its meaning, so a compiled graph that holds it stays valid in another process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import Block


def encode(block: Block) -> str:
    """A plan as JSON; equal plans give equal texts."""
    return json.dumps(_plain(block), separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def decode(text: str) -> Block:
    """The plan that `encode` wrote.

    Raises:
        ValueError: the text is no plan, or one that could not be built.
    """
    from . import plan

    kinds = {kind.__name__: kind for kind in (*plan.Term.__args__, plan.Operand, plan.Average, plan.Block)}

    def build(node: Any) -> Any:
        if isinstance(node, dict):
            kind = kinds[node.pop("kind")]
            return kind(**{name: build(value) for name, value in node.items()})
        return tuple(build(value) for value in node) if isinstance(node, list) else node

    try:
        block = build(json.loads(text))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the text of a plan: {text[:80]!r} ({error!r})") from error
    if not isinstance(block, plan.Block):
        raise ValueError(f"not the text of a plan: {text[:80]!r}")
    return block


def _plain(node: Any) -> Any:
    if dataclasses.is_dataclass(node):
        inputs = {f.name: _plain(getattr(node, f.name)) for f in dataclasses.fields(node) if f.init}
        return {"kind": type(node).__name__, **inputs}
    return [_plain(value) for value in node] if isinstance(node, tuple) else node
