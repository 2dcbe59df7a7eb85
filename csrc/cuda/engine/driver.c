/* libcuda.so.1, loaded at first use: a machine without it can load this extension all the same. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>

#include "engine.h"

static struct fa_cuda_driver functions;
static const char *missing; /* why there is no driver */

static void load(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        missing = "there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)";
        return;
    }
#define FIND(NAME, SYMBOL, PARAMETERS)                                                             \
    *(void **)&functions.NAME = dlsym(library, SYMBOL);                                            \
    if (!functions.NAME)                                                                           \
        missing =                                                                                  \
            "the NVIDIA driver is too old: it has no " SYMBOL " (525 is the first that will do)";
    FA_DRIVER_FUNCTIONS(FIND)
#undef FIND
    if (!missing && functions.cuInit(0) != 0)
        missing = "the NVIDIA driver does not start (cuInit fails): is there a GPU?";
}

const struct fa_cuda_driver *fa_cuda_driver(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (missing) {
        fa_cuda_fail(FA_UNSUPPORTED, "%s", missing);
        return NULL;
    }
    return &functions;
}

enum fa_status fa_cuda_driver_error(const char *what, CUresult error) {
    const char *text = NULL;
    functions.cuGetErrorString(error, &text);
    return fa_cuda_fail(error == CUDA_ERROR_OUT_OF_MEMORY ? FA_OUT_OF_MEMORY : FA_FAILED,
                        "%s: CUDA error %d, %s", what, error, text ? text : "unknown");
}

/* --- devices --- */

enum { MAX_DEVICES = 64 };

enum fa_status fa_cuda_arch(int device, int *arch) {
    static _Atomic int known[MAX_DEVICES]; /* 0: not yet */
    const struct fa_cuda_driver *cuda = fa_cuda_driver();
    if (!cuda)
        return FA_UNSUPPORTED;
    if (device < 0 || device >= MAX_DEVICES)
        return fa_cuda_fail(FA_INVALID, "device: there is no CUDA device %d", device);
    *arch = atomic_load_explicit(&known[device], memory_order_relaxed);
    if (*arch)
        return FA_OK;
    int major = 0, minor = 0;
    CUresult error =
        cuda->cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
    if (!error)
        error = cuda->cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                                           device);
    if (error)
        return fa_cuda_driver_error("device", error);
    *arch = 10 * major + minor;
    atomic_store_explicit(&known[device], *arch, memory_order_relaxed);
    return FA_OK;
}

enum fa_status fa_cuda_sm_count(int device, int *count) {
    static _Atomic int known[MAX_DEVICES]; /* 0: not yet */
    *count = atomic_load_explicit(&known[device], memory_order_relaxed);
    if (*count)
        return FA_OK;
    CUresult error =
        functions.cuDeviceGetAttribute(count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
    if (error)
        return fa_cuda_driver_error("device", error);
    atomic_store_explicit(&known[device], *count, memory_order_relaxed);
    return FA_OK;
}

/* A thread may have no context yet, or that of another device: torch sets neither where it can
 * avoid it. The device's primary context is the one that torch uses. */
enum fa_status fa_cuda_enter(int device, int *pushed) {
    static _Atomic(CUcontext) primary[MAX_DEVICES];
    const struct fa_cuda_driver *cuda = fa_cuda_driver();
    *pushed = 0;
    CUdevice current = -1;
    if (cuda->cuCtxGetDevice(&current) == 0 && current == device)
        return FA_OK;
    CUcontext context = atomic_load(&primary[device]);
    if (!context) {
        /* Two threads may both retain it; it lives until the process ends. */
        CUresult error = cuda->cuDevicePrimaryCtxRetain(&context, device);
        if (error)
            return fa_cuda_driver_error("the device's context", error);
        atomic_store(&primary[device], context);
    }
    CUresult error = cuda->cuCtxPushCurrent(context);
    if (error)
        return fa_cuda_driver_error("the device's context", error);
    *pushed = 1;
    return FA_OK;
}

void fa_cuda_leave(int pushed) {
    CUcontext popped;
    if (pushed)
        functions.cuCtxPopCurrent(&popped);
}

int fa_cuda_device_count(void) {
    const struct fa_cuda_driver *cuda = fa_cuda_driver();
    int count = 0;
    return cuda && cuda->cuDeviceGetCount(&count) == 0 ? count : 0;
}

enum fa_status fa_cuda_device(int device, char *name, size_t name_bytes, int *arch) {
    enum fa_status status = fa_cuda_arch(device, arch);
    if (status)
        return status;
    CUresult error = functions.cuDeviceGetName(name, (int)name_bytes, device);
    return error ? fa_cuda_driver_error("device", error) : FA_OK;
}

int fa_cuda_driver_version(void) {
    const struct fa_cuda_driver *cuda = fa_cuda_driver();
    int version = 0;
    return cuda && cuda->cuDriverGetVersion(&version) == 0 ? version : 0;
}
