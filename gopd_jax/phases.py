"""The programs of a step, compiled ahead of time: what each needs, computes and would take.

Memory is the compiler's own account. Seconds are a roofline, an estimate that is as good as its
assumptions (`ASSUMED`); nothing is run.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterable, Iterator

import jax

from gopd_jax import abstract, collectives, flops, sharding, step
from gopd_jax.chips import FLOAT32_PASSES, GIB, Topology
from gopd_jax.flops import Work
from gopd_jax.models import lora
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import abstract_params, logical_axes
from gopd_jax.recipe import following

PHASES = ("generate", "score", "update", "fused")
ASSUMED = (
    "every completion as long as the limit",
    "products at --mfu of the chip's bfloat16 peak, a float32 product as "
    f"{FLOAT32_PASSES} bfloat16 passes, evenly spread over the chips",
    "each token reads the weights in decode layout and all slots of the cache once, at full HBM "
    "bandwidth; other phases read their arguments once",
    "nothing for collectives, host work, evaluation and checkpoints",
    "templates of roles alike unless a setting says otherwise",
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
    """Bytes of one device. beside: what the run holds there that the program does not take."""

    arguments: int
    temporaries: int
    output: int
    aliased: int
    beside: int

    @property
    def peak(self) -> int:
        """What has to be there at one time: donated arguments become outputs."""
        return self.arguments + self.temporaries + self.output - self.aliased + self.beside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A phase's answer. memory None: the compiler refused it, exhausted says with what words.

    seconds: of the compilation. work: FLOPs of the whole mesh. buffers: the largest arrays, of one
    device where it says no other. sent: bytes of collectives on one device, by kind, where they
    were counted. estimate: seconds by what takes them.
    """

    name: str
    seconds: float
    work: Work
    memory: Memory | None = None
    needed: int | None = None  # bytes that the compiler says it would have needed
    exhausted: str | None = None
    buffers: tuple[str, ...] = ()
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    estimate: dict[str, float] = dataclasses.field(default_factory=dict)

    def fits(self, usable: int) -> bool:
        return self.memory is not None and self.memory.peak <= usable


def used_by(run: abstract.Run) -> tuple[str, ...]:
    """The programs that training runs: the fused step, or its stages around a verifier's reward."""
    return PHASES[:3] if run.recipe.objective.reward else ("fused",)


def possible(run: abstract.Run, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that the objective allows. ValueError for unknown ones, and for none."""
    if unknown := [name for name in names if name not in PHASES]:
        raise ValueError(f"--phase has {unknown}; the phases are {list(PHASES)}")
    if run.recipe.objective.reward:  # the host works between the stages
        names = tuple(name for name in names if name != "fused")
    if not names:
        raise ValueError(
            "--phase=fused, and the objective has a verifier's reward, which the host computes "
            f"between the stages; there are {list(PHASES[:3])}"
        )
    return names


def programs(run: abstract.Run, names: tuple[str, ...]) -> Iterator[Program]:
    """The phases of `names`, traced in the order of PHASES. Nothing is compiled."""
    made, frozen, prompts, key = run.recipe, run.frozen, run.prompts, run.key
    generate, score, update = step.staged(made)
    state, rollout, scores = abstract.state(run), None, None
    rows = sharding.by_rows(made.mesh)
    # setup keeps what it loaded. The student's first weights go once there is a state, but for what
    # of them is frozen: another role's, or what adapters are trained beside.
    whole = {} if frozen.base is None else {run.roles["student"].source: frozen.base}
    for name, role in run.roles.items():
        if name != "student" and role.params is not None:
            whole[role.source] = role.params
    loaded = [*whole.values()]

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
        if made.objective.reward:
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
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != "pinned_host"
    )


# --- the estimate


def roofline(
    run: abstract.Run, name: str, work: Work, memory: Memory | None, topology: Topology, *, mfu
) -> dict[str, float]:
    """Seconds of a phase by what takes them: "decode: HBM", "generate: compute" and so on.

    Of each part the slower of its two limits; {} where nothing is known of the chip. memory None:
    of a phase that does not fit, whose compute alone is told. An estimate.
    """
    chip = topology.chip
    if chip is None:
        return {}
    rate = len(topology.devices) * chip.flops * mfu

    def computing(part: Work) -> float:
        return (part.narrow + FLOAT32_PASSES * part.float32) / rate

    found = {}
    if work.looped.total:
        turns, bytes_ = decode_reads(run)
        _slower(found, "decode", computing(work.looped), turns * bytes_ / chip.bandwidth)
    touched = 0 if memory is None else memory.arguments + memory.output
    rest = "rest of the step" if name == "fused" else name
    _slower(found, rest, computing(work - work.looped), touched / chip.bandwidth)
    return found


def parts(found: Iterable[Compiled]) -> dict[str, float]:
    """Seconds by part: of the stages where there are all, else of what was compiled."""
    named = {one.name: one.estimate for one in found if one.estimate}
    stages = [named[name] for name in PHASES[:3] if name in named]
    chosen = stages if len(stages) == 3 or "fused" not in named else [named["fused"]]
    return {name: seconds for part in chosen for name, seconds in part.items()}


def _slower(found: dict, part: str, compute: float, memory: float) -> None:
    found[f"{part}: compute" if compute >= memory else f"{part}: HBM"] = max(compute, memory)


def decode_reads(run: abstract.Run) -> tuple[int, int]:
    """(turns of the loop where every row runs to its full length, bytes of HBM that one reads).

    Weights in decode layout once, without an embedding that is only looked up in; the cache whole,
    because attention masks its empty slots and reads them.
    """
    made, length = run.recipe, run.prompts.tokens_BP.shape[1] + run.recipe.completion_length
    total, turns = 0, made.completion_length - 1
    for decoder, n_rows, at_once in writers(run):
        if at_once < n_rows:
            turns = -(-n_rows * made.completion_length // at_once)
        total += weights_read(made.mesh, decoder)
        total += cache_bytes(made.mesh, decoder, at_once, length)
    return turns, total


def writers(run: abstract.Run) -> list[tuple[Decoder, int, int]]:
    """(who writes completions, of how many rows, of how many at one time), one after another."""
    made = run.recipe
    rows = {made.student: sum(made.group_rows)}
    if made.source == "teacher":
        (routes,) = made.routes
        of = {i: sum(n for j, n in zip(routes, made.group_rows) if i == j) for i in {*routes}}
        return [(made.teachers[i], n, min(n, made.slots or n)) for i, n in of.items()]
    return [(decoder, n, min(n, made.slots or n)) for decoder, n in rows.items()]


def cache_bytes(mesh, decoder, n_rows: int, length: int) -> int:
    """Keys and values of one device's rows and heads."""
    cfg, shards = decoder.cfg, sharding.n_decode_shards(mesh)
    n_rows = -(-n_rows // shards) * shards
    names = {"cache": (None, "batch", "kv_heads", None, None)}
    layout = sharding.shardings(mesh, names, sharding.DECODE)["cache"]
    shape = cfg.num_hidden_layers, n_rows, cfg.num_key_value_heads, length, cfg.head_dim
    return 2 * math.prod(layout.shard_shape(shape)) * jax.numpy.dtype(decoder.dtype).itemsize


def weights_read(mesh, decoder) -> int:
    """Bytes of one device's weights in decode layout, as a token reads them."""
    cfg = lora.base_config(decoder.cfg)
    shapes, axes = abstract_params(cfg), logical_axes(cfg)
    if not cfg.tie_word_embeddings:
        shapes, axes = ({k: x for k, x in tree.items() if k != "embed"} for tree in (shapes, axes))
    layout = sharding.shardings(mesh, axes, sharding.DECODE)
    sizes = jax.tree.map(lambda x, where: math.prod(where.shard_shape(x.shape)), shapes, layout)
    return sum(jax.tree.leaves(sizes)) * jax.numpy.dtype(decoder.dtype).itemsize
