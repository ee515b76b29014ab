/* How the kernel's files see each other's functions.
 *
 * Users compile the kernel as one translation unit (src/binding/kernel.c), where LEC_INTERNAL makes these functions
 * static: what is called once is inlined into its caller, and nothing but kernel.h is visible outside. The C tests
 * compile file by file, and call some of them by name.
 */
#ifndef LEC_INTERNAL
#define LEC_INTERNAL
#endif
