/* How the kernel's files see each other's functions, and what the compiler makes of them.
 *
 * Users compile the kernel as one translation unit (src/binding/kernel.c), where LEC_INTERNAL makes these functions
 * static: what is called once is inlined into its caller, and nothing but kernel.h is visible outside. The C tests
 * compile file by file, and call some of them by name.
 */
#ifndef LEC_INTERNAL
#define LEC_INTERNAL
#endif

/* A set runs through some sixty small functions, most with several callers, which a compiler leaves apart for that; the calls
 * were a sixth of its instructions. So a step of a get or a set is compiled with all that it calls inside (by gcc; clang goes
 * one level deep), and what few of them need stays aside. */
#define LEC_STEP __attribute__((noinline, flatten))
#define LEC_ASIDE __attribute__((noinline))
