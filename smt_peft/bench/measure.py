"""Check, then time: the rules by which every route to one result is judged.

A *route* is one way to compute a result, an *experiment* all routes to the same result on the same operands. A route
is timed only when its error against an fp64 truth is at most twice PyTorch's own in the same dtype. Rounds go through
the routes in a shuffled order, so that a slow spell of the machine falls on all of them; every call gets other
operands, so that what it reads is not in the cache; the figure is the median with the 20th and 80th percentile, and a
ratio is taken within a round. On a GPU a route is timed by events behind a kernel that keeps the GPU busy while the
host launches: its time is that of the GPU, and the host's own is written beside it.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARMUP = 2
# Clock of the kernel that keeps a GPU busy, cycles a second: only an upper bound matters.
GPU_CLOCK = 2e9
# The host is given this long at most to launch a route behind that kernel.
LONGEST_HEAD_START = 0.05


@dataclass(frozen=True)
class Route:
    """One way to a result.

    Args:
        run: takes the operands.
        read: what `run` returned, or wrote, as the tensors to compare; not timed.
        backend: the backend of this package that the route forces; None: not ours.
        serves: whether this backend is the one that an ordinary call gets.
        context: entered around every call, outside the time.
        flops: floating-point operations of this route where they are not the useful ones.
    """

    run: Callable[..., Any]
    read: Callable[[Any], Any] = lambda result: result
    backend: str | None = None
    serves: bool = False
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    flops: int | None = None


@dataclass(frozen=True)
class Experiment:
    """All routes to one result.

    Args:
        operation, case: what the rows of the table are called.
        operands: what every route takes; tensors in it, also in lists, are copied for every call that is checked.
        truth: the result in fp64.
        plain: PyTorch's own result in the dtype of the operands.
        routes: by name; a string instead of a route says why it cannot run.
        baseline: the route that ratios are taken to.
        bytes: unique bytes that must be read and written.
        flops: useful floating-point operations; 0 where they say nothing.
        exact: no error at all is allowed.
    """

    operation: str
    case: str
    operands: tuple
    truth: Callable[..., Any]
    plain: Callable[..., Any]
    routes: Mapping[str, Route | str]
    baseline: str
    bytes: int
    flops: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Budget:
    """How long and how large a measurement may be.

    Args:
        rounds: timed calls of every route.
        operand_bytes: all copies of the operands together stay below this, except that there are always two.
        cache_bytes: the cache that the operands must outgrow.
    """

    rounds: int
    operand_bytes: int
    cache_bytes: int


def run(experiment: Experiment, budget: Budget, peaks: Mapping[str, float]) -> list[dict[str, Any]]:
    """Check and time every route. Returns one row per route, ready for JSON.

    `status` is `"ok"`, `"wrong"` (with `error` and `allowed`, and no time) or `"cannot run"` (with `reason`).
    """
    truth, plain = (result(*copied(experiment.operands)) for result in (experiment.truth, experiment.plain))
    rows = {name: _checked(experiment, route, truth, plain) for name, route in experiment.routes.items()}
    del truth, plain
    sound = {name: experiment.routes[name] for name, row in rows.items() if row["status"] == "ok"}
    if sound:
        sets = rotation(experiment.operands, experiment.bytes, budget)
        seconds, host = time_routes(sound, sets, budget.rounds)
        for name, route in sound.items():
            rows[name] |= _figures(experiment, name, route, seconds, peaks) | {"operand_sets": len(sets)}
            if host[name] is not None:
                rows[name]["host_seconds"] = host[name]
    head = {"operation": experiment.operation, "case": experiment.case}
    return [{**head, "route": name, **row} for name, row in rows.items()]


def _checked(experiment: Experiment, route: Route | str, truth: Any, plain: Any) -> dict[str, Any]:
    if isinstance(route, str):
        return {"status": "cannot run", "reason": route}
    row = {"backend": route.backend, "serves": route.serves}
    try:
        with route.context():
            result = route.read(route.run(*copied(experiment.operands)))
    # Whatever the route of another library stumbles over is a line in the table, not the end of the run.
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        return {"status": "cannot run", "reason": f"{type(error).__name__}: {said}", **row}
    error, allowed = errors(result, plain, truth)
    if experiment.exact:
        allowed = 0.0
    # Not `error > allowed`, which a NaN would pass.
    status = "ok" if error <= allowed else "wrong"
    return {"status": status, "error": error, "allowed": allowed, **row}


def errors(ours: Any, plain: Any, truth: Any) -> tuple[float, float]:
    """The largest error against the truth and the largest allowed: twice PyTorch's own, or one rounding.

    Of several results, those of the one that is closest to its limit or furthest beyond.
    """
    worst = (0.0, 0.0)
    for mine, same, true in zip(_flat(ours), _flat(plain), _flat(truth), strict=True):
        true = true.double()
        if mine.shape != true.shape:
            return float("inf"), 0.0
        if not true.numel():
            continue
        rounding = torch.finfo(same.dtype).eps * true.abs().max().clamp(min=1e-30)
        allowed = float(2 * torch.maximum((same.double() - true).abs().max(), rounding / 2))
        error = float((mine.double() - true).abs().max())
        if error != error or worst[1] == 0 or error / allowed > worst[0] / worst[1]:
            worst = (error, allowed)
            if error != error:
                break
    return worst


def time_routes(
    routes: Mapping[str, Route], sets: Sequence[tuple], rounds: int, seed: int = 0
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Time every route `rounds` times.

    Returns:
        Per route the seconds of each round, and the median seconds of the host's part on a GPU (None on a CPU).
    """
    device = next(tensor.device for tensor in _flat(sets[0]))
    clock = _EventClock() if device.type == "cuda" else _HostClock()
    rng, turn = random.Random(seed), 0
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for index in range(WARMUP + rounds):
        order = list(routes)
        rng.shuffle(order)
        for name in order:
            operands = sets[turn % len(sets)]
            turn += 1
            with routes[name].context():
                taken = clock.time(name, routes[name].run, operands)
            if index >= WARMUP:
                seconds[name].append(taken)
    return seconds, {name: clock.host(name) for name in routes}


class _HostClock:
    def time(self, name: str, function: Callable, operands: tuple) -> float:
        start = time.perf_counter()
        function(*operands)
        return time.perf_counter() - start

    def host(self, name: str) -> None:
        return None


class _EventClock:
    """Times a GPU behind a head start: a kernel that spins for as long as the host took to launch the route before."""

    def __init__(self):
        self._host: dict[str, list[float]] = {}
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, name: str, function: Callable, operands: tuple) -> float:
        history = self._host.setdefault(name, [])
        head_start = min(1.5 * history[-1] + 50e-6 if history else LONGEST_HEAD_START, LONGEST_HEAD_START)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(head_start * GPU_CLOCK))
        self._begin.record()
        start = time.perf_counter()
        function(*operands)
        history.append(time.perf_counter() - start)
        self._end.record()
        torch.cuda.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3

    def host(self, name: str) -> float:
        return statistics.median(self._host[name][WARMUP:])


def rotation(operands: tuple, touched: int, budget: Budget) -> list[tuple]:
    """Copies of the operands, enough that what a call touches has left the cache when its copy comes up again."""
    size = max(1, sum(tensor.nbytes for tensor in _flat(operands)))
    wanted = -(-2 * budget.cache_bytes // max(1, min(touched, size)))
    count = max(2, min(wanted, budget.operand_bytes // size))
    return [operands, *(copied(operands) for _ in range(count - 1))]


def spread(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median and the [20th, 80th] percentile."""
    values = sorted(values)
    return statistics.median(values), [values[len(values) // 5], values[-1 - len(values) // 5]]


def ratios(mine: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(mine, base, strict=True)]


def peaks(device: torch.device, copy_bytes: int, side: int) -> dict[str, float]:
    """The two rates that bound everything: bytes a second of a copy (read plus written), FLOP a second of a GEMM.

    Args:
        copy_bytes: of the buffer that is copied.
        side: of the square matrices, fp32 on a CPU and bf16 elsewhere.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    source = torch.randn(copy_bytes // 4, device=device)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    routes = {
        "copy": Route(lambda source, target: target.copy_(source)),
        "mm": Route(torch.mm),
    }
    pairs = {"copy": (source, torch.empty_like(source)), "mm": (left, right)}
    taken = {name: statistics.median(time_routes({name: routes[name]}, [pairs[name]], 7)[0][name]) for name in routes}
    return {
        "copy_bytes_per_second": 2 * source.nbytes / taken["copy"],
        "mm_flops_per_second": 2 * side**3 / taken["mm"],
    }


def copied(operands: Any) -> Any:
    """The operands with every tensor cloned."""
    if isinstance(operands, Tensor):
        return operands.clone()
    if isinstance(operands, (list, tuple)):
        return type(operands)(copied(item) for item in operands)
    return operands


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _flat(item)] if isinstance(value, (list, tuple)) else []


def _figures(
    experiment: Experiment, name: str, route: Route, seconds: Mapping[str, list[float]], peaks: Mapping[str, float]
) -> dict[str, Any]:
    median, percentiles = spread(seconds[name])
    figures = {
        "seconds": median,
        "seconds_p20_p80": percentiles,
        "bytes": experiment.bytes,
        "bytes_per_second": experiment.bytes / median,
        "percent_of_copy": 100 * experiment.bytes / median / peaks["copy_bytes_per_second"],
    }
    flops = experiment.flops if route.flops is None else route.flops
    if flops:
        rate = flops / median
        figures |= {"flops": flops, "flops_per_second": rate}
        figures["percent_of_mm"] = 100 * rate / peaks["mm_flops_per_second"]
    if experiment.baseline in seconds:
        figures["baseline"] = experiment.baseline
        figures["ratio"], figures["ratio_p20_p80"] = spread(ratios(seconds[name], seconds[experiment.baseline]))
        base = experiment.routes[experiment.baseline].flops or experiment.flops
        if flops:
            # Of two routes that do different amounts of work, the rate says how well each does its own.
            figures["rate_to_baseline"] = flops / base / figures["ratio"]
    if route.serves:
        others = (other for other in seconds if other != name)
        figures["times_as_fast_as"] = {o: statistics.median(ratios(seconds[o], seconds[name])) for o in others}
    return figures
