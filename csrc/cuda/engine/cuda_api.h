/* The little of NVIDIA's driver API and of NVRTC that the engine uses, declared here so that no
 * CUDA header is needed to build; the libraries are loaded at run time (driver.c, compiler.c). */
#ifndef FA_CUDA_API_H
#define FA_CUDA_API_H

#include <stddef.h>
#include <stdint.h>

typedef int CUresult; /* 0: success */
typedef int CUdevice; /* as numbered by cudaSetDevice and by torch */
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;
typedef struct CUfunc_st *CUfunction;
typedef struct {
    _Alignas(64) uint64_t opaque[16];
} CUtensorMap;

enum {
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9, /* percent */
    CU_STREAM_CAPTURE_MODE_RELAXED = 2,
    CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
    CU_TENSOR_MAP_INTERLEAVE_NONE = 0,
    CU_TENSOR_MAP_SWIZZLE_128B = 3,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3,
    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0, /* zeros */
};

/* F(name, symbol, parameters). Libraries (cuLibrary*) came with CUDA 12.0: no older driver will do.
 */
#define FA_DRIVER_FUNCTIONS(F)                                                                     \
    F(cuInit, "cuInit", (unsigned flags))                                                          \
    F(cuDriverGetVersion, "cuDriverGetVersion", (int *version))                                    \
    F(cuGetErrorString, "cuGetErrorString", (CUresult error, const char **text))                   \
    F(cuDeviceGetCount, "cuDeviceGetCount", (int *count))                                          \
    F(cuDeviceGetName, "cuDeviceGetName", (char *name, int size, CUdevice device))                 \
    F(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, CUdevice device))  \
    F(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain",                                        \
      (CUcontext * context, CUdevice device))                                                      \
    F(cuCtxGetDevice, "cuCtxGetDevice", (CUdevice * device))                                       \
    F(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext context))                                \
    F(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext * context))                                \
    F(cuLibraryLoadData, "cuLibraryLoadData",                                                      \
      (CUlibrary * library, const void *image, int *jit_options, void **jit_values,                \
       unsigned jit_count, int *options, void **values, unsigned count))                           \
    F(cuLibraryUnload, "cuLibraryUnload", (CUlibrary library))                                     \
    F(cuLibraryGetKernel, "cuLibraryGetKernel",                                                    \
      (CUkernel * kernel, CUlibrary library, const char *name))                                    \
    F(cuKernelGetFunction, "cuKernelGetFunction", (CUfunction * function, CUkernel kernel))        \
    F(cuKernelSetAttribute, "cuKernelSetAttribute",                                                \
      (int attribute, int value, CUkernel kernel, CUdevice device))                                \
    F(cuLaunchKernel, "cuLaunchKernel",                                                            \
      (CUkernel kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,       \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream,                 \
       void **parameters, void **extra))                                                           \
    F(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled",                                            \
      (CUtensorMap * map, int dtype, unsigned rank, void *address, const uint64_t *sizes,          \
       const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,              \
       int interleave, int swizzle, int l2_promotion, int oob_fill))                               \
    F(cuStreamIsCapturing, "cuStreamIsCapturing", (CUstream stream, int *capturing))               \
    F(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int *mode))

typedef int nvrtcResult; /* 0: success */
typedef struct _nvrtcProgram *nvrtcProgram;

#define FA_NVRTC_FUNCTIONS(F)                                                                      \
    F(nvrtcVersion, "nvrtcVersion", (int *major, int *minor))                                      \
    F(nvrtcCreateProgram, "nvrtcCreateProgram",                                                    \
      (nvrtcProgram * program, const char *source, const char *name, int header_count,             \
       const char *const *headers, const char *const *header_names))                               \
    F(nvrtcDestroyProgram, "nvrtcDestroyProgram", (nvrtcProgram * program))                        \
    F(nvrtcCompileProgram, "nvrtcCompileProgram",                                                  \
      (nvrtcProgram program, int option_count, const char *const *options))                        \
    F(nvrtcGetCUBINSize, "nvrtcGetCUBINSize", (nvrtcProgram program, size_t *size))                \
    F(nvrtcGetCUBIN, "nvrtcGetCUBIN", (nvrtcProgram program, char *cubin))                         \
    F(nvrtcGetProgramLogSize, "nvrtcGetProgramLogSize", (nvrtcProgram program, size_t *size))      \
    F(nvrtcGetProgramLog, "nvrtcGetProgramLog", (nvrtcProgram program, char *log))

#endif
