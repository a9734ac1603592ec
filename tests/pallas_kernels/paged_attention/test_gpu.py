"""The GPU kernel against the definition: in the interpreter, and on a GPU where there is one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import PagedCache, core, gpu, paged_attention, quantize
from pallas_kernels.paged_attention.gpu import GpuConfig
from pallas_kernels.paged_attention.segments import Carry, Segments, decode_segments
from pallas_kernels.platform import platform
from pallas_kernels.shared_prefix_attention import Crossover, make_plan, shared_prefix_attention


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request):
    """Where the kernels run: everything below runs on a GPU as well."""
    if request.param == "gpu" and platform() != "gpu":
        pytest.skip("there is no GPU")
    if request.param == "interpreter" and platform() == "gpu":
        pytest.skip("the kernels run on the GPU itself")
    if request.param == "interpreter" and not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("JAX 0.10 has no interpreter of Mosaic GPU kernels")


def slow(*values, id):  # in the interpreter; one of each kind is quick enough
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


SMALL = GpuConfig(block=128, wide_block=64, workers=3, least=1)
NARROW = GpuConfig(block=64, warpgroups=1, wide_block=64, workers=3, least=1)
LENGTHS = (0, 1, 15, 16, 17, 128, 129, 200)


@dataclasses.dataclass
class Case:
    query: jax.Array
    cache: PagedCache
    table: jax.Array
    lengths: jax.Array
    starts: jax.Array | None
    query_starts: jax.Array | None

    def run(self, implementation, query=None, **options):
        def attend(query, cache):
            return paged_attention(
                query,
                cache,
                1,
                self.table,
                self.lengths,
                self.query_starts,
                starts=self.starts,
                return_lse=True,
                implementation=implementation,
                **options,
            )

        return jax.jit(attend)(self.query if query is None else query, self.cache)


def make(
    lengths=LENGTHS,
    new=None,
    *,
    starts=None,
    kv_heads=2,
    group=4,
    head_dim=64,
    page_size=16,
    dtype=jnp.bfloat16,
    kept=None,
    seed=0,
):
    """Sequences on permuted pages. What no one may read is NaN, or a page number out of range."""
    rng = np.random.default_rng(seed)
    sequences, width = len(lengths), -(-max(*lengths, 1) // page_size) + 1
    pages = sequences * width + 2
    *order, spare, _ = rng.permutation(pages).astype(np.int32)
    table = np.reshape(order, (sequences, width))
    held = np.zeros((pages, page_size), bool)
    for s, length in enumerate(lengths):
        for t in range(0 if starts is None else starts[s], length):
            held[table[s, t // page_size], t % page_size] = True
    page = np.arange(width) * page_size
    table = np.where(page < np.array(lengths)[:, None], table, 10**6)
    if starts is not None:
        table = np.where(page < np.array(starts)[:, None], spare, table)
    table = jnp.asarray(table, jnp.int32)
    held = held[:, :, None]

    def stored():
        x = jnp.asarray(rng.normal(size=(2, pages, page_size, kv_heads, head_dim)), jnp.float32)
        if kept is None:
            return jnp.where(held[..., None], x, jnp.nan).astype(dtype), None
        x, scale = quantize(x, kept)
        if kept != jnp.int8:
            x = jnp.where(held[..., None], x.astype(jnp.float32), jnp.nan).astype(kept)
        return x, jnp.swapaxes(jnp.where(held, scale, jnp.nan), -1, -2)

    (key, key_scale), (value, value_scale) = stored(), stored()
    rows, query_starts = sequences, None
    if new is not None:
        query_starts = jnp.asarray(np.cumsum([0, *new]), jnp.int32)
        rows = sum(new) + 3  # padding
    query = jnp.asarray(rng.normal(size=(rows, kv_heads * group, head_dim)), dtype)
    cache = PagedCache(key, value, key_scale, value_scale)
    starts = None if starts is None else jnp.asarray(starts, jnp.int32)
    return Case(query, cache, table, jnp.asarray(lengths, jnp.int32), starts, query_starts)


def agree(got, wanted, tolerance=0.01):
    """Attention within ``tolerance`` of the signal; log-sum-exps much closer, and -inf in the same rows."""
    out, lse = (np.asarray(x, np.float32) for x in got)
    true, true_lse = (np.asarray(x, np.float32) for x in wanted)
    seen = np.isfinite(true_lse)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    np.testing.assert_allclose(lse[seen], true_lse[seen], atol=2e-3)
    assert np.isfinite(out).all()
    assert (out[~seen] == 0).all()
    assert np.abs(out - true).max() <= tolerance * np.abs(true).max()


def differs(got, wanted):
    try:
        agree(got, wanted)
    except AssertionError:
        return True
    return False


def check(case, config=SMALL, **options):
    wanted = case.run("reference", case.query.astype(jnp.float32), **options)
    agree(case.run("gpu", config=config, **options), wanted)


@pytest.mark.sweep("interpreter-bf16", "interpreter-int8")
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("config", "sizes", "options"),
    [
        pytest.param(SMALL, {}, {}, id="bf16"),
        pytest.param(
            SMALL,
            {"group": 1, "head_dim": 128, "page_size": 64, "dtype": jnp.float16},
            {"window": 50, "softcap": 5.0},
            id="f16-window-softcap",
        ),
        slow(
            SMALL,
            {"group": 16, "kv_heads": 1, "starts": (0, 0, 0, 0, 16, 112, 112, 16)},
            {"window": jnp.int32(90)},
            id="starts-traced-window",
        ),
        pytest.param(SMALL, {"kept": jnp.int8, "group": 2}, {"scale": 0.1}, id="int8"),
        slow(SMALL, {"kept": jnp.float8_e4m3fn, "page_size": 32, "head_dim": 128, "group": 2}, {}, id="fp8"),
        slow(NARROW, {"lengths": (40, 200), "head_dim": 192, "page_size": 128, "group": 3}, {}, id="head192"),
    ],
)
def test_decodes(config, sizes, options):
    check(make(**sizes), config, **options)


@pytest.mark.sweep("interpreter-mixed")
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param(
            {"lengths": (0, 1, 40, 18, 160), "new": (0, 1, 40, 2, 3), "starts": (0, 0, 0, 16, 112)}, {}, id="mixed"
        ),
        slow(
            {"lengths": (30, 140), "new": (30, 50), "group": 3, "head_dim": 128},
            {"window": jnp.int32(33)},
            id="wide-traced-window",
        ),
        pytest.param({"lengths": (70, 129), "new": (70, 1), "kept": jnp.int8, "kv_heads": 1}, {}, id="int8"),
        slow(
            {"lengths": (90, 40), "new": (33, 40), "kept": jnp.float8_e4m3fn, "page_size": 64, "kv_heads": 1},
            {"window": 40},
            id="fp8-window",
        ),
    ],
)
def test_prefills_and_decodes(sizes, options):
    check(make(**sizes), **options)


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_nodes_of_a_prefix_tree():
    """Many rows against a shared run of tokens, and every row's own tokens, in one call; rows out of order."""
    case = make((150, 30, 40, 0), kv_heads=1)
    rows = 20
    query = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 4, 64)), jnp.bfloat16)

    def numbers(*x):
        return jnp.asarray(x, jnp.int32)

    segments = Segments(
        query_begin=numbers(0, 5, 19, 3, 0),
        query_count=numbers(19, 15, 1, 2, 0),
        table_row=numbers(0, 1, 2, 3, 0),
        kv_begin=numbers(0, 0, 16, 16, 0),
        kv_end=numbers(150, 30, 40, 16, 0),
        out_begin=numbers(20, 0, 19, 15, 0),
    )
    position = jnp.full(rows, 400, jnp.int32)

    def run(implementation, query, **options):
        return core.attend_segments(
            query,
            position,
            case.cache,
            1,
            case.table,
            segments,
            outputs=40,
            decode=False,
            scale=0.125,
            implementation=implementation,
            **options,
        )

    written = jnp.r_[0:17, 19:39]
    got = [x[written] for x in run("gpu", query, config=SMALL)]
    agree(got, [x[written] for x in run("reference", query.astype(jnp.float32))])


@pytest.mark.sweep("interpreter-True")
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("invariant", [False, True])
def test_shared_prefixes(invariant):
    """Through the public function: a prefix of 128 tokens below three sequences; invariant: to the bit as without."""
    case = make((150, 130, 200), kv_heads=1, group=2)
    table = case.table.at[1:, :8].set(case.table[0, :8])
    case = dataclasses.replace(case, table=table)
    granularity = {"granularity": 128} if invariant else {}
    plan = make_plan(
        np.asarray(table), np.asarray(case.lengths), page_size=16, rows=3, crossover=Crossover.always(), **granularity
    )
    assert plan.levels > 0
    shared = shared_prefix_attention(
        case.query,
        case.cache,
        1,
        table,
        case.lengths,
        plan,
        return_lse=True,
        invariant=invariant,
        implementation="gpu",
        config=SMALL,
    )
    agree(shared, case.run("reference", case.query.astype(jnp.float32)))
    if invariant:
        alone = case.run("gpu", invariant=True, config=SMALL)
        np.testing.assert_array_equal(alone[0].astype(jnp.float32), shared[0].astype(jnp.float32))
        np.testing.assert_array_equal(alone[1], shared[1])


@pytest.mark.usefixtures("machine")
def test_order_is_kept_bit_for_bit():
    """Ordered: a row alone, in company, among many rows, and with its tokens in two calls."""
    case = make((200, 1, 150), kv_heads=1, group=2)

    def run(query, position, segments, carry=None, decode=True):
        return gpu.attend(
            query,
            position,
            case.cache,
            jnp.int32(1),
            case.table,
            segments,
            outputs=query.shape[0],
            decode=decode,
            window=None,
            scale=0.125,
            softcap=None,
            carry=carry,
            ordered=True,
            config=SMALL,
        )

    def numbers(*x):
        return jnp.asarray(x, jnp.int32)

    position = case.lengths - 1
    together = run(case.query, position, decode_segments(case.lengths))
    agree(gpu.finish(together), case.run("reference", case.query.astype(jnp.float32), scale=0.125))

    def same(a, b):
        return [
            np.testing.assert_array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
        ]

    def row(carry, i):
        return jax.tree.map(lambda x: x[i], carry)

    last = Segments(numbers(0), numbers(1), numbers(2), numbers(0), numbers(150), numbers(0))
    same(row(run(case.query[2:], position[2:], last), 0), row(together, 2))
    # The same row as the last of a prefill of 40, whose other rows see less.
    many = jnp.concatenate([jnp.flip(case.query, 2)[jnp.arange(39) % 3], case.query[2:]])
    segments = dataclasses.replace(last, query_count=numbers(40))
    same(row(run(many, jnp.arange(110, 150, dtype=jnp.int32), segments, decode=False), 39), row(together, 2))

    # In two calls, and rows that no segment writes keep their carry.
    def cut(x):
        return dataclasses.replace(decode_segments(case.lengths), **x)

    first = run(case.query, position, cut({"kv_end": jnp.minimum(case.lengths, 128)}))
    then = cut({"kv_begin": numbers(128, 128, 128), "query_count": numbers(1, 0, 1)})
    same(run(case.query, position, then, first), together)
    assert isinstance(together, Carry)


@pytest.mark.usefixtures("machine")
def test_mutants_are_caught(monkeypatch):
    case = make((40, 200), kv_heads=1, group=2)
    wanted = case.run("reference", case.query.astype(jnp.float32))
    swapped = dataclasses.replace(
        case, table=case.table.at[1, :2].set(case.table[1, 1::-1]).at[1, 3].set(case.table[1, 9])
    )
    assert differs(swapped.run("gpu", config=SMALL), wanted)
    longer = dataclasses.replace(case, lengths=case.lengths - 1)
    assert differs(longer.run("gpu", config=SMALL), wanted)
    whole = gpu.merge

    def forgetful(out, lse, jobs, **rest):
        return whole(out, lse, jobs.at[:, 1].add(-1), **rest)

    monkeypatch.setattr(gpu, "merge", forgetful)
    assert differs(case.run("gpu", config=SMALL), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [None, jnp.int8, jnp.float8_e4m3fn], ids=["bf16", "int8", "fp8"])
@pytest.mark.parametrize(("group", "head_dim", "page_size"), [(4, 128, 64), (8, 128, 16), (2, 256, 128), (1, 64, 16)])
@pytest.mark.parametrize("new", [None, (1, 1, 700, 64, 1)], ids=["decode", "ragged"])
def test_at_full_size(new, group, head_dim, page_size, kept):
    """The configuration that the heuristic chooses, skewed lengths."""
    if platform() != "gpu":
        pytest.skip("there is no GPU")
    check(make((9000, 90, 3000, 64, 1), new, group=group, head_dim=head_dim, page_size=page_size, kept=kept), None)


def test_refuses_what_does_not_fit():
    case = make()
    with pytest.raises(ValueError, match=r"warpgroups=3; allowed are 1 and 2"):
        GpuConfig(warpgroups=3)
    with pytest.raises(ValueError, match=r"wide_block=96; allowed"):
        GpuConfig(wide_block=96)
    with pytest.raises(ValueError, match=r"stages=9 takes \d+ bytes of shared memory at head_dim=64; 232448"):
        case.run("gpu", config=GpuConfig(stages=9))
    with pytest.raises(ValueError, match=r"wide_block=256 must divide 128"):
        case.run("gpu", config=GpuConfig(wide_block=256), invariant=True)
    with pytest.raises(ValueError, match=r"query has dtype float32"):
        make(dtype=jnp.float32).run("gpu")
    with pytest.raises(ValueError, match=r"head_dim 96; the kernel takes 64"):
        make(head_dim=96).run("gpu")
    with pytest.raises(ValueError, match=r"page_size 48; the kernel takes 16"):
        make(page_size=48).run("gpu")
