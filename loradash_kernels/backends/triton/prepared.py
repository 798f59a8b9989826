"""Plans that are used again: made once for everything that they and Triton's choice of a kernel depend on.

A prepared plan holds no tensor. Its launches name the fields of a call and the pieces of one workspace: `bind` fills them in
and gives the launches as data, `run` executes them, from the second time on by addresses alone.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...calls import Call
from . import launcher
from .problem import C, KernelLaunch, LibraryProduct, Plan, Problem, Step, is_descriptor, multiply, round_up

# Pieces of the workspace begin at multiples of this, as if each were allocated by itself.
_ALIGNMENT = 256
# In both calls the fields before this one are given. Those from it on are written: contiguous, of shapes that follow.
_GIVEN = 12
_NUMBERS = (float, int)


class Slot(NamedTuple):
    """A tensor of a prepared launch: that field of the call, or beyond the last of them that piece of the workspace."""

    place: int


class Described(NamedTuple):
    """A tensor descriptor of a prepared launch, whose own tensor is left out."""

    place: int
    descriptor: Any

    def of(self, base: Any) -> Any:
        found = copy.copy(self.descriptor)
        found.base = base
        return found


class Address(NamedTuple):
    """As much of a tensor as Triton's launcher asks a descriptor's base for."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Piece(NamedTuple):
    """A tensor of the workspace, which begins at a byte of it. One that must be zero is allocated by itself."""

    offset: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    zeroed: bool

    def within(self, workspace: Tensor) -> Tensor:
        if self.zeroed:
            return workspace.new_zeros(self.shape, dtype=self.dtype)
        return workspace[self.offset :].view(self.dtype).as_strided(self.shape, self.strides)


class PreparedPlan:
    """The launches of a plan whose tensors are fields of its problem's call or workspace of its problem."""

    def __init__(self, problem: Problem[Any], plan: Plan) -> None:
        places = {id(t): index for index, t in enumerate((*problem.call, *problem.workspace)) if isinstance(t, Tensor)}
        self.pieces, self.bytes = _pieces(problem)
        self.steps = [_prepared(step, places) for step in plan]
        self._offsets = [piece.offset for piece in self.pieces]
        first = len(problem.call)
        self._zeroed = [(first + index, piece) for index, piece in enumerate(self.pieces) if piece.zeroed]
        kernels = [step.kernel for step in self.steps if isinstance(step, KernelLaunch)]
        # Where launches can be repeated: the hooks of the kernels, and from the second time on what `run` does.
        self._hooks = [kernel.pre_run_hooks for kernel in kernels] if launcher.obstacle(kernels) is None else None
        self._repeats: list[Repeat] | None = None

    def bind(self, call: Call) -> Plan:
        """The launches for a call; allocates the workspace."""
        tensors: list[Any] = list(call)
        if self.pieces:
            memory = call[0].new_empty(self.bytes + _ALIGNMENT, dtype=torch.uint8)
            memory = memory[-memory.data_ptr() % _ALIGNMENT :]
            tensors += [piece.within(memory) for piece in self.pieces]
        return [_bound(step, tensors) for step in self.steps]

    def run(self, call: Call, addresses: list[int]) -> None:
        """Executes the plan for a call whose fields have these addresses."""
        plain = self._hooks is not None and not launcher.watched(self._hooks)
        if plain and self._repeats is not None:
            self._repeat(call, addresses, self._repeats)
            return
        compiled = self._through_triton(call)
        if plain:
            self._repeats = [_repeat(step, kernel) for step, kernel in zip(self.steps, compiled, strict=True)]

    def _through_triton(self, call: Call) -> list[Any]:
        """Triton finds or compiles the kernels, and launches them; gives them, None where PyTorch computes."""
        capturing = call[0].is_cuda and torch.cuda.is_current_stream_capturing()
        try:
            return [step.run() for step in self.bind(call)]
        except Exception as error:
            if not capturing:
                raise
            raise RuntimeError(
                f"Triton could not launch kernels for x {tuple(call.x.shape)} within the capture of a CUDA graph, where nothing "
                f"can be compiled or loaded: call once with these sizes before, as loradash.warm_up does ({error})"
            ) from error

    def _repeat(self, call: Call, given: list[int], repeats: list[Repeat]) -> None:
        x, addresses, kept = call[0], given, []
        if self.pieces:
            kept.append(memory := x.new_empty(self.bytes + _ALIGNMENT, dtype=torch.uint8))
            start = memory.data_ptr()
            start += -start % _ALIGNMENT
            addresses = given + [start + offset for offset in self._offsets]
            for place, piece in self._zeroed:
                kept.append(zeros := piece.within(memory))
                addresses[place] = zeros.data_ptr()
        # Without kernels there need be no driver: the interpreter has none.
        stream = launcher.current_stream(x.get_device()) if self._hooks else None
        for launch, template, slots, descriptors, _ in repeats:
            if template is None:
                launch(call)
                continue
            arguments = template.copy()
            arguments[launcher.STREAM] = stream
            for argument, place in slots:
                arguments[argument] = addresses[place]
            for argument, described in descriptors:
                arguments[argument] = described.of(Address(addresses[described.place]))
            launch(*arguments)


def _pieces(problem: Problem[Any]) -> tuple[list[Piece], int]:
    """The workspace of a problem one after the other, and its size in bytes."""
    pieces, offset = [], 0
    for t in problem.workspace:
        zeroed = id(t) in problem.zeroed
        pieces.append(Piece(offset, t.shape, t.stride(), t.dtype, zeroed))
        offset += 0 if zeroed else round_up(t.numel() * t.element_size(), _ALIGNMENT)
    return pieces, offset


def _prepared(step: Step, places: Mapping[int, int]) -> Any:
    """A step of a plan whose tensors are slots."""

    def left_out(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Slot(places[id(value)])
        if not is_descriptor(value):
            return value
        empty = copy.copy(value)
        empty.base = None
        return Described(places[id(value.base)], empty)

    return _with_tensors(step, left_out)


def _bound(step: Any, tensors: list[Any]) -> Step:
    """A prepared step with its tensors."""

    def filled(value: Any) -> Any:
        if isinstance(value, Slot):
            return tensors[value.place]
        return value.of(tensors[value.place]) if isinstance(value, Described) else value

    return _with_tensors(step, filled)


def _with_tensors(step: Any, change: Callable[[Any], Any]) -> Any:
    """The step with everything changed that may be a tensor of it."""
    if isinstance(step, KernelLaunch):
        return replace(step, args={name: change(value) for name, value in step.args.items()})
    return replace(step, **{field.name: change(getattr(step, field.name)) for field in fields(step)})


class Repeat(NamedTuple):
    """How a launch is repeated."""

    # Takes the arguments of Triton's launcher, or where PyTorch computes the call.
    launch: Callable[..., Any]
    # The former, stream and addresses apart, or None.
    template: list[Any] | None
    # Where which address goes, and which descriptor.
    addresses: Sequence[tuple[int, int]] = ()
    descriptors: Sequence[tuple[int, Described]] = ()
    # Held: from Triton 3.8 on a compiled kernel that nobody holds unloads its code.
    kernel: Any = None


def _repeat(step: Any, compiled: Any) -> Repeat:
    if not isinstance(step, KernelLaunch):
        return Repeat(_product(step) if isinstance(step, LibraryProduct) else _zeros(step), None)
    every = [step.args[name] if name in step.args else step.constants[name] for name in step.kernel.arg_names]
    first = launcher.ARGUMENTS
    addresses = [(first + place, value.place) for place, value in enumerate(every) if isinstance(value, Slot)]
    descriptors = [(first + place, value) for place, value in enumerate(every) if isinstance(value, Described)]
    return Repeat(*launcher.repeated(compiled, step.grid, every), addresses, descriptors, compiled)


def _product(step: Any) -> Callable[[Any], None]:
    a, b, bias, out = (-1 if slot is None else slot.place for slot in (step.a, step.b, step.bias, step.out))

    def product(call: Any) -> None:
        multiply(call[a], call[b], None if bias < 0 else call[bias], call[out], step.transposed, step.accumulate)

    return product


def _zeros(step: Any) -> Callable[[Any], None]:
    place = step.out.place
    return lambda call: call[place].zero_()


class PlanCache:
    """The prepared plans that were used last. Safe from several threads."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._plans: OrderedDict[Hashable, PreparedPlan] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def clear(self) -> None:
        with self._lock:
            self._plans.clear()

    def find(self, key: Hashable) -> PreparedPlan | None:
        with self._lock:
            found = self._plans.get(key)
            if found is not None:
                self._plans.move_to_end(key)
            return found

    def keep(self, key: Hashable, plan: PreparedPlan) -> PreparedPlan:
        with self._lock:
            self._plans[key] = plan
            if len(self._plans) > self.capacity:
                self._plans.popitem(last=False)
            return plan


PLANS = PlanCache(1024)


def look(call: C) -> tuple[C, list[Any], list[int]]:
    """The call as kernels can take it, what its plan depends on (the device apart), and the addresses of its fields (0: none).

    Kernels need memory that holds the values, and vectors without gaps; what lacks that is copied. Shapes follow from those of
    x, B and the vectors. This is most of what a call costs, and takes 4 us as it is written.
    """
    traits: list[Any] = [call.__class__, call.x.shape, call.lora_b.shape]
    addresses: list[int] = []
    value: Any
    for value in call[:_GIVEN]:
        # isinstance(value, Tensor) runs Python code for all that is not exactly a Tensor, a Parameter too.
        if value is None or value.__class__ in _NUMBERS:
            traits.append(value)
            addresses.append(0)
            continue
        address, strides = value.data_ptr(), value.stride()
        vector = len(strides) == 1
        if value.is_neg() or (not address and value._is_zerotensor()) or (vector and strides[0] != 1):
            plain = _mapped(_plain, call)
            if any(new is not old for new, old in zip(plain, call, strict=True)):
                return look(plain)
        traits += (value.dtype, value.shape if vector else strides, address & 15)
        addresses.append(address)
    for value in call[_GIVEN:]:
        if value is None:
            traits.append(None)
            addresses.append(0)
        else:
            address = value.data_ptr()
            traits += (value.dtype, address & 15)
            addresses.append(address)
    return call, traits, addresses


def _plain(value: Any) -> Any:
    """A copy where a kernel cannot take this field, else the field."""
    if not isinstance(value, Tensor):
        return value
    if value.is_neg() or value._is_zerotensor():
        return value.clone()
    return value.contiguous() if value.dim() == 1 else value


def without_memory(call: C) -> C:
    """The call for a plan to be prepared from: every field is another object, whatever was given twice."""
    return _mapped(lambda value: value.detach() if isinstance(value, Tensor) else value, call)


def _mapped(change: Callable[[Any], Any], call: C) -> C:
    make: Any = type(call)
    return make(*map(change, call))
