"""torch.compile and torch.export: one node in the graph, whatever the shapes."""

import operator

import pytest
import torch
from helpers import RecordOps
from torch._dynamo.backends.common import aot_autograd

from flash_attn_ext import scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def block(q, k, v, mask=None, is_causal=False):
    out = scaled_dot_product_attention(q * 1.5, k, v, mask, is_causal=is_causal)
    return out.transpose(-3, -2).flatten(-2).sin()


def inputs(batch, seq, heads_k=4, **options):
    shapes = (batch, 4, seq, 16), (batch, heads_k, seq, 16), (batch, heads_k, seq, 16)
    return [torch.randn(shape, requires_grad=True, **options) for shape in shapes]


def assert_compiled_agrees(compiled, eager, leaves, *args, **options):
    ours, expected = (compiled(*leaves, *args, **options), eager(*leaves, *args, **options))
    torch.testing.assert_close(ours, expected)
    assert ours.stride() == expected.stride()
    grads = torch.autograd.grad(ours.square().sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), leaves))


@pytest.mark.parametrize("masked", [False, True])
def test_dynamic_shapes(masked, device):
    """Compiled once for every batch size and length."""
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, seq in [(2, 33), (3, 65), (5, 40)]:
        mask = torch.randn(batch, 1, seq, seq, device=device) if masked else None
        assert_compiled_agrees(compiled, block, inputs(batch, seq, device=device), mask)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("call", "leaves"),
    [
        (lambda q, k, v: block(q, k, v, is_causal=True), inputs(2, 33)),
        (lambda q, k, v: block(q, k, v, torch.ones(33, 33).tril() > 0), inputs(2, 33)),
        (
            lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True),
            inputs(2, 33, heads_k=2),
        ),
        (lambda q, k, v: block(q[0], k[0], v[0]), inputs(2, 33)),
        (lambda q, k, v: block(q[:, None], k[:, None], v[:, None]), inputs(2, 33)),
        (lambda q, k, v: block(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), inputs(2, 33)),
    ],
    ids=["causal", "mask", "grouped", "3d", "5d", "bfloat16"],
)
def test_one_graph(call, leaves):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_compiled_agrees(compiled, call, leaves)


def test_dropout(device):
    """Compiled or not, torch.manual_seed decides what is dropped."""

    def call(q, k, v):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.3)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = inputs(2, 33, device=device)
    results = []
    for function in (call, compiled, compiled):
        torch.manual_seed(7)
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_autocast_inside(device):
    def call(q, k, v):
        with torch.autocast(device, dtype=torch.bfloat16):
            return scaled_dot_product_attention(q, k, v).float()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_compiled_agrees(compiled, call, inputs(2, 33, device=device))


def test_graph_has_one_node():
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return graph

    q, k, v = (x.detach() for x in inputs(2, 33))
    backend = aot_autograd(fw_compiler=compiler)
    torch.compile(scaled_dot_product_attention, fullgraph=True, backend=backend)(q, k, v)
    (graph,) = graphs
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.flash_attn_ext.attention_forward.default, operator.getitem]


def test_inductor(device):
    """With the code that Inductor generates around it; it needs a C++ compiler."""
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for seq in (33, 48):
        assert_compiled_agrees(compiled, block, inputs(2, seq, device=device), is_causal=True)


class Attention(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return block(q, k, v, mask)


def test_export():
    batch, seq = (torch.export.Dim("batch", min=2, max=64), torch.export.Dim("seq", min=2, max=512))
    sizes = {0: batch, 2: seq}
    q, k, v = (x.detach() for x in inputs(2, 33))
    program = torch.export.export(
        Attention(),
        (q, k, v, torch.randn(2, 1, 33, 33)),
        dynamic_shapes={"q": sizes, "k": sizes, "v": sizes, "mask": {0: batch, 2: seq, 3: seq}},
    )
    assert "flash_attn_ext.attention_forward" in program.graph_module.code
    q, k, v = (x.detach() for x in inputs(3, 50))
    mask = torch.randn(3, 1, 50, 50)
    torch.testing.assert_close(program.module()(q, k, v, mask), block(q, k, v, mask))
    with RecordOps() as record:
        program.run_decompositions().module()(q, k, v, mask)
    assert record.used_ours


def test_compiled_autograd():
    leaves = inputs(2, 33)
    expected = torch.autograd.grad(block(*leaves).square().sum(), leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        block(*leaves).square().sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))
