"""enable(): models that know nothing of flash_attn_ext use it, and disable() leaves no trace."""

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import RecordOps
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import scaled_dot_product_attention as imported_earlier

import flash_attn_ext

ORIGINAL = torch._C._nn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def nothing_stays_enabled():
    yield
    flash_attn_ext.disable()
    assert F.scaled_dot_product_attention is ORIGINAL


def used_ours(call) -> bool:
    with RecordOps() as record:
        call()
    return record.used_ours


def call_through_module():
    x = torch.randn(1, 2, 9, 8)
    return F.scaled_dot_product_attention(x, x, x)


def call_imported_earlier():
    x = torch.randn(1, 2, 9, 8)
    return imported_earlier(x, x, x)


def call_through_torch():
    x = torch.randn(1, 2, 9, 8)
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


CALLS = [call_through_module, call_imported_earlier, call_through_torch]
calls = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


@calls
def test_nothing_happens_on_import(call):
    assert not used_ours(call)


@calls
def test_enable_and_disable(call):
    flash_attn_ext.enable()
    assert used_ours(call)
    flash_attn_ext.disable()
    assert not used_ours(call)


@calls
def test_context(call):
    with flash_attn_ext.enabled():
        assert used_ours(call)
    assert not used_ours(call)


def test_context_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), flash_attn_ext.enabled():
        1 / 0  # noqa: B018
    assert not used_ours(call_through_module)


def test_nested_contexts():
    with flash_attn_ext.enabled():
        with flash_attn_ext.enabled():
            assert used_ours(call_through_module)
        assert used_ours(call_through_module)
    assert not used_ours(call_through_module)


def test_context_within_enable():
    flash_attn_ext.enable()
    with flash_attn_ext.enabled():
        pass
    assert used_ours(call_through_module)


def test_enable_twice_disable_once():
    flash_attn_ext.enable()
    flash_attn_ext.enable()
    flash_attn_ext.disable()
    assert not used_ours(call_through_module)


def test_disable_without_enable():
    flash_attn_ext.disable()
    assert not used_ours(call_through_module)


def test_name_and_documentation_are_kept():
    """PyTorch's context parallel looks the function up by its name."""
    with flash_attn_ext.enabled():
        patched = F.scaled_dot_product_attention
        assert patched.__name__ == ORIGINAL.__name__ == "scaled_dot_product_attention"
        assert patched.__doc__


@pytest.mark.parametrize(
    "arguments",
    [{}, {"is_causal": True}, {"attn_mask": torch.ones(9, 9).tril() > 0}, {"scale": 0.2}],
    ids=str,
)
def test_same_results(arguments):
    q, k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, **arguments)
    with flash_attn_ext.enabled():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **arguments), expected)


def test_our_own_fallbacks_do_not_recurse():
    """While enabled, nothing of ours may come back to the patched function."""
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    with flash_attn_ext.enabled():
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.2).sum().backward()
        flash_attn_ext.scaled_dot_product_attention(x, x, x).sum().backward()


# --- torch.nn --------------------------------------------------------------------------------


def assert_module_agrees(module, *inputs, **options):
    """Same output and gradients, and ours is what ran."""

    def run():
        module.zero_grad()
        out = module(*inputs, **options)
        out = out[0] if isinstance(out, tuple) else out
        if not out.requires_grad:
            return [out]
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in module.parameters())]

    expected = run()
    with flash_attn_ext.enabled(), RecordOps() as record:
        results = run()
    assert record.used_ours
    assert not any("scaled_dot_product" in name for name in record.names)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
    # After it, the same path as before it: the same bits.
    for again, before in zip(run(), expected):
        assert torch.equal(again, before)


MHA_OPTIONS = {
    "plain": {},
    "weights_not_needed": {"need_weights": False},
    "causal": {
        "need_weights": False,
        "is_causal": True,
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(9),
    },
    "padding": {
        "need_weights": False,
        "key_padding_mask": torch.arange(9) >= torch.tensor([[9], [5]]),
    },
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", list(MHA_OPTIONS)[1:])
def test_multihead_attention(options, train):
    module = nn.MultiheadAttention(16, 4, batch_first=True).train(train)
    x = torch.randn(2, 9, 16)
    assert_module_agrees(module, x, x, x, **MHA_OPTIONS[options])


@pytest.mark.parametrize("options", list(MHA_OPTIONS)[1:])
def test_multihead_attention_without_gradients(options):
    """Where PyTorch takes a fused path of its own that never calls the function."""
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        assert_module_agrees(module, x, x, x, **MHA_OPTIONS[options])


def test_multihead_attention_that_returns_weights():
    """They are the N x N matrix: what PyTorch does then is left alone, and right."""
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 9, 16)
    expected = module(x, x, x)
    with flash_attn_ext.enabled():
        torch.testing.assert_close(module(x, x, x), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masked", ["", "causal", "padding"])
def test_transformer_encoder_layer(masked, train, grad):
    module = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(train)
    options = {}
    if masked == "causal":
        options = {"src_mask": nn.Transformer.generate_square_subsequent_mask(9), "is_causal": True}
    elif masked == "padding":
        options = {"src_key_padding_mask": torch.arange(9) >= torch.tensor([[9], [5]])}
    with torch.set_grad_enabled(grad):
        assert_module_agrees(module, torch.randn(2, 9, 16), **options)


def test_transformer_encoder_in_eval_mode():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        assert_module_agrees(module, torch.randn(2, 9, 16))


def test_transformer_decoder_layer():
    module = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    assert_module_agrees(module, torch.randn(2, 9, 16), torch.randn(2, 6, 16))


@pytest.mark.parametrize("fastpath", [True, False])
def test_fast_path_setting_is_restored(fastpath):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        with flash_attn_ext.enabled():
            pass
        assert torch.backends.mha.get_fastpath_enabled() == fastpath
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_compiled_model_while_enabled():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 9, 16)
    expected = layer(x)
    targets = []

    def compiler(graph, example_inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with flash_attn_ext.enabled():
        backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()
    assert torch.ops.flash_attn_ext.attention_forward.default in targets


def test_other_threads_see_it_too():
    """It is the process that is switched, as with any other of PyTorch's backend settings."""
    seen = []
    with flash_attn_ext.enabled():
        worker = threading.Thread(target=lambda: seen.append(used_ours(call_through_module)))
        worker.start()
        worker.join()
    assert seen == [True]
