"""Several TPU slices: replicas alone lie across them, and numbers do not change."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding

from gopd_jax import recipe, setup, sharding, step
from gopd_jax import slices as slicing
from gopd_jax.models.params import logical_axes
from gopd_jax.planning import abstract, chips
from gopd_jax.recipe import init_state

pytestmark = pytest.mark.slow


@pytest.fixture
def scattered(monkeypatch):
    """Eight devices of two slices that take turns in the platform's order."""
    scatter(monkeypatch)


def scatter(monkeypatch):
    monkeypatch.setattr(slicing, "_slice_indices", lambda devices: [d.id % 2 for d in devices])


def fakes(platform, per_slice=2, slices=2):
    """Devices that know their slice; the slices take turns, the last comes first."""
    n = per_slice * slices
    return [
        SimpleNamespace(id=i, slice_index=-i % slices, platform=platform, device_kind="x")
        for i in range(n)
    ]


def test_the_data_axis_has_the_slices_on_its_outside(scattered):
    mesh = sharding.make_mesh(None, 2, 1, slices=2)
    assert sharding.shape(mesh) == {"data": 4, "fsdp": 2, "tensor": 1}  # data counts over both
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert ids.reshape(2, 4).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_without_a_word_of_the_platform_devices_are_taken_in_their_order():
    mesh = sharding.make_mesh(4, 1, 2, slices=2)
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    with pytest.raises(ValueError, match="slices = 2 and the devices lie on 4 slices"):
        slicing.by_slice([*fakes("tpu", slices=4)], 2)


def test_the_order_is_that_of_jaxs_hybrid_mesh():
    devices = fakes("cpu", per_slice=4)
    want = mesh_utils.create_hybrid_device_mesh((1, 2, 2), (2, 1, 1), devices=devices)
    groups = slicing.by_slice(
        [SimpleNamespace(**vars(d) | {"platform": "tpu"}) for d in devices], 2
    )
    got = np.array([[device.id for device in group] for group in groups])
    np.testing.assert_array_equal(got.ravel(), [device.id for device in want.flat])


def test_gpus_of_several_hosts_are_one_mesh():
    """Their slice_index is the host, and parameters may be sharded over hosts."""
    (group,) = slicing.by_slice(devices := fakes("gpu"), 1)
    assert [d.id for d in sharding._laid_out({"data": 1, "fsdp": 4, "tensor": 1}, group).flat] == [
        d.id for d in devices
    ]


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 1, 2), (2, 4, 1)])
def test_each_slice_holds_every_parameter_and_moment_whole(scattered, setting, shape):
    made, *_ = setting()
    mesh = sharding.make_mesh(*shape, slices=2)
    made = dataclasses.replace(made, mesh=mesh)
    state = recipe.abstract_state(made)
    frozen = sharding.shardings(mesh, logical_axes(made.teachers[1].cfg))
    decode = sharding.shardings(mesh, logical_axes(made.student.cfg), sharding.DECODE)
    shapes = recipe.abstract_params(made.teachers[1].cfg), recipe.abstract_params(made.student.cfg)
    laid = [(x.shape, x.sharding) for x in jax.tree.leaves(state)]
    for tree, layout in zip(shapes, (frozen, decode)):
        laid += [(x.shape, w) for x, w in zip(jax.tree.leaves(tree), jax.tree.leaves(layout))]
    assert len(laid) > 50
    for size, layout in laid:
        held = layout.devices_indices_map(size)
        for of_slice in mesh.devices.reshape(2, -1):
            there = np.zeros(size, int)
            for index in {str(held[device]): held[device] for device in of_slice}.values():
                there[index] += 1
            assert (there == 1).all(), (size, layout.spec)


def test_two_slices_compute_what_one_does(monkeypatch, setting):
    made, params, frozen, prompts = setting((2, 2, 2))
    scatter(monkeypatch)
    mesh = sharding.make_mesh(2, 2, 2, slices=2)
    assert mesh.devices.tolist() != made.mesh.devices.tolist()

    def moved(tree):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), tree)

    def run(made, params, frozen, prompts):
        out = step.fused(made)(init_state(made, params), frozen, prompts, jax.random.key(0))
        return jax.device_get(out)

    two = dataclasses.replace(made, mesh=mesh), *map(moved, (params, frozen, prompts))
    (state, rollout, metrics), wanted = run(*two), run(made, params, frozen, prompts)
    np.testing.assert_array_equal(rollout.tokens_BL, wanted[1].tokens_BL)
    for got, want in ((state.params, wanted[0].params), (metrics, wanted[2])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.parametrize(
    ("sizes", "slices", "says"),
    [
        (
            (None, 8, 1),
            2,
            r"slices = 2 does not divide mesh.data = 1 .* mesh.tensor = 8 has to",
        ),
        ((4, 2, 1), 3, "slices = 3 does not divide mesh.data = 4"),
        ((None, 2, 1), 1, "slices = 1 and the devices lie on 2 slices; set --config.mesh.slices=2"),
        ((None, 2, 1), 4, "slices = 4 and the devices lie on 2 slices; .*--topology=2xv5e:4x4"),
    ],
)
def test_slices_that_are_not_there_are_refused(scattered, sizes, slices, says):
    with pytest.raises(ValueError, match=says):
        sharding.make_mesh(*sizes, slices=slices)


def test_slices_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match=r"slices have \[1, 2\] devices; give each the same"):
        slicing.by_slice(fakes("tpu")[:3], 2)


def test_the_setting_reaches_the_mesh_before_anything_is_loaded(root, scattered):
    config = tiny.config(root, mesh={"slices": 2, "fsdp": 2})
    one = tiny.config(root, mesh={"fsdp": 2})
    for make in (setup.checked_mesh, lambda c: abstract.prepare(c, jax.devices()).recipe.mesh):
        assert make(config).devices.flat[0].id == 0
        assert make(config).devices[1].flat[0].id == 4  # of the even slice, not 2 in the order
        with pytest.raises(ValueError, match=r"set --config.mesh.slices=2"):
            make(one)
    config.mesh.slices = 0
    with pytest.raises(ValueError, match=r"mesh\.slices is 0; it has to be positive"):
        setup.checked_mesh(config)


@pytest.mark.parametrize(
    ("name", "parts", "n"),
    [
        ("v5e:4x4", (1, "v5e", (4, 4)), 16),
        ("2xv5e:4x4", (2, "v5e", (4, 4)), 32),
        ("12xv5p:2x2x1", (12, "v5p", (2, 2, 1)), 48),
        ("2xcpu:4", (2, "cpu", (4,)), 8),
    ],
)
def test_a_topology_says_how_many_slices_it_has(name, parts, n):
    assert (chips.parse(name), chips.n_devices(name)) == (parts, n)


def test_emulated_slices_have_devices_of_their_own():
    assert len(chips.topology("2xcpu:4").devices) == 8
    for wrong in ("0xv5e:4x4", "xv5e:4x4", "2x:4", "2v5e:4x4"):
        with pytest.raises(ValueError, match="2xv5e:4x4 for two slices"):
            chips.parse(wrong)


@pytest.mark.tpu
def test_the_tpus_topology_of_two_slices_is_laid_out_as_jaxs_hybrid_mesh():
    pytest.importorskip("libtpu", reason='the TPU compiler: pip install "jax[tpu]"')
    devices = chips.topology("2xv5e:4x4").devices
    mesh = sharding.make_mesh(None, 8, 1, slices=2, devices=devices)
    want = mesh_utils.create_hybrid_device_mesh(
        (2, 8, 1), (2, 1, 1), devices=devices, allow_split_physical_axes=True
    )
    assert mesh.devices.ravel().tolist() == want.ravel().tolist()
    assert {device.slice_index for device in mesh.devices[:2].flat} == {0}
    with pytest.raises(ValueError, match=r"set --config.mesh.slices=2"):
        sharding.make_mesh(None, 8, 1, devices=devices)
    one = chips.topology("v5e:4x4").devices
    assert sharding.make_mesh(None, 8, 1, devices=one).devices.shape == (2, 8, 1, 1, 1)
    with pytest.raises(ValueError, match="devices lie on 1 slices"):
        sharding.make_mesh(None, 8, 1, slices=2, devices=one)


@pytest.mark.tpu
def test_an_axis_may_take_a_part_of_a_torus_and_whole_ones_lie_as_jax_lays_them():
    pytest.importorskip("libtpu", reason='the TPU compiler: pip install "jax[tpu]"')
    devices = chips.topology("v5p:4x4x4").devices
    mesh = sharding.make_mesh(None, 8, 1, expert=8, devices=devices)
    assert mesh.devices.shape == (1, 8, 8, 1, 1)
    assert {*mesh.devices.flat} == {*devices}
    want = jax.make_mesh((16, 4), ("fsdp", "tensor"), devices=devices)
    got = sharding.make_mesh(None, 16, 4, devices=devices)
    assert got.devices.ravel().tolist() == want.devices.ravel().tolist()
