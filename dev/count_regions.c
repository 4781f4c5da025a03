/*
 * Counts the parallel regions that torch opens in GNU's OpenMP: each wakes its threads and waits for
 * all of them. dev/bench_machine.py compiles this, and loads it in front of torch by LD_PRELOAD.
 */
#define _GNU_SOURCE
#include <dlfcn.h>

typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

static long num_regions;

long count_regions(void) { return num_regions; }

/* What compilers call for `#pragma omp parallel`. One thread is no region: nobody is woken. */
void GOMP_parallel(void (*work)(void *), void *data, unsigned num_threads, unsigned flags)
{
    static parallel next;
    if (!next)
        next = (parallel)dlsym(dlopen("libgomp.so.1", RTLD_NOW), "GOMP_parallel");
    if (num_threads != 1)
        num_regions++;
    next(work, data, num_threads, flags);
}
