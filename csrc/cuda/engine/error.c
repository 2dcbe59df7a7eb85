/* Errors are texts of the thread that met them; warnings go to whoever asked for them. */
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

#include "engine.h"

static _Thread_local char last_error[8192]; /* holds the log of a failed compilation */

enum fa_status fa_cuda_fail(enum fa_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

const char *fa_cuda_last_error(void) {
    return last_error;
}

static _Atomic(void (*)(const char *)) warning_handler;

void fa_cuda_set_warning_handler(void (*handler)(const char *message)) {
    atomic_store(&warning_handler, handler);
}

void fa_cuda_warn(const char *format, ...) {
    void (*handler)(const char *) = atomic_load(&warning_handler);
    if (!handler)
        return;
    char message[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    handler(message);
}
