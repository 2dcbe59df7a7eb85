/* Loaded ahead of everything (LD_PRELOAD), lets flash_attn_ext find no library whose name begins
 * with $HIDE; everybody else finds them all. For tests of what happens where one is missing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

void *dlopen(const char *name, int flags) {
    void *(*next)(const char *, int) = (void *(*)(const char *, int))dlsym(RTLD_NEXT, "dlopen");
    const char *hidden = getenv("HIDE");
    Dl_info caller;
    if (name && hidden && dladdr(__builtin_return_address(0), &caller) &&
        strstr(caller.dli_fname, "flash_attn_ext/_C")) {
        const char *slash = strrchr(name, '/');
        if (strncmp(slash ? slash + 1 : name, hidden, strlen(hidden)) == 0)
            return NULL;
    }
    return next(name, flags); /* a tail call: dlopen looks at who calls it */
}
