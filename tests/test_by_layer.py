"""Frozen models whose layers stay in host memory, against the same models on the device."""

import dataclasses

import jax
import numpy as np
import pytest
from test_step import KEY

from gopd_jax import sharding, step

MESHES = [(1, 1, 1), (2, 2, 2)]


def by_layer(recipe, frozen):
    """(recipe, frozen) with every frozen model in host memory, to be streamed layer by layer."""

    def streamed(decoder):
        return decoder and dataclasses.replace(decoder, by_layer=True)

    recipe = dataclasses.replace(
        recipe,
        teachers=tuple(map(streamed, recipe.teachers)),
        reference=streamed(recipe.reference),
    )
    return recipe, jax.tree.map(lambda x: jax.device_put(x, sharding.on_host(x.sharding)), frozen)


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize("shape", MESHES)
def test_scores_are_those_of_models_on_the_device(setting, shape):
    recipe, params, frozen, prompts = setting(shape)
    generate, score, _ = step.staged(recipe)
    rollout = generate(params, frozen, prompts, KEY)
    streamed, away = by_layer(recipe, frozen)
    equal(step.staged(streamed)[1](away, rollout), score(frozen, rollout))
