/* libtsan does not know pthread_mutex_clocklock() and would take what it guards for unguarded. It knows
 * pthread_mutex_timedlock(): the Makefile sends the kernel's calls here in the tsan variant. */
#include <pthread.h>
#include <time.h>

int tsan_pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until);
int tsan_pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until)
{
    struct timespec now, deadline;
    clock_gettime(clock, &now);
    clock_gettime(CLOCK_REALTIME, &deadline);
    long long nanoseconds = (until->tv_sec - now.tv_sec) * 1000000000LL + until->tv_nsec - now.tv_nsec + deadline.tv_nsec;
    if (nanoseconds < 0) nanoseconds = 0;
    deadline.tv_sec += nanoseconds / 1000000000;
    deadline.tv_nsec = nanoseconds % 1000000000;
    return pthread_mutex_timedlock(mutex, &deadline);
}
