"""ZeRO-3's parameters on their way: which are gathered when, and how many are whole at once.

DeepSpeed 0.19 records the order of modules in one step. From then on it fetches ahead of use
(`stage3_prefetch_bucket_size`), keeps what is used again soon (`stage3_max_reuse_distance`) and everything small
(`stage3_param_persistence_threshold`). Any call of another order, as each half of the two-pass step is, makes it begin
anew. This is its state machine (deepspeed/runtime/zero/partitioned_param_coordinator.py and stage3.py) over the events
of `trace`, without tensors.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from symile_dist.tools.plan.collectives import Collective, all_gather, broadcast, reduce_scatter
from symile_dist.tools.plan.trace import Event

AWAY, COMING, HERE = 0, 1, 2
STEPS = 5
"""After so many every step is like the one before."""


@dataclass(frozen=True)
class Settings:
    """Keys of `zero_optimization`, with DeepSpeed's defaults; in elements."""

    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = 2**63 - 1
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    overlap_comm: bool = False


class Whole(NamedTuple):
    """Elements of whole parameters at an event: when it has happened, and the most since the event before, with the
    buffers that they are gathered into."""

    now: int
    most: int
    persistent: int
    """Of those, what stays whole between steps."""


class _InTrace(NamedTuple):
    parameter: int
    step: int


class Coordinator:
    """One rank's. Modules and parameters go by their numbers."""

    def __init__(
        self, sizes: Sequence[int], own: Sequence[Sequence[int]], settings: Settings, world_size: int, dtype: str
    ) -> None:
        """
        Args:
            sizes: elements of each parameter, in the order of their numbers.
            own: each module's own parameters.
            dtype: of the weights.
        """
        self.sizes, self.settings, self.world_size, self.dtype = sizes, settings, world_size, dtype
        self.of_module = [set(parameters) for parameters in own]
        total = 0
        self.persistent: list[int] = []
        for number, size in enumerate(sizes):
            if size + total <= settings.model_persistence_threshold and size <= settings.param_persistence_threshold:
                self.persistent.append(number)
                total += size
        self._persists = set(self.persistent)
        self._resident = total
        self.status = [AWAY] * len(sizes)
        self.active: list[set[int]] = [set() for _ in sizes]
        self.calls: list[Collective] = []
        self.whole: list[Whole] = []
        self._mode = "invalid"
        self._order: list[int] = []
        self._uses: list[_InTrace] = []
        self._queue: deque[_InTrace] = deque()
        self._last_use: defaultdict[int, int] = defaultdict(lambda: -(10**10))
        self._steps_of: defaultdict[int, deque[int]] = defaultdict(deque)
        self._step = 0
        self._available = 0
        self._coming: dict[int, tuple[int, ...]] = {}
        self._backward: dict[int, None] = {}
        self._stack: list[int] = []
        self._releases: dict[tuple[int, int], frozenset[int]] = {}
        self._bucket: list[int] = []
        self._elements = 0  # of whole parameters
        self._buffers = 0  # of gathers under way
        self._most = 0

    # -- a step ----------------------------------------------------------------------------------------------------

    def run(self, events: Sequence[Event]) -> None:
        for event in events:
            self._most = self._elements + self._buffers
            getattr(self, f"_on_{event.kind}")(event.number)
            self.whole.append(Whole(self._elements + self._buffers, self._most, self._resident))

    def finish_step(self) -> None:
        """What the optimizer's step does with parameters: all are given back, then the small ones gathered one by
        one."""
        self._wait_for_all()
        for number in range(len(self.sizes)):
            self.active[number].clear()
            self._give_back(number)
        for number in self.persistent:
            self._note_gather([number])
            self._set(number, HERE)

    def _on_end(self, _: int) -> None:
        pass

    def _on_reset(self, _: int) -> None:
        self._clean()
        if self._mode != "complete":
            self._agree(len(self._order))
            if self._mode == "recording":
                self._uses = []
                for module in self._order:
                    step = self._steps_of[module].popleft()
                    self._uses += [_InTrace(parameter, step) for parameter in sorted(self.of_module[module])]
                self._agree(len(self._uses))
                self._agree(len(self._uses))
                self._mode = "complete"
            else:
                self._mode = "recording"
        self._queue = deque(self._uses)
        self._last_use.clear()
        self._steps_of.clear()
        self._step = self._available = 0
        self._stack = []

    def _on_pre_forward(self, module: int) -> None:
        self._stack.append(module)
        self._enter(module)
        self._fetch(module, backward=False)

    def _on_pre_backward(self, module: int) -> None:
        self._enter(module)
        self._fetch(module, backward=True)

    def _on_post_forward(self, module: int) -> None:
        self._stack.pop()
        self._release(module, backward=False)

    def _on_post_backward(self, module: int) -> None:
        self._release(module, backward=True)

    def _on_access(self, parameter: int) -> None:
        """A parameter that another module has, looked at in a forward pass: from now on it is this one's too."""
        if self.status[parameter] == AWAY and self._stack:
            self.of_module[self._stack[-1]].add(parameter)
            self._note_gather([parameter])
            self._set(parameter, HERE)

    def _on_gradient(self, parameter: int) -> None:
        size, limit = self.sizes[parameter], self.settings.reduce_bucket_size
        if self._bucket and sum(self.sizes[p] for p in self._bucket) + size > limit:
            self._reduce()
        self._bucket.append(parameter)

    def _on_backward_end(self, _: int) -> None:
        self._reduce()
        while self._backward:
            module, _none = self._backward.popitem()
            for parameter in self.of_module[module]:
                self.active[parameter].discard(module)
                if parameter not in self._persists:
                    self._give_back(parameter)

    # -- its parts --------------------------------------------------------------------------------------------------

    def _enter(self, module: int) -> None:
        if self._mode == "complete" and (len(self._order) <= self._step or self._order[self._step] != module):
            self._mode = "invalid"
            self._order, self._uses, self._queue = [], [], deque()
            self._last_use.clear()
            self._steps_of.clear()
            self._clean()
        if self._mode == "recording":
            self._order.append(module)
            self._steps_of[module].append(self._step)

    def _fetch(self, module: int, backward: bool) -> None:
        if backward:
            self._backward[module] = None
        wanted = self.of_module[module]
        self._gather(wanted)
        for parameter in wanted:
            self.active[parameter].add(module)
            if parameter in self._coming:
                self._wait(parameter)
        if self._mode == "complete":
            self._fetch_ahead(wanted)
        self._step += 1

    def _fetch_ahead(self, wanted: set[int]) -> None:
        new = {parameter for parameter in wanted if self._last_use[parameter] < self._step}
        passed: set[int] = set()
        while self._queue and len(passed) < len(new):
            use = self._queue.popleft()
            self._last_use[use.parameter] = use.step
            passed.add(use.parameter)
        room = min(self.settings.max_live_parameters - self._available, self.settings.prefetch_bucket_size)
        ahead: set[int] = set()
        elements = 0
        while self.settings.prefetch_bucket_size > 0 and self._queue and elements < room:
            use = self._queue.popleft()
            fetch = self.status[use.parameter] == AWAY and use.parameter not in ahead
            self._last_use[use.parameter] = max(self._last_use[use.parameter], use.step)
            if fetch:
                ahead.add(use.parameter)
                elements += self.sizes[use.parameter]
        if elements:
            self._gather(ahead)

    def _gather(self, parameters: set[int]) -> None:
        missing = tuple(sorted(p for p in parameters if self.status[p] == AWAY))
        if not missing:
            return
        self._available += sum(self.sizes[p] for p in missing)
        self._note_gather(missing)
        if len(missing) > 1:  # into one buffer, of which each is then copied
            self._buffers += sum(self._share(p) for p in missing) * self.world_size
            self._most = max(self._most, self._elements + self._buffers)
        for parameter in missing:
            self._set(parameter, COMING)
            self._coming[parameter] = missing

    def _wait(self, parameter: int) -> None:
        together = self._coming.pop(parameter)
        if self.status[together[0]] == COMING or self.status[parameter] == COMING:
            for other in together:
                if self.status[other] == COMING:
                    self._set(other, HERE)
            self._most = max(self._most, self._elements + self._buffers)
            if len(together) > 1:
                self._buffers -= sum(self._share(p) for p in together) * self.world_size

    def _wait_for_all(self) -> None:
        for parameter in list(self._coming):
            self._wait(parameter)

    def _clean(self) -> None:
        for parameter in list(self._coming):
            self._wait(parameter)
            self._give_back(parameter)

    def _release(self, module: int, backward: bool) -> None:
        if self._mode == "complete":
            to_release = self._releasable(module)
        else:
            to_release = frozenset(self.of_module[module])
        if backward:
            self._backward.pop(module, None)
        for parameter in self.of_module[module]:
            self.active[parameter].discard(module)
            if parameter in to_release:
                self._give_back(parameter)

    def _releasable(self, module: int) -> frozenset[int]:
        key = (module, self._step)
        if key not in self._releases:  # decided once, and then for good
            found = {p for p in self.of_module[module] if p not in self._persists}
            found -= {p for p in self.of_module[module] if self._last_use[p] > self._step}
            passed = 0
            for later in self._order[self._step :]:
                if passed >= self.settings.max_reuse_distance:
                    break
                for parameter in self.of_module[later]:
                    found.discard(parameter)
                    passed += self.sizes[parameter]
            self._releases[key] = frozenset(found)
        return self._releases[key]

    def _give_back(self, parameter: int) -> None:
        if self.status[parameter] == HERE and not self.active[parameter]:
            self._set(parameter, AWAY)
            self._available -= self.sizes[parameter]

    def _set(self, parameter: int, status: int) -> None:
        before, self.status[parameter] = self.status[parameter], status
        self._elements += self.sizes[parameter] * ((status == HERE) - (before == HERE))
        self._most = max(self._most, self._elements + self._buffers)

    def _share(self, parameter: int) -> int:
        return -(-self.sizes[parameter] // self.world_size)

    # -- collectives ------------------------------------------------------------------------------------------------

    def _note_gather(self, parameters: Sequence[int]) -> None:
        share = sum(self._share(parameter) for parameter in parameters)
        self.calls.append(all_gather(share, self.world_size, self.dtype, "parameters"))

    def _reduce(self) -> None:
        if self._bucket:
            elements = sum(self._share(parameter) for parameter in self._bucket) * self.world_size
            self.calls.append(reduce_scatter(elements, self.dtype, "gradients"))
        self._bucket = []

    def _agree(self, length: int) -> None:
        """All ranks compare a list of numbers with rank 0's."""
        self.calls += [broadcast(1, "int64", "agreement"), broadcast(length, "int64", "agreement")]


def steady_step(coordinator: Coordinator, events: Sequence[Event]) -> tuple[list[Collective], list[Whole]]:
    """Calls and whole parameters of a step like all later ones."""
    for _ in range(STEPS):
        coordinator.calls, coordinator.whole = [], []
        coordinator.run(events)
        coordinator.finish_step()
    return coordinator.calls, coordinator.whole


__all__ = ["STEPS", "Coordinator", "Settings", "Whole", "steady_step"]
