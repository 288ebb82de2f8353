"""Meshes, layouts, and the way of rows from a host to all devices and back."""

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import MOE
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gopd_jax import processes, sharding
from gopd_jax.models.params import abstract_params, logical_axes


def test_a_mesh_takes_all_devices_or_those_given():
    assert sharding.shape(sharding.make_mesh(2, 2, 2)) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.shape(sharding.make_mesh(None, 2, 1)) == {"data": 4, "fsdp": 2, "tensor": 1}
    mesh = sharding.make_mesh(None, 1, 2, expert=1, sequence=2)
    assert sharding.shape(mesh) == {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2}
    assert tuple(mesh.shape) == ("data", "fsdp", "expert", "sequence", "tensor")
    # Neighbours share rows and positions: "tensor" is the innermost axis, "sequence" the next.
    assert [d.id for d in mesh.devices[0].flat] == [0, 1, 2, 3]
    some = jax.devices()[4:6]
    mesh = sharding.make_mesh(None, 1, 2, devices=some)
    assert (sharding.shape(mesh), set(mesh.devices.flat)) == (
        {"data": 1, "fsdp": 1, "tensor": 2},
        set(some),
    )
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, 2, 1),
            r"\* mesh.fsdp \* mesh.tensor = 2 \* 2 \* 1 = 4 and there are 8 devices; leave mesh",
        ),
        ((8, 2, 1), r"= 16 and there are 8 devices"),
        ((None, 3, 1), r"fsdp \* mesh.tensor = 3 \* 1 does not divide the 8 devices; choose"),
        ((None, 4, 4), r"4 \* 4 does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*shape)


def test_every_axis_that_is_used_is_named_where_the_mesh_does_not_fit():
    said = r"mesh.fsdp \* mesh.expert \* mesh.sequence \* mesh.tensor = 1 \* 3 \* 2 \* 1 does not"
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(None, 1, 1, expert=3, sequence=2)
    said = r"mesh.data \* mesh.fsdp \* mesh.sequence \* mesh.tensor = 2 \* 1 \* 2 \* 1 = 4"
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(2, 1, 1, sequence=2)
    with pytest.raises(ValueError, match=r"alone .*mesh.fsdp \* mesh.sequence \* mesh.tensor = 4"):
        sharding.make_mesh(2, 1, 1, sequence=4, slices=4)


def test_rows_are_decoded_on_every_device_but_those_of_tensor(make_mesh):
    mesh = make_mesh((2, 1, 1, 2, 2))
    assert (sharding.n_row_shards(mesh), sharding.n_decode_shards(mesh)) == (4, 8)
    assert sharding.require_rows(mesh, 16) == 2
    said = r"4 rows .* mesh.sequence = 2 \* 1 \* 2 \* 2, over which tokens are decoded"
    with pytest.raises(ValueError, match=said):
        sharding.require_rows(mesh, 4)

    def flip(tree):
        return sharding.constrain_decode_rows(mesh, jax.tree.map(lambda x: x[::-1], tree))

    with sharding.use(mesh):
        out = jax.jit(flip)(np.arange(8))
    assert {shard.data.shape for shard in out.addressable_shards} == {(1,)}


def test_training_shards_the_width_and_decoding_does_not(make_mesh):
    mesh = make_mesh((2, 2, 2))
    axes = {"q": ("layers", "embed", "heads", "head_dim"), "embed": ("vocab", "embed")}
    train = sharding.shardings(mesh, axes)
    assert train["q"].spec == P(None, sharding.WEIGHTS, "tensor", None)
    assert train["embed"].spec == P("tensor", sharding.WEIGHTS)
    decode = sharding.shardings(mesh, axes, sharding.DECODE)
    assert decode["q"].spec == P(None, None, "tensor", None)
    assert decode["embed"].spec == P("tensor", None)
    assert sharding.replicated(mesh).spec == P()
    assert sharding.by_rows(mesh).spec == P(("data", "fsdp", "expert"))
    assert sharding.n_row_shards(mesh) == 4


def test_every_matrix_of_a_model_is_spread_over_the_whole_mesh(make_model, make_mesh):
    decoder, params = make_model()
    mesh = make_mesh((1, 2, 4))
    spread = jax.device_put(params, sharding.shardings(mesh, logical_axes(decoder.cfg)))
    layers = spread.pop("layers")
    pieces = {"embed": 8, "final_norm": 2, "attention_norm": 2, "mlp_norm": 2}
    pieces |= {"q_norm": 1, "k_norm": 1}  # norms of one head's width
    pieces |= dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 8)
    for name, x in (spread | layers).items():
        assert {x.size // shard.data.size for shard in x.addressable_shards} == {pieces.pop(name)}
    assert not pieces


def test_each_device_holds_some_of_the_experts_and_the_whole_choice(make_mesh):
    mesh, axes = make_mesh((2, 2, 2)), logical_axes(MOE)["layers"]
    for rules, width in ((sharding.TRAIN, sharding.WEIGHTS), (sharding.DECODE, None)):
        layers = sharding.shardings(mesh, axes, rules)
        assert layers["expert_up"].spec == P(None, ("expert", "tensor"), width, None)
        assert layers["expert_down"].spec == P(None, ("expert", "tensor"), None, width)
        assert layers["router"].spec == P(None, width, None)
    found = abstract_params(MOE), logical_axes(MOE)
    problems = sharding.mesh_problems(make_mesh((1, 1, 8)), *found, role="teacher")
    assert any(
        text.startswith("teacher has 4 along 'experts', which mesh.tensor = 8") for text in problems
    )
    assert sharding.mesh_problems(make_mesh((1, 1, 1, 4)), *found, role="teacher") == []
    assert sharding.mesh_problems(make_mesh((1, 1, 1, 8)), *found, role="teacher") == [
        "teacher has 4 along 'experts', which mesh.expert * mesh.tensor = 8 * 1 does not divide; "
        "choose a divisor of 4"
    ]


def test_devices_for_experts_ask_for_a_model_that_has_some(make_mesh):
    sharding.require_experts(make_mesh((1, 2, 1)), routed=False)
    sharding.require_experts(make_mesh((1, 1, 1, 4)), routed=True)
    with pytest.raises(ValueError, match=r"mesh.expert = 4, and no .* multiply mesh.fsdp by 4"):
        sharding.require_experts(make_mesh((1, 1, 1, 4)), routed=False)


def test_dimensions_that_the_mesh_does_not_divide_are_named(make_model, make_mesh):
    cfg = make_model()[0].cfg
    mesh = make_mesh((1, 2, 4))

    def problems(**changes):
        changed = dataclasses.replace(cfg, **changes)
        found = abstract_params(changed), logical_axes(changed)
        return sharding.mesh_problems(mesh, *found, role="teacher of math")

    assert problems() == []
    assert problems(num_key_value_heads=2) == [
        "teacher of math has 2 along 'kv_heads', which mesh.tensor = 4 does not divide; "
        "choose a divisor of 2"
    ]
    found = problems(hidden_size=33, vocab_size=67, intermediate_size=50)
    sizes = [text.split(" has ")[1].split(" does not")[0] for text in found]
    assert sizes == [
        "67 along 'vocab', which mesh.tensor = 4",
        "33 along 'embed', which mesh.fsdp = 2",
        "50 along 'mlp', which mesh.tensor = 4",
    ]


def test_rules_and_mesh_are_in_force_inside_use_and_nowhere_else(make_mesh):
    mesh = make_mesh((2, 2, 2))

    def specs():
        def hold(x):
            return nn.with_logical_constraint(x, ("batch", "embed", "heads"))

        jaxpr = jax.make_jaxpr(hold)(jnp.zeros((4, 2, 2)))
        return [eqn.params["sharding"].spec for eqn in jaxpr.eqns]

    assert specs() == []
    with sharding.use(mesh):  # rows lie on "fsdp" too, so that their width cannot
        assert specs() == [P(("data", "fsdp", "expert"), None, "tensor")]
    with sharding.use(mesh, (("embed", "fsdp"),)):
        assert specs() == [P(None, "fsdp", None)]
    assert specs() == []


def test_rows_go_to_the_devices_and_come_back_in_order(make_mesh):
    mesh = make_mesh((2, 2, 2))
    rows = {"x": np.arange(24).reshape(8, 3), "y": np.arange(8) > 2}
    placed = processes.to_global(mesh, rows)
    assert placed["x"].sharding.spec == P(("data", "fsdp", "expert"))
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 3)}
    for back in (processes.to_host(placed), processes.gather(placed)):
        assert isinstance(back["x"], np.ndarray)
        np.testing.assert_array_equal(back["x"], rows["x"])
        np.testing.assert_array_equal(back["y"], rows["y"])


def test_a_process_joins_its_own_shards_in_order_of_rows():
    """An array whose other half is on another process: two copies of two shards, out of order."""
    data = np.arange(4, 8)
    shards = [
        SimpleNamespace(index=(slice(a, b),), data=data[a - 4 : b - 4])
        for a, b in ((6, 8), (4, 6), (6, 8), (4, 6))
    ]
    array = SimpleNamespace(is_fully_addressable=False, addressable_shards=shards)
    np.testing.assert_array_equal(processes.to_host([array])[0], data)


def test_rows_are_held_to_the_row_axes_inside_a_jit(make_mesh):
    mesh = make_mesh((2, 2, 2))

    def flip(tree):
        return sharding.constrain_rows(jax.tree.map(lambda x: x[::-1], tree))

    with sharding.use(mesh):
        out = jax.jit(flip)({"x": np.arange(8)})["x"]
    assert out.sharding.is_equivalent_to(sharding.by_rows(mesh), 1)
    np.testing.assert_array_equal(out, np.arange(8)[::-1])


def test_one_process_feeds_all_rows(make_mesh):
    assert sharding.process_share(make_mesh((2, 2, 2)), 8) == (0, 1)
    assert sharding.process_share(make_mesh((1, 1, 1)), 5) == (0, 1)


def test_rows_that_do_not_divide_over_the_mesh_are_refused(make_mesh):
    with pytest.raises(ValueError, match=r"6 rows .* mesh.data \* mesh.fsdp = 2 \* 2"):
        sharding.process_share(make_mesh((2, 2, 2)), 6)


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([(None, 2), (2, 4)], (0, 2)),  # the first and the second of two processes
        ([(4, 6), (6, None)], (1, 2)),
        ([(6, None), (4, 6), (4, 6), (6, None)], (1, 2)),  # each row on two of its devices
        ([(2, 4)], (1, 4)),
        ([(None, None)], (0, 1)),  # tensor parallel over processes: all of them feed all rows
    ],
)
def test_a_process_feeds_the_rows_of_its_devices(make_mesh, monkeypatch, spans, share):
    mesh = make_mesh((2, 2, 2))
    held = {i: (slice(a, b, None),) for i, (a, b) in enumerate(spans)}
    fake = SimpleNamespace(addressable_devices_indices_map=lambda shape: held)
    monkeypatch.setattr(sharding, "by_rows", lambda mesh: fake)
    assert sharding.process_share(mesh, 8) == share


@pytest.mark.parametrize(
    "spans", [[(None, 2), (4, 6)], [(None, 2), (6, None)], [(2, 4), (4, 6)]], ids=str
)
def test_a_process_whose_rows_are_no_run_of_its_share_is_refused(make_mesh, monkeypatch, spans):
    mesh = make_mesh((2, 2, 2))
    held = {i: (slice(a, b, None),) for i, (a, b) in enumerate(spans)}
    fake = SimpleNamespace(addressable_devices_indices_map=lambda shape: held)
    monkeypatch.setattr(sharding, "by_rows", lambda mesh: fake)
    with pytest.raises(ValueError, match="do not hold one run of rows: reorder the mesh"):
        sharding.process_share(mesh, 8)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no backend\nmore")])
def test_a_platform_without_devices_is_named(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ValueError, match=r"no device where JAX_PLATFORMS is cuda.*unset it"):
        sharding.make_mesh(None, 1, 1)
