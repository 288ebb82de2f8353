"""The programs of a run, compiled ahead of time: what each needs, computes and would take.

Memory is the compiler's own account. Seconds are a roofline, an estimate that is as good as its
assumptions (`ASSUMED`); nothing is run.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Iterator

import jax

from gopd_jax import sharding, step
from gopd_jax.models import lora
from gopd_jax.planning import abstract, collectives, evaluated, flops, reads, streamed, traffic
from gopd_jax.planning.chips import FLOAT32_PASSES, GIB, HOST_LINK, Topology
from gopd_jax.planning.flops import Work
from gopd_jax.recipe import following

STEP = ("generate", "score", "update", "fused")
PHASES = (*STEP, "evaluate")
ASSUMED = (
    "every completion as long as the limit",
    "products at --mfu of the chip's bfloat16 peak, a float32 product as "
    f"{FLOAT32_PASSES} bfloat16 passes, evenly spread over the chips",
    "each token reads the weights in decode layout and the cache once, up to the width (one of "
    "sampling.buckets) that holds what is there, at full HBM bandwidth; other phases read their "
    "arguments once",
    "nothing for collectives, host work, evaluation and checkpoints",
    "templates of roles alike unless a setting says otherwise",
)
ASSUMED_OF_HOST = (
    f"weights in host memory come in at {HOST_LINK / 1e9:.0f} GB/s a chip, whole models before "
    "their work, single layers beside it and for each microbatch anew"
)
_UNIT = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A phase as it is traced. held: what the run has on the devices while it is at work.

    counted: a trace that has the same products, each as often as it runs; None: traced itself.
    """

    name: str
    traced: jax.stages.Traced
    held: object
    counted: jax.stages.Traced | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device. beside: what the run holds there that the program does not take.

    host: what the run holds for the device in its host's memory.
    """

    arguments: int
    temporaries: int
    output: int
    aliased: int
    beside: int
    host: int = 0

    @property
    def peak(self) -> int:
        """What has to be there at one time: donated arguments become outputs."""
        return self.arguments + self.temporaries + self.output - self.aliased + self.beside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A phase's answer. memory None: the compiler refused it, exhausted says with what words.

    seconds: of the compilation. work: FLOPs of the whole mesh. buffers: the largest arrays, of one
    device where it says no other. sent: bytes of collectives on one device, by kind, where they
    were counted. loops: of rollouts, what a turn reads and writes. estimate: seconds by what takes
    them.
    """

    name: str
    seconds: float
    work: Work
    memory: Memory | None = None
    needed: int | None = None  # bytes that the compiler says it would have needed
    exhausted: str | None = None
    buffers: tuple[str, ...] = ()
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    loops: tuple[traffic.Loop, ...] = ()
    estimate: dict[str, float] = dataclasses.field(default_factory=dict)

    def fits(self, usable: int) -> bool:
        return self.memory is not None and self.memory.peak <= usable


def used_by(run: abstract.Run) -> tuple[str, ...]:
    """The programs that training runs: the fused step, or its stages around a verifier's reward.

    And evaluation's, of a model that the step does not sample from, or not in the same way.
    """
    steps = STEP[:3] if run.recipe.objective.needs_reward else ("fused",)
    return (*steps, "evaluate") if evaluated.names(run) else steps


def possible(run: abstract.Run, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that the run may have. ValueError for unknown ones, and for none."""
    if unknown := [name for name in names if name not in PHASES]:
        raise ValueError(f"--phase has {unknown}; the phases are {list(PHASES)}")
    if not (left := kept(run, names)) and names:
        raise ValueError(
            "--phase=evaluate, and this run evaluates with the program of its rollout: no teacher "
            "(evaluation.teachers), no other numbers (sampling.cache_dtype, sampling.weights_dtype)"
        )
    names = left
    if run.recipe.objective.needs_reward:  # the host works between the stages
        names = tuple(name for name in names if name != "fused")
    if not names:
        raise ValueError(
            "--phase=fused, and the objective has a verifier's reward, which the host computes "
            f"between the stages; there are {list(STEP[:3])}"
        )
    return names


def kept(run: abstract.Run, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` without the evaluation, where the rollout's program is all it runs."""
    return names if evaluated.names(run) else tuple(name for name in names if name != "evaluate")


def programs(run: abstract.Run, names: tuple[str, ...]) -> Iterator[Program]:
    """The phases of `names`, traced in the order of PHASES. Nothing is compiled."""
    made, frozen, prompts, key = run.recipe, run.frozen, run.prompts, run.key
    generate, score, update = step.staged(made)
    state, rollout, scores = abstract.state(run), None, None
    rows = sharding.by_rows(made.mesh)
    loaded = abstract.loaded(run)

    def laid(tree):
        def one(x):  # of all that is handed on, states of positions alone have a third axis
            where = sharding.by_positions(made.mesh) if x.ndim > 2 else rows
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        return jax.tree.map(one, tree)

    followed = following(frozen, state)
    # In which turns slots are refilled cannot be read off a program; without slots it has the same
    # products, each in a loop of known length.
    plain = None if made.slots is None else dataclasses.replace(made, slots=None)
    if made.lag or {"generate", "score", "update"} & {*names}:
        traced = generate.trace(state.params, followed, prompts, key)
        rollout = laid(traced.out_info)
        if made.lag:
            state = abstract.state(run, rollout)
        if "generate" in names:
            held = state, loaded, prompts
            counted = plain and step.staged(plain)[0].trace(state.params, followed, prompts, key)
            yield Program(name="generate", traced=traced, held=held, counted=counted)
    if {"score", "update"} & {*names}:
        traced = score.trace(followed, rollout)
        scores = laid(traced.out_info)
        if made.objective.needs_reward:
            scores = scores.replace(
                reward_B=jax.ShapeDtypeStruct(rollout.ended_B.shape, "float32", sharding=rows)
            )
        if "score" in names:
            yield Program(name="score", traced=traced, held=(state, loaded, rollout))
    if "update" in names:
        traced = update.trace(state, rollout, scores, followed)
        yield Program(name="update", traced=traced, held=(state, loaded, rollout, scores))
    if "fused" in names:
        traced = step.fused(made).trace(state, frozen, prompts, key)
        counted = plain and step.fused(plain).trace(state, frozen, prompts, key)
        held = state, loaded, prompts
        yield Program(name="fused", traced=traced, held=held, counted=counted)
    if "evaluate" in names and (one := evaluated.largest(run)) is not None:
        yield _evaluation(run, one, state, loaded)


def _evaluation(run: abstract.Run, one: evaluated.Sampled, state, loaded) -> Program:
    """Of the model that needs most: with it the others fit, one after another."""
    made, params = run.recipe, run.roles[one.name].params
    if one.name == "student" or params is None:
        params = lora.join(state.params, run.frozen.base)
    prompts = evaluated.prompts(run, one)

    def traced(recipe):
        return step.sampling(recipe, one.decoder).trace(params, prompts, run.key)

    return Program(
        name="evaluate",
        traced=traced(made),
        held=(state, loaded, prompts),
        counted=traced(dataclasses.replace(made, slots=None)) if made.slots else None,
    )


def compiled(run: abstract.Run, program: Program, topology: Topology, *, mfu: float) -> Compiled:
    """The compiler's answer for a phase; its refusal for lack of memory is one."""
    work = flops.count((program.counted or program.traced).jaxpr)
    start = time.perf_counter()
    try:
        with sharding.use(run.recipe.mesh):
            made = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = _refused(program, work, time.perf_counter() - start, str(error))
        estimate = roofline(run, program.name, work, None, topology, mfu=mfu)
        return dataclasses.replace(refused, estimate=estimate)
    seconds = time.perf_counter() - start
    told = made.memory_analysis()
    arguments = told.argument_size_in_bytes
    memory = Memory(
        arguments=arguments,
        temporaries=told.temp_size_in_bytes,
        output=told.output_size_in_bytes,
        aliased=told.alias_size_in_bytes,
        beside=max(0, bytes_of(program.held) - arguments),
        host=streamed.there(program.held),
    )
    text = made.as_text()
    arrays = [f"{size / GIB:.2f} GiB {what}" for size, what in collectives.largest(text)]
    return Compiled(
        name=program.name,
        seconds=seconds,
        work=work,
        memory=memory,
        buffers=tuple(arrays),
        sent=collectives.sent(text),
        loops=tuple(traffic.loops(text)),
        estimate=roofline(run, program.name, work, memory, topology, mfu=mfu),
    )


def _refused(program: Program, work: Work, seconds: float, said: str) -> Compiled:
    """What the message tells: bytes needed, and the largest allocations where it lists them."""
    needed = re.search(r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", said)
    amount = [x for x in needed.groups() if x] if needed else None
    listed = re.findall(
        r"Size: (\S+)\s*\n(?:\s*Operator: op_name=\"([^\"]*)\"[^\n]*\n)?\s*Shape: (\S+)", said
    )
    buffers = [f"{size} {shape} {op.rsplit('/', 3)[-1]}" for size, op, shape in listed[:4]]
    if not buffers:
        buffers = [
            f"{size / GIB:.1f} GiB over the whole mesh, if it exists at one time: {what}"
            for size, what in flops.largest(program.traced.jaxpr)
        ]
    return Compiled(
        name=program.name,
        seconds=seconds,
        work=work,
        needed=int(float(amount[0]) * _UNIT[amount[1]]) if amount else None,
        exhausted=said.strip().splitlines()[0],
        buffers=tuple(buffers),
    )


def bytes_of(tree) -> int:
    """Bytes of one device's shards of abstract arrays, without those in host memory."""
    return sum(
        streamed.shard_bytes(x)
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != streamed.HOST
    )


# --- the estimate


def roofline(
    run: abstract.Run, name: str, work: Work, memory: Memory | None, topology: Topology, *, mfu
) -> dict[str, float]:
    """Seconds of a phase by what takes them: "decode: HBM", "generate: compute" and so on.

    Of each part the slowest of its limits; {} where nothing is known of the chip. memory None: of a
    phase that does not fit, whose compute and host link alone are told. {} of an evaluation, which
    is no part of a step. An estimate.
    """
    chip = topology.chip
    if chip is None or name == "evaluate":
        return {}
    found = {}
    if work.looped.total:
        computed, read = seconds_computed(work.looped, topology, mfu), seconds_read(run, topology)
        _slowest(found, "decode", {"compute": computed, "HBM": read})
    touched = 0 if memory is None else memory.arguments + memory.output
    rest = "rest of the step" if name == "fused" else name
    before, beside = (size / HOST_LINK for size in streamed.brought(run, name))
    computed = seconds_computed(work - work.looped, topology, mfu)
    limits = {"compute": computed, "HBM": touched / chip.bandwidth, "host link": beside}
    _slowest(found, rest, limits)
    if before:  # nothing runs meanwhile
        found[f"{rest}: host link"] = found.get(f"{rest}: host link", 0.0) + before
    return found


def seconds_computed(work: Work, topology: Topology, mfu: float) -> float:
    """Seconds in which the devices, of a chip that is known, do these products."""
    rate = len(topology.devices) * topology.chip.flops * mfu
    return (work.narrow + FLOAT32_PASSES * work.float32) / rate


def seconds_read(run: abstract.Run, topology: Topology) -> float:
    """Seconds in which HBM gives what the tokens of a step read; of a chip that is known."""
    turns, size = reads.decode_reads(run)
    return turns * size / topology.chip.bandwidth


def assumed(run: abstract.Run) -> tuple[str, ...]:
    """What the estimate of this run rests on."""
    return (*ASSUMED, ASSUMED_OF_HOST) if streamed.there(run.frozen) else ASSUMED


def parts(found: Iterable[Compiled]) -> dict[str, float]:
    """Seconds by part: of the stages where there are all, else of what was compiled."""
    named = {one.name: one.estimate for one in found if one.estimate}
    stages = [named[name] for name in STEP[:3] if name in named]
    chosen = stages if len(stages) == 3 or "fused" not in named else [named["fused"]]
    return {name: seconds for part in chosen for name, seconds in part.items()}


def _slowest(found: dict, part: str, limits: dict[str, float]) -> None:
    name = max(limits, key=limits.get)
    found[f"{part}: {name}"] = limits[name]
