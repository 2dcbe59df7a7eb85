"""The CUDA kernels without a GPU: their results, and that they are the same in every order in which
the threads of a block may run. What the emulator itself finds, it is shown at the end.

On a GPU tests/test_accuracy.py and others say the same of the kernels as they are."""

import ctypes
import itertools

import pytest
import sanitize
import torch
from emulator import KernelParams, emulated, launch, library, tensor_maps
from helpers import (
    EPS,
    assert_accurate,
    assert_same_bits,
    convert,
    forward_backward,
    make_case,
    max_abs,
    naive_attention,
)

# sm_90 has kernels of its own; sm_120 has less shared memory, and so other tiles.
ARCHS = [90, 80, 90, 120, 90]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The rest is small: to wake other threads for it takes longer."""
    threads(1)


# To compile them takes most of the time: of bfloat16, half of what float16 runs will do.
CASES = [
    (case, ARCHS[i % len(ARCHS)])
    for i, case in enumerate(sanitize.CASES)
    if case[0] != torch.bfloat16 or i % 2
]


def name_of(value) -> str:
    if isinstance(value, int):
        return f"sm_{value}"
    dtype, features, head_dim, (seq_q, seq_k), layout = value
    return f"{features}-{dtype}-{head_dim}-{seq_q}-{seq_k}-{layout.__name__}"


@pytest.mark.parametrize("description,arch", CASES, ids=name_of)
def test_accurate(description, arch, seed):
    """What `make sanitize` runs on a GPU; see there."""
    case = sanitize.draw(*description, device="cpu")
    assert_accurate(case, emulated(arch, seed=seed))


def on_calls(*features_and_sizes):
    """The test, once for each."""

    def name_of(x) -> str:
        return x if isinstance(x, str) else "-".join(map(str, x.values()))

    return pytest.mark.parametrize("features,sizes", features_and_sizes, ids=name_of)


# Every tile of forward_sm90.c, and the parts of the kernel that only some calls reach.
@on_calls(
    ("causal", {"seq_q": 700, "seq_k": 1600, "head_dim": 64}),
    ("causal", {"seq_q": 300, "seq_k": 300, "head_dim": 64}),
    ("", {"seq_q": 1600, "seq_k": 130, "head_dim": 96}),
    ("", {"seq_q": 1600, "seq_k": 130, "head_dim": 128}),
    ("causal", {"seq_q": 4100, "seq_k": 130, "head_dim": 128}),
    ("window", {"seq_q": 300, "seq_k": 500, "head_dim": 128}),
    ("causal", {"seq_q": 200, "seq_k": 300, "head_dim": 192}),
    ("causal+dropout", {"seq_q": 200, "seq_k": 200, "head_dim": 256}),
    ("bias", {"seq_q": 200, "seq_k": 200, "head_dim": 200}),
    ("bias", {"seq_q": 192, "seq_k": 200, "head_dim": 64}),
    ("head_bias", {"seq_q": 130, "seq_k": 264, "head_dim": 128}),
    ("fp32_bias", {"seq_q": 130, "seq_k": 132, "head_dim": 64}),
    ("bool_mask", {"seq_q": 130, "seq_k": 208, "head_dim": 128}),
)
def test_forward_of_hopper(features, sizes, seed):
    case = make_case(features, dtype=torch.bfloat16, batch=1, heads=2, **sizes)
    truth = naive_attention(*(convert(x, torch.float64) for x in case.inputs), **case.options)
    ours, standard = case.run(emulated(90, seed=seed)), case.run(naive_attention)
    allowed = max_abs(standard.double() - truth) + EPS[torch.bfloat16] * max_abs(truth)
    assert max_abs(ours.double() - truth) <= allowed


# Broadcast in every way; rows that the copy engine brings, and rows that it cannot; more tiles than
# a word of the map has bits.
@pytest.mark.parametrize(
    "mask_shape,seq_k,head_dim,causal",
    [
        ((2, 3, 300, 1104), 1104, 64, False),
        ((2, 1, 300, 1101), 1101, 128, False),
        ((300, 1104), 1104, 64, True),
        ((2, 1, 1, 1104), 1104, 256, False),
        ((1, 3, 300, 1), 1104, 64, False),
        ((300, 2304), 2304, 256, True),
    ],
)
def test_tiles_that_a_bool_mask_empties_are_skipped(mask_shape, seq_k, head_dim, causal, seed):
    """Their keys and values are never looked at: they are NaN."""
    q, k, v = (torch.randn(2, 3, n, head_dim).bfloat16() for n in (300, seq_k, seq_k))
    mask = torch.rand(mask_shape) < 0.5
    mask[..., 256:960] = False
    if mask.size(-2) > 1:
        mask[..., 128:256, :640] = False  # tiles of some queries, for which values are not NaN
    options = {"scale": head_dim**-0.5, "window": (-1, 0) if causal else (-1, -1)}
    options["diagonal_offset"] = seq_k - 300
    truth = naive_attention(*(x.double() for x in (q, k, v)), mask, **options)
    standard = naive_attention(q, k, v, mask, **options)
    if mask.size(-1) > 1:
        k[:, :, 256:896], v[:, :, 256:896] = torch.nan, torch.nan
    ours = emulated(90, seed=seed)(q, k, v, mask, **options)
    allowed = max_abs(standard.double() - truth) + EPS[torch.bfloat16] * max_abs(truth)
    assert max_abs(ours.double() - truth) <= allowed


# Likewise of forward_f32_sm90.cu: one panel and two, of K and of V; warpgroups that see fewer tiles
# than their block, at either end, or none; panels that are not full; rows that are not aligned.
@on_calls(
    ("causal", {"seq_q": 300, "seq_k": 300, "head_dim": 64}),
    ("window", {"seq_q": 300, "seq_k": 400, "head_dim": 128}),
    ("causal+bool_mask", {"seq_q": 200, "seq_k": 170, "head_dim": 96}),
    ("fp32_bias+dropout", {"seq_q": 130, "seq_k": 190, "head_dim": 128}),
    ("wide_v", {"seq_q": 60, "seq_k": 200, "head_dim": 63}),
    ("narrow_v+bottom_right", {"seq_q": 200, "seq_k": 90, "head_dim": 66}),
    ("causal+dropout+grouped", {"seq_q": 200, "seq_k": 200, "head_dim": 20}),
)
def test_forward_of_float32_on_hopper(features, sizes, seed):
    case = make_case(features, batch=1, heads=2, **sizes)
    assert_accurate(case, emulated(90, seed=seed))


# Likewise of backward_sm90.c: each tile, head sizes that leave panels empty, more tiles of queries
# than buffers, blocks that see none; masks in tiles, of all queries at once and element by element
# (odd rows), each with its gradient: by the copy engine, by threads, added up. Above 128 two blocks
# are a cluster: one of them may have no keys, or none that a query sees.
@on_calls(
    ("causal", {"seq_q": 700, "seq_k": 300, "head_dim": 64}),
    ("window+dropout", {"seq_q": 300, "seq_k": 500, "head_dim": 64}),
    ("grouped", {"seq_q": 300, "seq_k": 130, "head_dim": 128}),
    ("causal+dropout", {"seq_q": 130, "seq_k": 300, "head_dim": 128}),
    ("bottom_right", {"seq_q": 200, "seq_k": 200, "head_dim": 96}),
    ("causal+grouped", {"seq_q": 300, "seq_k": 200, "head_dim": 256}),
    ("dropout", {"seq_q": 70, "seq_k": 200, "head_dim": 256}),
    ("window", {"seq_q": 200, "seq_k": 300, "head_dim": 160}),
    ("grouped", {"seq_q": 200, "seq_k": 60, "head_dim": 256}),
    ("causal", {"seq_q": 130, "seq_k": 330, "head_dim": 256}),
    ("window", {"seq_q": 400, "seq_k": 301, "head_dim": 256}),
    ("", {"seq_q": 70, "seq_k": 150, "head_dim": 136}),
    ("bottom_right", {"seq_q": 300, "seq_k": 190, "head_dim": 192}),
    ("bias+window", {"seq_q": 300, "seq_k": 200, "head_dim": 64}),
    ("bias+dropout", {"seq_q": 130, "seq_k": 264, "head_dim": 128}),
    ("bias+causal", {"seq_q": 200, "seq_k": 136, "head_dim": 192}),
    ("bias+window", {"seq_q": 200, "seq_k": 301, "head_dim": 128}),
    ("fp32_bias+grouped", {"seq_q": 200, "seq_k": 132, "head_dim": 64}),
    ("fp32_bias", {"seq_q": 130, "seq_k": 131, "head_dim": 128}),
    ("query_bias", {"seq_q": 130, "seq_k": 200, "head_dim": 256}),
    ("head_bias+causal", {"seq_q": 200, "seq_k": 201, "head_dim": 64}),
    ("bool_mask+dropout", {"seq_q": 130, "seq_k": 208, "head_dim": 64}),
    ("bool_mask", {"seq_q": 130, "seq_k": 209, "head_dim": 128}),
    ("key_mask", {"seq_q": 300, "seq_k": 130, "head_dim": 128}),
)
def test_backward_of_hopper(features, sizes, seed):
    case = make_case(features, dtype=torch.bfloat16, batch=1, heads=2, **sizes)
    assert_accurate(case, emulated(90, seed=seed))


@pytest.mark.parametrize("head_dim,head_dim_v", [(128, 256), (192, 128), (256, 64)])
def test_backward_of_hopper_with_other_sizes_of_v(head_dim, head_dim_v, seed):
    case = make_case(dtype=torch.bfloat16, batch=1, heads=2, seq_k=130, head_dim=head_dim)
    case.v = torch.randn(1, 2, 130, head_dim_v, dtype=torch.bfloat16)
    assert_accurate(case, emulated(90, seed=seed))


# Likewise of backward_f32_sm90.cu: one warpgroup that computes and two, one panel and two.
@on_calls(
    ("causal", {"seq_q": 300, "seq_k": 200, "head_dim": 64}),
    ("window+grouped", {"seq_q": 200, "seq_k": 300, "head_dim": 128}),
    ("bottom_right", {"seq_q": 90, "seq_k": 200, "head_dim": 96}),
    ("wide_v", {"seq_q": 130, "seq_k": 65, "head_dim": 63}),
    ("narrow_v+grouped", {"seq_q": 70, "seq_k": 130, "head_dim": 66}),
    ("negative_scale", {"seq_q": 1, "seq_k": 1, "head_dim": 20}),
)
def test_backward_of_float32_on_hopper(features, sizes, seed):
    case = make_case(features, batch=1, heads=2, **sizes)
    assert_accurate(case, emulated(90, seed=seed))


@pytest.mark.parametrize("many_multiprocessors", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_scores_that_rise(arch, dtype, many_multiprocessors, seed):
    """Later keys have larger scores: the maximum that the softmax goes by has to follow."""
    case = make_case(dtype=dtype, batch=1, heads=2, seq_q=130, seq_k=300, head_dim=64)
    case.q[..., 0] = 8
    case.k[..., 0] = torch.linspace(200, -200, 300)
    assert_accurate(case, emulated(arch, many_multiprocessors=many_multiprocessors, seed=seed))


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("features", ["causal", "window+dropout", "bias", "query_bias+grouped"])
@pytest.mark.parametrize("arch", [80, 90])
def test_same_bits_in_every_order(arch, features, dtype, deterministic, seed):
    """Blocks run one after the other here, so that atomic additions have an order, too."""
    case = make_case(features, dtype=dtype, batch=1, heads=2, seq_q=150, seq_k=200)
    grad_out = torch.randn_like(case.q)
    results = [
        forward_backward(
            case.bind(emulated(arch, deterministic=deterministic, seed=order)),
            case.inputs,
            grad_out,
        )
        for order in (0, seed, seed + 1)
    ]
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("arch", [80, 90])
def test_tf32_where_it_is_allowed(arch, deterministic, seed):
    case = make_case("causal", batch=1, heads=2, head_dim=64)
    grad_out = torch.randn_like(case.q)
    wide = [convert(x, torch.float64) for x in case.inputs]
    truth = forward_backward(case.bind(naive_attention), wide, grad_out.double())
    errors = []
    for allow_tf32 in (False, True):
        ours = emulated(arch, deterministic=deterministic, allow_tf32=allow_tf32, seed=seed)
        results = forward_backward(case.bind(ours), case.inputs, grad_out)
        errors.append(
            [max_abs(results[name] - truth[name]) / max_abs(truth[name]) for name in truth]
        )
    assert all(32 * a < b < 2**-8 for a, b in zip(*errors)), errors


def test_every_kernel_was_run():
    cases = [
        (make_case(features, **{"dtype": torch.float16, "batch": 1, "heads": 2} | sizes), options)
        for features, sizes, options in (
            ("head_bias", {}, {}),
            ("head_bias", {}, {"deterministic": True}),
            ("", {"dtype": torch.float32}, {}),
            ("", {"head_dim": 256}, {}),
            ("bool_mask", {"seq_k": 1100}, {}),
        )
    ]
    for arch, (case, options) in itertools.product((80, 90), cases):
        attention = case.bind(emulated(arch, **options))
        forward_backward(attention, case.inputs, torch.randn_like(case.q))
    missing = sanitize.all_kernels() - set(library().emu_loaded().decode().split())
    assert not missing, f"never run: {missing}"


# --- the emulator itself ---------------------------------------------------------------------

KERNEL = """
#include "panels.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mma.cuh"
#include "ptx/order.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/warpgroup.cuh"

extern __shared__ __align__(1024) unsigned char shared_memory[];
struct Maps { tensor_map x, y; };

extern "C" __global__ void __cluster_dims__(BLOCKS) __launch_bounds__(THREADS, 1)
    fa_test(const __grid_constant__ Maps maps, float *result) {
    const unsigned shared = shared_address(shared_memory);
    mbarrier *full = (mbarrier *)(shared_memory + SHARED - 16);
    const int t = threadIdx.x;
    float d[8][4] = {};
    if (t == 0)
        mbarrier_init(full, 1);
    __syncthreads();
    BODY
}
"""
SHARED = 48 << 10


def run_body(
    body: str, x: torch.Tensor, y: torch.Tensor, *, blocks=1, threads=128, seed=0
) -> torch.Tensor:
    """The body of a kernel of one cluster with tensor maps of x and y, [1, 1, 64, 64], and a result
    for each thread."""
    result = torch.zeros(blocks * threads)
    launch(
        KERNEL.replace("BODY", body),
        "fa_test",
        tensor_maps((x, 64, 64), (y, 64, 64)),
        ctypes.c_void_p(result.data_ptr()),
        grid=blocks,
        threads=threads,
        shared_bytes=SHARED,
        seed=seed,
        BLOCKS=blocks,
        SHARED=SHARED,
        FA_DTYPE_FP32=0,
        FA_DTYPE_BF16=1,
    )
    return result


@pytest.fixture
def matrices():
    return [torch.randn(1, 1, 64, 64, dtype=torch.bfloat16) for _ in range(2)]


LOAD = """
    if (t == 0) {
        mbarrier_arrive_expect(full, 2 * 8192);
        tma_load(shared, &maps.x, full, 0, 0, 0, 0);
        tma_load(shared + 8192, &maps.y, full, 0, 0, 0, 0);
    }
"""
WAIT = "mbarrier_wait(full, 0);"
MULTIPLY = """
    const Panels<64, 64> X{shared}, Y{shared + 8192};
    wgmma_fence();
    Wgmma<64>::multiply(d, X.sum_over_cols(0), Y.sum_over_cols(0));
    for (int k = 16; k < 64; k += 16)
        Wgmma<64>::multiply_add(d, X.sum_over_cols(k), Y.sum_over_cols(k));
    wgmma_commit();
"""
STORE = "if (t == 0) { tma_store(&maps.y, shared, 0, 0, 0, 0); tma_store_commit(); %s }"

MISTAKES = {
    "hangs": "if (t < 64) mbarrier_wait(full, 0);",
    "wait at __syncthreads": "if (t < 32) __syncthreads(); else mbarrier_wait(full, 0);",
    "while other lanes of the warp are at": "if (t % 2) __syncwarp(); else uniform(t);",
    "wait for 256 registers": "registers_increase<256>();",
    "of which some lanes have ended": "if (t % 2) { unsigned r[4]; ldmatrix_x4(r, shared); }",
    "while others wait there for 64": "barrier_arrive(1, t < 32 ? 64 : 96);",
    "all the arrivals of this phase": LOAD + LOAD,
    "no initialised mbarrier": "mbarrier_arrive(mbarrier_ref(shared));",
    "where the block has none": "load_shared_1(shared + SHARED);",
    "where what is dynamic ends": "shared_memory[SHARED + 100] = 1;",
    "is not a multiple of 16": "store_shared_4(shared + 8, 0, 0, 0, 0);",
    "where there is none": "*(volatile int *)4096 = 1;",
    "cp.async of 16 bytes": "cp_async_16(shared, (char *)result + 4, 16);",
    "a wgmma.fence is missing": LOAD + WAIT + MULTIPLY.replace("wgmma_fence();", ""),
    "before a wgmma of warp 0 was waited for": LOAD + WAIT + MULTIPLY,
    "had different wgmmas": f"{LOAD} {WAIT} if (t < 64) {{ {MULTIPLY} wgmma_wait<0>(); }}",
    "operand of a wgmma": LOAD + MULTIPLY + WAIT + "wgmma_wait<0>();",
    "accumulators were written": LOAD + WAIT + MULTIPLY + "d[0][0] = 1; wgmma_wait<0>();",
    "not come to a fence.proxy.async": "store_shared_1(shared + 4 * t, t); __syncthreads();"
    + STORE % "tma_store_wait_read();",
    "still had to store": "fence_proxy_async();" + STORE % "",
    "changed while the copy engine": STORE % "shared_memory[0] = 1; tma_store_wait_read();",
    "something in global memory": "while (!load_acquire((unsigned long long *)result));",
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_reported(message, matrices, seed):
    with pytest.raises(RuntimeError, match=message):
        run_body(MISTAKES[message], *matrices)


SEND = """
    const int other = 1 - blockIdx.x;
    store_shared_1(shared + 4 * t, __float_as_uint(128 * blockIdx.x + t));
    %s
    cluster_sync();
    if (t == 0) {
        mbarrier_arrive_expect_in_block(full, 512, other);
        bulk_send(shared + 1024, shared, 512, full, other);
    }
"""
FENCED_SEND = SEND % "fence_proxy_async();"

MISTAKES_OF_CLUSTERS = {
    "wait for all threads of the cluster": "if (blockIdx.x == 0) cluster_sync();"
    + "else mbarrier_wait(full, 0);",
    "there is no block 2": "mbarrier_arrive_in_block(full, 2);",
    "block 1 of the cluster has ended": FENCED_SEND + "if (blockIdx.x == 0)" + WAIT,
    "was to send": FENCED_SEND + "shared_memory[4 * t] = 1; __syncthreads();" + WAIT,
    "not come to a fence.proxy.async": SEND % "",
}


@pytest.mark.parametrize("message", MISTAKES_OF_CLUSTERS)
def test_mistakes_of_clusters_are_reported(message, matrices):
    with pytest.raises(RuntimeError, match=message):
        run_body(MISTAKES_OF_CLUSTERS[message], *matrices, blocks=2)


def test_blocks_of_a_cluster_send(matrices, seed):
    look = "result[128 * blockIdx.x + t] = __uint_as_float(load_shared_1(shared + 1024 + 4 * t));"
    received = run_body(
        FENCED_SEND + WAIT + look + "cluster_sync();", *matrices, blocks=2, seed=seed
    )
    assert torch.equal(received, torch.arange(256.0).roll(128))


def test_what_has_not_arrived_is_nan(matrices):
    look = "result[t] = __uint_as_float(load_shared_1(shared + 16 * t));"
    copy = "cp_async_16(shared + 16 * t, result, 16); cp_async_commit();"
    assert run_body(look, *matrices).isnan().all()
    assert run_body(copy + look + "cp_async_wait<0>();", *matrices).isnan().all()
    assert run_body(LOAD + "__syncthreads();" + look + WAIT, *matrices).isnan().all()
    products = LOAD + WAIT + MULTIPLY + "result[t] = d[1][2]; wgmma_wait<0>();"
    assert run_body(products, *matrices).isnan().all()
    assert (run_body(copy + "cp_async_wait<0>();" + look, *matrices) == 0).all()


# The accumulators of a warpgroup, and where a thread has them.
RESULTS = """
    wgmma_wait<0>();
    __syncthreads();
    for (int n = 0; n < 8; n++)
        for (int x = 0; x < 4; x += 2) {
            const int row = t / 4 % 8 + t / 32 * 16 + x / 2 * 8, col = 8 * n + t % 4 * 2;
            store_shared_1(X.chunk(row, col) + col % 8 * 2, pack(d[n][x], d[n][x + 1]));
        }
    fence_proxy_async();
    __syncthreads();
"""


@pytest.mark.parametrize("a_over_rows", [False, True])
@pytest.mark.parametrize("b_over_rows", [False, True])
def test_wgmma(a_over_rows, b_over_rows, matrices, seed):
    """Every way for an operand to lie in shared memory, where the copy engine has put it."""
    x, y = matrices
    body = f"""
        const Panels<64, 64> X{{shared}}, Y{{shared + 8192}};
        wgmma_fence();
        for (int k = 0; k < 64; k += 16)
            emu_wgmma(EMU_BF16, d[0], 64, NULL, X.sum_over_{"rows" if a_over_rows else "cols"}(k),
                      Y.sum_over_{"rows" if b_over_rows else "cols"}(k),
                      EMU_ACCUMULATE | {a_over_rows:d} * EMU_A_MN | {b_over_rows:d} * EMU_B_MN);
        wgmma_commit();
    """
    a, b = x[0, 0].float(), y[0, 0].float()
    expected = (a.mT if a_over_rows else a) @ (b if b_over_rows else b.mT)
    run_body(LOAD + WAIT + body + RESULTS + STORE % "tma_store_wait_read();", x, y, seed=seed)
    torch.testing.assert_close(y[0, 0].float(), expected, rtol=2**-8, atol=1e-4)


ORDER = """
#include "block_order.cuh"

extern "C" __global__ void fa_order(const __grid_constant__ fa_kernel_params p) {
    const OrderedBlock block = ordered_block(p, p.heads_q, blockIdx.x);
    p.lse[2 * blockIdx.x] = block.head;
    p.lse[2 * blockIdx.x + 1] = block.index;
}
"""


@pytest.mark.parametrize("group_heads", [1, 4, 10, 12])  # 10: the last group is smaller
def test_order_of_blocks(group_heads):
    batch, heads, blocks = 4, 3, 5
    order = torch.zeros(batch * heads * blocks, 2)
    params = KernelParams(batch=batch, heads_q=heads, blocks=blocks, group_heads=group_heads)
    params.lse = order.data_ptr()
    launch(ORDER, "fa_order", params, grid=len(order), threads=32, FA_WINDOW=1)
    groups = [range(first, min(first + group_heads, 12)) for first in range(0, 12, group_heads)]
    assert order.tolist() == [
        [head, index] for group in groups for index in range(blocks) for head in group
    ]
    launch(ORDER, "fa_order", params, grid=len(order), threads=32, FA_WINDOW=0)
    assert order.tolist() == [[head, index] for head in range(12) for index in range(blocks)]


def test_boxes_past_the_edge(matrices):
    """The copy engine brings zeros and leaves alone what lies outside."""
    x, y = matrices
    move = """
        if (t == 0) {
            mbarrier_arrive_expect(full, 8192);
            tma_load(shared, &maps.x, full, -8, 60, 0, 0);
            mbarrier_wait(full, 0);
            tma_store(&maps.y, shared, 16, -2, 0, 0);
            tma_store_commit();
            tma_store_wait_read();
        }
    """
    expected = y.clone()
    box = torch.zeros(64, 64, dtype=x.dtype)
    box[:4, 8:] = x[0, 0, 60:, :56]
    expected[0, 0, :62, 16:] = box[2:, :48]
    run_body(move, x, y)
    assert torch.equal(y, expected)
