// flash_attn_ext._C: importing it registers the operators (ops.cpp, autograd.cpp); as a module it
// offers introspection.
#include <pybind11/pybind11.h>

#include "../flash_attention.h"

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
        throw py::value_error("the environment variable FLASH_ATTN_EXT_ISA names an instruction "
                              "set that is unknown or that this machine lacks");
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

py::dict build_info() {
    py::dict info;
    info["version"] = BUILD_VERSION;
    info["torch"] = BUILD_TORCH_VERSION;
    info["compiler"] = kCompiler;
    info["flags"] = BUILD_C_FLAGS;
    return info;
}

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of flash_attn_ext: operators, and facts about the build.";
    m.def("isa", isa, "Name of the instruction set that the CPU kernels use.");
    m.def("isa_list", isa_list,
          "(name, usable on this machine) of every instruction set compiled in, best first.");
    m.def("set_isa", set_isa, py::arg("name"),
          "Use the named instruction set from now on. For tests: not while calls are under way.");
    m.def("build_info", build_info, "Versions, compiler and flags that this file was built with.");
}
