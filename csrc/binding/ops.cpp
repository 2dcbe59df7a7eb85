// The operators: their schemas, and what every device does with their arguments. They are checked
// and described in a fa_params here; all that reaches the kernels is valid.
#include "ops.h"

#include <algorithm>
#include <limits>

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace flash_attn_ext {
namespace {

// Farther than any sequence is long, and sums of a few stay far from overflow.
constexpr int64_t kFar = int64_t{1} << 40;

fa_dtype dtype_of(const char *name, const Tensor &t) {
    switch (t.scalar_type()) {
    case at::kFloat:
        return FA_FLOAT32;
    case at::kDouble:
        return FA_FLOAT64;
    case at::kBFloat16:
        return FA_BFLOAT16;
    case at::kHalf:
        return FA_FLOAT16;
    default:
        TORCH_CHECK_NOT_IMPLEMENTED(false, "flash_attn_ext: ", name,
                                    " must be float32, float64, bfloat16 or float16, but got ",
                                    t.scalar_type());
    }
}

// The type of the log-sum-exp and of the mask's gradient while it is summed up: acc.
at::ScalarType acc_dtype(const Tensor &q) {
    return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_like(const char *name, const Tensor &t, at::IntArrayRef sizes, at::ScalarType dtype) {
    TORCH_CHECK(t.sizes() == sizes, "flash_attn_ext: ", name, " must have shape ", sizes,
                ", but got ", t.sizes());
    TORCH_CHECK(t.scalar_type() == dtype, "flash_attn_ext: ", name, " must have dtype ", dtype,
                ", but got ", t.scalar_type());
}

void check_device(const char *name, const Tensor &t, const Tensor &q) {
    TORCH_CHECK(t.device() == q.device(), "flash_attn_ext: ", name, " must be on the device of q (",
                q.device(), "), but is on ", t.device());
}

bool rows_are_contiguous(const Tensor &t) {
    return t.sizes().back() <= 1 || t.strides().back() == 1;
}

// Kernels want the last dimension contiguous; the others may have any strides.
Tensor with_contiguous_rows(const Tensor &t) {
    return rows_are_contiguous(t) ? t : t.contiguous();
}

fa_tensor input(const Tensor &t) {
    const at::IntArrayRef strides = t.strides();
    return {const_cast<void *>(t.const_data_ptr()), strides[0], strides[1], strides[2]};
}

fa_tensor output(const Tensor &t) {
    const at::IntArrayRef strides = t.strides();
    return {t.mutable_data_ptr(), strides[0], strides[1], strides[2]};
}

// 0 where the mask broadcasts.
int64_t broadcast_stride(const Tensor &mask, int64_t dim) {
    return mask.size(dim) == 1 ? 0 : mask.stride(dim);
}

// On t's device; by the shortest way, since a small call allocates for as long as it computes.
Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const Tensor &t,
                     at::ScalarType dtype) {
    if (t.is_cpu())
        return at::detail::empty_strided_cpu(sizes, strides, dtype);
    return at::empty_strided(sizes, strides, t.options().dtype(dtype));
}

// In place of a gradient that is not wanted.
Tensor no_gradient(const Tensor &t) {
    return empty_strided({0}, {1}, t, t.scalar_type());
}

// Memory for the gradient of t, in t's order of dimensions where that keeps rows contiguous.
Tensor empty_gradient(const Tensor &t, bool wanted) {
    if (!wanted)
        return no_gradient(t);
    if (rows_are_contiguous(t) && t.is_non_overlapping_and_dense()) // what empty_like finds out
        return empty_strided(t.sizes(), t.strides(), t, t.scalar_type());
    const Tensor grad = at::empty_like(t);
    return rows_are_contiguous(grad) ? grad : at::empty(t.sizes(), t.options());
}

} // namespace

Inputs::Inputs(const Tensor &q, const Tensor &k, const Tensor &v, const OptionalTensor &mask,
               const OptionalTensor &rng_state, double scale, int64_t window_left,
               int64_t window_right, int64_t diagonal_offset, double dropout_p) {
    set_qkv(q, k, v);
    if (mask)
        set_mask(*mask);
    set_window(window_left, window_right, diagonal_offset);
    set_dropout(dropout_p, rng_state);
    params.scale = scale;
    params.deterministic = at::globalContext().deterministicAlgorithms();
}

void Inputs::set_qkv(const Tensor &q_, const Tensor &k_, const Tensor &v_) {
    const at::IntArrayRef sizes_q = q_.sizes(), sizes_k = k_.sizes(), sizes_v = v_.sizes();
    TORCH_CHECK(sizes_q.size() == 4 && sizes_k.size() == 4 && sizes_v.size() == 4,
                "flash_attn_ext: q, k and v must be 4-dimensional [batch, heads, length, head "
                "size], but got q ",
                sizes_q, ", k ", sizes_k, " and v ", sizes_v);
    TORCH_CHECK(q_.scalar_type() == k_.scalar_type() && q_.scalar_type() == v_.scalar_type(),
                "flash_attn_ext: q, k and v must have the same dtype, but got q ", q_.scalar_type(),
                ", k ", k_.scalar_type(), " and v ", v_.scalar_type());
    const int64_t heads_q = sizes_q[1], heads_k = sizes_k[1];
    TORCH_CHECK(sizes_k[0] == sizes_q[0] && sizes_v[0] == sizes_q[0],
                "flash_attn_ext: q, k and v must have the same batch size, but got q ", sizes_q,
                ", k ", sizes_k, " and v ", sizes_v);
    TORCH_CHECK(sizes_v[1] == heads_k && sizes_v[2] == sizes_k[2],
                "flash_attn_ext: k and v must have the same heads and length, but got k ", sizes_k,
                " and v ", sizes_v);
    TORCH_CHECK(heads_k > 0 ? heads_q % heads_k == 0 : heads_q == 0,
                "flash_attn_ext: the heads of q must be a multiple of those of k and v, but "
                "got q ",
                sizes_q, " and k ", sizes_k);
    TORCH_CHECK(sizes_k[3] == sizes_q[3],
                "flash_attn_ext: q and k must have the same head size, but got q ", sizes_q,
                " and k ", sizes_k);
    check_device("k", k_, q_);
    check_device("v", v_, q_);
    q = with_contiguous_rows(q_);
    k = with_contiguous_rows(k_);
    v = with_contiguous_rows(v_);
    params.device = q.get_device();
    params.dtype = dtype_of("q", q);
    params.batch = sizes_q[0];
    params.heads_q = heads_q;
    params.heads_k = heads_k;
    params.seq_q = sizes_q[2];
    params.seq_k = sizes_k[2];
    params.head_dim = sizes_q[3];
    params.head_dim_v = sizes_v[3];
    params.q = input(q);
    params.k = input(k);
    params.v = input(v);
}

void Inputs::set_mask(const Tensor &mask_) {
    const at::DimVector full = {q.size(0), q.size(1), q.size(2), k.size(2)};
    bool broadcasts = mask_.dim() == 4;
    for (int64_t d = 0; broadcasts && d < 4; d++)
        broadcasts = mask_.size(d) == 1 || mask_.size(d) == full[d];
    TORCH_CHECK(broadcasts, "flash_attn_ext: mask must have 4 dimensions, each 1 or as in ",
                at::IntArrayRef(full),
                " [batch, heads of q, length of q, length of k], but "
                "got ",
                mask_.sizes());
    const auto dtype = mask_.scalar_type();
    TORCH_CHECK(dtype == at::kBool || dtype == at::kFloat || dtype == q.scalar_type(),
                "flash_attn_ext: mask must have dtype bool, float32 or that of q (",
                q.scalar_type(), "), but got ", dtype);
    check_device("mask", mask_, q);
    mask = mask_;
    params.mask = {mask.const_data_ptr(),     dtype == at::kBool ? FA_BOOL : dtype_of("mask", mask),
                   broadcast_stride(mask, 0), broadcast_stride(mask, 1),
                   broadcast_stride(mask, 2), broadcast_stride(mask, 3)};
}

void Inputs::set_window(int64_t left, int64_t right, int64_t diagonal_offset) {
    TORCH_CHECK(-kFar <= diagonal_offset && diagonal_offset <= kFar,
                "flash_attn_ext: diagonal_offset must be between -2**40 and 2**40, but got ",
                diagonal_offset);
    const auto limit = [](int64_t window) { return window > 4 * kFar ? FA_NO_LIMIT : window; };
    params.window_left = limit(left);
    params.window_right = limit(right);
    params.diagonal_offset = diagonal_offset;
}

void Inputs::set_dropout(double dropout_p, const OptionalTensor &rng_state_) {
    TORCH_CHECK(0 <= dropout_p && dropout_p <= 1,
                "flash_attn_ext: dropout_p must be between 0 and 1, but got ", dropout_p);
    if (dropout_p == 0)
        return;
    TORCH_CHECK(rng_state_.has_value(),
                "flash_attn_ext: rng_state must be given where dropout_p > 0");
    check_like("rng_state", *rng_state_, {2}, at::kLong);
    check_device("rng_state", *rng_state_, q);
    rng_state = rng_state_->contiguous();
    params.dropout_p = dropout_p;
    params.rng_state = static_cast<const uint64_t *>(rng_state.const_data_ptr());
}

BackwardInputs::BackwardInputs(const Tensor &grad_out_, const Tensor &out_, const Tensor &lse_,
                               Inputs inputs)
    : Inputs(std::move(inputs)) {
    const at::DimVector out_sizes = {params.batch, params.heads_q, params.seq_q, params.head_dim_v};
    check_like("grad_out", grad_out_, out_sizes, q.scalar_type());
    check_like("out", out_, out_sizes, q.scalar_type());
    check_like("lse", lse_, lse_sizes(), acc_dtype(q));
    check_device("grad_out", grad_out_, q);
    check_device("out", out_, q);
    check_device("lse", lse_, q);
    grad_out = with_contiguous_rows(grad_out_);
    out = with_contiguous_rows(out_);
    lse = lse_.contiguous();
    params.dout = input(grad_out);
    params.out = input(out);
    params.lse = const_cast<void *>(lse.const_data_ptr());
}

std::tuple<Tensor, Tensor> run_forward(Inputs &inputs, Launch *launch) {
    const fa_params &p = inputs.params;
    const Tensor &q = inputs.q;
    // [B, Hq, Sq, Dv] on memory [B, Sq, Hq, Dv]: joining the heads afterwards needs no copy.
    const auto at_least_1 = [](int64_t size) { return std::max<int64_t>(size, 1); };
    const int64_t length = at_least_1(p.seq_q), heads = at_least_1(p.heads_q),
                  dim_v = at_least_1(p.head_dim_v);
    const Tensor out =
        empty_strided({p.batch, p.heads_q, p.seq_q, p.head_dim_v},
                      {length * heads * dim_v, dim_v, heads * dim_v, 1}, q, q.scalar_type());
    const Tensor lse =
        empty_strided(inputs.lse_sizes(), {heads * length, length, 1}, q, acc_dtype(q));
    if (inputs.no_scores()) {
        out.zero_();
        lse.fill_(-std::numeric_limits<double>::infinity());
        return {out, lse};
    }
    inputs.params.out = output(out);
    inputs.params.lse = lse.mutable_data_ptr();
    launch(inputs.params);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(BackwardInputs &inputs,
                                                        std::array<bool, 4> grad_wanted,
                                                        Launch *launch, MaskGrad mask_grad) {
    const auto &[q, k, v, mask] = std::tie(inputs.q, inputs.k, inputs.v, inputs.mask);
    const bool mask_wanted = grad_wanted[3];
    TORCH_CHECK(!mask_wanted || (mask.defined() && mask.scalar_type() != at::kBool),
                "flash_attn_ext: grad_wanted asks for the gradient of mask, which must then be a "
                "floating-point tensor");

    const Tensor dq = empty_gradient(q, grad_wanted[0]);
    const Tensor dk = empty_gradient(k, grad_wanted[1]);
    const Tensor dv = empty_gradient(v, grad_wanted[2]);
    const at::DimVector scores = {q.size(0), q.size(1), q.size(2), k.size(2)};
    const bool in_dtype = mask_wanted && !inputs.no_scores() &&
                          mask.scalar_type() == q.scalar_type() && mask.sizes() == scores &&
                          (mask_grad == MaskGrad::any || acc_dtype(q) != q.scalar_type());
    const Tensor dmask = in_dtype      ? at::empty(scores, q.options())
                         : mask_wanted ? at::zeros(mask.sizes(), inputs.lse.options())
                                       : no_gradient(q);
    if (inputs.no_scores()) {
        dq.zero_();
        dk.zero_();
        dv.zero_();
    } else if (grad_wanted != std::array<bool, 4>{}) {
        fa_params &params = inputs.params;
        if (grad_wanted[0])
            params.dq = output(dq);
        if (grad_wanted[1])
            params.dk = output(dk);
        if (grad_wanted[2])
            params.dv = output(dv);
        if (mask_wanted)
            params.dmask = {dmask.mutable_data_ptr(),   broadcast_stride(dmask, 0),
                            broadcast_stride(dmask, 1), broadcast_stride(dmask, 2),
                            broadcast_stride(dmask, 3), in_dtype};
        launch(params);
    }
    return {dq, dk, dv, mask_wanted ? dmask.to(mask.scalar_type()) : dmask};
}

TORCH_LIBRARY(flash_attn_ext, m) {
    m.def("attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? rng_state, "
          "float scale, SymInt window_left, SymInt window_right, SymInt diagonal_offset, "
          "float dropout_p) -> (Tensor out, Tensor lse)",
          {at::Tag::pt2_compliant_tag});
    m.def("attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? mask, "
          "Tensor? rng_state, Tensor out, Tensor lse, float scale, SymInt window_left, "
          "SymInt window_right, SymInt diagonal_offset, float dropout_p, bool[4] grad_wanted) "
          "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)",
          {at::Tag::pt2_compliant_tag});
}

} // namespace flash_attn_ext
