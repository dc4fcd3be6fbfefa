/* A wall clock that jumps when a test says so, for LD_PRELOAD.
 *
 * The file that JUMPING_CLOCK names holds one signed 64-bit number: seconds that the wall clock is ahead. All
 * processes map it, so all see a jump at the same moment. As with a real jump, the monotonic clock knows nothing of
 * it, and whoever waits for a moment of the wall clock wakes up early, or sleeps on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
/* How soon a waiting thread notices a jump. */
#define SLICE (SECOND / 20)
/* No machine runs that long, so a smaller deadline is one of the monotonic clock. */
#define WALL_S 1000000000L
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const volatile int64_t *ahead;

__attribute__((constructor)) static void attach(void)
{
    const char *path = getenv("JUMPING_CLOCK");
    int file = path != NULL ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *page = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED)
        ahead = page;
}

static int64_t jumped(void)
{
    return ahead != NULL ? *ahead : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static __typeof__(&clock_gettime) real;
    if (real == NULL)
        real = REAL(clock_gettime);
    int result = real(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += jumped();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    (void)zone;
    struct timespec found;
    int result = clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return result;
}

time_t time(time_t *where)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where != NULL)
        *where = now.tv_sec;
    return now.tv_sec;
}

/* The end of the next slice of a wait, on the clock that the kernel knows; 0 if the deadline has come. */
static int next_slice(const struct timespec *deadline, struct timespec *end)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    int64_t left = (deadline->tv_sec - now.tv_sec) * SECOND + deadline->tv_nsec - now.tv_nsec;
    if (left <= 0)
        return 0;
    int64_t until = now.tv_nsec + (left < SLICE ? left : SLICE);
    end->tv_sec = now.tv_sec - jumped() + until / SECOND;
    end->tv_nsec = until % SECOND;
    return 1;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict deadline)
{
    static __typeof__(&pthread_cond_timedwait) real;
    if (real == NULL)
        real = REAL(pthread_cond_timedwait);
    if (deadline->tv_sec < WALL_S)
        return real(condition, mutex, deadline);
    struct timespec end;
    while (next_slice(deadline, &end)) {
        int result = real(condition, mutex, &end);
        if (result != ETIMEDOUT)
            return result;
    }
    /* Also a deadline that has passed lets others have the mutex for a moment. */
    return real(condition, mutex, &(struct timespec){0});
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline)
{
    static __typeof__(&sem_timedwait) real;
    if (real == NULL)
        real = REAL(sem_timedwait);
    struct timespec end;
    while (next_slice(deadline, &end)) {
        if (real(semaphore, &end) == 0)
            return 0;
        if (errno != ETIMEDOUT)
            return -1;
    }
    return real(semaphore, &(struct timespec){0});
}
