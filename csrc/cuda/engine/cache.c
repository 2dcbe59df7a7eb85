/* Machine code on disk: $FLASH_ATTN_EXT_CACHE, or else ~/.cache/flash_attn_ext.
 *
 * An entry's name is a hash of all that it depends on, so entries never go out of date and any
 * number of processes may share a directory: each writes to a file of its own and renames it. An
 * entry that is damaged fails its checksum and is made again. A directory that cannot be written
 * costs time at every start, and a warning, no more. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <pwd.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"

/* What a file begins with; cubin and log follow. */
struct header {
    char magic[8];
    uint64_t cubin_bytes, log_bytes;
    unsigned char checksum[32]; /* of what follows */
};
static const char magic[8] = "fa-cubin";

static const char *home(void) {
    const char *directory = getenv("HOME");
    if (directory && *directory)
        return directory;
    const struct passwd *user = getpwuid(getuid());
    return user ? user->pw_dir : "/";
}

const char *fa_cuda_cache_directory(char *path, size_t bytes) {
    const char *chosen = getenv("FLASH_ATTN_EXT_CACHE");
    if (chosen && *chosen)
        snprintf(path, bytes, "%s", chosen);
    else
        snprintf(path, bytes, "%s/.cache/flash_attn_ext", home());
    return path;
}

static void warn_once(const char *directory, const char *problem) {
    static atomic_flag warned = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&warned))
        fa_cuda_warn("flash_attn_ext cannot keep compiled CUDA kernels in %s: %s. Each process "
                     "compiles what it needs; set FLASH_ATTN_EXT_CACHE to another directory",
                     directory, problem);
}

/* As mkdir -p -m 700. */
static int make_directories(const char *path) {
    char prefix[PATH_MAX];
    snprintf(prefix, sizeof prefix, "%s", path);
    for (char *slash = prefix; (slash = strchr(slash + 1, '/'));) {
        *slash = 0;
        mkdir(prefix, 0700);
        *slash = '/';
    }
    return mkdir(prefix, 0700) == 0 || errno == EEXIST ? 0 : -1;
}

/* Opens the directory, or returns -1. Code is loaded from there: nobody but this user (or root) may
 * have put it there. */
static int open_directory(void) {
    char path[PATH_MAX];
    fa_cuda_cache_directory(path, sizeof path);
    int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0 && errno == ENOENT && make_directories(path) == 0)
        directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0) {
        warn_once(path, strerror(errno));
        return -1;
    }
    struct stat status;
    if (fstat(directory, &status) || (status.st_uid != geteuid() && status.st_uid != 0) ||
        (status.st_mode & (S_IWGRP | S_IWOTH))) {
        warn_once(path, "other users can write there");
        close(directory);
        return -1;
    }
    return directory;
}

static void checksum(const struct fa_cuda_code *code, unsigned char digest[32]) {
    struct fa_sha256 h;
    fa_sha256_init(&h);
    fa_sha256_add(&h, code->data, code->cubin_bytes + code->log_bytes);
    fa_sha256_finish(&h, digest);
}

static int read_all(int file, void *data, size_t bytes) {
    for (char *at = data; bytes;) {
        ssize_t got = read(file, at, bytes);
        if (got <= 0)
            return -1;
        at += got, bytes -= (size_t)got;
    }
    return 0;
}

static int write_all(int file, const void *data, size_t bytes) {
    for (const char *at = data; bytes;) {
        ssize_t put = write(file, at, bytes);
        if (put <= 0)
            return -1;
        at += put, bytes -= (size_t)put;
    }
    return 0;
}

/* Whether the directory has a sound entry of that name. */
static int read_entry(int directory, const char *name, struct fa_cuda_code *code) {
    int file = openat(directory, name, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    struct header header;
    struct stat status;
    unsigned char digest[32];
    int sound = 0;
    *code = (struct fa_cuda_code){0};
    if (fstat(file, &status) == 0 && read_all(file, &header, sizeof header) == 0 &&
        memcmp(header.magic, magic, sizeof magic) == 0) {
        uint64_t size = (uint64_t)status.st_size - sizeof header;
        if (header.cubin_bytes <= size && header.log_bytes == size - header.cubin_bytes &&
            (code->data = malloc(size + 1)) && read_all(file, code->data, size) == 0) {
            code->cubin_bytes = header.cubin_bytes;
            code->log_bytes = header.log_bytes;
            checksum(code, digest);
            sound = memcmp(digest, header.checksum, sizeof digest) == 0;
        }
    }
    close(file);
    if (!sound) {
        free(code->data);
        *code = (struct fa_cuda_code){0};
    }
    return sound;
}

static void write_entry(int directory, const char *name, const struct fa_cuda_code *code) {
    uint64_t random = 0;
    char temporary[32];
    (void)!getrandom(&random, sizeof random, 0);
    snprintf(temporary, sizeof temporary, ".%016" PRIx64, random);
    struct header header = {.cubin_bytes = code->cubin_bytes, .log_bytes = code->log_bytes};
    memcpy(header.magic, magic, sizeof magic);
    checksum(code, header.checksum);

    int file = openat(directory, temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    int failed = file < 0 || write_all(file, &header, sizeof header) ||
                 write_all(file, code->data, code->cubin_bytes + code->log_bytes);
    if (file >= 0)
        failed |= close(file) != 0;
    if (failed || renameat(directory, temporary, directory, name)) {
        char path[PATH_MAX];
        warn_once(fa_cuda_cache_directory(path, sizeof path), strerror(errno));
        unlinkat(directory, temporary, 0);
    }
}

/* The entry's name: a hash of the compiler's version, the options, and the kernel's source with all
 * headers. */
static void entry_name(const struct fa_cuda_variant *v, const char *options, char name[80]) {
    int major, minor;
    fa_cuda_compiler(&major, &minor);
    struct fa_sha256 h;
    fa_sha256_init(&h);
    fa_sha256_add(&h, &major, sizeof major);
    fa_sha256_add(&h, &minor, sizeof minor);
    size_t length = 0;
    while (options[length])
        length += strlen(options + length) + 1;
    fa_sha256_add(&h, options, length + 1);
    for (const struct fa_cuda_source *s = fa_cuda_sources; s->name; s++) {
        if (fa_cuda_is_header(s->name) || strcmp(s->name, fa_cuda_file(v)) == 0) {
            fa_sha256_add(&h, s->name, strlen(s->name) + 1);
            fa_sha256_add(&h, s->text, strlen(s->text) + 1);
        }
    }
    unsigned char digest[32];
    fa_sha256_finish(&h, digest);
    for (int i = 0; i < 32; i++)
        snprintf(name + 2 * i, 3, "%02x", digest[i]);
    strcpy(name + 64, ".cubin");
}

enum fa_status fa_cuda_code_of(const struct fa_cuda_variant *v, int compile,
                               struct fa_cuda_code *code) {
    int major, minor;
    if (!fa_cuda_compiler(&major, &minor))
        return FA_UNSUPPORTED;
    char options[FA_CUDA_OPTIONS_BYTES], name[80];
    fa_cuda_options(v, options);
    entry_name(v, options, name);

    int directory = open_directory();
    enum fa_status status = FA_OK;
    if (directory < 0 || !read_entry(directory, name, code)) {
        if (compile)
            status = fa_cuda_compile_variant(v, options, code);
        else
            status = fa_cuda_fail(
                FA_FAILED,
                "%s has to be compiled for this call, which cannot be done while a CUDA graph is "
                "captured. Make the call once before the capture, or fill the cache beforehand: "
                "python -m flash_attn_ext warmup",
                fa_cuda_entry(v));
        if (!status && directory >= 0)
            write_entry(directory, name, code);
    }
    if (directory >= 0)
        close(directory);
    return status;
}
