/* NVRTC, loaded at first use: every CUDA build of PyTorch brings it along, and so does the package
 * nvidia-cuda-nvrtc. */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

static struct {
    int major, minor; /* of NVRTC; 0: there is none */
    char path[PATH_MAX];
#define DECLARE(NAME, SYMBOL, PARAMETERS) nvrtcResult(*NAME) PARAMETERS;
    FA_NVRTC_FUNCTIONS(DECLARE)
#undef DECLARE
} nvrtc;

static char preferred[PATH_MAX];

void fa_cuda_set_nvrtc(const char *path) {
    snprintf(preferred, sizeof preferred, "%s", path);
}

static void *find_library(void) {
    static const char *const names[] = {"libnvrtc.so.13", "libnvrtc.so.12"};
    void *library = NULL;
    for (int i = 0; i < 2 && !library; i++) /* in this process already */
        library = dlopen(names[i], RTLD_NOW | RTLD_NOLOAD);
    if (!library && *preferred)
        library = dlopen(preferred, RTLD_NOW | RTLD_LOCAL);
    for (int i = 0; i < 2 && !library; i++) /* where the dynamic linker looks */
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    return library ? library : dlopen("/usr/local/cuda/lib64/libnvrtc.so", RTLD_NOW | RTLD_LOCAL);
}

static void load(void) {
    void *library = find_library();
    if (!library)
        return;
#define FIND(NAME, SYMBOL, PARAMETERS)                                                             \
    *(void **)&nvrtc.NAME = dlsym(library, SYMBOL);                                                \
    if (!nvrtc.NAME)                                                                               \
        return;
    FA_NVRTC_FUNCTIONS(FIND)
#undef FIND
    int major = 0, minor = 0;
    Dl_info info;
    if (nvrtc.nvrtcVersion(&major, &minor) || !dladdr((void *)nvrtc.nvrtcVersion, &info))
        return;
    snprintf(nvrtc.path, sizeof nvrtc.path, "%s", info.dli_fname);

    /* NVRTC loads its built-in declarations by name alone, which fails for a library that lies in a
     * place of its own, unless they are loaded already. */
    char directory[PATH_MAX], builtins[PATH_MAX + 64];
    snprintf(directory, sizeof directory, "%s", nvrtc.path);
    snprintf(builtins, sizeof builtins, "%s/libnvrtc-builtins.so.%d.%d", dirname(directory), major,
             minor);
    dlopen(builtins, RTLD_NOW | RTLD_LOCAL);
    nvrtc.major = major, nvrtc.minor = minor;
}

const char *fa_cuda_compiler(int *major, int *minor) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    *major = nvrtc.major, *minor = nvrtc.minor;
    if (nvrtc.major)
        return nvrtc.path;
    fa_cuda_fail(FA_UNSUPPORTED, "there is no NVRTC (libnvrtc.so.13 or .12), which compiles the "
                                 "kernels: pip install nvidia-cuda-nvrtc");
    return NULL;
}

int fa_cuda_is_header(const char *name) {
    size_t length = strlen(name);
    return length < 3 || strcmp(name + length - 3, ".cu") != 0;
}

static enum fa_status compile(nvrtcProgram program, const char *name, const char *options,
                              struct fa_cuda_code *code) {
    const char *list[32];
    int count = 0;
    for (; *options && count < 32; options += strlen(options) + 1)
        list[count++] = options;
    nvrtcResult result = nvrtc.nvrtcCompileProgram(program, count, list);
    if (nvrtc.nvrtcGetProgramLogSize(program, &code->log_bytes))
        code->log_bytes = 0;
    if (!result)
        result = nvrtc.nvrtcGetCUBINSize(program, &code->cubin_bytes);
    code->data = calloc(code->cubin_bytes + code->log_bytes + 1, 1);
    if (!code->data)
        return fa_cuda_fail(FA_OUT_OF_MEMORY, "out of memory");
    char *log = (char *)code->data + code->cubin_bytes;
    if (code->log_bytes)
        nvrtc.nvrtcGetProgramLog(program, log);
    if (!result)
        result = nvrtc.nvrtcGetCUBIN(program, (char *)code->data);
    return result ? fa_cuda_fail(FA_FAILED, "NVRTC %d.%d could not compile %s (error %d):\n%s",
                                 nvrtc.major, nvrtc.minor, name, result, log)
                  : FA_OK;
}

enum fa_status fa_cuda_compile_variant(const struct fa_cuda_variant *v, const char *options,
                                       struct fa_cuda_code *code) {
    int major, minor;
    *code = (struct fa_cuda_code){0};
    if (!fa_cuda_compiler(&major, &minor))
        return FA_UNSUPPORTED;

    const char *name = fa_cuda_file(v), *source = NULL;
    const char *headers[64], *header_names[64];
    int header_count = 0;
    for (const struct fa_cuda_source *s = fa_cuda_sources; s->name; s++) {
        if (strcmp(s->name, name) == 0)
            source = s->text;
        if (fa_cuda_is_header(s->name) && header_count < 64) {
            headers[header_count] = s->text;
            header_names[header_count++] = s->name;
        }
    }
    if (!source)
        return fa_cuda_fail(FA_UNSUPPORTED, "there is no kernel %s", name);

    nvrtcProgram program;
    if (nvrtc.nvrtcCreateProgram(&program, source, name, header_count, headers, header_names))
        return fa_cuda_fail(FA_FAILED, "NVRTC could not begin to compile %s", name);
    enum fa_status status = compile(program, name, options, code);
    nvrtc.nvrtcDestroyProgram(&program);
    if (status) {
        free(code->data);
        *code = (struct fa_cuda_code){0};
    }
    return status;
}
