"""A step is compiled once, whatever the lengths of prompts and completions."""

import jax
import numpy as np

from gopd_jax import processes, step
from gopd_jax.recipe import init_state


def test_steps_of_other_lengths_compile_nothing(setting):
    """Neither slots nor widths make shapes of their own."""
    recipe, params, frozen, prompts = setting(
        (2, 1, 1), slots=4, buckets=3, sampling_buckets=3, prompt_buckets=2
    )
    compiled = []

    def count(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    run, state, lengths = step.fused(recipe), init_state(recipe, params), set()
    keys = [jax.random.key(i) for i in range(6)]
    wholes = []
    for i in range(6):  # prompts of other lengths, too
        valid_BP = np.arange(5) >= 4 - (np.arange(16)[:, None] + i) % 5
        tokens_BP = np.where(valid_BP, np.arange(5) + i, -1).astype(np.int32)
        changed = jax.device_get(prompts).replace(tokens_BP=tokens_BP, valid_BP=valid_BP)
        wholes.append(processes.to_global(recipe.mesh, changed))
    state, rollout, _ = run(state, frozen, wholes[0], keys[0])
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for rows, key in zip(wholes[1:], keys[1:]):
            state, rollout, _ = run(state, frozen, rows, key)
            lengths.add(tuple(np.asarray(rollout.mask_BT).sum(1)))
        assert len(lengths) == 5
        assert compiled == []
        jax.jit(lambda x: x + 17)(np.float32(1))
        assert compiled  # the count sees what there is
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
