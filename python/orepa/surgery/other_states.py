"""Doubts a proof where another state of the model may use a convolution, or the norm after it, in another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from ..module_info import join
from .source_usage import Usage
from .tracing import Traces
from .unrun_code import Use, other_uses


class OtherStates:
    """What `Traces` of parts of a model, by their names, do not show."""

    def __init__(
        self,
        model: nn.Module,
        traced: Mapping[str, Traces],
        called: set[str],
        is_conv: Callable[[nn.Module], bool],
        is_norm: Callable[[nn.Module], bool],
    ) -> None:
        self.traced, self.is_conv = traced, is_conv
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.paths: dict[nn.Module, list[str]] = {}  # a module may have several names
        for name, module in self.modules.items():
            self.paths.setdefault(module, []).append(name)
        self.idle = {
            name
            for name, module in model.named_modules()
            if name not in called and self._trace_around(name) and (is_conv(module) or is_norm(module))
        }
        self.rivals = [
            self._reach(name) for name in self.idle if is_norm(self.modules[name]) and not self._is_paired(name)
        ]
        self.uses: dict[str, list[Use]] = {}

    def may_part(self, conv: str, norm: str) -> bool:
        """Return whether a norm that follows a convolution in all traces may not in another state of the model."""
        owners = {self._owner(conv), self._owner(norm)}
        if any(owner in owners or _is_in(norm, group) for owner, group in self.rivals):
            return True
        return any(
            self._is_used_apart(ours, theirs, name)
            for ours in self.paths[self.modules[conv]]
            for theirs in self.paths[self.modules[norm]]
            for name in {*_ancestors(ours), *_ancestors(theirs)}
        )

    def _trace_around(self, name: str) -> Traces | None:
        return next((self.traced[n] for n in [*_ancestors(name), name] if n in self.traced), None)

    def _owner(self, name: str) -> str:
        """Return the closest ancestor that is no mere container."""
        name = name.rpartition(".")[0]
        while name and type(self.modules[name]).__module__ == nn.Sequential.__module__:
            name = name.rpartition(".")[0]
        return name

    def _is_paired(self, norm: str) -> bool:
        """Return whether the last convolution before an uncalled norm, among its siblings, is not called either."""
        parent, _, own = norm.rpartition(".")
        siblings = list(self.modules[parent]._modules.items())
        before = siblings[: [name for name, _ in siblings].index(own)]
        convs = [name for name, module in before if module is not None and self.is_conv(module)]
        return bool(convs) and join(parent, convs[-1]) in self.idle

    def _reach(self, norm: str) -> tuple[str, str]:
        """Return the closest ancestor of an uncalled norm with convolutions, and the part of it that holds the norm.

        The norm may be chosen in place of another in that part, or of one that the ancestor itself calls.
        """
        group = norm
        for ancestor in reversed([*_ancestors(norm)]):
            if any(self.is_conv(m) for m in self.modules[ancestor].modules()):
                break
            group = ancestor
        return self._owner(join(ancestor, "*")), group

    def _is_used_apart(self, conv: str, norm: str, name: str) -> bool:
        """Return whether code of the module ``name`` that was not run uses one of the two without the other."""
        if name not in self.uses:
            traces = self._trace_around(name)
            lines, in_train_mode = (None, False) if traces is None else (traces.lines, traces.in_train_mode)
            self.uses[name] = other_uses(self.modules[name], lines, in_train_mode)
        (first, ours), (second, theirs) = ([*_below(path, name)[:2], "", ""][:2] for path in (conv, norm))
        for use in self.uses[name]:
            if use.child not in (first, second) or use.usage is Usage.READ:
                continue
            if first != second:
                if (first, second) not in ((use.child, use.after), (use.before, use.child)):
                    return True
            elif use.usage is Usage.UNKNOWN or (use.usage is Usage.ITERATED and ours != theirs):
                return True
        return False


def _ancestors(name: str) -> Iterator[str]:
    """Yield the names of all modules around one, outermost first."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts)))


def _is_in(name: str, prefix: str) -> bool:
    return not prefix or f"{name}.".startswith(f"{prefix}.")


def _below(path: str, name: str) -> list[str]:
    """Return the parts of a path below a module, none where it lies elsewhere."""
    return path[len(name) :].strip(".").split(".") if _is_in(path, name) else []
