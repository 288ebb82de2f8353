"""What it is worth that the host does not wait for the step before it dispatches the next one.

    python -m benchmarks.overlap --out=docs/profile.png > docs/overlap.md

Three forms of a step on the microworld's models, each with a verifier that does nothing but sleep
for --verify_ms a batch, are run in alternation; each is told as seconds of a step over those of the
same step without overlap:

- *verdicts for the log* (OPD, one compiled step, a verdict on every batch): the row of each step
  waited for before the next one is dispatched, against one step late, as training does it;
- *verdicts in the reward* (GRPO in stages): the same two, and one-step-off, `sampling.lag` = 1,
  where the completions of the next step are written while those of this one are verified.

A sleep takes no core, so that on a CPU too it can be hidden behind a step. The picture is of the
steps that the JAX profiler traced: the device's programs, and what the host did meanwhile.
"""

import argparse
import dataclasses
import gzip
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt

from gopd_jax import advance
from gopd_jax.config import Config
from gopd_jax.microworld import preset
from gopd_jax.recipe import init_state
from gopd_jax.setup import prepare
from gopd_jax.verifiers import Verdict

HOST = ("prompts", "dispatch", "verify", "wait for rollout", "wait for metrics")
COLORS = {
    "device": "#4c72b0",
    "prompts": "#55a868",
    "dispatch": "#8c8c8c",
    "verify": "#dd8452",
    "wait for rollout": "#c7c7c7",
    "wait for metrics": "#e3e3e3",
}


HEAD = """# What the host does while the device works

A step is dispatched before the row of the one before it is waited for, the frozen models score and,
with `sampling.lag` = 1, the next completions are written while the host verifies. The same steps
with and without that, in alternation, as ratios. The verifier here only sleeps, so that on a CPU it
takes none of the cores that are the device. Made by
`python -m benchmarks.overlap --out=docs/profile.png > docs/overlap.md`.
"""


@dataclasses.dataclass
class Arm:
    """A form of the step under way: late, whether a row is asked for one step late."""

    title: str
    stepper: advance.Stepper
    state: object
    late: bool
    at: int = 0  # steps that are done
    seconds: list[float] = dataclasses.field(default_factory=list)  # of a step, by block

    def run(self, steps: int) -> float:
        """Seconds of each of so many steps, the last one's row included."""
        start, under_way = time.perf_counter(), None
        for i in range(self.at, self.at + steps):
            with jax.profiler.TraceAnnotation("prompts"):
                prompts = self.stepper.make(i + self.stepper.run.recipe.lag)
            with jax.profiler.TraceAnnotation("dispatch"):
                self.state, seen = self.stepper.dispatch(self.state, prompts, i)
            if under_way is not None:
                self.stepper.row(under_way)
            under_way = seen
            if not self.late:
                self.stepper.row(under_way)
                jax.block_until_ready(self.state)
                under_way = None
        if under_way is not None:
            self.stepper.row(under_way)
        jax.block_until_ready(self.state)
        self.at += steps
        return (time.perf_counter() - start) / steps


def arms(rows: int) -> dict[str, list[Arm]]:
    """The forms to compare, the one without overlap first."""
    told, logged, rewarded = {}, _config(rows), _config(rows)
    logged.evaluation.verify_every = 1
    told["verdicts for the log"] = [
        _arm("each row waited for", logged, late=False),
        _arm("row one step late", logged, late=True),
    ]
    rewarded.objective.advantage, rewarded.batch.rollouts = "grpo", 4
    rewarded.batch.prompts = rows // 4
    off = dataclasses.replace(
        rewarded,
        sampling=dataclasses.replace(rewarded.sampling, lag=1),
        objective=dataclasses.replace(rewarded.objective, importance="token"),
    )
    told["verdicts in the reward"] = [
        _arm("each row waited for", rewarded, late=False),
        _arm("row one step late", rewarded, late=True),
        _arm("one-step-off, lag = 1", off, late=True),
    ]
    return told


def _config(rows: int) -> Config:
    c = preset.two_teachers("runs/overlap")
    c.batch.prompts, c.batch.rollouts, c.batch.microbatches = rows, 1, 1
    c.evaluation.verify_every = c.diagnostics.every = None
    return c


def _arm(title: str, config: Config, *, late: bool) -> Arm:
    this = prepare(config)
    stepper = advance.Stepper(this)
    state = stepper.begin(init_state(this.recipe, this.student.params))
    return Arm(title=title, stepper=stepper, state=state, late=late)


def sleeping(seconds: float):
    """A verifier that takes so long for a batch and computes nothing."""

    def verify(texts, records):
        time.sleep(seconds)
        # Not all alike: equal rewards have no advantage in GRPO.
        return [Verdict(float(i % 2), "") for i in range(len(texts))]

    return verify


def traced(arm: Arm, steps: int) -> list[tuple[str, float, float]]:
    """(lane, start, end) of the profiler's events in so many steps, milliseconds."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be an event, and cost time
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            arm.run(steps)
        (file,) = Path(folder).rglob("*.trace.json.gz")
        return spans(json.loads(gzip.decompress(file.read_bytes()))["traceEvents"])


def spans(events: list[dict]) -> list[tuple[str, float, float]]:
    """(lane, start, end) in milliseconds from the first: the device's programs, the host's parts.

    events: of Chrome's trace format. An accelerator's are those of its process; on a CPU a program
    is an event of XLA's executor on some thread of the host.
    """
    process = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    found = []
    for e in events:
        if e.get("ph") != "X":
            continue
        lane = e["name"] if e["name"] in HOST else None
        if e["name"].startswith("ThunkExecutor::Execute") or "/device:" in process[e["pid"]]:
            lane = "device"
        if lane:
            found.append((lane, e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3))
    if not found:
        raise ValueError("the trace holds no event of the device or of a step; is it of a run?")
    first = min(start for _, start, _ in found)
    return sorted((lane, start - first, end - first) for lane, start, end in found)


def busy(found: list[tuple[str, float, float]], lane: str) -> float:
    """Milliseconds in which at least one event of a lane goes on."""
    total, until = 0.0, 0.0
    for _, start, end in sorted((s for s in found if s[0] == lane), key=lambda s: s[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def draw(pictures: dict[str, list[tuple[str, float, float]]], out: Path, note: str) -> None:
    """One strip a form: its device's programs above what the host does."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(
        len(pictures), 1, figsize=(10, 1.5 * len(pictures) + 0.8), sharex=True, squeeze=False
    )
    for axis, (title, found) in zip(axes[:, 0], pictures.items()):
        for lane, start, end in found:
            row = 1 if lane == "device" else 0
            axis.barh(row, end - start, left=start, height=0.8, color=COLORS[lane], linewidth=0)
        axis.set_yticks((0, 1), ("host", "device"))
        end = max(end for _, _, end in found)
        share = busy(found, "device") / end
        axis.set_title(f"{title}: the device is at work {share:.0%} of the time", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    names = ["device: programs", *(f"host: {name}" for name in HOST)]
    axes[-1, 0].set_xlabel(f"milliseconds. {note}", fontsize=8)
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(out, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a .png of the traced steps; none without it")
    parser.add_argument("--verify_ms", type=float, default=50.0, help="of the verifier, a batch")
    parser.add_argument("--rows", type=int, default=16, help="of a batch; a multiple of 8")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--blocks", type=int, default=5, help="of each form, in alternation")
    parser.add_argument("--traced", type=int, default=4, help="steps of each form in the picture")
    asked = parser.parse_args()
    if asked.rows < 8 or asked.rows % 8:
        parser.error(f"--rows is {asked.rows}; give a multiple of 8: two tasks, four rollouts each")
    advance.verify = sleeping(asked.verify_ms / 1e3)
    note = (
        f"{asked.rows} rows, verifier {asked.verify_ms:g} ms a batch, {jax.devices()[0].platform}"
    )
    pictures = {}
    print(f"{HEAD}\n{note}; {asked.blocks} blocks of {asked.steps} steps of each form: medians.\n")
    print("| step | form | ms a step | of the first form |\n|---|---|---:|---:|")
    for name, forms in arms(asked.rows).items():
        for arm in forms:
            arm.run(2)  # compiles
        for _ in range(asked.blocks):
            for arm in forms:
                arm.seconds.append(arm.run(asked.steps))
        for arm in forms:
            ratio = statistics.median(a / b for a, b in zip(arm.seconds, forms[0].seconds))
            milliseconds = 1e3 * statistics.median(arm.seconds)
            print(f"| {name} | {arm.title} | {milliseconds:.1f} | {ratio:.3f} |", flush=True)
            if asked.out:
                pictures[f"{name}, {arm.title}"] = traced(arm, asked.traced)
    if asked.out:
        draw(pictures, asked.out, note)
        print(f"\n![Where the time of {asked.traced} steps goes]({asked.out.name})")


if __name__ == "__main__":
    main()
