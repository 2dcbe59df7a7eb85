// flash_attn_ext._C: importing it registers the operators (ops.cpp and its neighbours); as a module
// it offers introspection.
#include <climits>
#include <cstdlib>
#include <string>
#include <utility>

#include <pybind11/pybind11.h>

#include "../flash_attention.h"
#include "fast_path.h"

namespace py = pybind11;

namespace {

// _extension.py searches the file for this text, to know before loading it what it was built for.
[[gnu::used]] constexpr char kBuiltFor[] = "flash_attn_ext built for torch " BUILD_TORCH_VERSION;

#ifdef __clang__
constexpr char kCompiler[] = __VERSION__;
#else
constexpr char kCompiler[] = "GCC " __VERSION__;
#endif

const char *isa() {
    const char *name = fa_cpu_isa();
    if (!name)
        throw py::value_error(
            "FLASH_ATTN_EXT_ISA=" + std::string(std::getenv("FLASH_ATTN_EXT_ISA")) +
            " names an instruction set that is unknown or that this machine lacks");
    return name;
}

py::list isa_list() {
    py::list list;
    int usable = 0;
    for (int i = 0; const char *name = fa_cpu_isa_list(i, &usable); i++)
        list.append(py::make_tuple(name, usable != 0));
    return list;
}

void set_isa(const char *name) {
    if (fa_cpu_set_isa(name) != FA_OK)
        throw py::value_error("no instruction set \"" + std::string(name) +
                              "\" here; isa_list() tells which are usable");
}

void cuda_set_kernels(const char *name) {
    if (fa_cuda_set_kernels(name) != FA_OK)
        throw py::value_error(fa_cuda_last_error());
}

py::dict build_info() {
    py::dict info;
    info["version"] = BUILD_VERSION;
    info["torch"] = BUILD_TORCH_VERSION;
    info["compiler"] = kCompiler;
    info["flags"] = BUILD_C_FLAGS;
    return info;
}

// --- CUDA ---

void warn(const char *message) {
    const py::gil_scoped_acquire gil;
    if (PyErr_WarnEx(PyExc_UserWarning, message, 1) < 0) // warnings are to be errors
        PyErr_WriteUnraisable(nullptr);
}

py::dict cuda_info() {
    char cache[PATH_MAX];
    int major = 0, minor = 0;
    const char *nvrtc = fa_cuda_compiler(&major, &minor);
    py::list devices;
    for (int device = 0; device < fa_cuda_device_count(); device++) {
        char name[256];
        int arch = 0;
        if (fa_cuda_device(device, name, sizeof name, &arch) == FA_OK)
            devices.append(py::make_tuple(name, arch));
    }
    py::dict info;
    info["devices"] = devices;
    info["driver"] = fa_cuda_driver_version();
    info["nvrtc"] = py::make_tuple(major, minor);
    info["nvrtc_path"] = nvrtc;
    info["cache"] = fa_cuda_cache_directory(cache, sizeof cache);
    return info;
}

fa_dtype dtype_of(const std::string &name) {
    for (const auto &[known, dtype] :
         {std::pair("float32", FA_FLOAT32), std::pair("float64", FA_FLOAT64),
          std::pair("bfloat16", FA_BFLOAT16), std::pair("float16", FA_FLOAT16),
          std::pair("bool", FA_BOOL)}) {
        if (name == known)
            return dtype;
    }
    throw py::value_error("unknown dtype: " + name);
}

// A CudaCall of _C.pyi: a call with tensors that are not there.
fa_params params_of(const py::dict &call) {
    alignas(16) static char memory[32];
    const auto get = [&](const char *name) { return call[name]; };
    const bool aligned = get("aligned").cast<bool>();
    char *nothing = aligned ? memory : memory + 8;
    const auto row = [&](int64_t size) { return aligned ? (size + 7) / 8 * 8 : size; };
    fa_params p{};
    p.dtype = dtype_of(get("dtype").cast<std::string>());
    p.head_dim = get("head_dim").cast<int>();
    p.head_dim_v = get("head_dim_v").cast<int>();
    p.batch = 2; // so that there is something to broadcast over
    p.heads_q = p.heads_k = 1;
    p.seq_q = p.seq_k = get("seq_q").cast<int>();
    p.q = p.k = {nothing, 0, 0, row(p.head_dim)};
    p.v = p.out = {nothing, 0, 0, row(p.head_dim_v)};
    p.window_left = FA_NO_LIMIT;
    p.window_right = get("window").cast<bool>() ? 0 : FA_NO_LIMIT;
    p.allow_tf32 = get("allow_tf32").cast<bool>();
    if (!get("mask").is_none())
        p.mask = {memory, dtype_of(get("mask").cast<std::string>()), 0, 0, p.seq_k, 1};
    if (get("dropout").cast<bool>()) {
        p.dropout_p = 0.5;
        p.rng_state = reinterpret_cast<const uint64_t *>(memory);
    }
    if (get("backward").cast<bool>()) {
        p.dq = p.dk = p.q;
        p.dv = p.dout = p.v;
        p.deterministic = get("deterministic").cast<bool>();
        if (get("mask_grad").cast<bool>()) {
            const int64_t scores = get("mask_broadcasts").cast<bool>() ? 0 : p.seq_q * p.seq_k;
            const bool in_dtype = scores && p.mask.dtype == p.dtype && p.dtype != FA_FLOAT32;
            p.dmask = {memory, scores, scores, p.seq_k, 1, in_dtype};
        }
    }
    return p;
}

py::object cuda_unsupported(const py::dict &call, int device) {
    fa_params p = params_of(call);
    p.device = device;
    return fa_cuda_supports(&p) == FA_OK ? py::object(py::none()) : py::str(fa_cuda_last_error());
}

py::list cuda_choice(const py::dict &call, int arch) {
    const fa_params p = params_of(call);
    py::list kernels;
    const auto append = [](void *list, const char *file, const char *not_sm90) {
        static_cast<py::list *>(list)->append(py::make_tuple(file, not_sm90));
    };
    if (fa_cuda_choice(&p, arch, append, &kernels) != FA_OK)
        throw std::runtime_error(fa_cuda_last_error());
    return kernels;
}

py::list cuda_compile(const py::dict &call, int arch) {
    const fa_params p = params_of(call);
    py::list kernels;
    const auto append = [](void *list, const fa_cuda_compiled *compiled) {
        const py::gil_scoped_acquire gil;
        py::dict kernel;
        kernel["file"] = compiled->file;
        kernel["block_m"] = compiled->block_m;
        kernel["block_n"] = compiled->block_n;
        kernel["threads"] = compiled->threads;
        kernel["shared_bytes"] = compiled->shared_bytes;
        kernel["cubin"] =
            py::bytes(static_cast<const char *>(compiled->cubin), compiled->cubin_bytes);
        kernel["log"] = compiled->log;
        static_cast<py::list *>(list)->append(kernel);
    };
    fa_status status;
    {
        const py::gil_scoped_release no_gil; // so that threads can compile at the same time
        status = fa_cuda_compile(&p, arch, append, &kernels);
    }
    if (status != FA_OK)
        throw std::runtime_error(fa_cuda_last_error());
    return kernels;
}

// Past pybind11, whose own calls cost as much as the whole of the fast path.
PyMethodDef methods[] = {
    {"attention", reinterpret_cast<PyCFunction>(flash_attn_ext::attention), METH_FASTCALL,
     "scaled_dot_product_attention for plain calls; None: not such a call."},
    {},
};

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of flash_attn_ext: operators, and facts about the build.";
    if (PyModule_AddFunctions(m.ptr(), methods) != 0)
        throw py::error_already_set();
    m.def("isa", isa, "Name of the instruction set that the CPU kernels use.");
    m.def("isa_list", isa_list,
          "(name, usable on this machine) of every instruction set compiled in, best first.");
    m.def("set_isa", set_isa, py::arg("name"),
          "Use the named instruction set from now on. For tests: not while calls are under way.");
    m.def("build_info", build_info, "Versions, compiler and flags that this file was built with.");

    m.def("cuda_info", cuda_info, "Devices, versions of driver and compiler, where the cache is.");
    m.def("cuda_set_nvrtc", fa_cuda_set_nvrtc, py::arg("path"),
          "The NVRTC to take, unless the process has loaded one. Before anything else with CUDA.");
    m.def("cuda_kernels", fa_cuda_kernels,
          "Which CUDA kernels are taken: \"best\", those for sm_90a where they apply, or "
          "\"portable\", those for every GPU.");
    m.def("cuda_set_kernels", cuda_set_kernels, py::arg("name"),
          "Take the \"best\" or the \"portable\" ones from now on. For tests and benchmarks: not "
          "while calls are under way.");
    m.def("cuda_last_error", fa_cuda_last_error,
          "Why the last call of the CUDA engine that failed on this thread did so.");
    m.def("cuda_unsupported", cuda_unsupported, py::arg("call"), py::arg("device"),
          "Why the CUDA kernels cannot take a call, or None.");
    m.def("cuda_choice", cuda_choice, py::arg("call"), py::arg("arch"),
          "(file, why not its sibling for sm_90a) of the kernels that a call takes, in order.");
    m.def("cuda_compile", cuda_compile, py::arg("call"), py::arg("arch"),
          "Compiles the kernels of a call for an architecture, unless the cache has them.");
    fa_cuda_set_warning_handler(warn);
}
