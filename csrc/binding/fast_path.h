// What fast_path.cpp has for module.cpp.
#pragma once

#include <Python.h>

namespace flash_attn_ext {

// attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa): the output of
// scaled_dot_product_attention, or None: this call is not for the fast path.
PyObject *attention(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

} // namespace flash_attn_ext
