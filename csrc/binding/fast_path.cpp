// scaled_dot_product_attention for the calls that need nothing but an operator: plain 4-D tensors
// that fit each other. In Python the same would take longer than a small attention. What is not so
// plain, or wrong, is left to flash_attn_ext/functional.py, which knows all of SDPA's meaning.
#include "fast_path.h"

#include <cmath>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops.h"

namespace flash_attn_ext {
namespace {

// Sizes and strides can be read, and mean what they say.
bool is_plain(const Tensor &t) {
    return t.layout() == at::kStrided && !t.is_nested() &&
           !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

bool is_plain_4d(PyObject *object) {
    return THPVariable_CheckExact(object) && is_plain(THPVariable_Unpack(object)) &&
           THPVariable_Unpack(object).dim() == 4;
}

bool is_supported(at::ScalarType dtype) {
    return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ||
           dtype == at::kDouble;
}

bool is_like(const Tensor &t, const Tensor &q) {
    return t.scalar_type() == q.scalar_type() && t.device() == q.device();
}

// torch.func (grad, vmap, ...), or a mode of torch.overrides, has to see the call first.
bool is_intercepted() {
    const auto included = c10::impl::tls_local_dispatch_key_set().included_;
    return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
           included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
           at::impl::torch_function_mode_enabled();
}

bool is_cast(const Tensor &q) { // by autocast, to another dtype
    const auto device = q.device().type();
    return device != at::kMeta && at::autocast::is_autocast_enabled(device) &&
           at::autocast::get_autocast_dtype(device) != q.scalar_type();
}

bool fit(const Tensor &q_, const Tensor &k_, const Tensor &v_, bool enable_gqa) {
    const at::IntArrayRef q = q_.sizes(), k = k_.sizes(), v = v_.sizes();
    return is_like(k_, q_) && is_like(v_, q_) && is_supported(q_.scalar_type()) && k[0] == q[0] &&
           v[0] == q[0] && v[1] == k[1] &&
           (q[1] == k[1] || (enable_gqa && k[1] > 0 && q[1] % k[1] == 0)) && k[3] == q[3] &&
           q[3] > 0 && v[2] == k[2];
}

// A mask that broadcasts, and of which no dimension was expanded: functional.py would undo that.
bool mask_fits(const Tensor &mask, const Tensor &q, const Tensor &k) {
    if (!is_plain(mask) || mask.dim() > 4 || mask.device() != q.device() ||
        (mask.scalar_type() != at::kBool && mask.scalar_type() != q.scalar_type()))
        return false;
    const int64_t full[4] = {k.size(2), q.size(2), q.size(1), q.size(0)}; // from the last one
    for (int d = 0; d < mask.dim(); d++) {
        const int64_t size = mask.size(-1 - d);
        if (size != 1 && (size != full[d] || mask.stride(-1 - d) == 0))
            return false;
    }
    return true;
}

} // namespace

PyObject *attention(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (count != 8)
        Py_RETURN_NONE;
    PyObject *mask_ = arguments[3], *dropout_p_ = arguments[4], *is_causal_ = arguments[5],
             *scale_ = arguments[6], *enable_gqa_ = arguments[7];
    if (is_intercepted() || !is_plain_4d(arguments[0]) || !is_plain_4d(arguments[1]) ||
        !is_plain_4d(arguments[2]) || !(mask_ == Py_None || THPVariable_CheckExact(mask_)) ||
        !PyFloat_CheckExact(dropout_p_) || !PyBool_Check(is_causal_) ||
        !(scale_ == Py_None || PyFloat_CheckExact(scale_)) || !PyBool_Check(enable_gqa_))
        Py_RETURN_NONE;

    const Tensor &q = THPVariable_Unpack(arguments[0]), &k = THPVariable_Unpack(arguments[1]),
                 &v = THPVariable_Unpack(arguments[2]);
    const double dropout_p = PyFloat_AS_DOUBLE(dropout_p_);
    const bool is_causal = is_causal_ == Py_True;
    OptionalTensor mask;
    if (mask_ != Py_None)
        mask = THPVariable_Unpack(mask_);
    if (!fit(q, k, v, enable_gqa_ == Py_True) || is_cast(q) ||
        !(0 <= dropout_p && dropout_p <= 1) || (mask && (is_causal || !mask_fits(*mask, q, k))))
        Py_RETURN_NONE;
    const double scale = scale_ == Py_None ? std::pow(static_cast<double>(q.size(3)), -0.5)
                                           : PyFloat_AS_DOUBLE(scale_);

    Tensor out;
    {
        const pybind11::gil_scoped_release no_gil;
        while (mask && mask->dim() < 4)
            mask = mask->unsqueeze(0);
        OptionalTensor rng_state;
        if (dropout_p > 0)
            rng_state = at::randint(0, int64_t{1} << 62, {2}, q.options().dtype(at::kLong));
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("flash_attn_ext::attention_forward", "")
                                   .typed<AttentionForward>();
        out = std::get<0>(
            op.call(q, k, v, mask, rng_state, scale, -1, is_causal ? 0 : -1, 0, dropout_p));
    }
    return THPVariable_Wrap(out);
    END_HANDLE_TH_ERRORS
}

} // namespace flash_attn_ext
