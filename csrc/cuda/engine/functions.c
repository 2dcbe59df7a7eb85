/* Functions in memory: a hash table that only grows, read without a lock. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

struct entry {
    struct fa_cuda_variant variant;
    int device;
    CUkernel function;
    struct entry *next;
};

enum { BUCKETS = 1024 };
static _Atomic(struct entry *) buckets[BUCKETS];

static _Atomic(struct entry *) *bucket_of(const struct fa_cuda_variant *v, int device) {
    uint16_t words[sizeof *v / 2];
    uint32_t hash = (uint32_t)device;
    memcpy(words, v, sizeof *v);
    for (size_t i = 0; i < sizeof *v / 2; i++)
        hash = (hash ^ words[i]) * 0x9E3779B1u, hash ^= hash >> 15;
    return &buckets[hash % BUCKETS];
}

static struct entry *find(const struct fa_cuda_variant *v, int device) {
    struct entry *e = atomic_load_explicit(bucket_of(v, device), memory_order_acquire);
    while (e && (e->device != device || memcmp(&e->variant, v, sizeof *v) != 0))
        e = e->next;
    return e;
}

static enum fa_status load(const struct fa_cuda_step *step, int device, int compile,
                           CUkernel *function) {
    const struct fa_cuda_driver *cuda = fa_cuda_driver();
    const struct fa_cuda_variant *v = &step->variant;
    struct fa_cuda_code code;
    enum fa_status status = fa_cuda_code_of(v, compile, &code);
    if (status)
        return status;

    CUlibrary library;
    CUfunction loaded;
    CUresult error = cuda->cuLibraryLoadData(&library, code.data, NULL, NULL, 0, NULL, NULL, 0);
    free(code.data);
    if (error)
        return fa_cuda_driver_error(fa_cuda_entry(v), error);
    error = cuda->cuLibraryGetKernel(function, library, fa_cuda_entry(v));
    /* Loads it into the context, now rather than at the first launch. */
    if (!error)
        error = cuda->cuKernelGetFunction(&loaded, *function);
    if (!error)
        error = cuda->cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                           (int)step->shared_bytes, *function, device);
    if (!error && step->shared_bytes > 0) /* room for as many blocks as the registers allow */
        error = cuda->cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100,
                                           *function, device);
    if (error) {
        cuda->cuLibraryUnload(library);
        return fa_cuda_driver_error(fa_cuda_entry(v), error);
    }
    return FA_OK;
}

static enum fa_status add(const struct fa_cuda_step *step, int device, CUstream stream) {
    struct entry *e = malloc(sizeof *e);
    if (!e)
        return fa_cuda_fail(FA_OUT_OF_MEMORY, "out of memory");
    const struct fa_cuda_driver *cuda = fa_cuda_driver();
    int capturing = 0;
    cuda->cuStreamIsCapturing(stream, &capturing);

    /* To load code allocates memory, which would break a capture that this thread or another one
     * has begun; it does not where the thread says that it knows what it is doing. */
    int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cuda->cuThreadExchangeStreamCaptureMode(&mode);
    CUkernel function;
    enum fa_status status = load(step, device, !capturing, &function);
    cuda->cuThreadExchangeStreamCaptureMode(&mode);
    if (status) {
        free(e);
        return status;
    }

    _Atomic(struct entry *) *bucket = bucket_of(&step->variant, device);
    *e = (struct entry){step->variant, device, function, atomic_load(bucket)};
    atomic_store_explicit(bucket, e, memory_order_release);
    return FA_OK;
}

enum fa_status fa_cuda_function(const struct fa_cuda_step *step, int device, CUstream stream,
                                CUkernel *function) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* of those who add */
    const struct entry *e = find(&step->variant, device);
    if (!e) {
        pthread_mutex_lock(&mutex);
        enum fa_status status = FA_OK;
        if (!find(&step->variant, device)) /* another thread may have added it meanwhile */
            status = add(step, device, stream);
        pthread_mutex_unlock(&mutex);
        if (status)
            return status;
        e = find(&step->variant, device);
    }
    *function = e->function;
    return FA_OK;
}
