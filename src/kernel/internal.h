/* How the kernel's files see each other's functions.
 *
 * Users compile the kernel as one translation unit (src/binding/kernel.c), where LEC_INTERNAL makes these functions
 * static: what is called once is inlined into its caller, and nothing but kernel.h is visible outside. The C tests
 * compile file by file, and call some of them by name.
 */
#ifndef LEC_INTERNAL
#define LEC_INTERNAL
#endif

/* How a write is compiled. It runs through some sixty small functions, most with several callers, which a compiler leaves
 * apart for that; the calls were a sixth of a set's instructions. So a step is compiled with all that it calls inside,
 * and what few writes need stays aside. */
#define LEC_STEP __attribute__((noinline, flatten))
#define LEC_ASIDE __attribute__((noinline))
