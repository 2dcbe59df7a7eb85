/* Stands in for libcuda.so.1 and for libnvrtc.so.13, so that the engine runs as it is: "NVRTC" is
 * the host's C++ compiler, a "cubin" a shared library (after its size), memory that of the host. */
#define _GNU_SOURCE /* dladdr, memfd_create */
#undef dlopen       /* the Makefile has the engine call what is below */
#undef getenv
#include <dlfcn.h>
#include <pthread.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cuda/engine/engine.h"
#include "inside.h"

/* --- what the engine takes for dlopen and getenv --- */

static const char *own_path(void) {
    Dl_info info;
    return dladdr((void *)own_path, &info) ? info.dli_fname : "";
}

/* libcuda and NVRTC are both here. */
void *emu_dlopen(const char *name, int flags) {
    (void)name;
    return dlopen(own_path(), flags);
}

/* A cache apart from that of GPUs: "libemulator.so.cache". */
char *emu_getenv(const char *name) {
    static char cache[4096];
    if (strcmp(name, "FLASH_ATTN_EXT_CACHE") != 0)
        return getenv(name);
    snprintf(cache, sizeof cache, "%s.cache", own_path());
    return cache;
}

/* --- NVRTC --- */

struct _nvrtcProgram {
    char directory[32], *source;
    char *cubin, *log;
    size_t cubin_bytes;
};

int nvrtcVersion(int *major, int *minor) {
    *major = 13, *minor = __GNUC__;
    return 0;
}

static int write_file(const char *directory, const char *name, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "w");
    if (!file)
        return 1;
    const int failed = fputs(text, file) < 0;
    return fclose(file) || failed;
}

static char *read_file(const char *directory, const char *name, size_t *bytes) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "r");
    struct stat status;
    if (!file || fstat(fileno(file), &status))
        return NULL;
    *bytes = (size_t)status.st_size;
    char *data = calloc(*bytes + 1, 1);
    if (data && fread(data, 1, *bytes, file) != *bytes)
        abort();
    fclose(file);
    return data;
}

int nvrtcCreateProgram(nvrtcProgram *program, const char *source, const char *name, int count,
                       const char *const *headers, const char *const *names) {
    nvrtcProgram p = *program = calloc(1, sizeof **program);
    if (!p)
        return 1;
    strcpy(p->directory, "/tmp/emulator-XXXXXX");
    if (!mkdtemp(p->directory))
        return 1;
    char path[512];
    snprintf(path, sizeof path, "%s/ptx", p->directory);
    int failed = mkdir(path, 0700);
    for (int n = 0; n < count; n++)
        failed |= write_file(p->directory, names[n], headers[n]);

    /* The kernels, with what loads them. */
    const size_t bytes = strlen(source) + 4096;
    char *text = malloc(bytes), *end = text;
    p->source = strdup(name);
    if (!text || !p->source)
        return 1;
    end += snprintf(end, bytes, "%s\nEMU_SHARED_MEMORY\n", source);
    regex_t entry;
    regmatch_t match[4]; /* 2: what is said of clusters, 3: the number of blocks */
    regcomp(&entry,
            "(__cluster_dims__\\(([A-Za-z0-9_]+)\\)[^;{]*)?(fa_[a-z0-9_]+)\\(const "
            "__grid_constant__",
            REG_EXTENDED);
    for (const char *at = source; regexec(&entry, at, 4, match, 0) == 0; at += match[0].rm_eo) {
        const int cluster = match[2].rm_so >= 0;
        end += snprintf(end, bytes - (size_t)(end - text), "EMU_KERNEL(%.*s, %.*s)\n",
                        (int)(match[3].rm_eo - match[3].rm_so), at + match[3].rm_so,
                        cluster ? (int)(match[2].rm_eo - match[2].rm_so) : 1,
                        cluster ? at + match[2].rm_so : "1");
    }
    regfree(&entry);
    failed |= write_file(p->directory, name, text);
    free(text);
    return failed;
}

int nvrtcDestroyProgram(nvrtcProgram *program) {
    nvrtcProgram p = *program;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", p->directory);
    const int failed = system(command);
    free(p->source), free(p->cubin), free(p->log), free(p);
    return failed;
}

int nvrtcCompileProgram(nvrtcProgram p, int count, const char *const *options) {
    const char *compiler = getenv("CXX");
    char command[8192];
    int length = snprintf(command, sizeof command,
                          "cd %s && %s -std=c++17 -O1 -g1 -fno-omit-frame-pointer "
                          "-fno-optimize-sibling-calls -fno-strict-aliasing "
                          "-fPIC -shared -w -Wno-psabi -I. -include cuda.h",
                          p->directory, compiler && *compiler ? compiler : "g++");
    for (int n = 0; n < count; n++) {
        int arch;
        if (sscanf(options[n], "--gpu-architecture=sm_%d", &arch) == 1)
            length += snprintf(command + length, sizeof command - (size_t)length,
                               " -D__CUDA_ARCH__=%d0", arch);
        else if (strncmp(options[n], "-D", 2) == 0)
            length +=
                snprintf(command + length, sizeof command - (size_t)length, " '%s'", options[n]);
    }
    snprintf(command + length, sizeof command - (size_t)length, " -x c++ %s -x none -o so %s 2>log",
             p->source, own_path());
    const int failed = system(command);
    size_t bytes;
    p->log = read_file(p->directory, "log", &bytes);
    p->cubin = failed ? NULL : read_file(p->directory, "so", &p->cubin_bytes);
    return !p->log || !p->cubin;
}

int nvrtcGetCUBINSize(nvrtcProgram p, size_t *size) {
    *size = sizeof(uint64_t) + p->cubin_bytes;
    return 0;
}
int nvrtcGetCUBIN(nvrtcProgram p, char *cubin) {
    const uint64_t bytes = p->cubin_bytes;
    memcpy(cubin, &bytes, sizeof bytes);
    memcpy(cubin + sizeof bytes, p->cubin, p->cubin_bytes);
    return 0;
}
int nvrtcGetProgramLogSize(nvrtcProgram p, size_t *size) {
    *size = p->log ? strlen(p->log) + 1 : 0;
    return 0;
}
int nvrtcGetProgramLog(nvrtcProgram p, char *log) {
    strcpy(log, p->log);
    return 0;
}

/* --- the driver --- */

enum { WRONG = 1, LAUNCH_FAILED = 719 };
static char report[8000]; /* of the last launch that failed */

/* Devices: of each architecture one with few multiprocessors and one with many. */
static const int archs[] = {80, 86, 89, 90, 100, 120};

static struct emu_context {
    int device;
} contexts[2 * sizeof archs / sizeof *archs];
static _Thread_local struct emu_context *current_context;

int cuInit(unsigned flags) {
    return flags != 0;
}
int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
int cuGetErrorString(CUresult error, const char **text) {
    *text = error == LAUNCH_FAILED ? report : "wrong arguments";
    return 0;
}
int cuDeviceGetCount(int *count) {
    *count = sizeof contexts / sizeof *contexts;
    return 0;
}
int cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, (size_t)size, "emulated sm_%d", archs[device / 2]);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    if (device >= (int)(sizeof contexts / sizeof *contexts))
        return WRONG;
    *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT       ? device % 2 ? 132 : 2
             : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? archs[device / 2] / 10
                                                                         : archs[device / 2] % 10;
    return 0;
}
int cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    contexts[device].device = device;
    *context = (CUcontext)&contexts[device];
    return 0;
}
int cuCtxGetDevice(CUdevice *device) {
    *device = current_context ? current_context->device : -1;
    return !current_context;
}
int cuCtxPushCurrent_v2(CUcontext context) {
    current_context = (struct emu_context *)context;
    return 0;
}
int cuCtxPopCurrent_v2(CUcontext *context) {
    *context = (CUcontext)current_context;
    current_context = NULL;
    return 0;
}
/* A library for each block of a cluster. */
static struct library {
    void *of_block[MAX_CLUSTER];
} *load_library(const void *image) {
    uint64_t bytes;
    memcpy(&bytes, image, sizeof bytes);
    struct library *library = calloc(1, sizeof *library);
    for (int block = 0; library && block < MAX_CLUSTER; block++) {
        const int file = memfd_create("kernel", 0); /* stays open, for reports to look into */
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/fd/%d", getpid(), file);
        if (file < 0 || write(file, (const char *)image + sizeof bytes, bytes) != (ssize_t)bytes)
            return NULL;
        library->of_block[block] = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library->of_block[block]) {
            fprintf(stderr, "%s\n", dlerror());
            return NULL;
        }
    }
    return library;
}
int cuLibraryLoadData(CUlibrary *library, const void *image, int *jit_options, void **jit_values,
                      unsigned jit_count, int *options, void **values, unsigned count) {
    (void)jit_options, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    *library = (CUlibrary)load_library(image);
    return *library ? 0 : WRONG;
}
int cuLibraryUnload(CUlibrary library) {
    int failed = 0;
    for (int block = 0; block < MAX_CLUSTER; block++)
        failed |= dlclose(((struct library *)library)->of_block[block]);
    free(library);
    return failed;
}
/* The names of all kernels that were loaded so far, each after a space. */
static char loaded[1 << 16];
const char *emu_loaded(void) {
    return loaded;
}
int cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
    const size_t length = strlen(loaded);
    snprintf(loaded + length, sizeof loaded - length, " %s", name);
    char symbol[128];
    snprintf(symbol, sizeof symbol, "%s_kernel", name);
    const struct emu_kernel **of_block = calloc(MAX_CLUSTER, sizeof *of_block);
    for (int block = 0; of_block && block < MAX_CLUSTER; block++)
        of_block[block] = dlsym(((struct library *)library)->of_block[block], symbol);
    *kernel = (CUkernel)of_block;
    return of_block && of_block[0] ? 0 : WRONG;
}
int cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
    *function = (CUfunction)kernel;
    return kernel == NULL;
}
int cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice device) {
    (void)kernel;
    const int arch = archs[device / 2], shared = arch == 80                      ? 163
                                                 : arch / 10 == 8 || arch == 120 ? 99
                                                                                 : 227;
    return attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > shared << 10;
}
int cuLaunchKernel(CUkernel kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   CUstream stream, void **parameters, void **extra) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    (void)stream, (void)extra;
    if (grid_x == 0 || grid_y != 1 || grid_z != 1 || block_x == 0 || block_x % LANES ||
        block_x > MAX_THREADS || block_y != 1 || block_z != 1 || shared_bytes > EMU_MAX_DYNAMIC)
        return WRONG;
    pthread_mutex_lock(&mutex);
    const char *what = emu_run((const struct emu_kernel *const *)kernel, parameters, grid_x,
                               block_x, shared_bytes);
    if (what)
        snprintf(report, sizeof report, "%s", what);
    pthread_mutex_unlock(&mutex);
    return what ? LAUNCH_FAILED : 0;
}
int cuTensorMapEncodeTiled(CUtensorMap *map, int dtype, unsigned rank, void *address,
                           const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *element_strides, int interleave, int swizzle,
                           int l2_promotion, int oob_fill) {
    (void)l2_promotion;
    static const uint8_t bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
    struct emu_map m = {.magic = EMU_MAP_MAGIC,
                        .data = address,
                        .rank = (uint8_t)rank,
                        .elem_bytes = bytes_of[dtype],
                        .is_float32 = dtype == CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                        .swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
    _Static_assert(sizeof m <= sizeof *map, "it has room");
    int wrong = rank < 1 || rank > 5 || interleave || oob_fill || ((uintptr_t)map & 63) ||
                ((uintptr_t)address & 15) || (swizzle && !m.swizzled);
    for (unsigned i = 0; i < rank && !wrong; i++) {
        wrong |= sizes[i] == 0 || sizes[i] > UINT32_MAX || box[i] == 0 || box[i] > 256 ||
                 element_strides[i] != 1;
        m.size[i] = (uint32_t)sizes[i], m.box[i] = (uint16_t)box[i];
    }
    for (unsigned i = 0; i + 1 < rank && !wrong; i++) {
        wrong |= strides[i] == 0 || strides[i] % 16 || strides[i] >> 40;
        m.stride[i] = strides[i];
    }
    const unsigned row_bytes = box[0] * m.elem_bytes;
    wrong |= row_bytes % 16 != 0 || (m.swizzled && row_bytes > 128);
    memcpy(map, &m, sizeof m);
    return wrong;
}
int cuStreamIsCapturing(CUstream stream, int *capturing) {
    (void)stream;
    *capturing = 0;
    return 0;
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
    (void)mode;
    return 0;
}

/* --- one kernel, past the engine --- */

/* For tests/emulator.py; returns what went wrong, or NULL. */
const char *emu_launch(const char *source, const char *entry, int count, const char *const *options,
                       unsigned grid, unsigned threads, unsigned shared_bytes, void **parameters) {
    const char *headers[64], *names[64];
    int header_count = 0;
    for (const struct fa_cuda_source *s = fa_cuda_sources; s->name; s++) {
        if (fa_cuda_is_header(s->name) && header_count < 64)
            headers[header_count] = s->text, names[header_count++] = s->name;
    }
    nvrtcProgram program;
    if (nvrtcCreateProgram(&program, source, "kernel.cu", header_count, headers, names))
        return "the disk is full";
    CUlibrary library;
    CUkernel kernel;
    char *cubin = NULL;
    int failed = nvrtcCompileProgram(program, count, options);
    if (!failed) {
        cubin = malloc(sizeof(uint64_t) + program->cubin_bytes);
        failed = !cubin || nvrtcGetCUBIN(program, cubin) ||
                 cuLibraryLoadData(&library, cubin, NULL, NULL, 0, NULL, NULL, 0) ||
                 cuLibraryGetKernel(&kernel, library, entry);
    }
    if (failed)
        snprintf(report, sizeof report, "%s cannot be compiled: %s", entry, program->log);
    else
        failed =
            cuLaunchKernel(kernel, grid, 1, 1, threads, 1, 1, shared_bytes, NULL, parameters, NULL);
    free(cubin);
    nvrtcDestroyProgram(&program);
    return failed ? report : NULL;
}
