/* Lists the stores to shared memory that have no kill point.
 *
 * The segment is write-protected. Each store faults; the handler compares its address with what the instrumentation
 * announced just before, lets the one instruction through (single step) and protects again. A store that nobody
 * announced is listed by the libc call or the function it happened in, and must be one of `allowed`.
 */
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "crashing.h"

/* Stores that no kill point precedes one by one, and why that is right. */
static const struct { const char *where, *reason; } allowed[] = {
    {"pthread_mutex_lock", "libc's own steps; the kernel's robust list covers a death between them"},
    {"pthread_mutex_trylock", "as pthread_mutex_lock"},
    {"pthread_mutex_timedlock", "as pthread_mutex_lock"},
    {"pthread_mutex_clocklock", "as pthread_mutex_lock"},
    {"pthread_mutex_unlock", "as pthread_mutex_lock"},
    {"pthread_mutex_consistent", "one store of libc's"},
    {"pthread_mutex_init", "before the magic is stored, nobody attaches"},
};

#define MAX_FOUND 64
#define TRAP_FLAG 0x100
static struct { const void *instruction; const char *libc_call; uint64_t times; } found[MAX_FOUND];
static unsigned found_count;
static uint64_t stores_seen;
static uint8_t *watched;
static uint64_t watched_bytes;

static void note(const void *instruction)
{
    const char *libc_call = points_libc_call();
    for (unsigned index = 0; index < found_count; index++)
        if (found[index].instruction == instruction && found[index].libc_call == libc_call) {
            found[index].times++;
            return;
        }
    if (found_count < MAX_FOUND) {
        found[found_count].instruction = instruction;
        found[found_count].libc_call = libc_call;
        found[found_count++].times = 1;
    }
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    ucontext_t *machine = context;
    uint8_t *address = info->si_addr;
    if (address < watched || address >= watched + watched_bytes) {
        signal(number, SIG_DFL);            /* a real crash: fault again */
        return;
    }
    stores_seen++;
    if (!points_announced(address)) note((const void *)machine->uc_mcontext.gregs[REG_RIP]);
    mprotect(watched, watched_bytes, PROT_READ | PROT_WRITE);
    machine->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
}

static void on_step(int number, siginfo_t *info, void *context)
{
    ucontext_t *machine = context;
    (void)number, (void)info;
    mprotect(watched, watched_bytes, PROT_READ);
    machine->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
}

static void trap_stores(struct world *world)
{
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    struct sigaction step = {.sa_sigaction = on_step, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &fault, NULL);
    sigaction(SIGTRAP, &step, NULL);
    watched = world->base;
    watched_bytes = world->bytes;
    mprotect(watched, watched_bytes, PROT_READ);
}

static void untrap_stores(void) { mprotect(watched, watched_bytes, PROT_READ | PROT_WRITE); }

static bool is_allowed(const char *where)
{
    for (unsigned index = 0; index < sizeof allowed / sizeof *allowed; index++)
        if (where && !strcmp(where, allowed[index].where)) return true;
    return false;
}

static unsigned report_found(void)
{
    unsigned forbidden = 0;
    for (unsigned index = 0; index < found_count; index++) {
        Dl_info where = {0};
        const char *name = found[index].libc_call;
        if (!name && dladdr(found[index].instruction, &where)) name = where.dli_sname;
        bool is_fine = is_allowed(found[index].libc_call);
        forbidden += !is_fine;
        printf("  %s: %6llu stores in %s at %p%s\n", is_fine ? "allowed" : "NO KILL POINT", (unsigned long long)found[index].times,
               name ? name : "?", found[index].instruction, "");
    }
    return forbidden;
}

/* After an abandoned lock: recovery's stores, too. */
static void run_recovery(struct play *play)
{
    world_restore(&play->world);
    if (!child_dies(play, work_scenario, 60, false)) return;
    trap_stores(&play->world);
    work_recover(play);
    untrap_stores();
}

static void create_under_watch(const struct lec_config *config, uint64_t spare)
{
    static const uint64_t random[3] = {1, 2, 3};
    struct world world;
    world_create(&world, config, spare);
    memset(world.base, 0, world.bytes);
    points_watch(world.base, world.bytes);
    trap_stores(&world);
    enum lec_status status = lec_create(world.base, world.bytes, &world.config, test_boot_id, world.now, 1, random);
    untrap_stores();
    REQUIRE(status == LEC_OK, "lec_create: %d", (int)status);
    world_destroy(&world);
}

/* A store that the instrumentation cannot have announced must be found: else this test proves nothing. */
static void the_trap_works(void)
{
    struct world world;
    world_create(&world, &scenarios[0].config, scenarios[0].spare_bytes);
    points_watch(world.base, world.bytes);
    trap_stores(&world);
    *(volatile uint8_t *)(world.base + world.bytes - 1) = 1;
    untrap_stores();
    REQUIRE(found_count == 1 && !found[0].libc_call, "an unannounced store was not noticed");
    found_count = 0;
    world_destroy(&world);
}

int main(void)
{
    uint64_t widest = 0;
    the_trap_works();
    create_under_watch(&scenarios[0].config, scenarios[0].spare_bytes);
    for (unsigned index = 0; index < scenario_count; index++) {
        struct play play;
        play_open(&play, &scenarios[index]);
        points_reset();
        struct lec_handle handle = play.world.handle;   /* the call may detach it */
        trap_stores(&play.world);
        work_scenario(&play);
        untrap_stores();
        if (points_widest() > widest) widest = points_widest();
        play.world.handle = handle;
        run_recovery(&play);
        play_close(&play);
    }
    unsigned forbidden = report_found();
    REQUIRE(forbidden == 0, "%u places store to shared memory without a kill point", forbidden);
    REQUIRE(widest <= 16, "one announcement stands for %llu bytes: no kill point within", (unsigned long long)widest);
    printf("test_announced: %llu stores followed, widest %llu bytes\n", (unsigned long long)stores_seen, (unsigned long long)widest);
    return 0;
}
