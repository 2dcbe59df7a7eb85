/* Stands in for libcuda.so.1 and, compiled once more, for libnvrtc.so.13. */
#include "fake_cuda.h"

#include <stdlib.h>
#include <string.h>

#include "cuda/engine/cuda_api.h"

#ifdef FAKE_NVRTC

int nvrtcVersion(int *major, int *minor) {
    *major = 13, *minor = 0;
    return 0;
}
int nvrtcCreateProgram(nvrtcProgram *program, const char *source, const char *name, int count,
                       const char *const *headers, const char *const *names) {
    (void)source, (void)name, (void)count, (void)headers, (void)names;
    *program = malloc(1);
    return *program == NULL;
}
int nvrtcDestroyProgram(nvrtcProgram *program) {
    free(*program);
    return 0;
}
int nvrtcCompileProgram(nvrtcProgram program, int count, const char *const *options) {
    (void)program, (void)options;
    return count == 0;
}
int nvrtcGetCUBINSize(nvrtcProgram program, size_t *size) {
    (void)program;
    *size = 6;
    return 0;
}
int nvrtcGetCUBIN(nvrtcProgram program, char *cubin) {
    (void)program;
    memcpy(cubin, "cubin", 6);
    return 0;
}
int nvrtcGetProgramLogSize(nvrtcProgram program, size_t *size) {
    (void)program;
    *size = 4;
    return 0;
}
int nvrtcGetProgramLog(nvrtcProgram program, char *log) {
    (void)program;
    memcpy(log, "log", 4);
    return 0;
}

#else

struct fake_cuda fake_cuda = {.arch = 80};
static char something; /* for handles to point to */

int cuInit(unsigned flags) {
    return flags != 0;
}
int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
int cuGetErrorString(CUresult error, const char **text) {
    *text = error == 2 ? "out of memory" : "some error";
    return 0;
}
int cuDeviceGetCount(int *count) {
    *count = 2;
    return 0;
}
int cuDeviceGetName(char *name, int size, CUdevice device) {
    (void)device;
    memset(name, 0, (size_t)size);
    memcpy(name, "fake", 5);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT       ? 5
             : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? fake_cuda.arch / 10
                                                                         : fake_cuda.arch % 10;
    return device < 8 ? 0 : 101;
}
int cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    (void)device;
    *context = (CUcontext)&something;
    return 0;
}
int cuCtxGetDevice(CUdevice *device) {
    *device = fake_cuda.current_device;
    return 0;
}
int cuCtxPushCurrent_v2(CUcontext context) {
    fake_cuda.pushes++;
    return context == NULL;
}
int cuCtxPopCurrent_v2(CUcontext *context) {
    fake_cuda.pops++;
    *context = (CUcontext)&something;
    return 0;
}
int cuLibraryLoadData(CUlibrary *library, const void *image, int *jit_options, void **jit_values,
                      unsigned jit_count, int *options, void **values, unsigned count) {
    (void)jit_options, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    fake_cuda.loads++;
    *library = (CUlibrary)&something;
    return memcmp(image, "cubin", 6) ? 200 : fake_cuda.load_error;
}
int cuLibraryUnload(CUlibrary library) {
    fake_cuda.unloads++;
    return library == NULL;
}
int cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
    *kernel = (CUkernel)&something;
    return library == NULL || strncmp(name, "fa_", 3) != 0;
}
int cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
    *function = (CUfunction)&something;
    return kernel == NULL ? 1 : fake_cuda.function_error;
}
int cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice device) {
    (void)attribute, (void)value, (void)device;
    return kernel == NULL;
}
int cuLaunchKernel(CUkernel kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   CUstream stream, void **parameters, void **extra) {
    (void)stream, (void)extra;
    fake_cuda.launches++;
    fake_cuda.grid = grid_x * grid_y * grid_z;
    fake_cuda.threads = block_x * block_y * block_z;
    fake_cuda.shared_bytes = shared_bytes;
    return kernel == NULL || parameters == NULL ? 1 : fake_cuda.launch_error;
}
int cuTensorMapEncodeTiled(CUtensorMap *map, int dtype, unsigned rank, void *address,
                           const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *element_strides, int interleave, int swizzle,
                           int l2_promotion, int oob_fill) {
    (void)dtype, (void)interleave, (void)swizzle, (void)l2_promotion, (void)oob_fill;
    int wrong = rank != 4 || ((uintptr_t)map & 63) || ((uintptr_t)address & 15);
    for (unsigned i = 0; i < rank; i++)
        wrong |= sizes[i] == 0 || box[i] == 0 || box[i] > 256 || element_strides[i] != 1;
    for (unsigned i = 0; i + 1 < rank; i++)
        wrong |= strides[i] == 0 || strides[i] % 16 || strides[i] >> 40;
    fake_cuda.tensor_maps++;
    return wrong;
}
int cuStreamIsCapturing(CUstream stream, int *capturing) {
    (void)stream;
    *capturing = fake_cuda.capturing;
    return 0;
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
    (void)mode;
    return 0;
}

#endif
